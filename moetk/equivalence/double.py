"""fp64 throughout: the exact twin of code that asks for fp32 on the way."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """Whoever asks for fp32 gets fp64: norms, rotations, softmaxes and routers of a float64 model,
    which all compute in fp32 by declaration; and whoever asks for `own`, the dtype that the model
    has outside: `.to(torch.bfloat16)` says in a bfloat16 model what `.to(x.dtype)` says. Another
    narrow dtype that code asks for stays: it is not the family's declaration but somebody's choice,
    and shows."""

    def __init__(self, own: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.own = own

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        widened = (torch.float32, self.own)
        if _CASTS.get(func) in widened:
            return args[0].double()
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in widened:
            kwargs["dtype"] = torch.float64
        args = tuple(torch.float64 if _is_one_of(arg, widened) else arg for arg in args)
        return func(*args, **kwargs)


_CASTS = {
    Tensor.float: torch.float32,
    Tensor.bfloat16: torch.bfloat16,
    Tensor.half: torch.float16,
}


def _is_one_of(arg: Any, dtypes: Sequence[torch.dtype]) -> bool:
    return isinstance(arg, torch.dtype) and arg in dtypes


def still_in_double() -> AbstractContextManager[Any]:
    """InDouble where it is in force, else nothing: for code that runs later, where autograd has
    left the modes behind, as a recompute in backward."""
    for own, cast in ((torch.bfloat16, Tensor.bfloat16), (torch.float16, Tensor.half)):
        if cast(torch.empty(0)).dtype == torch.float64:
            return InDouble(own)
    in_force = torch.empty(0).float().dtype == torch.float64
    return InDouble() if in_force else nullcontext()
