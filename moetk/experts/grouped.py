"""The bank as two grouped matrix products over rows sorted by expert.

Three choices make it lighter than the plain composition of the same steps: the gradient of both
gathers is a gather again (the plan knows where each row came from), the routing weights' gradient
is taken from the activation (d_a . a, so the weighted output is never saved; SonicMoE,
arXiv 2512.14080), and unused rows are never computed.

Letters: T tokens, K choices, N = T*K rows in expert order, H hidden, I expert width, J up width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetk.experts.spec import BankSpec, BankWeights
from moetk.kernels.first_order import refuse_second_order
from moetk.kernels.gather_sum import gather_sum
from moetk.kernels.grouped_mm import grouped_mm, grouped_outer
from moetk.kernels.sort_plan import SortPlan, sort_plan
from moetk.routing import ExpertChoice, Routing, SoftChoice, TokenChoice


def grouped(spec: BankSpec, weights: BankWeights, x_TH: Tensor, routing: Routing) -> Tensor:
    """The same function as `reference`: (T, H) -> (T, H)."""
    if isinstance(routing, TokenChoice):
        return _token_choice(spec, weights, x_TH, routing)
    if isinstance(routing, ExpertChoice):
        return _expert_choice(spec, weights, x_TH, routing)
    return _soft_choice(spec, weights, x_TH, routing)


def _token_choice(
    spec: BankSpec, weights: BankWeights, x_TH: Tensor, routing: TokenChoice
) -> Tensor:
    plan = sort_plan(routing.experts_TK, routing.kept_TK, spec.num_experts, routing.known)
    x_in = x_TH.to(weights.dtype)
    hidden_NJ = _GatherUp.apply(
        x_in,
        routing.weights_TK if spec.scale == "input" else None,
        weights.up,
        weights.up_bias,
        plan,
        spec.transposed,
    )
    y_TH: Tensor = _DownCombine.apply(
        spec.activate(hidden_NJ),
        routing.weights_TK if spec.scale == "output" else None,
        weights.down,
        weights.down_bias,
        plan,
        spec.transposed,
    )
    return y_TH.to(x_TH.dtype)


def _row_experts(plan: SortPlan) -> Tensor:
    """(N,) int64: the expert of each row; E behind the last offset."""
    rows_N = torch.arange(plan.source_N.shape[0], device=plan.source_N.device, dtype=torch.int32)
    return torch.searchsorted(plan.offsets_E, rows_N, right=True)


def _bias_rows(bias_EB: Tensor, plan: SortPlan) -> Tensor:
    """(N, B): the bias of each row's expert; 0 where the row is nobody's."""
    experts_N = _row_experts(plan)
    bias_NB = bias_EB.index_select(0, experts_N.clamp(max=bias_EB.shape[0] - 1))
    return bias_NB.masked_fill((experts_N == bias_EB.shape[0])[:, None], 0)


def _bias_gradient(dy_NB: Tensor, plan: SortPlan) -> Tensor:
    """Sum of each expert's rows, as a product with ones: no atomics, accumulated like a GEMM."""
    ones_N1 = dy_NB.new_ones(dy_NB.shape[0], 1)
    if dy_NB.is_cuda:  # the device kernel wants rows of 16 bytes
        ones_N1 = ones_N1.expand(-1, 8).contiguous()
    return grouped_outer(ones_N1, dy_NB, plan.offsets_E)[:, 0]


def _spread(values_N: Tensor, plan: SortPlan) -> Tensor:
    """One value a row, back in the order of the choices: (N,) -> (T, K)."""
    return values_N.index_select(0, plan.slot_TK.flatten()).view(plan.slot_TK.shape)


def _sorted(values_TK: Tensor, plan: SortPlan) -> Tensor:
    """One value a choice, in row order: (T, K) -> (N,)."""
    return values_TK.flatten().index_select(0, plan.choice_N)


_FIRST_ORDER = 'backend="grouped"', 'backend="reference"'


