"""A decoder layer's forward with each norm and the residual stream beside it as one call.

What transformers writes, in one family as in the other, is

    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    ...
    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)

The forward is read from its source, and where it says that, it says now

    residual, hidden_states = self._moetk_forked(hidden_states, self.input_layernorm)
    ...
    residual, hidden_states = self._moetk_added(residual, hidden_states, self....)

Every other line stays, so that there is no second copy of a layer that could differ from the first.
A sum that is anything else (scaled, dropped out, of parallel branches) is not one of these lines.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ADDED = re.compile(
    r"^( *)(?P<branch>\w+) = (?P<stream>\w+) \+ (?P=branch)\n"
    r"\1(?P=stream) = (?P=branch)\n"
    r"\1(?P=branch) = self\.(?P<norm>\w+)\((?P=branch)\)$",
    re.MULTILINE,
)
FORKED = re.compile(
    r"^( *)(?P<stream>\w+) = (?P<branch>\w+)\n"
    r"\1(?P=branch) = self\.(?P<norm>\w+)\((?P=branch)\)$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Joined:
    """read: the class's forward this was made of. forward: what runs instead. added, forked: names
    of the norms that are joined with a sum and a stream, or with a stream alone. why_not: why
    there are none, and forward is as it was read; None where there are."""

    read: Callable[..., Any]
    forward: Callable[..., Any]
    added: tuple[str, ...] = ()
    forked: tuple[str, ...] = ()
    why_not: str | None = None


@functools.cache
def joined(read: Callable[..., Any]) -> Joined:
    """A decoder layer class's forward, read and rewritten."""
    function = _below_checkpointing(read)
    try:
        text = _text(function)
    except _NotPlain as reason:
        return Joined(read, read, why_not=str(reason))
    added = tuple(found["norm"] for found in ADDED.finditer(text))
    text = ADDED.sub(
        r"\1\g<stream>, \g<branch> = self._moetk_added(\g<stream>, \g<branch>, self.\g<norm>)", text
    )
    forked = tuple(found["norm"] for found in FORKED.finditer(text))
    text = FORKED.sub(
        r"\1\g<stream>, \g<branch> = self._moetk_forked(\g<branch>, self.\g<norm>)", text
    )
    if not added and not forked:
        return Joined(read, read, why_not="its forward norms nothing beside a residual stream")
    return Joined(read, _function(text, function), added, forked)


def _below_checkpointing(forward: Any) -> Any:
    """Without transformers' wrapper, which each class gets anew, the shell's too."""
    while inspect.isfunction(forward) and forward.__code__.co_name == "forward_with_checkpointing":
        forward = forward.__wrapped__  # type: ignore[attr-defined]
    return forward


class _NotPlain(Exception):
    """The source is not all there is to the function."""


def _text(function: Any) -> str:
    """Its source, one statement a line, without comments."""
    if not inspect.isfunction(function) or hasattr(function, "__wrapped__"):
        raise _NotPlain("its forward is wrapped")
    try:
        source = textwrap.dedent(inspect.getsource(function))
        written = ast.parse(source).body[0]
    except (OSError, SyntaxError):
        raise _NotPlain("the source of its forward is not there") from None
    if not isinstance(written, ast.FunctionDef) or written.decorator_list or function.__closure__:
        raise _NotPlain("its forward is decorated, or reads variables around it")
    if any(map(_writes, ast.walk(written))):
        raise _NotPlain("its forward may write into the residual stream")
    if _names(_function(source, function)) != _names(function):
        raise _NotPlain("its forward is not what its source says")
    return ast.unparse(written)


def _names(function: Any) -> tuple[Any, ...]:
    """They tell functions apart, and not where those stand: the source of a library that was
    upgraded under a running process is another function's. (Code depends on the file around it.)"""
    return function.__code__.co_varnames, function.__code__.co_names


def _writes(node: ast.AST) -> bool:
    """`x += y`, or a name like torch's `x.add_`."""
    if isinstance(node, ast.Attribute):
        return node.attr.endswith("_") and not node.attr.endswith("__")
    return isinstance(node, ast.AugAssign)


def _function(text: str, original: Any) -> Any:
    """The text as a function that reads the names the original reads; tracebacks show it."""
    name = f"<moetk.speed_up: {original.__module__}.{original.__qualname__}>"
    linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name
    made: dict[str, Any] = {}
    exec(compile(text, name, "exec"), original.__globals__, made)
    [function] = made.values()
    return function
