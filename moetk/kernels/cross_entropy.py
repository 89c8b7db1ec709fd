"""Cross-entropy of a linear head, by chunks of rows, without ever holding all the logits.

Letters: T positions, N of them with a label, C rows of one chunk, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moetk.errors import ExpertIndexError, MoeDtypeError, MoeShapeError
from moetk.kernels.first_order import refuse_second_order

CHUNK = 4096
"""Rows of one chunk: products large enough to run at full speed, 1.2 GiB of bf16 logits at
V = 151,936."""


def linear_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    items: Tensor | float,
    *,
    bias_V: Tensor | None = None,
    rows_N: Tensor | None = None,
    ignore_index: int = -100,
    chunk: int = CHUNK,
    accumulate: torch.dtype = torch.float32,
) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T + bias` against the labels, over `items`.

    Returns a scalar, in fp32 or wider. The gradients of hidden, weight and bias are computed here,
    in forward, while a chunk's logits exist (as Liger-Kernel's fused linear cross-entropy does):
    each product runs once, and backward only scales. No gradient is computed for what does not
    require one, and none under no_grad.

    labels_T: int64; rows of `ignore_index` count nothing and have no gradient. items: the divisor,
    a number or a scalar tensor on the same device. rows_N: int64, distinct: the only rows to look
    at, so that ignored ones cost nothing. accumulate: what the weight's gradient is summed in over
    chunks; the sum is rounded once to the weight's dtype.
    Raises MoeDtypeError on fp16, MoeShapeError on shapes that do not fit, ExpertIndexError on a
    label outside 0 .. V-1 (a RuntimeError under torch.compile, a device-side assertion on a GPU);
    in backward SecondOrderError under create_graph=True.
    """
    _check(hidden_TH, weight_VH, labels_T, ignore_index)
    if not torch.is_grad_enabled():
        hidden_TH, weight_VH = hidden_TH.detach(), weight_VH.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    if not isinstance(items, Tensor):
        items = torch.full((), items, dtype=torch.float32, device=hidden_TH.device)
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden_TH, weight_VH, bias_V, labels_T, items, rows_N, ignore_index, chunk, accumulate
    )
    return loss


def plain_cross_entropy_(
    logits_CV: Tensor, labels_C: Tensor, items: Tensor, ignore_index: int, want_gradient: bool
) -> Tensor:
    """Losses (C,), in fp32 or wider; the logits become the gradient of their sum over `items`.

    The twin of `moetk.kernels.gpu.cross_entropy.cross_entropy_`. A row without a label has loss
    zero and gradient zero whatever its logits hold; one whose label is no column is NaN.
    """
    last = logits_CV.shape[1] - 1
    labelled_C1 = (labels_C != ignore_index)[:, None]
    picked_C1 = labels_C.clamp(0, last)[:, None]
    spoiled_C1 = picked_C1 != labels_C[:, None]
    log_p_CV = logits_CV.to(_wide(logits_CV.dtype)).log_softmax(-1)
    losses_C1 = -log_p_CV.gather(1, picked_C1).masked_fill(spoiled_C1, torch.nan)
    if want_gradient:
        gradient_CV = log_p_CV.exp_()
        minus_one = gradient_CV.new_full((), -1).expand(picked_C1.shape)
        gradient_CV.scatter_add_(1, picked_C1, minus_one).div_(items)
        gradient_CV.masked_fill_(spoiled_C1, torch.nan)
        logits_CV.copy_(gradient_CV.where(labelled_C1, 0))
    return losses_C1.where(labelled_C1, 0).squeeze(1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        items: Tensor,
        rows_N: Tensor | None,
        ignore_index: int,
        chunk: int,
        accumulate: torch.dtype,
    ) -> Tensor:
        cross_entropy_ = _on(hidden_TH.device)
        sums = _Gradients(ctx.needs_input_grad[:3], hidden_TH, weight_VH, accumulate)
        losses = []
        for part in _parts(len(labels_T), rows_N, chunk):
            hidden_CH, labels_C = _take(hidden_TH, part), _take(labels_T, part)
            logits_CV = F.linear(hidden_CH, weight_VH, bias_V)
            losses.append(cross_entropy_(logits_CV, labels_C, items, ignore_index, sums.wanted))
            sums.add(part, logits_CV, hidden_CH, weight_VH)
            del logits_CV  # before the next chunk's are allocated
        ctx.save_for_backward(*sums.rounded(weight_VH, bias_V))
        if not losses:
            return hidden_TH.new_zeros((), dtype=_wide(hidden_TH.dtype)) / items
        return torch.cat(losses).sum() / items

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order(
            "linear_cross_entropy", "torch's cross_entropy of the logits, speed_up(..., loss=False)"
        )
        # Not in place: a retained graph may come here again.
        scaled = (None if saved is None else saved * grad for saved in ctx.saved_tensors)
        return *scaled, None, None, None, None, None, None


