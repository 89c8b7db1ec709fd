"""Launch a Triton kernel with little work on the host.

Triton looks at every argument of every launch to find the code that was compiled for it, asks the
driver about every pointer, and describes every tensor to the copy engine anew, which takes tens of
microseconds; a layer at 256 tokens runs a dozen kernels in one millisecond. What decides is little,
and is looked at here: dtypes, whether pointers are aligned, the constants.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


class Tiled(NamedTuple):
    """A dense tensor, read as one of `shape` and moved by the copy engine in tiles of `block`.

    The tensor starts at a multiple of 16 bytes, and so does each row (`dense` sees to the former,
    the bank's sizes to the latter).
    """

    base: Tensor
    shape: tuple[int, ...]
    block: tuple[int, ...]

    def descriptor(self) -> TensorDescriptor:
        strides = [1]
        for size in self.shape[:0:-1]:
            strides.insert(0, strides[0] * size)
        return TensorDescriptor(self.base, list(self.shape), strides, list(self.block))


INTERPRETED = bool(knobs.runtime.interpret)
_compiled: dict[tuple[Any, ...], _Compiled] = {}
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

    args: tensors, `Tiled` ones, numbers and None, in the kernel's order; constants: what its
    signature has behind them.
    """
    hooks = getattr(knobs.runtime.launch_enter_hook, "calls", None)
    if hooks or not isinstance(kernel, JITFunction):  # a profiler, or the interpreter
        _by_triton(kernel, grid, args, constants, warps, stages)
        return
    device = torch._C._cuda_getDevice()
    if getattr(_thread, "device", None) != device:
        # Backward runs in a thread of its own, which has no CUDA context until something was
        # launched there; a descriptor cannot be made without one.
        torch.zeros(1, device=device)
        _thread.device = device
    key: list[Any] = [id(kernel), device, warps, stages, constants]
    flat: list[Any] = []
    addresses, elsewhere = 0, False
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            address = arg.data_ptr()
            addresses |= address
            if arg.get_device() != device:
                elsewhere = True
            key.append(arg.dtype)
            flat.append(address)
        elif kind is Tiled:
            base = arg.base
            addresses |= base.data_ptr()
            if base.get_device() != device:
                elsewhere = True
            key.append(base.dtype)
            flat.append(arg)
        else:
            # What Triton compiles anew for: of a float and of None, that it is one.
            key.append((arg == 1, arg % 16 == 0, arg >= 2**31) if kind is int else kind)
            flat.append(arg)
    if elsewhere or addresses % 16:  # refused by Triton, or rare and other code: it finds it
        _by_triton(kernel, grid, args, constants, warps, stages)
        return
    compiled = _compiled.get(tuple(key))
    if compiled is None:
        made = _by_triton(kernel, grid, args, constants, warps, stages)
        _compiled[tuple(key)] = _Compiled(made)
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    compiled.run((*grid, 1, 1)[:3], stream, flat, args, constants)


def _by_triton(
    kernel: Any,
    grid: tuple[int, ...],
    args: Sequence[Any],
    constants: tuple[Any, ...],
    warps: int,
    stages: int,
) -> Any:
    return kernel[grid](*_described(args), *constants, num_warps=warps, num_stages=stages)


def _described(args: Sequence[Any]) -> list[Any]:
    return [arg.descriptor() if type(arg) is Tiled else arg for arg in args]


class _Compiled:
    """A compiled kernel, launched below Triton's own looks at its arguments where this knows the
    Triton at hand."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.head: tuple[Any, ...] = (compiled.function,)
        self.tail = (compiled.packed_metadata, None, None, None)
        below = _below(compiled.run)
        self.call: Callable[..., None] | None = None
        if below is not None:
            launcher = compiled.run
            self.call, self.tiled = below
            flags = (launcher.launch_cooperative_grid, launcher.launch_pdl)
            self.head = (compiled.function, *flags, None, None)

    def run(
        self,
        grid: tuple[int, ...],
        stream: int,
        flat: list[Any],
        args: Sequence[Any],
        constants: tuple[Any, ...],
    ) -> None:
        """flat: the args with addresses in place of tensors."""
        if self.call is None:
            described = _described(args)
            self.compiled.run(*grid, stream, *self.head, *self.tail, *described, *constants)
            return
        for place, expanded in self.tiled:  # from the last on: the places before stay
            flat[place : place + 1] = expanded(flat[place])
        self.call(*grid, stream, *self.head, *self.tail, *flat, *constants)


_KNOWN = "3.6."  # 3.7 and later hand over annotations, a signature and a tuple
_MOST_REMEMBERED = 4096


class _Expanded:
    """A `Tiled` argument as the compiled kernel takes it: what it tells the copy engine, sizes,
    strides. Remembered by address and shape, of which it is a function."""

    def __init__(self, expand: Callable[[Any, Any], list[Any]], metadata: Any) -> None:
        self.expand, self.metadata = expand, metadata
        self.known: dict[tuple[Any, ...], list[Any]] = {}

    def __call__(self, tiled: Tiled) -> list[Any]:
        key = (tiled.base.data_ptr(), tiled.shape)
        found = self.known.get(key)
        if found is None:
            if len(self.known) >= _MOST_REMEMBERED:
                self.known.clear()
            found = self.known[key] = self.expand(tiled.descriptor(), self.metadata)
        return found


def _below(launcher: Any) -> tuple[Callable[..., None], list[tuple[int, _Expanded]]] | None:
    """The function that Triton 3.6's CudaLauncher calls in the end, which takes addresses as
    numbers, and the places of descriptors among its arguments, the last first. None for another
    Triton, whose function takes other arguments, for a launcher that is built otherwise, or that
    needs memory of its own for a launch."""
    if not triton.__version__.startswith(_KNOWN):
        return None
    try:
        from triton.backends.nvidia.driver import CudaLauncher, make_tensordesc_arg

        if not isinstance(launcher, CudaLauncher):
            return None
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            return None
        call = launcher.launch
        if not hasattr(call, "__code__"):  # a C function: nothing is expanded before it
            return call, []
        cells = [cell.cell_contents for cell in call.__closure__]
        around = dict(zip(call.__code__.co_freevars, cells, strict=True))
        places = sorted(around["tensordesc_indices"])
        expanded = [
            (place, _Expanded(make_tensordesc_arg, metadata))
            for place, metadata in zip(places, around["tensordesc_meta"], strict=True)
        ]
        return around["launcher"], expanded[::-1]
    except (AttributeError, ImportError, KeyError, TypeError, ValueError):
        return None


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is strided or starts between multiples of 16 bytes."""
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def divided(count: int, block: int) -> int:
    """How many blocks hold `count`. (Triton's own `cdiv` takes microseconds outside a kernel.)"""
    return -(-count // block)


def power_of_two(count: int) -> int:
    """The next power of two, `count` itself where it is one."""
    return 1 << max(count - 1, 0).bit_length()
