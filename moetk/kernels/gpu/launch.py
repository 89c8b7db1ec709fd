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
_constants: dict[Any, tuple[bool, ...]] = {}
_thread = threading.local()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 3) -> None:
    """kernel[grid](*args, num_warps=warps, num_stages=stages) on the current stream.

    All of the kernel's arguments by position, constants included.
    """
    hooks = getattr(knobs.runtime.launch_enter_hook, "calls", None)
    if hooks or not isinstance(kernel, JITFunction):  # a profiler, or the interpreter
        kernel[grid](*args, num_warps=warps, num_stages=stages)
        return
    constants = _constants.get(kernel)
    if constants is None:
        constants = _constants[kernel] = tuple(p.is_constexpr for p in kernel.params)
    device = torch.cuda.current_device()
    if getattr(_thread, "device", None) != device:
        # Backward runs in a thread of its own, which has no CUDA context until something was
        # launched there; a descriptor cannot be made without one.
        torch.zeros(1, device=device)
        _thread.device = device
    key = (kernel, device, warps, stages, *map(_kind, args, constants))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*args, num_warps=warps, num_stages=stages)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)
    compiled.run(
        x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *args
    )


def _kind(arg: Any, constant: bool) -> Any:
    """What Triton specialises code on, for one argument."""
    if constant or arg is None:
        return arg
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, tuple(arg.block_shape)
    if isinstance(arg, float):
        return float
    return arg == 1, arg % 16 == 0, arg >= 2**31
