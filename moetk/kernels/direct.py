"""Calling an operator's kernel without going through torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def direct(tensor: Tensor) -> bool:
    """True in plain eager CUDA, where nobody watches operators go by.

    The dispatcher and a custom operator's checks cost some 100 us a call on the host, forward and
    backward together, as long as the kernels of a layer take at a few hundred tokens. The operator
    is what torch.compile, fake tensors and dispatch modes (selective checkpointing) see.
    """
    return (
        tensor.is_cuda
        and not torch.compiler.is_compiling()
        and type(tensor) in PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def node(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The function's `apply`, for where `direct` holds: without what torch does in Python before
    it, for the sake of functorch's transforms. (A tensor that escaped from one, when that has
    ended, is not unwrapped: it has no storage, and a kernel raises.)"""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc,no-any-return]


PLAIN = (Tensor, torch.nn.Parameter)
_STAY = nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels launched inside run where the tensor lies. Nothing is done, and nothing costs time,
    where that is the current device already."""
    if tensor.is_cuda and tensor.get_device() != torch._C._cuda_getDevice():
        return torch.cuda.device_of(tensor)
    return _STAY
