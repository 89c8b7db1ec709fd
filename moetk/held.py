"""What a module holds, asked for in every call."""

from __future__ import annotations

from torch import Tensor, nn


def held(module: nn.Module, name: str) -> Tensor | None:
    """The module's tensor of that name, None where it has none.

    `getattr(module, name, None)`, without the text of an error that nn.Module writes for what is
    not there, which costs the host as much as a kernel's launch. A tensor may also be a plain
    attribute (while FSDP2 or PEFT stand in), or computed (a parametrisation).
    """
    for tensors in (module._parameters, module._buffers):
        if name in tensors:
            return tensors[name]
    if name in vars(module) or hasattr(type(module), name):
        return getattr(module, name)  # type: ignore[no-any-return]
    return None
