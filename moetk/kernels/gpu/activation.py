"""What stands between an expert's two matrices, on values in registers and as one backward pass.

Twin: `moetk.kernels.form.Form`.

Letters: N rows in expert order, I expert width, J = 2I for gated activations, else I, T tokens,
K choices a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetk.kernels.form import Form
from moetk.kernels.gpu.launch import divided, launch, power_of_two


@triton.jit
def _act(z, ACT: tl.constexpr):
    if ACT == "silu":
        return z * tl.sigmoid(z)
    elif ACT == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    else:
        tl.static_assert(ACT == "relu")
        return tl.where(z < 0, 0.0, z)


@triton.jit
def _act_slope(z, ACT: tl.constexpr):
    if ACT == "silu":
        s = tl.sigmoid(z)
        return s + z * s * (1 - s)
    elif ACT == "gelu":
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(
            -0.5 * z * z
        )
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    else:
        return tl.where(z > 0, 1.0, 0.0)


@triton.jit
def gated(gate, up, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """fp32 gate and up to the activation; comparisons are written so that NaN stays NaN."""
    if LIMIT > 0:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if ACT == "gpt_oss":
        return (up + 1) * gate * tl.sigmoid(ALPHA * gate)
    else:
        return _act(gate, ACT) * up


@triton.jit
def gated_with_slopes(gate, up, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """The activation and its derivatives by gate and by up. At a bound the gradient passes, as in
    torch.clamp."""
    g, u = gate, up
    if LIMIT > 0:
        g = tl.where(gate > LIMIT, LIMIT, gate)
        u = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if ACT == "gpt_oss":
        s = tl.sigmoid(ALPHA * g)
        by_up = g * s
        by_gate = (u + 1) * (s + ALPHA * g * s * (1 - s))
        a = (u + 1) * by_up
    elif ACT == "silu":
        s = tl.sigmoid(g)
        by_up = g * s
        by_gate = u * (s + by_up * (1 - s))
        a = by_up * u
    else:
        by_up = _act(g, ACT)
        by_gate = u * _act_slope(g, ACT)
        a = by_up * u
    if LIMIT > 0:
        by_gate = tl.where(gate > LIMIT, 0.0, by_gate)
        by_up = tl.where((up > LIMIT) | (up < -LIMIT), 0.0, by_up)
    return a, by_gate, by_up


@triton.jit
def _activation_backward(
    da_ptr,
    h_ptr,
    weights_ptr,
    choice_ptr,
    offsets_ptr,
    dh_ptr,
    aw_ptr,
    dw_ptr,
    N,
    I: tl.constexpr,
    E: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    R: tl.constexpr,
    BI: tl.constexpr,
):
    rows = tl.program_id(0) * R + tl.arange(0, R)
    total = tl.load(offsets_ptr + E - 1)
    choice = tl.load(choice_ptr + rows, mask=rows < N, other=0)
    used = rows < total
    w = tl.load(weights_ptr + choice, mask=used, other=0.0).to(tl.float32)[:, None]
    r64 = rows[:, None].to(tl.int64)
    dots = tl.zeros((R,), tl.float32)
    J: tl.constexpr = 2 * I if GATED else I
    for first in tl.static_range(0, I, BI):
        c = first + tl.arange(0, BI)[None, :]
        ok = used[:, None] & (c < I)
        da = tl.load(da_ptr + r64 * I + c, mask=ok, other=0.0).to(tl.float32)
        if GATED:
            if INTERLEAVED:
                c2 = 2 * first + tl.arange(0, 2 * BI)[None, :]
                ok2 = used[:, None] & (c2 < J)
                h = tl.load(h_ptr + r64 * J + c2, mask=ok2, other=0.0).to(tl.float32)
                g, u = tl.split(tl.reshape(h, (R, BI, 2)))
            else:
                g = tl.load(h_ptr + r64 * J + c, mask=ok, other=0.0).to(tl.float32)
                u = tl.load(h_ptr + r64 * J + I + c, mask=ok, other=0.0).to(tl.float32)
            a, by_gate, by_up = gated_with_slopes(g, u, ACT, ALPHA, LIMIT)
            dots += tl.sum(tl.where(ok, da * a, 0.0), 1)
            da = da * w
            dg = (da * by_gate).to(dh_ptr.dtype.element_ty)
            du = (da * by_up).to(dh_ptr.dtype.element_ty)
            if INTERLEAVED:
                tl.store(dh_ptr + r64 * J + c2, tl.reshape(tl.join(dg, du), (R, 2 * BI)), mask=ok2)
            else:
                tl.store(dh_ptr + r64 * J + c, dg, mask=ok)
                tl.store(dh_ptr + r64 * J + I + c, du, mask=ok)
        else:
            z = tl.load(h_ptr + r64 * I + c, mask=ok, other=0.0).to(tl.float32)
            a = _act(z, ACT)
            dots += tl.sum(tl.where(ok, da * a, 0.0), 1)
            dz = (da * w * _act_slope(z, ACT)).to(dh_ptr.dtype.element_ty)
            tl.store(dh_ptr + r64 * I + c, dz, mask=ok)
        tl.store(aw_ptr + r64 * I + c, (a * w).to(aw_ptr.dtype.element_ty), mask=ok)
    # Every choice has one row, so this is a permutation: no two programs write one place.
    dots = tl.where(used, dots, 0.0)
    tl.store(dw_ptr + choice, dots.to(dw_ptr.dtype.element_ty), mask=rows < N)


def activation_backward(
    da_NI: Tensor,
    h_NJ: Tensor,
    weights_TK: Tensor,
    choice_N: Tensor,
    offsets_E: Tensor,
    form: Form,
    dweights_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the activation's gradient da (of the unweighted output, not yet times the
    routing weight): dh (N, J) = w * da * act'(h), the weighted activation w * a (N, I), and the
    routing weights' gradient <da, a>, (T, K), 0 for unused choices (SonicMoE, arXiv
    2512.14080). Rows behind the last offset are not written."""
    num_rows, width = da_NI.shape
    dh_NJ, aw_NI = torch.empty_like(h_NJ), torch.empty_like(da_NI)
    dw_TK = weights_TK.new_empty(weights_TK.shape, dtype=dweights_dtype)
    block = min(256, power_of_two(width))
    rows = 4 if num_rows >= 4096 else 1
    launch(
        _activation_backward,
        (divided(num_rows, rows),),
        (
            da_NI,
            h_NJ,
            weights_TK,
            choice_N,
            offsets_E,
            dh_NJ,
            aw_NI,
            dw_TK,
            num_rows,
        ),
        (
            width,
            offsets_E.shape[0],
            form.gated,
            form.interleaved,
            form.act,
            form.alpha,
            form.limit,
            rows,
            block,
        ),
        warps=4,
    )
    return dh_NJ, aw_NI, dw_TK
