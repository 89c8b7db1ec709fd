"""Logits to their gradient in place, and the losses, in one kernel.

Twin: `moetk.kernels.cross_entropy.plain_cross_entropy_`.

Letters: C rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetk.kernels.gpu.launch import power_of_two
from moetk.kernels.gpu.there import launch_there


@triton.jit
def _cross_entropy(
    logits_ptr,
    labels_ptr,
    items_ptr,
    losses_ptr,
    V,
    ignore_index,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * V
    lanes = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            for first in range(0, V, BLOCK):
                c = first + lanes
                tl.store(logits_ptr + c, tl.zeros((BLOCK,), tl.float32), mask=c < V)
    else:
        highest = -float("inf")
        total = 0.0
        for first in range(0, V, BLOCK):
            c = first + lanes
            x = tl.load(logits_ptr + c, mask=c < V, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(highest, tl.max(x, 0))
            # While all logits so far are -inf, -inf less itself would be NaN.
            base = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp(highest - base) + tl.sum(tl.exp(x - base), 0)
            highest = higher
        log_total = highest + tl.log(total)
        inside = (label >= 0) & (label < V)
        picked = tl.load(logits_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
        tl.store(losses_ptr + row, log_total - picked)
        if GRADIENT:
            # The label's own logit was read above; from here on the row is overwritten.
            tl.debug_barrier()
            share = tl.where(inside, 1.0 / tl.load(items_ptr).to(tl.float32), float("nan"))
            for first in range(0, V, BLOCK):
                c = first + lanes
                x = tl.load(logits_ptr + c, mask=c < V, other=-float("inf")).to(tl.float32)
                p = tl.exp(x - log_total)
                dx = tl.where(c == label, p - 1.0, p) * share
                tl.store(logits_ptr + c, dx.to(logits_ptr.dtype.element_ty), mask=c < V)


def cross_entropy_(
    logits_CV: Tensor, labels_C: Tensor, items: Tensor, ignore_index: int, want_gradient: bool
) -> Tensor:
    """fp32 losses (C,); the contiguous logits become the gradient of their sum over `items`.

    The softmax is taken in fp32, online (arXiv 1805.02867); each row is read twice and written
    once. Nothing is summed across rows, so the result does not depend on scheduling. A label
    outside the vocabulary is not looked up: its row is NaN.
    """
    C, V = logits_CV.shape
    losses_C = torch.empty(C, dtype=torch.float32, device=logits_CV.device)
    block = min(8192, power_of_two(V))
    launch_there(
        logits_CV,
        _cross_entropy,
        (C,),
        (logits_CV, labels_C.contiguous(), items, losses_C, V, ignore_index),
        (want_gradient, block),
        warps=max(1, min(16, block // 512)),
    )
    return losses_C
