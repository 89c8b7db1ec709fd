"""RMSNorm, alone or beside the residual stream: one kernel forward, one backward.

Twins: `moetk.kernels.norm.rms_norm_plain` and `added_rms_norm_plain`.

Letters: R rows, W their width, P programs of the backward pass.
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

PROGRAMS = 1024
"""Programs of the backward pass, each with its own partial sum of the weight's gradient: fixed, so
that the order of summation does not depend on the machine."""


@triton.jit
def _forward(
    x_ptr,
    branch_ptr,
    weight_ptr,
    sum_ptr,
    y_ptr,
    W,
    eps,
    OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = norm(x), or where there is a branch: sum = x + branch, y = norm(sum).

    torch.compile hands numbers over as fp64, in which all that follows would be computed.
    """
    start = tl.program_id(0).to(tl.int64) * W
    c = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + start + c, mask=c < W, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        x += tl.load(branch_ptr + start + c, mask=c < W, other=0.0).to(tl.float32)
        x = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + start + c, x, mask=c < W)
        x = x.to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=c < W, other=0.0).to(tl.float32) + OFFSET
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / W + tl.cast(eps, tl.float32))
    if ROUNDS_FIRST:
        normed = normed.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + start + c, (normed * weight).to(y_ptr.dtype.element_ty), mask=c < W)