class _GatherUp(torch.autograd.Function):
    """x (T, H) -> h (N, J): gather each row, scale it where asked, times its expert's matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        scale_TK: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        plan: SortPlan,
        transposed: bool,
    ) -> Tensor:
        rows_NH = x_TH.index_select(0, plan.source_N)
        if scale_TK is not None:
            rows_NH = (rows_NH * _sorted(scale_TK, plan)[:, None]).to(x_TH.dtype)
        h_NJ = grouped_mm(
            rows_NH, up if transposed else up.transpose(1, 2), plan.offsets_E, full=plan.full
        )
        if up_bias is not None:
            h_NJ = h_NJ + _bias_rows(up_bias, plan)
        ctx.save_for_backward(x_TH, scale_TK, up)
        ctx.plan, ctx.transposed, ctx.has_bias = plan, transposed, up_bias is not None
        return h_NJ

    @staticmethod
    def backward(ctx: Any, dh_NJ: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order(*_FIRST_ORDER)
        x_TH, scale_TK, up = ctx.saved_tensors
        plan, need = ctx.plan, ctx.needs_input_grad
        dx_TH = dscale_TK = dup = dbias = None
        if need[0] or need[1]:
            dx_NH = grouped_mm(
                dh_NJ, up.transpose(1, 2) if ctx.transposed else up, plan.offsets_E, full=plan.full
            )
            if scale_TK is not None:
                dscale_N = (dx_NH * x_TH.index_select(0, plan.source_N)).sum(-1)
                dscale_TK = _spread(dscale_N, plan).to(scale_TK.dtype)
            dx_TH = gather_sum(dx_NH, plan.slot_TK, scale_TK).to(x_TH.dtype)
        if need[2]:
            rows_NH = x_TH.index_select(0, plan.source_N)
            if scale_TK is not None:
                rows_NH = (rows_NH * _sorted(scale_TK, plan)[:, None]).to(x_TH.dtype)
            left, right = (rows_NH, dh_NJ) if ctx.transposed else (dh_NJ, rows_NH)
            dup = grouped_outer(left, right, plan.offsets_E)
        if ctx.has_bias and need[3]:
            dbias = _bias_gradient(dh_NJ, plan)
        return dx_TH, dscale_TK, dup, dbias, None, None


class _DownCombine(torch.autograd.Function):
    """a (N, I) -> y (T, H): times the expert's matrix, times the routing weight, summed over K."""

    @staticmethod
    def forward(
        ctx: Any,
        a_NI: Tensor,
        weights_TK: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        plan: SortPlan,
        transposed: bool,
    ) -> Tensor:
        o_NH = grouped_mm(
            a_NI, down if transposed else down.transpose(1, 2), plan.offsets_E, full=plan.full
        )
        if down_bias is not None:
            o_NH = o_NH + _bias_rows(down_bias, plan)
        ctx.save_for_backward(a_NI, weights_TK, down, down_bias)
        ctx.plan, ctx.transposed = plan, transposed
        used_TK = None if weights_TK is None else plan.weights_of_used(weights_TK)
        return gather_sum(o_NH, plan.slot_TK, used_TK)

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order(*_FIRST_ORDER)
        a_NI, weights_TK, down, down_bias = ctx.saved_tensors
        plan, need = ctx.plan, ctx.needs_input_grad
        da_NI = dweights_TK = ddown = dbias = None
        # dy in the bank's dtype: a product of a fp32 gradient with bf16 weights is no GEMM.
        dy_NH = dy_TH.to(down.dtype).index_select(0, plan.source_N)
        if need[0] or need[1]:
            columns = down.transpose(1, 2) if ctx.transposed else down
            da_NI = grouped_mm(dy_NH, columns, plan.offsets_E, full=plan.full)
        if weights_TK is None:
            w_N1 = None
        else:
            w_N1 = _sorted(weights_TK, plan)[:, None]
            if need[1]:
                assert da_NI is not None
                # In the wider dtype: float32 weights in a float64 model would lose half the digits.
                wide = torch.promote_types(da_NI.dtype, w_N1.dtype)
                dw_N = (da_NI.to(wide) * a_NI).sum(-1)
                if down_bias is not None:
                    dw_N = dw_N + (_bias_rows(down_bias, plan) * dy_NH).sum(-1)
                dweights_TK = _spread(dw_N, plan).to(weights_TK.dtype)
            if need[0]:
                assert da_NI is not None
                da_NI = (da_NI * w_N1).to(a_NI.dtype)
        if need[2] or need[3]:
            weighted_NH = dy_NH if w_N1 is None else (dy_NH * w_N1).to(down.dtype)
            if need[2]:
                left, right = (a_NI, weighted_NH) if ctx.transposed else (weighted_NH, a_NI)
                ddown = grouped_outer(left, right, plan.offsets_E)
            if down_bias is not None and need[3]:
                dbias = _bias_gradient(weighted_NH, plan)
        return da_NI, dweights_TK, ddown, dbias, None, None


