"""Run somebody's module, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """In evaluation mode within; afterwards modes, attributes and buffers are what they were, also
    where the code inside raised, wrote a counter, or put a new tensor in an attribute's place."""
    modules = list(module.modules())
    before = [(vars(one), dict(vars(one)), dict(one._buffers)) for one in modules]
    kept = [(t, t._version, t.detach().clone()) for one in modules for t in plain_tensors(one)]
    module.eval()
    try:
        yield
    finally:
        for attributes, old, buffers in before:
            for name in attributes.keys() - old.keys():
                del attributes[name]
            attributes.update(old)
            attributes["_buffers"].clear()
            attributes["_buffers"].update(buffers)
        for tensor, version, value in kept:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)


def plain_tensors(module: nn.Module) -> list[Tensor]:
    """Its own buffers and tensor attributes: what it holds that is no parameter."""
    held = [*module._buffers.values(), *vars(module).values()]
    return [t for t in held if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)]
