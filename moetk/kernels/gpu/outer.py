"""Each expert's sum of outer products over its rows: the gradients of its matrices.

Twin: `moetk.kernels.grouped_mm.grouped_outer`.

Letters: N rows in expert order, T tokens, E experts, A and B the two widths.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moetk.kernels.gpu.launch import INTERPRETED, Tiled, divided, launch
from moetk.kernels.gpu.outer_walk import outer_walk
from moetk.kernels.gpu.tiles import Tile, in_groups, tile_for

_LINE = 64  # numbers of 16 bits in what the cache fetches at once


@triton.jit
def _outer(
    left_desc,
    right_desc,
    gathered_ptr,
    source_ptr,
    offsets_ptr,
    c_ptr,
    c_desc,
    A: tl.constexpr,
    B: tl.constexpr,
    GATHER: tl.constexpr,
    HOW: tl.constexpr,
    LINE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GM: tl.constexpr,
):
    num_m: tl.constexpr = (A + BM - 1) // BM
    num_n: tl.constexpr = (B + BN - 1) // BN
    pid = tl.program_id(0)
    expert = pid // (num_m * num_n)
    pm, pn = in_groups(pid % (num_m * num_n), num_m, num_n, GM)
    start = tl.where(expert > 0, tl.load(offsets_ptr + tl.maximum(expert - 1, 0)), 0)
    end = tl.load(offsets_ptr + expert)
    if HOW != "written" and start == end:
        return
    k_range = tl.arange(0, BK)
    m = pm * BM + tl.arange(0, BM)
    n = pn * BN + tl.arange(0, BN)
    c = c_ptr + expert.to(tl.int64) * A * B + m[:, None].to(tl.int64) * B + n[None, :]
    ok = (m < A)[:, None] & (n < B)[None, :]
    if LINE:
        # What is added to at the end comes into the cache meanwhile: 128 bytes for each pointer.
        line = pn * BN + tl.arange(0, BN // LINE) * LINE
        at = c_ptr + expert.to(tl.int64) * A * B + m[:, None].to(tl.int64) * B + line[None, :]
        inside = (m < A)[:, None] & (line < B)[None, :]
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
            "=r,l,r",
            [at.to(tl.int64), inside.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    width: tl.constexpr = A if GATHER == "left" else B
    columns = pm * BM + tl.arange(0, BM) if GATHER == "left" else pn * BN + tl.arange(0, BN)
    inside = (columns < width)[None, :]
    # A tile that ends with its expert's matrix is moved by the copy engine.
    even: tl.constexpr = A % BM == 0
    acc = tl.zeros((BM, BN), tl.float32)
    whole = start + (end - start) // BK * BK
    for row in range(start, whole, BK):
        if GATHER == "none":
            left = left_desc.load([row, pm * BM])
            right = right_desc.load([row, pn * BN])
        else:
            source = tl.load(source_ptr + row + k_range).to(tl.int64)
            pointers = gathered_ptr + source[:, None] * width + columns[None, :]
            if width % (BM if GATHER == "left" else BN) == 0:
                rows = tl.load(pointers)
            else:
                rows = tl.load(pointers, mask=inside, other=0.0)
            if GATHER == "left":
                left = rows
                right = right_desc.load([row, pn * BN])
            else:
                left = left_desc.load([row, pm * BM])
                right = rows
        acc = tl.dot(left.T, right, acc)
    if whole < end:
        # Selected, not multiplied away: the rows behind are another expert's, or nobody's NaN.
        mine = (whole + k_range < end)[:, None]
        if GATHER == "none":
            left = tl.where(mine, left_desc.load([whole, pm * BM]), 0.0)
            right = tl.where(mine, right_desc.load([whole, pn * BN]), 0.0)
        else:
            source = tl.load(source_ptr + tl.minimum(whole + k_range, end - 1)).to(tl.int64)
            pointers = gathered_ptr + source[:, None] * width + columns[None, :]
            rows = tl.load(pointers, mask=mine & inside, other=0.0)
            if GATHER == "left":
                left = rows
                right = tl.where(mine, right_desc.load([whole, pn * BN]), 0.0)
            else:
                left = tl.where(mine, left_desc.load([whole, pm * BM]), 0.0)
                right = rows
        acc = tl.dot(left.T, right, acc)
    dtype = c_ptr.dtype.element_ty
    if HOW == "added in L2":
        c_desc.atomic_add([expert * A + pm * BM, pn * BN], acc.to(dtype))
    else:
        if HOW == "rounded and added":
            acc = acc.to(dtype).to(tl.float32)
        if HOW != "written" and even:
            acc += c_desc.load([expert * A + pm * BM, pn * BN]).to(tl.float32)
        elif HOW != "written":
            acc += tl.load(c, mask=ok, other=0.0).to(tl.float32)
        if even:
            c_desc.store([expert * A + pm * BM, pn * BN], acc.to(dtype))
        else:
            tl.store(c, acc.to(dtype), mask=ok)


def outer(
    kernel: str,
    left: Tensor,
    right: Tensor,
    offsets_E: Tensor,
    *,
    source_N: Tensor | None = None,
    gather: str = "none",
    into_EAB: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """(E, A, B): for each expert the sum over its rows of left[row] x right[row], in their dtype.

    gather: which of the two, "left" or "right", is (T, width) and read at source_N; the other, and
    with "none" both, are (N, width). into: is added to, in place, and returned; None = a new
    tensor. kernel: its name in the table of tiles, "_add" behind it with into. An expert without
    rows gets zeros. Sums run in the order of the rows, in fp32, and are rounded when they were
    added to `into`; where the tile `reduces`, before and after, as by torch. Each number is
    written, or added to, once: the same bits from run to run.
    """
    num_experts, a, b = offsets_E.shape[0], left.shape[1], right.shape[1]
    num_rows = (left if gather == "right" else right).shape[0]
    adds = into_EAB is not None
    tile = tile or tile_for(f"{kernel}_add" if adds else kernel, num_rows, num_experts, b, a)
    c_EAB = left.new_empty(num_experts, a, b) if into_EAB is None else into_EAB
    # A gathered operand needs no descriptor; the other's stands in for it.
    left_desc = None if gather == "left" else Tiled(left, (num_rows, a), (tile.k, tile.m))
    right_desc = None if gather == "right" else Tiled(right, (num_rows, b), (tile.k, tile.n))
    operands = (
        left_desc or right_desc,
        right_desc or left_desc,
        left if gather == "left" else right,
        offsets_E if source_N is None else source_N,
        offsets_E,
    )
    c_desc = Tiled(c_EAB, (num_experts * a, b), (tile.m, tile.n))
    if tile.per_sm and a % tile.m == 0:
        launch(
            outer_walk,
            (num_experts * (a // tile.m),),
            (*operands, c_desc),
            (a, b, gather, adds, tile.m, tile.n, tile.k, tile.stages),
            warps=tile.warps,
            stages=tile.stages,
        )
        return c_EAB
    how = "added" if adds else "written"
    if adds and tile.reduces and a % tile.m == 0:  # else a tile reaches into the next expert's
        # The interpreter does not know the copy engine's addition.
        how = "rounded and added" if INTERPRETED else "added in L2"
    fetches = how == "added" and gather == "none" and tile.n >= _LINE and not INTERPRETED
    launch(
        _outer,
        (num_experts * divided(a, tile.m) * divided(b, tile.n),),
        (*operands, c_EAB, c_desc),
        (a, b, gather, how, _LINE if fetches else 0, tile.m, tile.n, tile.k, tile.group),
        warps=tile.warps,
        stages=tile.stages,
    )
    return c_EAB