@triton.jit
def _backward(
    x_ptr,
    weight_ptr,
    dstream_ptr,
    dy_ptr,
    dx_ptr,
    partial_ptr,
    R,
    W,
    eps,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of the norm, and of the stream beside it where there is one. The inverse rms is taken
    from the row again, which is read anyway."""
    c = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + c, mask=c < W, other=0.0).to(tl.float32) + OFFSET
    dweight = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), R, tl.num_programs(0)):
        x = tl.load(x_ptr + row * W + c, mask=c < W, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * W + c, mask=c < W, other=0.0).to(tl.float32)
        dstream = 0.0
        if dstream_ptr is not None:  # asked for before the sums, which wait for all lanes
            dstream = tl.load(dstream_ptr + row * W + c, mask=c < W, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 0) / W + tl.cast(eps, tl.float32))
        normed = x * scale
        dweight += dy * normed
        dnormed = dy * weight
        dx = (dnormed - normed * (tl.sum(dnormed * normed, 0) / W)) * scale + dstream
        tl.store(dx_ptr + row * W + c, dx.to(dx_ptr.dtype.element_ty), mask=c < W)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * W + c, dweight, mask=c < W)


def rms_norm_fused(
    x_RW: Tensor, weight_W: Tensor, eps: float, offset: float, rounds_first: bool
) -> Tensor:
    """`moetk.kernels.norm.rms_norm` on a GPU. Saves x alone; the weight's gradient is summed in a
    fixed order."""
    y_RW: Tensor = _RMSNorm.apply(x_RW, weight_W, eps, offset, rounds_first)
    return y_RW


def forked_rms_norm_fused(
    x_RW: Tensor, weight_W: Tensor, eps: float, offset: float, rounds_first: bool
) -> tuple[Tensor, Tensor]:
    """`moetk.kernels.norm.forked_rms_norm` on a GPU. Saves x alone."""
    made: tuple[Tensor, Tensor] = _Forked.apply(x_RW, weight_W, eps, offset, rounds_first)
    return made


def added_rms_norm_fused(
    x_RW: Tensor,
    branch_RW: Tensor,
    weight_W: Tensor,
    eps: float,
    offset: float,
    rounds_first: bool,
) -> tuple[Tensor, Tensor]:
    """`moetk.kernels.norm.added_rms_norm` on a GPU. Saves the sum alone."""
    made: tuple[Tensor, Tensor] = _Added.apply(x_RW, branch_RW, weight_W, eps, offset, rounds_first)
    return made


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RW: Tensor, weight_W: Tensor, eps: float, offset: float, rounds_first: bool
    ) -> Tensor:
        _, y_RW = _made(ctx, x_RW, None, weight_W, eps, offset, rounds_first)
        return y_RW

    @staticmethod
    def backward(ctx: Any, dy_RW: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("rms_norm", _INSTEAD)
        dx_RW, dweight_W = _gradients(ctx, None, dy_RW)
        return dx_RW, dweight_W, None, None, None


class _Forked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RW: Tensor, weight_W: Tensor, eps: float, offset: float, rounds_first: bool
    ) -> tuple[Tensor, Tensor]:
        _, y_RW = _made(ctx, x_RW, None, weight_W, eps, offset, rounds_first)
        return x_RW, y_RW

    @staticmethod
    def backward(ctx: Any, dstream_RW: Tensor, dy_RW: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("forked_rms_norm", _INSTEAD)
        dx_RW, dweight_W = _gradients(ctx, dstream_RW, dy_RW)
        return dx_RW, dweight_W, None, None, None


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RW: Tensor,
        branch_RW: Tensor,
        weight_W: Tensor,
        eps: float,
        offset: float,
        rounds_first: bool,
    ) -> tuple[Tensor, Tensor]:
        return _made(ctx, x_RW, branch_RW, weight_W, eps, offset, rounds_first)

    @staticmethod
    def backward(ctx: Any, dstream_RW: Tensor, dy_RW: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("added_rms_norm", _INSTEAD)
        dx_RW, dweight_W = _gradients(ctx, dstream_RW, dy_RW)
        return dx_RW, dx_RW, dweight_W, None, None, None


_INSTEAD = "transformers' norm, speed_up(..., norm=False)"


def _made(
    ctx: Any,
    x_RW: Tensor,
    branch_RW: Tensor | None,
    weight_W: Tensor,
    eps: float,
    offset: float,
    rounds_first: bool,
) -> tuple[Tensor, Tensor]:
    """What is normed, x or its sum with the branch, and its norm."""
    x_RW, weight_W = x_RW.contiguous(), weight_W.contiguous()
    sum_RW = None
    if branch_RW is not None:
        branch_RW, sum_RW = branch_RW.contiguous(), torch.empty_like(x_RW)
    y_RW = torch.empty_like(x_RW)
    W = len(weight_W)
    if x_RW.numel():
        block, warps = _block(W)
        launch_there(
            x_RW,
            _forward,
            (x_RW.numel() // W,),
            (x_RW, branch_RW, weight_W, sum_RW, y_RW, W, eps),
            (offset, rounds_first, block),
            warps=warps,
        )
    normed_RW = x_RW if sum_RW is None else sum_RW
    ctx.save_for_backward(normed_RW, weight_W)
    ctx.eps, ctx.offset = eps, offset
    return normed_RW, y_RW


def _gradients(ctx: Any, dstream_RW: Tensor | None, dy_RW: Tensor) -> tuple[Tensor, Tensor]:
    """Of what was normed, that of the stream included, and of the weight."""
    x_RW, weight_W = ctx.saved_tensors
    dx_RW = torch.empty_like(x_RW)
    W = len(weight_W)
    R = x_RW.numel() // W
    partial_PW = x_RW.new_empty(min(R, PROGRAMS), W, dtype=torch.float32)
    if dstream_RW is not None:
        dstream_RW = dstream_RW.contiguous()
    if R:
        block, warps = _block(W)
        given = x_RW, weight_W, dstream_RW, dy_RW.contiguous(), dx_RW, partial_PW
        launch_there(
            x_RW,
            _backward,
            (len(partial_PW),),
            (*given, R, W, ctx.eps),
            (ctx.offset, block),
            warps=warps,
        )
    return dx_RW, partial_PW.sum(0).to(weight_W.dtype)


def _block(W: int) -> tuple[int, int]:
    """Lanes that hold a row, and warps to share them."""
    block = power_of_two(W)
    return block, max(1, min(16, block // 512))
