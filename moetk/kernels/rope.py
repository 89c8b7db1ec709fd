"""Queries and keys made ready for attention: RMSNorm where the model has one, then rotation.

Letters: B batch, S sequence, N heads, D head size, W the norm's width: D, or N * D where it runs
over all heads of a token at once (OLMoE).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """An RMSNorm over heads: weight_W and epsilon."""

    weight_W: Tensor
    eps: float


def rotated(
    q_BSND: Tensor,
    k_BSND: Tensor,
    cos_BSD: Tensor,
    sin_BSD: Tensor,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> tuple[Tensor, Tensor]:
    """Normed and rotated queries and keys, as shaped and typed as they came; N may differ.

    cos_BSD, sin_BSD: transformers' tables, B = 1 where all sequences share positions; no gradient
    flows to them. On a GPU one Triton kernel reads and writes each tensor once and computes in
    fp32 whatever the dtype; its backward raises SecondOrderError under create_graph=True.
    """
    if not q_BSND.is_cuda:
        return (
            rotated_plain(q_BSND, cos_BSD, sin_BSD, q_norm),
            rotated_plain(k_BSND, cos_BSD, sin_BSD, k_norm),
        )
    from moetk.kernels.gpu.rope import rotated_fused

    return rotated_fused(q_BSND, k_BSND, cos_BSD, sin_BSD, q_norm, k_norm)


def rotated_plain(
    x_BSND: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, norm: Norm | None = None
) -> Tensor:
    """One of the two in plain torch: fp32 (or wider) throughout, rounded once at the end.

    The norm itself is taken in fp32 whatever the model's dtype, as transformers' RMSNorm does.
    """
    wide = torch.promote_types(x_BSND.dtype, torch.float32)
    x = x_BSND if norm is None else _normed(x_BSND, norm, wide)
    first, second = x.to(wide).chunk(2, -1)
    cos, sin = cos_BSD.to(wide).unsqueeze(-2), sin_BSD.to(wide).unsqueeze(-2)
    turned = torch.cat((-second, first), -1)
    return (x.to(wide) * cos + turned * sin).to(x_BSND.dtype)


def _normed(x_BSND: Tensor, norm: Norm, wide: torch.dtype) -> Tensor:
    B, S, N, D = x_BSND.shape
    width = len(norm.weight_W)
    rows_W = x_BSND.reshape(B, S, N * D // width, width).to(torch.float32)
    mean_square = rows_W.pow(2).mean(-1, keepdim=True)
    normed = (rows_W * torch.rsqrt(mean_square + norm.eps)).to(wide) * norm.weight_W.to(wide)
    return normed.view_as(x_BSND)
