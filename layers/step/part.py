"""One part of the step, told by four small functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

ACTIVE = "_moetk_step"
"""Set on a module while its shell works; without it the shell lets the stock forward through."""


@dataclass(frozen=True)
class Part:
    """shell: the class put in front of a module's own. concerns: is this module of the part's kind?
    refusal: why its class is left as it is, or None. runs: what runs in a module that has the
    shell, as things stand now, and why.
    """

    name: str
    shell: type
    concerns: Callable[[nn.Module], bool]
    refusal: Callable[[nn.Module], str | None]
    runs: Callable[[nn.Module], str]


def is_watched(module: nn.Module) -> bool:
    """Someone's hook or forward on the instance expects this module to be called."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(module)
