"""The bank as a loop: the readable truth that every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from moetk.experts.spec import BankSpec, BankWeights
from moetk.routing import ExpertChoice, Routing, SoftChoice


def expert_mlp(spec: BankSpec, weights: BankWeights, expert: int, x_NH: Tensor) -> Tensor:
    """One expert's feed-forward network: (N, H) -> (N, H)."""
    up_EHJ, down_EIH = weights.as_columns(spec)
    hidden_NJ = x_NH @ up_EHJ[expert]
    if weights.up_bias is not None:
        hidden_NJ = hidden_NJ + weights.up_bias[expert]
    y_NH = spec.activate(hidden_NJ) @ down_EIH[expert]
    if weights.down_bias is not None:
        y_NH = y_NH + weights.down_bias[expert]
    return y_NH


def reference(spec: BankSpec, weights: BankWeights, x_TH: Tensor, routing: Routing) -> Tensor:
    """Every kept choice's expert output times its weight, summed: (T, H) -> (T, H)."""
    if isinstance(routing, SoftChoice):
        return _soft(spec, weights, x_TH, routing)
    x_in = x_TH.to(weights.dtype)
    routed_weights = routing.weights_EC if isinstance(routing, ExpertChoice) else routing.weights_TK
    sum_dtype = torch.promote_types(weights.dtype, routed_weights.dtype)
    y_TH = x_in.new_zeros(x_in.shape, dtype=sum_dtype)
    for expert in range(spec.num_experts):
        tokens_N, weights_N = _rows_of(routing, expert)
        rows_NH = x_in[tokens_N]
        if spec.scale == "input":
            rows_NH = (rows_NH * weights_N[:, None]).to(weights.dtype)
            out_NH = expert_mlp(spec, weights, expert, rows_NH).to(sum_dtype)
        else:
            out_NH = expert_mlp(spec, weights, expert, rows_NH) * weights_N[:, None]
        y_TH = y_TH.index_add(0, tokens_N, out_NH)
    return y_TH.to(x_TH.dtype)


def _rows_of(routing: Routing, expert: int) -> tuple[Tensor, Tensor]:
    """The tokens that go to one expert, and their weights."""
    if isinstance(routing, ExpertChoice):
        taken_C = routing.tokens_EC[expert] >= 0
        return routing.tokens_EC[expert][taken_C], routing.weights_EC[expert][taken_C]
    assert not isinstance(routing, SoftChoice)
    here_TK = routing.experts_TK == expert
    if routing.kept_TK is not None:
        here_TK = here_TK & routing.kept_TK
    tokens_N, columns_N = here_TK.nonzero(as_tuple=True)
    return tokens_N, routing.weights_TK[tokens_N, columns_N]


def _soft(spec: BankSpec, weights: BankWeights, x_TH: Tensor, routing: SoftChoice) -> Tensor:
    batch, length, num_slots = routing.dispatch_BSP.shape
    x_BSH = x_TH.view(batch, length, x_TH.shape[1])
    slots_BPH = routing.dispatch_BSP.to(x_TH.dtype).transpose(1, 2) @ x_BSH
    per_expert = slots_BPH.to(weights.dtype).chunk(routing.num_experts, dim=1)
    out = [
        expert_mlp(spec, weights, expert, slots.flatten(0, 1)).view_as(slots)
        for expert, slots in enumerate(per_expert)
    ]
    out_BPH = torch.cat(out, dim=1)
    y_BSH = routing.combine_BSP.to(out_BPH.dtype) @ out_BPH
    return y_BSH.reshape(x_TH.shape).to(x_TH.dtype)
