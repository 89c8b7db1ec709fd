"""RMSNorm and rotation of queries and keys: one kernel forward, one backward.

Twin: `moetk.kernels.rope.rotated_plain`.

Letters: T = B * S tokens, N heads, D head size, HD half of it, W the norm's width (D or N * D),
P programs of the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetk.kernels.first_order import refuse_second_order
from moetk.kernels.gpu.launch import power_of_two
from moetk.kernels.gpu.there import launch_there
from moetk.kernels.rope import Norm

PROGRAMS = 1024
"""Programs of the backward pass, each with its own partial sum of the weights' gradients: fixed,
so that the order of summation does not depend on the machine."""


@triton.jit
def _angles(ptr, token, S, batch_stride, HD: tl.constexpr, DP: tl.constexpr):
    """Both halves (1, HD) of a token's row of cos or sin."""
    d = tl.arange(0, DP)[None, :]
    at = ptr + (token // S) * batch_stride + (token % S) * 2 * HD + d
    first = tl.load(at, mask=d < HD, other=0.0).to(tl.float32)
    second = tl.load(at + HD, mask=d < HD, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _heads(ptr, start, N: tl.constexpr, HD: tl.constexpr, NP: tl.constexpr, DP: tl.constexpr):
    """Both halves (N, HD) of the N heads that begin at `start`."""
    n = tl.arange(0, NP)[:, None]
    d = tl.arange(0, DP)[None, :]
    at = ptr + start + n * 2 * HD + d
    ok = (n < N) & (d < HD)
    first = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(at + HD, mask=ok, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store(
    ptr, start, first, second, N: tl.constexpr, HD: tl.constexpr, NP: tl.constexpr, DP: tl.constexpr
):
    n = tl.arange(0, NP)[:, None]
    d = tl.arange(0, DP)[None, :]
    at = ptr + start + n * 2 * HD + d
    ok = (n < N) & (d < HD)
    tl.store(at, first.to(ptr.dtype.element_ty), mask=ok)
    tl.store(at + HD, second.to(ptr.dtype.element_ty), mask=ok)


@triton.jit
def _weight(
    ptr,
    NORM: tl.constexpr,
    N: tl.constexpr,
    HD: tl.constexpr,
    NP: tl.constexpr,
    DP: tl.constexpr,
):
    """The norm's weight as heads see it: one row for all, or one for each."""
    if NORM == "head":
        first, second = _heads(ptr, 0, 1, HD, 1, DP)
    else:
        first, second = _heads(ptr, 0, N, HD, NP, DP)
    return first, second


@triton.jit
def _mean(first, second, NORM: tl.constexpr, N: tl.constexpr, HD: tl.constexpr):
    """Mean of each head (N, 1), or of all heads of the token (1, 1)."""
    sums = tl.sum(first + second, 1)[:, None]
    if NORM == "head":
        return sums / (2 * HD)
    else:
        return tl.sum(sums, 0)[None, :] / (N * 2 * HD)


@triton.jit
def _forward_one(
    x_ptr,
    y_ptr,
    weight_ptr,
    token,
    cos1,
    cos2,
    sin1,
    sin2,
    eps,
    NORM: tl.constexpr,
    N: tl.constexpr,
    HD: tl.constexpr,
    NP: tl.constexpr,
    DP: tl.constexpr,
):
    start = token * N * 2 * HD
    x1, x2 = _heads(x_ptr, start, N, HD, NP, DP)
    if NORM != "none":
        w1, w2 = _weight(weight_ptr, NORM, N, HD, NP, DP)
        scale = tl.rsqrt(_mean(x1 * x1, x2 * x2, NORM, N, HD) + tl.cast(eps, tl.float32))
        x1 = x1 * scale * w1
        x2 = x2 * scale * w2
    _store(y_ptr, start, x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2, N, HD, NP, DP)


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_out_ptr,
    k_out_ptr,
    S,
    batch_stride,
    q_eps,
    k_eps,
    NORM: tl.constexpr,
    NQ: tl.constexpr,
    NK: tl.constexpr,
    HD: tl.constexpr,
    NQP: tl.constexpr,
    NKP: tl.constexpr,
    DP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cos1, cos2 = _angles(cos_ptr, token, S, batch_stride, HD, DP)
    sin1, sin2 = _angles(sin_ptr, token, S, batch_stride, HD, DP)
    _forward_one(
        q_ptr, q_out_ptr, q_weight_ptr, token, cos1, cos2, sin1, sin2, q_eps, NORM, NQ, HD, NQP, DP
    )
    _forward_one(
        k_ptr, k_out_ptr, k_weight_ptr, token, cos1, cos2, sin1, sin2, k_eps, NORM, NK, HD, NKP, DP
    )


@triton.jit
def _backward_one(
    x_ptr,
    dy_ptr,
    dx_ptr,
    token,
    cos1,
    cos2,
    sin1,
    sin2,
    w1,
    w2,
    dw1,
    dw2,
    eps,
    NORM: tl.constexpr,
    N: tl.constexpr,
    HD: tl.constexpr,
    NP: tl.constexpr,
    DP: tl.constexpr,
):
    """Writes dx; returns the weight's gradient so far, (N, HD) twice."""
    start = token * N * 2 * HD
    y1, y2 = _heads(dy_ptr, start, N, HD, NP, DP)
    g1 = y1 * cos1 + y2 * sin2
    g2 = y2 * cos2 - y1 * sin1
    if NORM != "none":
        x1, x2 = _heads(x_ptr, start, N, HD, NP, DP)
        scale = tl.rsqrt(_mean(x1 * x1, x2 * x2, NORM, N, HD) + tl.cast(eps, tl.float32))
        x1 *= scale
        x2 *= scale
        dw1 += g1 * x1
        dw2 += g2 * x2
        g1 *= w1
        g2 *= w2
        along = _mean(g1 * x1, g2 * x2, NORM, N, HD)
        g1 = (g1 - x1 * along) * scale
        g2 = (g2 - x2 * along) * scale
    _store(dx_ptr, start, g1, g2, N, HD, NP, DP)
    return dw1, dw2


@triton.jit
def _store_partial(
    ptr,
    dw1,
    dw2,
    NORM: tl.constexpr,
    N: tl.constexpr,
    HD: tl.constexpr,
    NP: tl.constexpr,
    DP: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if NORM == "head":
        first = tl.sum(dw1, 0)[None, :]
        second = tl.sum(dw2, 0)[None, :]
        _store(ptr, program * 2 * HD, first, second, 1, HD, 1, DP)
    else:
        _store(ptr, program * N * 2 * HD, dw1, dw2, N, HD, NP, DP)


@triton.jit
def _backward(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    dq_out_ptr,
    dk_out_ptr,
    dq_ptr,
    dk_ptr,
    q_partial_ptr,
    k_partial_ptr,
    T,
    S,
    batch_stride,
    q_eps,
    k_eps,
    NORM: tl.constexpr,
    NQ: tl.constexpr,
    NK: tl.constexpr,
    HD: tl.constexpr,
    NQP: tl.constexpr,
    NKP: tl.constexpr,
    DP: tl.constexpr,
):
    qw1, qw2 = 1.0, 1.0
    kw1, kw2 = 1.0, 1.0
    if NORM != "none":
        qw1, qw2 = _weight(q_weight_ptr, NORM, NQ, HD, NQP, DP)
        kw1, kw2 = _weight(k_weight_ptr, NORM, NK, HD, NKP, DP)
    dqw1 = tl.zeros((NQP, DP), tl.float32)
    dqw2 = tl.zeros((NQP, DP), tl.float32)
    dkw1 = tl.zeros((NKP, DP), tl.float32)
    dkw2 = tl.zeros((NKP, DP), tl.float32)
    for token in range(tl.program_id(0).to(tl.int64), T, tl.num_programs(0)):
        cos1, cos2 = _angles(cos_ptr, token, S, batch_stride, HD, DP)
        sin1, sin2 = _angles(sin_ptr, token, S, batch_stride, HD, DP)
        dqw1, dqw2 = _backward_one(
            q_ptr, dq_out_ptr, dq_ptr, token, cos1, cos2, sin1, sin2,
            qw1, qw2, dqw1, dqw2, q_eps, NORM, NQ, HD, NQP, DP,
        )  # fmt: skip
        dkw1, dkw2 = _backward_one(
            k_ptr, dk_out_ptr, dk_ptr, token, cos1, cos2, sin1, sin2,
            kw1, kw2, dkw1, dkw2, k_eps, NORM, NK, HD, NKP, DP,
        )  # fmt: skip
    if NORM != "none":
        _store_partial(q_partial_ptr, dqw1, dqw2, NORM, NQ, HD, NQP, DP)
        _store_partial(k_partial_ptr, dkw1, dkw2, NORM, NK, HD, NKP, DP)


def rotated_fused(
    q_BSND: Tensor,
    k_BSND: Tensor,
    cos_BSD: Tensor,
    sin_BSD: Tensor,
    q_norm: Norm | None,
    k_norm: Norm | None,
) -> tuple[Tensor, Tensor]:
    """`moetk.kernels.rope.rotated` on a GPU. Saves q and k as they came; the weights' gradients
    are summed in a fixed order."""
    q_weight, q_eps = _opened(q_norm)
    k_weight, k_eps = _opened(k_norm)
    made: tuple[Tensor, Tensor] = _Rotated.apply(
        q_BSND, k_BSND, cos_BSD, sin_BSD, q_weight, k_weight, q_eps, k_eps
    )
    return made


def _opened(norm: Norm | None) -> tuple[Tensor | None, float]:
    return (None, 0.0) if norm is None else (norm.weight_W.contiguous(), norm.eps)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        q_eps: float,
        k_eps: float,
    ) -> tuple[Tensor, Tensor]:
        q, k, cos, sin = (x.contiguous() for x in (q, k, cos, sin))
        q_out, k_out = torch.empty_like(q), torch.empty_like(k)
        B, S = q.shape[:2]
        ctx.save_for_backward(q, k, cos, sin, q_weight, k_weight)
        ctx.eps = q_eps, k_eps
        if B * S:
            constants, warps = _sizes(q, k, q_weight)
            args = q, k, cos, sin, q_weight, k_weight, q_out, k_out
            numbers = S, _batch_stride(cos), q_eps, k_eps
            launch_there(q, _forward, (B * S,), (*args, *numbers), constants, warps=warps)
        return q_out, k_out

    @staticmethod
    def backward(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("rotated", "transformers' attention, speed_up(..., rope=False)")
        q, k, cos, sin, q_weight, k_weight = ctx.saved_tensors
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        B, S = q.shape[:2]
        programs = min(B * S, PROGRAMS)
        q_partial = _partial(q_weight, programs)
        k_partial = _partial(k_weight, programs)
        if programs:
            constants, warps = _sizes(q, k, q_weight)
            given = q, k, cos, sin, q_weight, k_weight, dq_out.contiguous(), dk_out.contiguous()
            made = dq, dk, q_partial, k_partial
            numbers = B * S, S, _batch_stride(cos), *ctx.eps
            launch_there(
                q, _backward, (programs,), (*given, *made, *numbers), constants, warps=warps
            )
        dq_weight = None if q_partial is None else q_partial.sum(0).to(q_weight.dtype)
        dk_weight = None if k_partial is None else k_partial.sum(0).to(k_weight.dtype)
        return dq, dk, None, None, dq_weight, dk_weight, None, None


def _partial(weight_W: Tensor | None, programs: int) -> Tensor | None:
    if weight_W is None:
        return None
    return torch.empty(programs, len(weight_W), dtype=torch.float32, device=weight_W.device)


def _batch_stride(table_BSD: Tensor) -> int:
    return table_BSD.stride(0) if table_BSD.shape[0] > 1 else 0


def _sizes(
    q_BSND: Tensor, k_BSND: Tensor, q_weight_W: Tensor | None
) -> tuple[tuple[Any, ...], int]:
    """The constants of both kernels, NORM to DP, and how many warps run them."""
    NQ, D = q_BSND.shape[2:]
    NK = k_BSND.shape[2]
    norm = "none" if q_weight_W is None else "head" if len(q_weight_W) == D else "row"
    NQP, NKP, DP = power_of_two(NQ), power_of_two(NK), power_of_two(D // 2)
    return (norm, NQ, NK, D // 2, NQP, NKP, DP), 4 if NQP * DP <= 2048 else 8
