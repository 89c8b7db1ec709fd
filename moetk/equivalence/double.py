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
    which all compute in fp32 by declaration. A narrower dtype that code asks for stays: it is not
    the family's declaration but somebody's choice, and shows."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        return func(*args, **kwargs)


def still_in_double() -> AbstractContextManager[Any]:
    """InDouble where it is in force, else nothing: for code that runs later, where autograd has
    left the modes behind, as a recompute in backward."""
    in_force = torch.empty(0).float().dtype == torch.float64
    return InDouble() if in_force else nullcontext()