def _batched_mlp(spec: BankSpec, weights: BankWeights, x_ENH: Tensor) -> Tensor:
    """Every expert on as many rows as every other: (E, N, H) -> (E, N, H)."""
    up_EHJ, down_EIH = weights.as_columns(spec)
    hidden_ENJ = torch.bmm(x_ENH, up_EHJ)
    if weights.up_bias is not None:
        hidden_ENJ = hidden_ENJ + weights.up_bias[:, None]
    y_ENH = torch.bmm(spec.activate(hidden_ENJ), down_EIH)
    if weights.down_bias is not None:
        y_ENH = y_ENH + weights.down_bias[:, None]
    return y_ENH


def _expert_choice(
    spec: BankSpec, weights: BankWeights, x_TH: Tensor, routing: ExpertChoice
) -> Tensor:
    tokens_EC = routing.tokens_EC.clamp(min=0)
    weights_EC = routing.weights_EC.masked_fill(routing.tokens_EC < 0, 0)[..., None]
    rows_ECH = (
        x_TH.to(weights.dtype).index_select(0, tokens_EC.flatten()).unflatten(0, tokens_EC.shape)
    )
    if spec.scale == "input":
        out_ECH = _batched_mlp(spec, weights, (rows_ECH * weights_EC).to(weights.dtype))
        # An expert with biases answers an empty place too; nobody asked.
        sum_dtype = torch.promote_types(out_ECH.dtype, weights_EC.dtype)
        out_ECH = out_ECH.masked_fill((routing.tokens_EC < 0)[..., None], 0).to(sum_dtype)
    else:
        out_ECH = _batched_mlp(spec, weights, rows_ECH) * weights_EC
    y_TH = out_ECH.new_zeros(x_TH.shape)
    return y_TH.index_add(0, tokens_EC.flatten(), out_ECH.flatten(0, 1)).to(x_TH.dtype)


def _soft_choice(spec: BankSpec, weights: BankWeights, x_TH: Tensor, routing: SoftChoice) -> Tensor:
    batch, length, num_slots = routing.dispatch_BSP.shape
    x_BSH = x_TH.view(batch, length, x_TH.shape[1])
    slots_BPH = torch.bmm(routing.dispatch_BSP.to(x_TH.dtype).transpose(1, 2), x_BSH)
    of_one = num_slots // routing.num_experts
    slots_ENH = slots_BPH.unflatten(1, (routing.num_experts, of_one)).transpose(0, 1).flatten(1, 2)
    out_ENH = _batched_mlp(spec, weights, slots_ENH.to(weights.dtype))
    out_BPH = out_ENH.unflatten(1, (batch, of_one)).transpose(0, 1).flatten(1, 2)
    y_BSH = torch.bmm(routing.combine_BSP.to(out_BPH.dtype), out_BPH)
    return y_BSH.reshape(x_TH.shape).to(x_TH.dtype)