class _Gradients:
    """The three gradients as they grow chunk by chunk; None for what needs none."""

    def __init__(
        self,
        needed: tuple[bool, ...],
        hidden_TH: Tensor,
        weight_VH: Tensor,
        accumulate: torch.dtype,
    ) -> None:
        self.wanted = any(needed)
        wide = torch.promote_types(accumulate, weight_VH.dtype)
        self.hidden_TH = torch.zeros_like(hidden_TH) if needed[0] else None
        self.weight_VH = torch.zeros_like(weight_VH, dtype=wide) if needed[1] else None
        self.bias_V = weight_VH.new_zeros(len(weight_VH), dtype=wide) if needed[2] else None

    def add(
        self, part: Tensor | slice, dlogits_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor
    ) -> None:
        if self.hidden_TH is not None:
            if isinstance(part, slice):
                torch.mm(dlogits_CV, weight_VH, out=self.hidden_TH[part])
            else:
                self.hidden_TH.index_copy_(0, part, dlogits_CV @ weight_VH)
        if self.weight_VH is not None:
            _add_product(self.weight_VH, dlogits_CV.T, hidden_CH)
        if self.bias_V is not None:
            self.bias_V += dlogits_CV.sum(0, dtype=self.bias_V.dtype)

    def rounded(self, weight_VH: Tensor, bias_V: Tensor | None) -> tuple[Tensor | None, ...]:
        weight = None if self.weight_VH is None else self.weight_VH.to(weight_VH.dtype)
        bias = None if self.bias_V is None or bias_V is None else self.bias_V.to(bias_V.dtype)
        return self.hidden_TH, weight, bias


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; on a GPU the product is not rounded to the dtype of a and b first."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _parts(num_rows: int, rows_N: Tensor | None, chunk: int) -> list[Tensor | slice]:
    if rows_N is not None:
        return list(rows_N.split(chunk)) if len(rows_N) else []
    return [slice(first, first + chunk) for first in range(0, num_rows, chunk)]


def _take(x: Tensor, part: Tensor | slice) -> Tensor:
    return x[part] if isinstance(part, slice) else x.index_select(0, part)


def _on(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, int, bool], Tensor]:
    if device.type != "cuda":
        return plain_cross_entropy_
    from moetk.kernels.gpu.cross_entropy import cross_entropy_

    return cross_entropy_


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, ignore_index: int) -> None:
    if hidden_TH.ndim != 2 or weight_VH.ndim != 2 or hidden_TH.shape[1] != weight_VH.shape[1]:
        raise MoeShapeError(
            f"linear_cross_entropy: hidden_TH {tuple(hidden_TH.shape)} and weight_VH "
            f"{tuple(weight_VH.shape)} need two dimensions each and one width H: flatten the batch."
        )
    for name, tensor in (("hidden_TH", hidden_TH), ("weight_VH", weight_VH)):
        if tensor.dtype == torch.float16:
            raise MoeDtypeError(
                f"linear_cross_entropy: {name} is {tensor.dtype}. The gradients are rounded in "
                "forward, before a loss scale is known, and fp16 would lose the small ones: use "
                "bfloat16 or float32, or torch's cross_entropy of the logits."
            )
    if labels_T.shape != hidden_TH.shape[:1]:
        raise MoeShapeError(
            f"linear_cross_entropy: labels_T {tuple(labels_T.shape)} needs one label for each of "
            f"the {len(hidden_TH)} rows of hidden_TH; mark a row without one as {ignore_index}."
        )
    vocabulary = len(weight_VH)
    fits_T = (labels_T == ignore_index) | ((labels_T >= 0) & (labels_T < vocabulary))
    if labels_T.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(fits_T.all(), "linear_cross_entropy: a label is outside 0 .. V-1")
    elif not bool(fits_T.all()):
        first = int((~fits_T).nonzero()[0])
        raise ExpertIndexError(
            f"linear_cross_entropy: labels_T[{first}] is {int(labels_T[first])}, but the head has "
            f"{vocabulary} rows; need 0 <= label < {vocabulary}, or {ignore_index} for no label."
        )
