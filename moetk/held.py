"""What a module holds, asked for in every call."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def held(module: nn.Module, name: str) -> Tensor | None:
    """The module's tensor of that name, None where it has none: a parameter, a buffer, a plain
    attribute (FSDP1 and others put one there), or computed (a parametrisation).

    In place of `getattr(module, name, None)`, where nn.Module writes the text of an error for what
    is not there, which costs the host as much as a kernel's launch. A `__getattr__` of the module's
    own is not asked.
    """
    if torch.compiler.is_compiling():  # it has to notice when a tensor comes to be there
        return getattr(module, name, None)
    for tensors in (module._parameters, module._buffers):
        if name in tensors:
            return tensors[name]
    if name in vars(module) or hasattr(type(module), name):
        return getattr(module, name)  # type: ignore[no-any-return]
    return None
