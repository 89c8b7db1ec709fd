"""The two operators of `moetk.kernels.fused_mlp`, launch by launch.

Letters: T tokens, K choices a token, N rows in expert order, E experts, H hidden, I expert width,
J up width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetk.kernels.form import Form
from moetk.kernels.fused_mlp import row_experts
from moetk.kernels.gpu.activation import activation_backward
from moetk.kernels.gpu.combine import gather_sum, segment_sum, spread
from moetk.kernels.gpu.launch import dense
from moetk.kernels.gpu.outer import outer
from moetk.kernels.gpu.rows import rows_times
from moetk.kernels.gpu.up import up_activate
from moetk.kernels.sort_plan import SortPlan

# From this many rows of an expert on, a gathered copy of x is cheaper for dW than gathering in
# each of the product's tiles (H200: 1.41 + 0.14 ms against 1.59 at 1,024 rows).
COPY_FROM = 64


def forward(
    x_TH: Tensor,
    weights_TK: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    plan: SortPlan,
    form: Form,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """y and, with `keep`, h."""
    if not plan.source_N.shape[0]:
        return torch.zeros_like(x_TH), x_TH.new_empty(0, form.up_width(up)) if keep else None
    x_TH, weights_TK, up, down = dense(x_TH), dense(weights_TK), dense(up), dense(down)
    up_bias = None if up_bias is None else dense(up_bias)
    down_bias = None if down_bias is None else dense(down_bias)
    h_NJ, a_NI = up_activate(x_TH, plan.source_N, up, up_bias, plan.offsets_E, form, keep=keep)
    o_NH = rows_times(
        "down", a_NI, down, plan.offsets_E, columns_first=not form.transposed, bias_EB=down_bias
    )
    return gather_sum(o_NH, plan.slot_TK, weights_TK, plan.offsets_E), h_NJ


def backward(
    dy_TH: Tensor,
    h_NJ: Tensor,
    x_TH: Tensor,
    weights_TK: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    plan: SortPlan,
    form: Form,
    need: list[bool],
    into: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor | None, ...]:
    """The six gradients, None where `need` is False. into: what the gradients of up and down are
    added to; None = a new tensor."""
    source_N, offsets_E, num_rows = plan.source_N, plan.offsets_E, plan.source_N.shape[0]
    if not num_rows:
        tensors = (x_TH, weights_TK, up, down, up_bias, down_bias)
        return tuple(
            torch.zeros_like(t) if t is not None and wanted else None
            for t, wanted in zip(tensors, need, strict=True)
        )
    dx = dweights = dup = ddown = dup_bias = ddown_bias = None
    x_TH, dy_TH, weights_TK = dense(x_TH), dense(dy_TH), dense(weights_TK)
    up, down = dense(up), dense(down)

    if any(need[:5]):
        da_NI = rows_times(
            "da", dy_TH, down, offsets_E, columns_first=form.transposed, source_N=source_N
        )
        dh_NJ, aw_NI, dw_TK = activation_backward(
            da_NI,
            h_NJ,
            weights_TK,
            plan.choice_N,
            offsets_E,
            form,
            torch.float32 if down_bias is not None else weights_TK.dtype,
        )
        del da_NI
    if need[1]:
        if down_bias is not None:
            dw_TK = (dw_TK + bias_dots(dy_TH, down_bias, plan)).to(weights_TK.dtype)
        dweights = dw_TK
    if need[3]:
        ddown = _down_gradient(dy_TH, aw_NI, plan, form, into[1])
    if need[5]:
        ddown_bias = segment_sum(dy_TH, offsets_E, source_N, plan.choice_N, weights_TK)
    if any(need[:5]):
        del aw_NI
    if need[4]:
        dup_bias = segment_sum(dh_NJ, offsets_E)
    if need[2]:
        dup = _up_gradient(dh_NJ, x_TH, plan, form, into[0])
    if need[0]:
        dx_NH = rows_times("dx", dh_NJ, up, offsets_E, columns_first=form.transposed)
        dx = gather_sum(dx_NH, plan.slot_TK, None, offsets_E)
    return dx, dweights, dup, ddown, dup_bias, ddown_bias


def _down_gradient(
    dy_TH: Tensor, aw_NI: Tensor, plan: SortPlan, form: Form, into: Tensor | None
) -> Tensor:
    pair, side = ((aw_NI, dy_TH), "right") if form.transposed else ((dy_TH, aw_NI), "left")
    return outer(
        "ddown_gather",
        *pair,
        plan.offsets_E,
        source_N=plan.source_N,
        gather=side,
        into_EAB=into,
    )


def _up_gradient(
    dh_NJ: Tensor, x_TH: Tensor, plan: SortPlan, form: Form, into: Tensor | None
) -> Tensor:
    source_N, offsets_E = plan.source_N, plan.offsets_E
    if source_N.shape[0] >= COPY_FROM * offsets_E.shape[0]:
        rows_NH = spread(x_TH, plan.slot_TK, offsets_E)
        pair = (rows_NH, dh_NJ) if form.transposed else (dh_NJ, rows_NH)
        return outer("dup", *pair, offsets_E, into_EAB=into)
    pair, side = ((x_TH, dh_NJ), "left") if form.transposed else ((dh_NJ, x_TH), "right")
    return outer("dup_gather", *pair, offsets_E, source_N=source_N, gather=side, into_EAB=into)


def bias_dots(dy_TH: Tensor, bias_EH: Tensor, plan: SortPlan) -> Tensor:
    """(T, K) fp32: <dy[t], bias of choice (t, k)>, 0 for unused choices."""
    dots_TE = dy_TH.float() @ bias_EH.float().t()
    experts_N = row_experts(plan.offsets_E, len(plan.source_N))
    ours_N = experts_N < len(bias_EH)
    dots_N = dots_TE[plan.source_N, experts_N.clamp(max=len(bias_EH) - 1)]
    dots_N = dots_N.masked_fill(~ours_N, 0)
    return dots_N.index_select(0, plan.slot_TK.flatten()).view(plan.slot_TK.shape)
