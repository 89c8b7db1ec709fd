"""RMSNorm (arXiv 1910.07467) with the rounding points of transformers' families.

Letters: R rows, W their width.
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
    x_RW may have any number of leading dimensions. weight_W: dtype as x. On a GPU one Triton kernel
    reads and writes each row once, and backward raises SecondOrderError under create_graph=True.
    """
    if not x_RW.is_cuda:
        return rms_norm_plain(x_RW, weight_W, eps, offset, rounds_first)
    from moetk.kernels.gpu.norm import rms_norm_fused

    return rms_norm_fused(x_RW, weight_W, eps, offset, rounds_first)


def rms_norm_plain(
    x_RW: Tensor, weight_W: Tensor, eps: float, offset: float, rounds_first: bool
) -> Tensor:
    """The same in plain torch, operation by operation as transformers computes it."""
    wide_RW = x_RW.to(torch.float32)
    normed_RW = wide_RW * torch.rsqrt(wide_RW.pow(2).mean(-1, keepdim=True) + eps)
    if rounds_first:
        return (offset + weight_W) * normed_RW.to(x_RW.dtype)
    return ((offset + weight_W.float()) * normed_RW).to(x_RW.dtype)
