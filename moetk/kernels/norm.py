"""RMSNorm (arXiv 1910.07467) with the rounding points of transformers' families, alone or beside
the residual stream.

Letters: R rows, W their width. What is called R here may be any number of leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x_RW: Tensor, weight_W: Tensor, eps: float, *, offset: float = 0.0, rounds_first: bool = True
) -> Tensor:
    """x over its root mean square, taken in fp32, times (weight + offset); shape and dtype as x.

    rounds_first: the normed row is rounded to x's dtype before the weight is multiplied (Llama and
    its heirs); otherwise the product is taken in fp32 and rounded once (Gemma, gpt-oss).
    weight_W: dtype as x. On a GPU one Triton kernel reads and writes each row once, and backward
    raises SecondOrderError under create_graph=True.
    """
    if not x_RW.is_cuda:
        return rms_norm_plain(x_RW, weight_W, eps, offset, rounds_first)
    from moetk.kernels.gpu.norm import rms_norm_fused

    return rms_norm_fused(x_RW, weight_W, eps, offset, rounds_first)


def forked_rms_norm(
    x_RW: Tensor, weight_W: Tensor, eps: float, *, offset: float = 0.0, rounds_first: bool = True
) -> tuple[Tensor, Tensor]:
    """x as it is, to go on as the residual stream, and `rms_norm` of it.

    What it is for is backward: on a GPU the kernel of the norm's gradient adds that of the stream,
    in fp32, where autograd would read and write both once more.
    """
    if not x_RW.is_cuda:
        return x_RW, rms_norm_plain(x_RW, weight_W, eps, offset, rounds_first)
    from moetk.kernels.gpu.norm import forked_rms_norm_fused

    return forked_rms_norm_fused(x_RW, weight_W, eps, offset, rounds_first)


def added_rms_norm(
    x_RW: Tensor,
    branch_RW: Tensor,
    weight_W: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    rounds_first: bool = True,
) -> tuple[Tensor, Tensor]:
    """x + branch, rounded to their dtype, and `rms_norm` of the rounded sum.

    branch_RW: shape and dtype as x. On a GPU one Triton kernel each way; backward writes one
    gradient, the norm's and the stream's together, which is that of both summands.
    """
    if not x_RW.is_cuda:
        return added_rms_norm_plain(x_RW, branch_RW, weight_W, eps, offset, rounds_first)
    from moetk.kernels.gpu.norm import added_rms_norm_fused

    return added_rms_norm_fused(x_RW, branch_RW, weight_W, eps, offset, rounds_first)


def rms_norm_plain(
    x_RW: Tensor, weight_W: Tensor, eps: float, offset: float, rounds_first: bool
) -> Tensor:
    """The same in plain torch, operation by operation as transformers computes it."""
    wide_RW = x_RW.to(torch.float32)
    normed_RW = wide_RW * torch.rsqrt(wide_RW.pow(2).mean(-1, keepdim=True) + eps)
    if rounds_first:
        return (offset + weight_W) * normed_RW.to(x_RW.dtype)
    return ((offset + weight_W.float()) * normed_RW).to(x_RW.dtype)


def added_rms_norm_plain(
    x_RW: Tensor,
    branch_RW: Tensor,
    weight_W: Tensor,
    eps: float,
    offset: float,
    rounds_first: bool,
) -> tuple[Tensor, Tensor]:
    sum_RW = x_RW + branch_RW
    return sum_RW, rms_norm_plain(sum_RW, weight_W, eps, offset, rounds_first)
