"""Rows times their expert's matrix, read in place or gathered.

Twin: `moetk.kernels.grouped_mm.grouped_mm`.

Letters: N rows in expert order, E experts, A the reduction, B columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moetk.kernels.gpu.launch import Tiled, divided, launch
from moetk.kernels.gpu.tiles import (
    Tile,
    count_tiles,
    find_tile,
    grid_rows,
    in_groups,
    padded,
    programs,
    tile_for,
)


@triton.jit
def _tile(
    a_ptr,
    a_desc,
    source_ptr,
    w_desc,
    bias_ptr,
    c_ptr,
    c_desc,
    expert,
    first,
    end,
    pn,
    A: tl.constexpr,
    B: tl.constexpr,
    NT: tl.constexpr,
    GATHER: tl.constexpr,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BM rows from `first` on. WHOLE: descriptors have this tile's size; else it goes without."""
    k_range = tl.arange(0, BK)
    rows = first + tl.arange(0, BM)
    if GATHER or not WHOLE:
        # Clamped, not masked: a mask would cost the copies their width; the store has it.
        source = tl.minimum(rows, end - 1)
        if GATHER:
            source = tl.load(source_ptr + source)
        a_rows = a_ptr + source.to(tl.int64)[:, None] * A + k_range[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, A, BK):
        if WHOLE and not GATHER:
            a = a_desc.load([first, k])  # behind `end` lie another expert's rows: not stored
        elif A % BK == 0:
            a = tl.load(a_rows + k)
        else:
            a = tl.load(a_rows + k, mask=(k + k_range < A)[None, :], other=0.0)
        if NT:
            w = w_desc.load([expert * B + pn * BN, k]).T
        else:
            w = w_desc.load([expert * A + k, pn * BN])
            if A % BK != 0:  # what lies behind is the next expert's, and may be NaN
                w = tl.where((k + k_range < A)[:, None], w, 0.0)
        acc = tl.dot(a, w, acc)
    columns = pn * BN + tl.arange(0, BN)
    if BIAS:
        bias = tl.load(bias_ptr + expert * B + columns, mask=columns < B, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    c = acc.to(c_ptr.dtype.element_ty)
    if WHOLE and first + BM <= end:
        c_desc.store([first, pn * BN], c)
    else:
        at = c_ptr + rows[:, None].to(tl.int64) * B + columns[None, :]
        tl.store(at, c, mask=(rows < end)[:, None] & (columns < B)[None, :])


@triton.jit
def _rows(
    a_ptr,
    a_desc,
    source_ptr,
    w_desc,
    bias_ptr,
    offsets_ptr,
    c_ptr,
    c_desc,
    A: tl.constexpr,
    B: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    NT: tl.constexpr,
    GATHER: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GM: tl.constexpr,
    TAIL: tl.constexpr,
):
    num_n: tl.constexpr = (B + BN - 1) // BN
    for pid in tl.range(
        tl.program_id(0), count_tiles(offsets_ptr, num_n, E, EP, BM), tl.num_programs(0)
    ):
        expert, tile, start, end, num_m = find_tile(offsets_ptr, pid, num_n, E, EP, BM)
        pm, pn = in_groups(tile, num_m, num_n, GM)
        first = start + pm * BM
        held = a_ptr, a_desc, source_ptr, w_desc, bias_ptr, c_ptr, c_desc
        where = expert, first, end, pn
        if TAIL == 0 or first + TAIL < end:
            _tile(*held, *where, A, B, NT, GATHER, BIAS, True, BM, BN, BK)
        else:
            _tile(*held, *where, A, B, NT, GATHER, BIAS, False, TAIL, BN, BK)


def rows_times(
    kernel: str,
    x: Tensor,
    weights: Tensor,
    offsets_E: Tensor,
    *,
    columns_first: bool,
    source_N: Tensor | None = None,
    bias_EB: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """(N, B): each row of x, or of x[source], times its expert's matrix, plus its bias.

    weights: (E, A, B), or (E, B, A) with columns_first. kernel: its name in the table of tiles.
    Rows behind the last offset are not written.
    """
    num_rows, num_experts = (x if source_N is None else source_N).shape[0], offsets_E.shape[0]
    reduction = x.shape[1]
    columns = weights.shape[1] if columns_first else weights.shape[2]
    c_NB = x.new_empty(num_rows, columns)
    tile = tile or tile_for(kernel, num_rows, num_experts, columns, reduction)
    block = (tile.n, tile.k) if columns_first else (tile.k, tile.n)
    tiles = grid_rows(num_rows, num_experts, tile.m) * divided(columns, tile.n)
    launch(
        _rows,
        (programs(tiles, tile, x.device),),
        (
            x,
            Tiled(x, (x.shape[0], reduction), (tile.m, tile.k)),
            offsets_E if source_N is None else source_N,
            Tiled(weights, (weights.shape[0] * weights.shape[1], weights.shape[2]), block),
            x if bias_EB is None else bias_EB,
            offsets_E,
            c_NB,
            Tiled(c_NB, (num_rows, columns), (tile.m, tile.n)),
        ),
        (
            reduction,
            columns,
            num_experts,
            padded(num_experts),
            columns_first,
            source_N is not None,
            bias_EB is not None,
            tile.m,
            tile.n,
            tile.k,
            tile.group,
            tile.tail,
        ),
        warps=tile.warps,
        stages=tile.stages,
    )
    return c_NB
