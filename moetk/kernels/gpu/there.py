"""Launch a kernel where its tensors lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetk.kernels.direct import on_device_of
from moetk.kernels.gpu.launch import launch


def launch_there(
    sample: Tensor,
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: tuple[Any, ...],
    *,
    warps: int,
) -> None:
    """`launch` on the device of `sample`, whichever is current.

    torch.compile traces the plain launch, and chooses the device itself.
    """
    if torch.compiler.is_compiling():
        kernel[grid](*args, *constants, num_warps=warps)
        return
    with on_device_of(sample):
        launch(kernel, grid, args, constants, warps=warps)
