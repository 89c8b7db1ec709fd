"""Run somebody's module, and leave it as it was."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

M = TypeVar("M", bound=nn.Module)
# Their subclasses may refuse to be cleared.
_CONTAINERS = (list, deque, set, dict, OrderedDict, defaultdict, Counter)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """In evaluation mode within; afterwards modes, attributes, buffers, lists, dicts and sets are
    what they were, also where the code inside raised, wrote a counter, appended to a list, or put a
    new tensor in an attribute's place. What other objects hold is theirs."""
    modules = list(module.modules())
    before = [(vars(one), dict(vars(one))) for one in modules]
    filled = [(one, one.copy()) for attributes, _ in before for one in _containers(attributes)]
    kept = [(t, t._version, t.detach().clone()) for one in modules for t in plain_tensors(one)]
    module.eval()
    try:
        yield
    finally:
        for attributes, old in before:
            _refill(attributes, old)
        for container, content in filled:
            _refill(container, content)
        for tensor, version, value in kept:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)


def _containers(attributes: dict[str, Any]) -> list[Any]:
    """The lists, dicts and sets in it, and those in these."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [attributes]
    while waiting:
        outer = waiting.pop()
        for one in outer.values() if isinstance(outer, dict) else outer:
            if type(one) in _CONTAINERS and id(one) not in found:
                found[id(one)] = one
                waiting.append(one)
    return list(found.values())


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list | deque):
        container.extend(content)
    else:
        container.update(content)


def plain_tensors(module: nn.Module) -> list[Tensor]:
    """Its own buffers and tensor attributes: what it holds that is no parameter."""
    held = [*module._buffers.values(), *vars(module).values()]
    return [t for t in held if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)]


def copied(module: M) -> M:
    """A deep copy. A tensor with a graph, as of the last step's loss, is copied without it:
    copy.deepcopy refuses it."""
    with _WithoutGraphs():
        return copy.deepcopy(module)


class _WithoutGraphs(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), tensor.detach().clone())
