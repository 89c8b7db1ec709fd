"""AdamW's step in place: one kernel a parameter, at the speed of memory.

Twin: `moetk.kernels.adamw.adamw_plain_`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetk.kernels.adamw import Numbers, Row
from moetk.kernels.gpu.launch import divided, launch

BLOCK = 2048
"""Elements of a program: at 8 warps 8 a thread, which is one load of 16 bytes in bf16."""
WARPS = 8


@triton.jit(do_not_specialize=["n"])
def _step(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    scales_ptr,
    n,
    size,
    keep1,
    take1,
    keep2,
    take2,
    decay,
    eps,
    DECAYS: tl.constexpr,  # an infinite parameter stays so without decay: inf - 0 x inf is NaN
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    param = tl.load(param_ptr + i, mask=inside).to(tl.float32)
    grad = tl.load(grad_ptr + i, mask=inside).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + i, mask=inside).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + i, mask=inside).to(tl.float32)
    first_scale = tl.load(scales_ptr + 2 * n)
    root_scale = tl.load(scales_ptr + 2 * n + 1)

    if DECAYS:
        param -= decay * param
    exp_avg = keep1 * exp_avg + take1 * grad
    exp_avg_sq = keep2 * exp_avg_sq + take2 * grad * grad
    root = tl.sqrt(exp_avg_sq) * root_scale + eps
    param -= first_scale * exp_avg / root

    tl.store(param_ptr + i, param.to(param_ptr.dtype.element_ty), mask=inside)
    tl.store(exp_avg_ptr + i, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq_ptr + i, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=inside)


def adamw_fused_(rows: Sequence[Row], scales_N2: Tensor, numbers: Numbers) -> None:
    """`moetk.kernels.adamw.adamw_` on a GPU."""
    with torch.cuda.device_of(scales_N2):
        for n, row in enumerate(rows):
            size = row.param.numel()
            if size:
                launch(
                    _step,
                    (divided(size, BLOCK),),
                    (*row, scales_N2, n, size, *numbers),
                    (numbers.decay != 0, BLOCK),
                    warps=WARPS,
                )
    # Autograd has not seen these writes; a backward through a graph that saved the old values must
    # still raise.
    torch.autograd.graph.increment_version(
        [t for row in rows for t in (row.param, row.exp_avg, row.exp_avg_sq)]
    )
