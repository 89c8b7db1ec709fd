"""An fp32 matrix as two low-precision ones side by side, for the tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetk.kernels.gpu.launch import divided, launch

_BLOCK = 1024


@triton.jit
def _two_summands_kernel(x_MN, both_M2N, numel, N: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_MN + at, mask=at < numel)
    high = x.to(both_M2N.dtype.element_ty)
    low = (x - high.to(tl.float32)).to(both_M2N.dtype.element_ty)
    row, column = at // N, at % N
    tl.store(both_M2N + row * 2 * N + column, high, mask=at < numel)
    tl.store(both_M2N + row * 2 * N + N + column, low, mask=at < numel)


def two_summands(x_MN: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, 2N) in `dtype`: x rounded, then what the rounding left. x_MN: float32.

    In torch: `high = x.to(dtype); torch.cat([high, (x - high).to(dtype)], 1)`. Where x is infinite,
    what is left is NaN, and so is the sum.
    """
    rows, columns = x_MN.shape
    both_M2N = x_MN.new_empty((rows, 2 * columns), dtype=dtype)
    if x_MN.numel():
        launch(
            _two_summands_kernel,
            (divided(x_MN.numel(), _BLOCK),),
            (
                x_MN.contiguous(),
                both_M2N,
                x_MN.numel(),
            ),
            (
                columns,
                _BLOCK,
            ),
        )
    return both_M2N
