"""The experts of a layer as two operators: a forward that keeps only x and the up product, and the
backward, which recomputes the activation.

The graph is SonicMoE's (arXiv 2512.14080, section 4): rows are gathered inside the products, the
routing weight multiplies the rows of the down product as they are summed, and its gradient is
<d_a, a>, so that neither the gathered rows, the activation nor the unsummed output is kept.

On a CPU both operators run the plain composition below, which states what the kernels compute; on
CUDA they run `moetk.kernels.gpu`.

Letters: T tokens, K choices a token, N = T * K rows in expert order, E experts, H hidden, I expert
width, J = 2I for gated activations, else I.
"""

from __future__ import annotations

import functools
from dataclasses import astuple
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from moetk.errors import BackendError
from moetk.kernels.direct import direct, node, on_device_of
from moetk.kernels.first_order import refuse_second_order
from moetk.kernels.form import Form
from moetk.kernels.gather_sum import gather_sum
from moetk.kernels.grouped_mm import grouped_mm, grouped_outer
from moetk.kernels.sort_plan import SortPlan


def row_experts(offsets_E: Tensor, num_rows: int) -> Tensor:
    """(N,) int64: the expert of each row; E behind the last offset."""
    rows_N = torch.arange(num_rows, device=offsets_E.device, dtype=torch.int32)
    return torch.searchsorted(offsets_E, rows_N, right=True)


def bias_rows(bias_EB: Tensor, offsets_E: Tensor, num_rows: int) -> Tensor:
    """(N, B): the bias of each row's expert; 0 where the row is nobody's."""
    experts_N = row_experts(offsets_E, num_rows)
    bias_NB = bias_EB.index_select(0, experts_N.clamp(max=len(bias_EB) - 1))
    return bias_NB.masked_fill((experts_N == len(bias_EB))[:, None], 0)


def segment_sum(rows_NB: Tensor, offsets_E: Tensor) -> Tensor:
    """(E, B): the sum of each expert's rows."""
    num_experts = len(offsets_E)
    sums_EB = rows_NB.new_zeros(num_experts + 1, rows_NB.shape[1])
    return sums_EB.index_add(0, row_experts(offsets_E, len(rows_NB)), rows_NB)[:num_experts]


