"""RMSNorm: one kernel forward, one backward.

Twin: `moetk.kernels.norm.rms_norm_plain`.

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
    weight_ptr,
    y_ptr,
    W,
    eps,
    OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * W
    c = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + start + c, mask=c < W, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=c < W, other=0.0).to(tl.float32) + OFFSET
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / W + eps)
    if ROUNDS_FIRST:
        normed = normed.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + start + c, (normed * weight).to(y_ptr.dtype.element_ty), mask=c < W)


@triton.jit
def _backward(
    x_ptr,
    weight_ptr,
    dy_ptr,
    dx_ptr,
    partial_ptr,
    R,
    W,
    eps,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    c = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + c, mask=c < W, other=0.0).to(tl.float32) + OFFSET
    dweight = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), R, tl.num_programs(0)):
        x = tl.load(x_ptr + row * W + c, mask=c < W, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * W + c, mask=c < W, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 0) / W + eps)
        normed = x * scale
        dweight += dy * normed
        dnormed = dy * weight
        dx = (dnormed - normed * (tl.sum(dnormed * normed, 0) / W)) * scale
        tl.store(dx_ptr + row * W + c, dx.to(dx_ptr.dtype.element_ty), mask=c < W)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * W + c, dweight, mask=c < W)


def rms_norm_fused(
    x_RW: Tensor, weight_W: Tensor, eps: float, offset: float, rounds_first: bool
) -> Tensor:
    """`moetk.kernels.norm.rms_norm` on a GPU. Saves x alone; the weight's gradient is summed in a
    fixed order."""
    y_RW: Tensor = _RMSNorm.apply(x_RW, weight_W, eps, offset, rounds_first)
    return y_RW


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RW: Tensor, weight_W: Tensor, eps: float, offset: float, rounds_first: bool
    ) -> Tensor:
        x_RW, weight_W = x_RW.contiguous(), weight_W.contiguous()
        y_RW = torch.empty_like(x_RW)
        ctx.save_for_backward(x_RW, weight_W)
        ctx.eps, ctx.offset = eps, offset
        W = len(weight_W)
        if x_RW.numel():
            block, warps = _block(W)
            launch_there(
                x_RW,
                _forward,
                (x_RW.numel() // W,),
                (x_RW, weight_W, y_RW, W, eps),
                (offset, rounds_first, block),
                warps=warps,
            )
        return y_RW

    @staticmethod
    def backward(ctx: Any, dy_RW: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("rms_norm", "transformers' norm, speed_up(..., norm=False)")
        x_RW, weight_W = ctx.saved_tensors
        dx_RW = torch.empty_like(x_RW)
        W = len(weight_W)
        R = x_RW.numel() // W
        partial_PW = x_RW.new_empty(min(R, PROGRAMS), W, dtype=torch.float32)
        if R:
            block, warps = _block(W)
            launch_there(
                x_RW,
                _backward,
                (len(partial_PW),),
                (x_RW, weight_W, dy_RW.contiguous(), dx_RW, partial_PW, R, W, ctx.eps),
                (ctx.offset, block),
                warps=warps,
            )
        return dx_RW, partial_PW.sum(0).to(weight_W.dtype), None, None, None


def _block(W: int) -> tuple[int, int]:
    """Lanes that hold a row, and warps to share them."""
    block = power_of_two(W)
    return block, max(1, min(16, block // 512))
