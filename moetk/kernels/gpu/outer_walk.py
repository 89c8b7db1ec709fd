"""Sums of outer products where an expert has few rows: a program walks along a row of tiles.

What is left of the work is to read and write the gradients, so the tiles of the sum are fetched
ahead, while the expert's rows stay: the kernel of `moetk.kernels.gpu.outer` for a handful of rows.

Letters: E experts, A and B the two widths.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mine(
    desc,
    gathered_ptr,
    source,
    mine,
    row,
    first,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """(BK, BLOCK): the rows from `row` on, columns from `first` on; 0 where they are another's."""
    if GATHERED:
        column = first + tl.arange(0, BLOCK)
        ok = mine & (column < W)[None, :]
        return tl.load(gathered_ptr + source[:, None] * W + column[None, :], mask=ok, other=0.0)
    else:
        return tl.where(mine, desc.load([row, first]), 0.0)


@triton.jit
def _source(source_ptr, rows, end, GATHER: tl.constexpr):
    """Where the gathered operand has these rows; what lies behind the expert's is not looked at."""
    if GATHER == "none":
        return rows.to(tl.int64)
    else:
        return tl.load(source_ptr + rows, mask=rows < end, other=0).to(tl.int64)


@triton.jit
def outer_walk(
    left_desc,
    right_desc,
    gathered_ptr,
    source_ptr,
    offsets_ptr,
    c_desc,
    A: tl.constexpr,
    B: tl.constexpr,
    GATHER: tl.constexpr,
    ADD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program for each BM rows of an expert's matrix, of which A is a multiple."""
    num_m: tl.constexpr = A // BM
    num_n: tl.constexpr = (B + BN - 1) // BN
    expert = tl.program_id(0) // num_m
    m = tl.program_id(0) % num_m * BM
    start = tl.where(expert > 0, tl.load(offsets_ptr + tl.maximum(expert - 1, 0)), 0)
    end = tl.load(offsets_ptr + expert)
    if ADD and start == end:
        return
    k_range = tl.arange(0, BK)
    dtype = gathered_ptr.dtype.element_ty
    if end - start <= BK:
        mine = (start + k_range < end)[:, None]
        source = _source(source_ptr, start + k_range, end, GATHER)
        left = _mine(left_desc, gathered_ptr, source, mine, start, m, A, BM, GATHER == "left").T
        for pn in tl.range(0, num_n, num_stages=STAGES):
            n = pn * BN
            right = _mine(
                right_desc, gathered_ptr, source, mine, start, n, B, BN, GATHER == "right"
            )
            acc = tl.zeros((BM, BN), tl.float32)
            if ADD:
                acc = c_desc.load([expert * A + m, n]).to(tl.float32)
            c_desc.store([expert * A + m, n], tl.dot(left, right, acc).to(dtype))
    else:
        for pn in range(num_n):
            n = pn * BN
            acc = tl.zeros((BM, BN), tl.float32)
            if ADD:
                acc = c_desc.load([expert * A + m, n]).to(tl.float32)
            for row in range(start, end, BK):
                mine = (row + k_range < end)[:, None]
                source = _source(source_ptr, row + k_range, end, GATHER)
                left = _mine(left_desc, gathered_ptr, source, mine, row, m, A, BM, GATHER == "left")
                right = _mine(
                    right_desc, gathered_ptr, source, mine, row, n, B, BN, GATHER == "right"
                )
                acc = tl.dot(left.T, right, acc)
            c_desc.store([expert * A + m, n], acc.to(dtype))
