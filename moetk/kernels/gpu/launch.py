"""Launch a Triton kernel with little work on the host.

Triton looks at every argument of every launch to find the code that was compiled for it, which
takes tens of microseconds; a layer at 256 tokens runs a dozen kernels in one millisecond. What
decides is little, and is looked at here: dtypes, whether pointers are aligned, the constants.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_compiled: dict[tuple[Any, ...], Any] = {}
_thread = threading.local()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: tuple[Any, ...] = (),
    *,
    warps: int = 4,
    stages: int = 3,
) -> None:
    """kernel[grid](*args, *constants, num_warps=warps, num_stages=stages) on the current stream.

    args: tensors, descriptors, numbers and None, in the kernel's order; constants: what its
    signature has behind them.
    """
    hooks = getattr(knobs.runtime.launch_enter_hook, "calls", None)
    if hooks or not isinstance(kernel, JITFunction):  # a profiler, or the interpreter
        kernel[grid](*args, *constants, num_warps=warps, num_stages=stages)
        return
    device = torch._C._cuda_getDevice()
    if getattr(_thread, "device", None) != device:
        # Backward runs in a thread of its own, which has no CUDA context until something was
        # launched there; a descriptor cannot be made without one.
        torch.zeros(1, device=device)
        _thread.device = device
    key = (id(kernel), device, warps, stages, constants, *_kinds(args))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*args, *constants, num_warps=warps, num_stages=stages)
        return
    x, y, z = (*grid, 1, 1)[:3]
    compiled.run(
        x,
        y,
        z,
        torch._C._cuda_getCurrentRawStream(device),
        compiled.function,
        compiled.packed_metadata,
        None,
        None,
        None,
        *args,
        *constants,
    )


def described(tensor: Tensor, shape: list[int], block: list[int]) -> TensorDescriptor:
    """A dense tensor, read as one of `shape` and copied in tiles of `block`.

    The tensor starts at a multiple of 16 bytes, and so does each row (`dense` sees to the former,
    the bank's sizes to the latter). Made without the checks of TensorDescriptor, which cost more
    than the launch.
    """
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = tensor, shape, strides
    made.block_shape, made.padding = block, "zero"
    return made


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is strided or starts between multiples of 16 bytes."""
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _kinds(args: tuple[Any, ...]) -> list[Any]:
    """What Triton specialises code on, for each argument. A descriptor's tile and the value of a
    float are no part of it: the former is a constant of its kernel as well."""
    return [
        (arg.dtype, arg.data_ptr() % 16 == 0)
        if (kind := type(arg)) is Tensor or kind is torch.nn.Parameter
        else arg.base.dtype
        if kind is TensorDescriptor
        else (arg == 1, arg % 16 == 0, arg >= 2**31)
        if kind is int
        else kind
        for arg in args
    ]


def divided(count: int, block: int) -> int:
    """How many blocks hold `count`. (Triton's own `cdiv` takes microseconds outside a kernel.)"""
    return -(-count // block)


def power_of_two(count: int) -> int:
    """The next power of two, `count` itself where it is one."""
    return 1 << max(count - 1, 0).bit_length()
