"""The graph of `moetk.kernels.fused_mlp` with Transformer Engine's products.

What is kept between forward and backward is the same: x and the up product. Rows are gathered into
a copy before a product, again in backward, and weights are quantised in both passes, so that FP8
holds nothing in between either.

Letters: T tokens, K choices a token, U rows in expert order, E experts, H hidden, I expert width,
J up width, P = T * K + 1 choices, the last of which is padding's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetk.kernels.direct import on_device_of
from moetk.kernels.first_order import refuse_second_order
from moetk.kernels.form import Form
from moetk.kernels.fused_mlp import addable
from moetk.kernels.gpu.activation import activation_backward
from moetk.kernels.gpu.combine import gather_sum, segment_sum
from moetk.kernels.gpu.launch import dense
from moetk.kernels.gpu.mlp import bias_dots
from moetk.kernels.gpu.te_numbers import Numbers
from moetk.kernels.gpu.te_products import Products
from moetk.kernels.gpu.te_rows import ExpertRows, activate


def te_mlp(
    x_TH: Tensor,
    weights_TK: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    rows: ExpertRows,
    form: Form,
    numbers: Numbers,
    *,
    add_to_grad: bool,
) -> Tensor:
    """y (T, H): each token's experts, weighted and summed. Dtypes and shapes as in `moe_mlp`, and
    add_to_grad as in `experts_mlp`, both of moetk.kernels.fused_mlp."""
    tensors = (x_TH, weights_TK, up, down, up_bias, down_bias)
    y_TH: Tensor = _TeMlp.apply(*tensors, rows, form, numbers, add_to_grad)
    return y_TH


class _TeMlp(torch.autograd.Function):
    """Keeps what it was given and the up product."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, rows, form, numbers, ctx.adds = args
        ctx.rest = rows, form, numbers
        with on_device_of(tensors[0]):
            y_TH, h_UJ = _forward(*_dense(tensors), *ctx.rest)
        ctx.save_for_backward(h_UJ, *tensors)
        return y_TH

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order('backend="te"', 'backend="reference"')
        h_UJ, *tensors = ctx.saved_tensors
        into = tuple(addable(weight) if ctx.adds else None for weight in tensors[2:4])
        need = ctx.needs_input_grad[:6]
        with on_device_of(dy_TH):
            given = dense(dy_TH), h_UJ, *_dense(tensors), *ctx.rest
            grads = _backward(*given, need=need, into=into)
        added = (None, None, *into, None, None)
        left = [grad if there is None else None for grad, there in zip(grads, added, strict=True)]
        return (*left, None, None, None, None)


def _dense(tensors: list[Tensor | None]) -> Any:
    return [None if tensor is None else dense(tensor) for tensor in tensors]


def _forward(
    x_TH: Tensor,
    weights_TK: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    rows: ExpertRows,
    form: Form,
    numbers: Numbers,
) -> tuple[Tensor, Tensor]:
    """y (T, H) and h (U, J)."""
    if not rows.total:
        return torch.zeros_like(x_TH), x_TH.new_empty(0, form.up_width(up))
    products = Products(rows.counts, numbers, form.transposed)
    x = numbers.inputs.tokens(x_TH, rows, rowwise=True, columnwise=False)
    h_UJ = products.outputs(x, up, up_bias)
    del x
    a = numbers.inputs.rows(activate(h_UJ, form), rows.counts, rowwise=True, columnwise=False)
    o_UH = products.outputs(a, down, down_bias)
    return gather_sum(o_UH, rows.slot_TK, weights_TK, rows.ends_E), h_UJ


def _backward(
    dy_TH: Tensor,
    h_UJ: Tensor,
    x_TH: Tensor,
    weights_TK: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    rows: ExpertRows,
    form: Form,
    numbers: Numbers,
    *,
    need: tuple[bool, ...],
    into: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """The six tensors' gradients, None where `need` is False. into: what those of up and down are
    added to; None = a new tensor."""
    tensors = (x_TH, weights_TK, up, down, up_bias, down_bias)
    if not rows.total:
        pairs = zip(tensors, need, strict=True)
        return [torch.zeros_like(t) if t is not None and wanted else None for t, wanted in pairs]
    dx = dweights = dup = ddown = dup_bias = ddown_bias = None
    plan, counts = rows.plan, rows.counts
    products = Products(counts, numbers, form.transposed)
    if need[5]:
        ddown_bias = segment_sum(dy_TH, plan.offsets_E, plan.source_N, plan.choice_N, weights_TK)
    if any(need[:5]):
        dy = numbers.gradients.tokens(dy_TH, rows, rowwise=True, columnwise=need[3])
        da_UI = products.inputs(dy, down)
        # Padding reads a weight of zero behind all others, and leaves its gradient there.
        w_P = F.pad(weights_TK.flatten(), (0, 1))
        dh_UJ, aw_UI, dw_P = activation_backward(
            da_UI, h_UJ, w_P, rows.choice_U, rows.ends_E, form, torch.float32
        )
        del da_UI
    if need[1]:
        dw_TK = dw_P[:-1].view(weights_TK.shape)
        dw_TK = dw_TK.masked_fill(rows.slot_TK >= rows.total, 0)  # nobody wrote an unused choice's
        if down_bias is not None:
            dw_TK = dw_TK + bias_dots(dy_TH, down_bias, plan)
        dweights = dw_TK.to(weights_TK.dtype)
    if need[3]:
        aw = numbers.inputs.rows(aw_UI, counts, rowwise=False, columnwise=True)
        ddown = products.gradient(dy, aw, down, into[1])
        del aw
    if any(need[:5]):
        del dy, aw_UI
    if need[4]:
        dup_bias = segment_sum(dh_UJ, rows.ends_E)
    if need[0] or need[2]:
        dh = numbers.gradients.rows(dh_UJ, counts, rowwise=need[0], columnwise=need[2])
    if need[2]:
        x = numbers.inputs.tokens(x_TH, rows, rowwise=False, columnwise=True)
        dup = products.gradient(dh, x, up, into[0])
        del x
    if need[0]:
        dx = gather_sum(products.inputs(dh, up), rows.slot_TK, None, rows.ends_E)
    return [dx, dweights, dup, ddown, dup_bias, ddown_bias]
