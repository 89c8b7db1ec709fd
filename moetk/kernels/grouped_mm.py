"""Matrix products over rows grouped by expert.

Letters: N rows in expert order, E experts, A and B the two widths. Rows behind offsets_E[-1]
belong to nobody: their output is zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(
    x_NA: Tensor, weight_EAB: Tensor, offsets_E: Tensor, *, full: bool = False
) -> Tensor:
    """Each row times its expert's matrix: (N, A) x (E, A, B) -> (N, B), in the dtype of x_NA.

    offsets_E: int32, where each expert's rows end, not decreasing. Both operands share one dtype.
    full: the last offset is N, so there is no tail to clear.
    """
    if _torch_kernel_takes(x_NA, weight_EAB):
        y_NB = F.grouped_mm(x_NA, weight_EAB, offs=offsets_E)
        return y_NB if full else _zero_tail(y_NB, offsets_E)
    if torch.compiler.is_compiling():
        return torch.ops.moetk.grouped_mm(x_NA, weight_EAB, offsets_E)  # type: ignore[no-any-return]
    return _grouped_mm_loop(x_NA, weight_EAB, offsets_E)


def grouped_outer(x_NA: Tensor, y_NB: Tensor, offsets_E: Tensor) -> Tensor:
    """Each expert's sum of outer products over its rows: (N, A), (N, B) -> (E, A, B).

    The gradient of `grouped_mm` for its weights. An expert without rows gets zeros.
    """
    if _torch_kernel_takes(x_NA, y_NB):
        return F.grouped_mm(x_NA.t(), y_NB, offs=offsets_E)
    if torch.compiler.is_compiling():
        return torch.ops.moetk.grouped_outer(x_NA, y_NB, offsets_E)  # type: ignore[no-any-return]
    return _grouped_outer_loop(x_NA, y_NB, offsets_E)


def _torch_kernel_takes(left: Tensor, right: Tensor) -> bool:
    """torch's kernel takes bf16 on the device, fp32 and bf16 on the CPU, and rows of whole 16
    bytes; inductor compiles it in bf16 only."""
    dtype = left.dtype
    if dtype == torch.bfloat16:
        lanes = 7
    elif dtype == torch.float32 and left.device.type == "cpu" and not torch.compiler.is_compiling():
        lanes = 3
    else:
        return False
    widths = left.shape[1] | right.shape[-1] | right.shape[-2]
    if right.ndim == 2:  # rows pair up, their number is free
        widths = left.shape[1] | right.shape[1]
    return left.numel() > 0 and not widths & lanes


def _zero_tail(y_NB: Tensor, offsets_E: Tensor) -> Tensor:
    # The kernel leaves rows behind the last offset unwritten.
    rows_N = torch.arange(y_NB.shape[0], device=y_NB.device, dtype=torch.int32)
    return y_NB.masked_fill_((rows_N >= offsets_E[-1])[:, None], 0)


def _grouped_mm_loop(x_NA: Tensor, weight_EAB: Tensor, offsets_E: Tensor) -> Tensor:
    y_NB = x_NA.new_empty(x_NA.shape[0], weight_EAB.shape[2])
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            torch.mm(x_NA[start:end], weight_EAB[expert], out=y_NB[start:end])
            start = end
    y_NB[start:].zero_()
    return y_NB


def _grouped_outer_loop(x_NA: Tensor, y_NB: Tensor, offsets_E: Tensor) -> Tensor:
    out_EAB = x_NA.new_empty(offsets_E.shape[0], x_NA.shape[1], y_NB.shape[1])
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            torch.mm(x_NA[start:end].t(), y_NB[start:end], out=out_EAB[expert])
            start = end
        else:
            out_EAB[expert].zero_()
    return out_EAB


# torch.compile sees the loops as one op each: their lengths are data.
_grouped_mm_op = torch.library.custom_op("moetk::grouped_mm", _grouped_mm_loop, mutates_args=())
_grouped_outer_op = torch.library.custom_op(
    "moetk::grouped_outer", _grouped_outer_loop, mutates_args=()
)


@_grouped_mm_op.register_fake
def _(x_NA: Tensor, weight_EAB: Tensor, offsets_E: Tensor) -> Tensor:
    return x_NA.new_empty(x_NA.shape[0], weight_EAB.shape[2])


@_grouped_outer_op.register_fake
def _(x_NA: Tensor, y_NB: Tensor, offsets_E: Tensor) -> Tensor:
    return x_NA.new_empty(offsets_E.shape[0], x_NA.shape[1], y_NB.shape[1])
