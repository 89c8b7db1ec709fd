"""Bring rows in expert order back to their tokens: gather K rows, weigh, sum.

Letters: T tokens, K choices, N rows, H width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gather_sum(rows_NH: Tensor, slot_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """y[t] = sum over k of weights[t, k] * rows[slot[t, k]]: (T, H).

    slot_TK: int32. weights_TK None = ones. The sum runs, and comes back, in the wider dtype of rows
    and weights.
    """
    if _bag_takes(rows_NH, weights_TK) and slot_TK.numel():
        return F.embedding_bag(slot_TK, rows_NH, per_sample_weights=weights_TK, mode="sum")
    spread_TKH = rows_NH.index_select(0, slot_TK.flatten()).view(*slot_TK.shape, rows_NH.shape[1])
    if weights_TK is not None:
        spread_TKH = spread_TKH * weights_TK[..., None]
    return spread_TKH.sum(1)


def _bag_takes(rows_NH: Tensor, weights_TK: Tensor | None) -> bool:
    """torch's embedding bag is this very sum without the (T, K, H) tensor: a quarter of the time on
    the CPU. In low precision it accumulates in that precision."""
    wide = rows_NH.dtype in (torch.float32, torch.float64)
    same = weights_TK is None or weights_TK.dtype == rows_NH.dtype
    return wide and same and rows_NH.device.type == "cpu"
