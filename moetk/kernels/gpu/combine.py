"""Rows from tokens, tokens from rows, and sums over an expert's rows.

Twins: `moetk.kernels.gather_sum.gather_sum`, `Tensor.index_select`, and `segment_sum` in
`moetk.kernels.fused_mlp`.

Letters: T tokens, K choices a token, N rows in expert order, H width, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moetk.kernels.gpu.launch import divided, launch, power_of_two


@triton.jit
def _gather_sum(
    rows_ptr,
    slot_ptr,
    weights_ptr,
    offsets_ptr,
    y_ptr,
    H: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BH + tl.arange(0, BH)
    total = tl.load(offsets_ptr + E - 1)
    acc = tl.zeros((BH,), tl.float32)
    for k in tl.static_range(K):
        slot = tl.load(slot_ptr + token * K + k)
        # A row behind the last offset was never written.
        ok = (column < H) & (slot < total)
        row = tl.load(rows_ptr + slot.to(tl.int64) * H + column, mask=ok, other=0.0).to(tl.float32)
        if WEIGHTED:
            row = row * tl.load(weights_ptr + token * K + k).to(tl.float32)
        acc += tl.where(ok, row, 0.0)  # selected: the weight of an unused choice may be NaN
    tl.store(y_ptr + token * H + column, acc.to(y_ptr.dtype.element_ty), mask=column < H)


def gather_sum(
    rows_NH: Tensor, slot_TK: Tensor, weights_TK: Tensor | None, offsets_E: Tensor
) -> Tensor:
    """y[t] = sum over k, in that order and in fp32, of weights[t, k] * rows[slot[t, k]]: (T, H) in
    the dtype of rows. Slots behind the last offset add nothing. weights_TK None = ones."""
    (num_tokens, k), hidden = slot_TK.shape, rows_NH.shape[1]
    y_TH = rows_NH.new_empty(num_tokens, hidden)
    block = min(power_of_two(hidden), 8192 if num_tokens >= 1024 else 512)
    launch(
        _gather_sum,
        (num_tokens, divided(hidden, block)),
        (
            rows_NH,
            slot_TK,
            rows_NH if weights_TK is None else weights_TK,
            offsets_E,
            y_TH,
        ),
        (
            hidden,
            offsets_E.shape[0],
            k,
            weights_TK is not None,
            block,
        ),
        warps=4 if block <= 2048 else 8,
    )
    return y_TH


@triton.jit
def _spread(
    x_ptr,
    slot_ptr,
    offsets_ptr,
    y_ptr,
    H: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BH + tl.arange(0, BH)
    total = tl.load(offsets_ptr + E - 1)
    values = tl.load(x_ptr + token * H + column, mask=column < H)
    for k in tl.static_range(K):
        slot = tl.load(slot_ptr + token * K + k)
        at = y_ptr + slot.to(tl.int64) * H + column
        tl.store(at, values, mask=(column < H) & (slot < total))


def spread(x_TH: Tensor, slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """(N, H): each token in the rows of its choices, read once and written K times. Rows behind the
    last offset are not written."""
    (num_tokens, k), hidden = slot_TK.shape, x_TH.shape[1]
    y_NH = x_TH.new_empty(num_tokens * k, hidden)
    block = min(power_of_two(hidden), 4096)
    launch(
        _spread,
        (num_tokens, divided(hidden, block)),
        (
            x_TH,
            slot_TK,
            offsets_E,
            y_NH,
        ),
        (
            hidden,
            offsets_E.shape[0],
            k,
            block,
        ),
        warps=4,
    )
    return y_NH


@triton.jit
def _segment_sum(
    rows_ptr,
    source_ptr,
    choice_ptr,
    weights_ptr,
    offsets_ptr,
    sum_ptr,
    B: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BR: tl.constexpr,
    BB: tl.constexpr,
):
    expert = tl.program_id(0)
    column = tl.program_id(1) * BB + tl.arange(0, BB)
    start = tl.where(expert > 0, tl.load(offsets_ptr + tl.maximum(expert - 1, 0)), 0)
    end = tl.load(offsets_ptr + expert)
    acc = tl.zeros((BR, BB), tl.float32)
    for first in range(start, end, BR):
        row = first + tl.arange(0, BR)
        mine = row < end
        if WEIGHTED:
            at = tl.load(source_ptr + row, mask=mine, other=0).to(tl.int64)
            choice = tl.load(choice_ptr + row, mask=mine, other=0)
            weight = tl.load(weights_ptr + choice, mask=mine, other=0.0).to(tl.float32)[:, None]
        else:
            at = row.to(tl.int64)
        ok = mine[:, None] & (column < B)[None, :]
        values = tl.load(rows_ptr + at[:, None] * B + column[None, :], mask=ok, other=0.0)
        if WEIGHTED:
            acc += values.to(tl.float32) * weight
        else:
            acc += values.to(tl.float32)
    total = tl.sum(acc, 0).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + expert * B + column, total, mask=column < B)


def segment_sum(
    rows: Tensor,
    offsets_E: Tensor,
    source_N: Tensor | None = None,
    choice_N: Tensor | None = None,
    weights_TK: Tensor | None = None,
) -> Tensor:
    """(E, B): the sum of each expert's rows; with the last three, of weight * rows[source]."""
    width = rows.shape[1]
    sum_EB = rows.new_empty(offsets_E.shape[0], width)
    block = 64
    launch(
        _segment_sum,
        (offsets_E.shape[0], divided(width, block)),
        (
            rows,
            offsets_E if source_N is None else source_N,
            offsets_E if choice_N is None else choice_N,
            rows if weights_TK is None else weights_TK,
            offsets_E,
            sum_EB,
        ),
        (
            width,
            weights_TK is not None,
            32,
            block,
        ),
        warps=4,
    )
    return sum_EB