def experts_mlp(
    x_TH: Tensor,
    weights_TK: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    plan: SortPlan,
    form: Form,
    *,
    add_to_grad: bool = False,
) -> Tensor:
    """y (T, H): each token's experts, weighted and summed. Dtypes and shapes as `moe_mlp`.

    add_to_grad: backward adds the gradients of up and down into their .grad, where they have one,
    and returns none: the product that computes them adds to .grad as it ends, which saves the
    gradient's memory and a pass over it. It is rounded when it was added, or before and after, as
    torch would (`moetk.kernels.gpu.outer`). Raises BackendError where somebody else waits for the
    gradient that is not returned.
    """
    tensors = (x_TH, weights_TK, up, down, up_bias, down_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if add_to_grad and keep:
        check_adds(x_TH, up, down)
    if direct(x_TH):
        y_TH: Tensor
        if keep:
            y_TH = _node(*tensors, plan, form, add_to_grad)
        else:
            with on_device_of(x_TH):
                y_TH, _ = _gpu().forward(*tensors, plan, form, False)
        return y_TH
    fields = (plan.choice_N, plan.source_N, plan.slot_TK, plan.offsets_E)
    return moe_mlp(*tensors, *fields, *astuple(form), keep)[0]  # type: ignore[no-any-return]


def check_adds(x_TH: Tensor, up: Tensor, down: Tensor) -> None:
    """Raise BackendError where gradients of up and down cannot be added to .grad behind autograd's
    back: somebody else waits for them."""
    watched = not direct(x_TH)
    several = not watched and several_ranks()
    for name, weight in (("up", up), ("down", down)):
        why = None
        if watched:
            why = "it needs eager CUDA (no torch.compile, no dispatch mode)"
        elif weight.requires_grad and not weight.is_leaf:
            why = f"{name} is no parameter but computed (LoRA, a parametrisation)"
        elif weight._backward_hooks or weight._post_accumulate_grad_hooks:
            why = f"{name} has gradient hooks (an optimizer in backward), which would not run"
        elif several:
            why = "several ranks run, and who reduces gradients (DDP, FSDP2) waits for them"
        if why:
            raise BackendError(f"add_to_grad=True: {why}. Leave it out: gradients are returned.")


def several_ranks() -> bool:
    """True where torch.distributed runs with more than one."""
    here = torch.distributed.is_available() and torch.distributed.is_initialized()
    return here and torch.distributed.get_world_size() > 1


def addable(weight: Tensor) -> Tensor | None:
    """The gradient that a kernel may add to: there, dense, of the weight's dtype, and where the
    copy engine can reach it."""
    grad = weight.grad
    if grad is None or grad.dtype != weight.dtype:
        return None
    return grad if grad.is_contiguous() and grad.data_ptr() % 16 == 0 else None


@functools.cache
def _gpu() -> Any:
    """The kernels' module; it imports Triton."""
    from moetk.kernels.gpu import mlp

    return mlp


class _Direct(torch.autograd.Function):
    """The kernels of both operators, called as they are; see `direct`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, ctx.plan, ctx.form, ctx.adds = args
        with on_device_of(tensors[0]):
            y_TH, h_NJ = _gpu().forward(*tensors, ctx.plan, ctx.form, True)
        ctx.save_for_backward(h_NJ, *tensors)
        return y_TH  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order(*_FIRST_ORDER)
        h_NJ, x_TH, weights_TK, up, down, up_bias, down_bias = ctx.saved_tensors
        tensors = (x_TH, weights_TK, up, down, up_bias, down_bias)
        wanted = ctx.needs_input_grad[:6]
        into = (addable(up), addable(down)) if ctx.adds else (None, None)
        with on_device_of(x_TH):
            grads = _gpu().backward(dy_TH, h_NJ, *tensors, ctx.plan, ctx.form, list(wanted), into)
        added = (None, None, *into, None, None)
        returned = [
            grad if want and there is None else None
            for grad, want, there in zip(grads, wanted, added, strict=True)
        ]
        return (*returned, None, None, None)


_node = node(_Direct)


# An operator's arguments are tensors, numbers and names: it takes plan and form field by field.
_ARGS = (
    "Tensor x_TH, Tensor weights_TK, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, "
    "Tensor choice_N, Tensor source_N, Tensor slot_TK, Tensor offsets_E, "
    "str act, bool gated, bool interleaved, bool transposed, float alpha, float limit"
)
_FIRST_ORDER = 'backend="fused"', 'backend="reference"'


_Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _read(args: tuple[Any, ...]) -> tuple[_Tensors, SortPlan, Form]:
    """What `_ARGS` names: x, weights, the matrices and their biases; the plan; the form."""
    return cast(_Tensors, args[:6]), SortPlan(*args[6:10]), Form(*args[10:16])


@torch.library.custom_op(
    "moetk::moe_mlp", mutates_args=(), schema=f"({_ARGS}, bool keep) -> (Tensor, Tensor)"
)
def moe_mlp(*args: Any) -> tuple[Tensor, Tensor]:
    """y (T, H) and, with keep, the up product h (N, J) that backward needs, else (0, J).

    x, up, down and the biases share a dtype, which y and h have; weights_TK is floating, the plan
    (`SortPlan`) int32. Rows behind offsets_E[-1] belong to unused choices and are not computed.
    """
    (x_TH, weights_TK, up, down, up_bias, down_bias), plan, form = _read(args)
    keep, offsets_E, num_rows = args[16], plan.offsets_E, len(plan.source_N)
    h_NJ = grouped_mm(x_TH.index_select(0, plan.source_N), form.columns(up), offsets_E)
    if up_bias is not None:
        h_NJ = h_NJ + bias_rows(up_bias, offsets_E, num_rows)
    o_NH = grouped_mm(form.activate(h_NJ), form.columns(down), offsets_E)
    if down_bias is not None:
        o_NH = o_NH + bias_rows(down_bias, offsets_E, num_rows)
    y_TH = gather_sum(o_NH, plan.slot_TK, plan.weights_of_used(weights_TK)).to(x_TH.dtype)
    return y_TH, h_NJ if keep else h_NJ[:0].clone()


@moe_mlp.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    tensors, plan, form = _read(args)
    x_TH, up = tensors[0], tensors[2]
    with on_device_of(x_TH):
        y_TH, h_NJ = _gpu().forward(*tensors, plan, form, args[16])
    return y_TH, x_TH.new_empty(0, form.up_width(up)) if h_NJ is None else h_NJ


@moe_mlp.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    (x_TH, _, up, *_), plan, form = _read(args)
    num_kept = len(plan.source_N) if args[16] else 0
    return x_TH.new_empty(x_TH.shape), x_TH.new_empty(num_kept, form.up_width(up))


_SIX = ", ".join(["Tensor"] * 6)


@torch.library.custom_op(
    "moetk::moe_mlp_backward",
    mutates_args=(),
    schema=f"(Tensor dy_TH, Tensor h_NJ, {_ARGS}, bool[] need) -> ({_SIX})",
)
def moe_mlp_backward(dy_TH: Tensor, h_NJ: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The gradients of x, weights, up, down, up_bias, down_bias, each in its tensor's dtype and
    shape; (0,) where `need` says that nobody wants it."""
    (x_TH, weights_TK, up, down, _, down_bias), plan, form = _read(args)
    need, source_N, slot_TK, offsets_E = args[16], plan.source_N, plan.slot_TK, plan.offsets_E
    num_rows, empty = len(source_N), x_TH.new_empty(0)
    dx = dweights = dup = ddown = dup_bias = ddown_bias = empty
    dy_NH = dy_TH.index_select(0, source_N)
    w_N = weights_TK.flatten().index_select(0, plan.choice_N)
    w_N = w_N.masked_fill(row_experts(offsets_E, num_rows) == len(offsets_E), 0)[:, None]
    a_NI = form.activate(h_NJ)
    da_NI = grouped_mm(dy_NH, form.columns(down).transpose(1, 2), offsets_E)
    if need[1]:
        wide = torch.promote_types(da_NI.dtype, weights_TK.dtype)
        dw_N = (da_NI.to(wide) * a_NI).sum(-1)
        if down_bias is not None:
            dw_N = dw_N + (bias_rows(down_bias, offsets_E, num_rows) * dy_NH).sum(-1)
        dweights = dw_N.index_select(0, slot_TK.flatten()).view(slot_TK.shape).to(weights_TK.dtype)
    if need[3]:
        left, right = dy_NH, (a_NI * w_N).to(down.dtype)
        pair = (right, left) if form.transposed else (left, right)
        ddown = grouped_outer(*pair, offsets_E)
    if need[5]:
        ddown_bias = segment_sum((dy_NH * w_N).to(dy_NH.dtype), offsets_E)
    if need[0] or need[2] or need[4]:
        dh_NJ = form.backward(h_NJ, (da_NI * w_N).to(h_NJ.dtype))
        if need[2]:
            rows_NH = x_TH.index_select(0, source_N)
            pair = (rows_NH, dh_NJ) if form.transposed else (dh_NJ, rows_NH)
            dup = grouped_outer(*pair, offsets_E)
        if need[4]:
            dup_bias = segment_sum(dh_NJ, offsets_E)
        if need[0]:
            dx_NH = grouped_mm(dh_NJ, form.columns(up).transpose(1, 2), offsets_E)
            dx = gather_sum(dx_NH, slot_TK, None)
    given = (dx, dweights, dup, ddown, dup_bias, ddown_bias)
    return tuple(grad if grad is not empty else empty.clone() for grad in given)


@moe_mlp_backward.register_kernel("cuda")
def _(dy_TH: Tensor, h_NJ: Tensor, *args: Any) -> tuple[Tensor, ...]:
    tensors, plan, form = _read(args)
    with on_device_of(dy_TH):
        grads = _gpu().backward(dy_TH, h_NJ, *tensors, plan, form, args[16])
    return tuple(dy_TH.new_empty(0) if grad is None else grad for grad in grads)


@moe_mlp_backward.register_fake
def _(dy_TH: Tensor, h_NJ: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(
        t.new_empty(t.shape) if t is not None and wanted else dy_TH.new_empty(0)
        for t, wanted in zip(args[:6], args[16], strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # else h gets a gradient of zeros, of its full size
    ctx.save_for_backward(output[1], *inputs[:10])
    ctx.form = inputs[10:16]


def _backward(ctx: Any, dy_TH: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    refuse_second_order(*_FIRST_ORDER)
    wanted = ctx.needs_input_grad[:6]
    if dy_TH is None or not any(wanted):
        return (None,) * 17
    grads = moe_mlp_backward(dy_TH, *ctx.saved_tensors, *ctx.form, list(wanted))
    taken = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return (*taken, *(None,) * 11)


moe_mlp.register_autograd(_backward, setup_context=_save)
