"""Gather rows, multiply by each expert's up matrix, activate: one kernel.

Letters: T tokens, N rows in expert order, E experts, H hidden, I expert width, J up width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moetk.kernels.form import Form
from moetk.kernels.gpu.activation import _act, gated
from moetk.kernels.gpu.launch import Tiled, divided, launch
from moetk.kernels.gpu.tiles import (
    Tile,
    find_tile,
    grid_rows,
    in_groups,
    padded,
    tile_for,
)


@triton.jit
def _tile(
    x_ptr,
    source_ptr,
    w_desc,
    bias_ptr,
    h_ptr,
    a_ptr,
    expert,
    first,
    end,
    pn,
    H: tl.constexpr,
    I: tl.constexpr,
    NT: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BM rows from `first` on: their h and a."""
    J: tl.constexpr = 2 * I if GATED else I
    WN: tl.constexpr = 2 * BN if GATED else BN  # columns of one tile of h
    rows = first + tl.arange(0, BM)
    # Clamped, not masked: a mask would cost the copies their width; the store has it.
    source = tl.load(source_ptr + tl.minimum(rows, end - 1))
    k_range = tl.arange(0, BK)
    x_rows = x_ptr + source[:, None].to(tl.int64) * H + k_range[None, :]
    acc = tl.zeros((BM, WN), tl.float32)
    for k in range(0, H, BK):
        if H % BK == 0:
            x = tl.load(x_rows + k)
        else:
            x = tl.load(x_rows + k, mask=(k + k_range < H)[None, :], other=0.0)
        # Gate and up in one tile: one product of twice the width reads x from shared memory once.
        if SPLIT and NT:
            w = tl.reshape(w_desc.load([expert * 2, pn * BN, k]), (WN, BK)).T
        elif SPLIT:
            w = tl.reshape(w_desc.load([expert * H + k, 0, pn * BN]), (BK, WN))
        elif NT:
            w = w_desc.load([expert * J + pn * WN, k]).T
        else:
            w = w_desc.load([expert * H + k, pn * WN])
        if not NT and H % BK != 0:  # what lies behind is the next expert's, and may be NaN
            w = tl.where((k + k_range < H)[:, None], w, 0.0)
        acc = tl.dot(x, w, acc)

    dtype = h_ptr.dtype.element_ty
    r64 = rows[:, None].to(tl.int64)
    columns = pn * BN + tl.arange(0, BN)
    ok = (rows < end)[:, None] & (columns < I)[None, :]
    # The activation sees what backward will see again: the rounded product.
    if not GATED:
        if BIAS:
            bias = tl.load(bias_ptr + expert * J + columns, mask=columns < I, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        h = acc.to(dtype)
        if KEEP:
            tl.store(h_ptr + r64 * J + columns[None, :], h, mask=ok)
        a = _act(h.to(tl.float32), ACT)
    else:
        if SPLIT:
            gate, up = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN)), (0, 2, 1)))
            gate_columns = columns
            up_columns = I + columns
        else:
            gate, up = tl.split(tl.reshape(acc, (BM, BN, 2)))
            gate_columns = 2 * columns
            up_columns = 2 * columns + 1
        if BIAS:
            b = bias_ptr + expert * J
            gate += tl.load(b + gate_columns, mask=columns < I, other=0.0).to(tl.float32)[None, :]
            up += tl.load(b + up_columns, mask=columns < I, other=0.0).to(tl.float32)[None, :]
        gate = gate.to(dtype)
        up = up.to(dtype)
        if KEEP and SPLIT:
            tl.store(h_ptr + r64 * J + gate_columns[None, :], gate, mask=ok)
            tl.store(h_ptr + r64 * J + up_columns[None, :], up, mask=ok)
        elif KEEP:
            h = tl.reshape(tl.join(gate, up), (BM, WN))
            h_columns = pn * WN + tl.arange(0, WN)
            h_ok = (rows < end)[:, None] & (h_columns < J)[None, :]
            tl.store(h_ptr + r64 * J + h_columns[None, :], h, mask=h_ok)
        a = gated(gate.to(tl.float32), up.to(tl.float32), ACT, ALPHA, LIMIT)
    tl.store(a_ptr + r64 * I + columns[None, :], a.to(dtype), mask=ok)


@triton.jit
def _up(
    x_ptr,
    source_ptr,
    w_desc,
    bias_ptr,
    offsets_ptr,
    h_ptr,
    a_ptr,
    H: tl.constexpr,
    I: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    NT: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GM: tl.constexpr,
    TAIL: tl.constexpr,
):
    num_n: tl.constexpr = (I + BN - 1) // BN
    expert, tile, start, end, num_m = find_tile(offsets_ptr, tl.program_id(0), num_n, E, EP, BM)
    if expert >= E:
        return
    pm, pn = in_groups(tile, num_m, num_n, GM)
    first = start + pm * BM
    held = x_ptr, source_ptr, w_desc, bias_ptr, h_ptr, a_ptr
    where = expert, first, end, pn
    if TAIL == 0 or first + TAIL < end:
        _tile(*held, *where, H, I, NT, GATED, SPLIT, BIAS, KEEP, ACT, ALPHA, LIMIT, BM, BN, BK)
    else:
        _tile(*held, *where, H, I, NT, GATED, SPLIT, BIAS, KEEP, ACT, ALPHA, LIMIT, TAIL, BN, BK)


def _descriptor(up: Tensor, form: Form, n: int, k: int) -> Tiled:
    """One tile of it holds the gate's columns and, beside them, the same columns of up."""
    experts, rows, columns = up.shape
    if form.gated and not form.interleaved and form.transposed:
        return Tiled(up, (experts * rows, 2, columns // 2), (k, 2, n))
    if form.gated and not form.interleaved:
        return Tiled(up, (experts * 2, rows // 2, columns), (2, n, k))
    width = 2 * n if form.gated else n
    block = (k, width) if form.transposed else (width, k)
    return Tiled(up, (experts * rows, columns), block)


def up_activate(
    x_TH: Tensor,
    source_N: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    offsets_E: Tensor,
    form: Form,
    *,
    keep: bool,
    tile: Tile | None = None,
) -> tuple[Tensor | None, Tensor]:
    """h (N, J) = x[source] times its expert's matrix, plus bias, and a (N, I) = activation(h).

    keep: write h; else it is None. Rows behind the last offset are not written.
    """
    num_rows, num_experts = source_N.shape[0], offsets_E.shape[0]
    hidden = x_TH.shape[1]
    up_width = form.up_width(up)
    width = up_width // 2 if form.gated else up_width
    h_NJ = x_TH.new_empty(num_rows, up_width) if keep else None
    a_NI = x_TH.new_empty(num_rows, width)
    tile = tile or tile_for("up", num_rows, num_experts, width, hidden)
    launch(
        _up,
        (grid_rows(num_rows, num_experts, tile.m) * divided(width, tile.n),),
        (
            x_TH,
            source_N,
            _descriptor(up, form, tile.n, tile.k),
            x_TH if up_bias is None else up_bias,
            offsets_E,
            a_NI if h_NJ is None else h_NJ,
            a_NI,
        ),
        (
            hidden,
            width,
            num_experts,
            padded(num_experts),
            not form.transposed,
            form.gated,
            form.gated and not form.interleaved,
            up_bias is not None,
            keep,
            form.act,
            form.alpha,
            form.limit,
            tile.m,
            tile.n,
            tile.k,
            tile.group,
            tile.tail,
        ),
        warps=tile.warps,
        stages=tile.stages,
    )
    return h_NJ, a_NI
