"""Twelve defects, each with what a diagnosis should say of it, written down before any was run.

A case builds a right part, a defective one and an input on which the defect shows. `stage` is the
first stage whose own computation is wrong although what it is given is right; `cause` is in plain
words. The first six are the test, the other six its reserve. The defects are those of the field:
ports between frameworks, refactorings, kernels whose backward was written by hand.

Letters: T tokens, B sequences, S positions, E experts, K choices, N = T * K rows, H hidden.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moetk import ExpertBank, MoELayer, RouterContext, TokenChoice
from moetk.dispatch import Capacity, Local
from moetk.losses import LoadBalancingLoss
from moetk.routers import DeepSeekV3Router, MixtralRouter, gather, top_k
from moetk.routing import Routing
from tests.tiny import tiny

H, E, K, I = 32, 8, 2, 16


@dataclass(frozen=True)
class Case:
    """Two parts that should agree, and the input on which they do not."""

    right: Any
    wrong: Any
    x: Tensor
    ctx: RouterContext | None = None


@dataclass(frozen=True)
class Defect:
    """How to build the case, and what a diagnosis should say of it."""

    name: str
    stage: str
    cause: str
    build: Callable[[], Case]

    def case(self) -> Case:
        torch.manual_seed(0)
        return self.build()


DEFECTS: list[Defect] = []


def planted(stage: str, cause: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def plant(build: Callable[[], Case]) -> Callable[[], Case]:
        DEFECTS.append(Defect(build.__name__, stage, cause, build))
        return build

    return plant


def stock_block(family: str) -> Any:
    """The last mixture-of-experts block of a tiny stock model."""
    layers = tiny(family).model.layers
    return layers[-1].mlp


def patched(block: Any, part: str, method: str, function: Callable[..., Any]) -> Any:
    """A copy of the block in which one method of one of its parts ("" = itself) is another's."""
    block = copy.deepcopy(block)
    owner = block.get_submodule(part)
    setattr(owner, method, MethodType(function, owner))
    return block


# --- The six -------------------------------------------------------------------------------------


@planted("weights", "weights are recovered as (score + bias) - bias: the bias swallows the score")
def bias_subtracted_again() -> Case:
    """A top-k kernel that keeps only the biased values (flashinfer pull request 3875). Nothing is
    lost while scores and biases are alike; here scores are near 1e-7 and biases near 12."""

    def route(gate: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_TH = hidden_states.view(-1, gate.hidden_dim)
        logits_TE = F.linear(x_TH.type(torch.float32), gate.weight.type(torch.float32))
        biased_TE = logits_TE.sigmoid() + gate.e_score_correction_bias
        biased_TGM = biased_TE.view(len(x_TH), gate.num_group, -1)
        worth_TG = biased_TGM.topk(2, dim=-1)[0].sum(-1)
        best_TG = worth_TG.topk(gate.topk_group, dim=-1, sorted=False)[1]
        allowed_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter(1, best_TG, True)
        masked_TE = biased_TGM.masked_fill(~allowed_TG[..., None], -math.inf).flatten(1)
        values_TK, experts_TK = masked_TE.topk(gate.top_k, dim=-1, sorted=False)
        weights_TK = values_TK - gate.e_score_correction_bias[experts_TK]
        if gate.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return logits_TE, weights_TK * gate.routed_scaling_factor, experts_TK

    right = stock_block("deepseek_v3")
    with torch.no_grad():
        right.gate.weight.copy_(0.1 * torch.randn(E, H) - 0.5)
        right.gate.e_score_correction_bias.copy_(12 + 0.1 * torch.randn(E))
    return Case(right, patched(right, "gate", "forward", route), 1 + 0.5 * torch.randn(2, 12, H))


class _FusedNormalise(torch.autograd.Function):
    """w / sum(w), with the backward of a division by a constant."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor) -> Tensor:
        total_T1 = weights_TK.sum(-1, keepdim=True)
        ctx.save_for_backward(total_T1)
        return weights_TK / total_T1

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor) -> Tensor:
        (total_T1,) = ctx.saved_tensors
        return grad_TK / total_T1


class _FusedMixtralRouter(MixtralRouter):
    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.logits(x_TH)
        scores_TE = logits_TE.softmax(-1, dtype=self.score_dtype)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        weights_TK = _FusedNormalise.apply(gather(scores_TE, experts_TK))
        return TokenChoice(
            experts_TK, weights_TK, self.num_experts, logits_TE, scores_TE, scores_TE
        )


@planted("grad scores", "the sum that weights are divided by is taken for a constant in backward")
def normaliser_without_gradient() -> Case:
    """A fused routing kernel whose backward forgets the quotient rule. Every forward value is
    right."""
    right = MoELayer(MixtralRouter(H, E, K), ExpertBank(H, E, I))
    wrong = copy.deepcopy(right)
    wrong.router = _FusedMixtralRouter(H, E, K)
    wrong.router.load_state_dict(right.router.state_dict())
    return Case(right, wrong, torch.randn(2, 12, H))


def _places_by_token(routing: Routing, ctx: RouterContext) -> TokenChoice:
    """Capacity 1.0 with places counted along the flattened (S, K) choices."""
    assert isinstance(routing, TokenChoice) and ctx.batch_shape is not None
    batch, length = ctx.batch_shape
    num_choices = routing.experts_TK.shape[1]
    capacity = math.ceil(length * num_choices / routing.num_experts)
    taken_BNE = F.one_hot(routing.experts_TK.reshape(batch, -1), routing.num_experts)
    place_BN = (taken_BNE.cumsum(1) * taken_BNE).sum(-1) - 1
    kept_TK = (place_BN < capacity).view(-1, num_choices)
    return replace(routing, kept_TK=kept_TK, weights_TK=routing.weights_TK.masked_fill(~kept_TK, 0))


@planted("dispatched", "places are given token by token, not all first choices before any second")
def second_choices_served_too_early() -> Case:
    """The cumulative sum of GShard's capacity runs over (S, K) flattened token first."""
    right = MoELayer(MixtralRouter(H, E, K), ExpertBank(H, E, I), dispatcher=Local(Capacity(1.0)))
    wrong = copy.deepcopy(right)
    wrong.dispatcher = Local(_places_by_token)
    return Case(right, wrong, torch.randn(2, 24, H) + 0.5)


@planted("activation", "up is clamped from above only: the lower limit is missing")
def up_clamped_on_one_side() -> Case:
    """gpt-oss clamps gate from above and up on both sides; the port gives both the same clamp.
    Shows only where up is below -7."""

    def apply_gate(experts: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = gate.clamp(max=experts.limit), up.clamp(max=experts.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * experts.alpha))

    right = stock_block("gpt_oss")
    wrong = patched(right, "experts", "_apply_gate", apply_gate)
    return Case(right, wrong, 4 * torch.randn(2, 12, H))


class _BalanceOfAllRows:
    """E * sum_e share_e * P_e over every row of the batch."""

    reads = ("scores_TE",)

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def __call__(self, routing: TokenChoice, ctx: RouterContext) -> Tensor:
        assert routing.scores_TE is not None
        share_E = F.one_hot(routing.experts_TK, routing.num_experts).float().mean((0, 1))
        prob_E = routing.scores_TE.float().mean(0)
        return self.coefficient * routing.num_experts * (share_E * prob_E).sum()


@planted("losses", "padding is counted in the balance loss: the token mask is ignored")
def padding_in_the_loss() -> Case:
    """The auxiliary loss of the first Mixtral ports. Right wherever nothing is padded."""
    right = MoELayer(MixtralRouter(H, E, K), ExpertBank(H, E, I), losses=[LoadBalancingLoss(0.01)])
    wrong = MoELayer(right.router, right.experts, losses=[_BalanceOfAllRows(0.01)])
    mask_BS = torch.ones(2, 12, dtype=torch.bool)
    mask_BS[1, 5:] = False
    x_BSH = torch.randn(2, 12, H)
    x_BSH[~mask_BS] = 3 * torch.randn(H)  # one padding vector, hence one place to go
    return Case(
        right, wrong, x_BSH, RouterContext(token_mask=mask_BS.flatten(), batch_shape=(2, 12))
    )


@planted("output", "the shared experts read the routed output instead of the layer's input")
def shared_experts_read_the_wrong_tensor() -> Case:
    """A refactoring drops `residuals` and reuses the name that now holds the routed output."""

    def forward(block: Any, hidden_states: Tensor) -> Tensor:
        shape = hidden_states.shape
        _, weights_TK, experts_TK = block.gate(hidden_states)
        hidden_states = hidden_states.view(-1, shape[-1])
        hidden_states = block.experts(hidden_states, experts_TK, weights_TK).view(shape)
        return hidden_states + block.shared_experts(hidden_states)

    right = stock_block("deepseek_v3")
    return Case(right, patched(right, "", "forward", forward), torch.randn(2, 12, H))


# --- The reserve ---------------------------------------------------------------------------------


@planted("choice", "the correction bias was rounded to bf16 with the rest of the model")
def bias_rounded_with_the_model() -> Case:
    """`model.to(bfloat16)` takes the bias along (transformers pull request 42580). Biases near 12
    are 1/16 apart in bf16, and they differ by less."""
    right = MoELayer(DeepSeekV3Router(H, E, K), ExpertBank(H, E, I))
    bias_E = 12 + 0.03 * torch.randn(E)
    right.router.e_score_correction_bias.copy_(bias_E)
    right.to(torch.bfloat16)
    wrong = copy.deepcopy(right)
    right.router.e_score_correction_bias = bias_E
    return Case(right, wrong, 0.2 * torch.randn(2, 24, H, dtype=torch.bfloat16))


@planted("combined", "a token's choices overwrite each other instead of adding up")
def choices_overwrite_each_other() -> Case:
    """`out = out.at[tokens].set(y)` where `.add(y)` was meant, ported back."""

    def forward(experts: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y_TH = torch.zeros_like(hidden_states)
        for expert in range(experts.num_experts):
            tokens_N, columns_N = torch.where(index == expert)
            gate, up = F.linear(hidden_states[tokens_N], experts.gate_up_proj[expert]).chunk(2, -1)
            out_NH = F.linear(experts.act_fn(gate) * up, experts.down_proj[expert])
            out_NH = out_NH * weights[tokens_N, columns_N, None]
            y_TH = y_TH.index_copy(0, tokens_N, out_NH.to(y_TH.dtype))
        return y_TH

    right = stock_block("mixtral")
    return Case(right, patched(right, "experts", "forward", forward), torch.randn(2, 12, H))


class SortingBank(ExpertBank):
    """Sort the choices by expert, run each expert on its run of rows, unsort, weigh, sum."""

    def counts(self, experts_N: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.bincount(experts_N, minlength=self.num_experts)

    def rows(self, x_TH: Tensor, tokens_N: Tensor) -> Tensor:
        return x_TH[tokens_N]

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, TokenChoice)
        experts_N = routing.experts_TK.flatten()
        order_N = experts_N.argsort(stable=True)
        rows_NH = self.rows(x_TH, order_N // routing.experts_TK.shape[1])
        ends_E = self.counts(experts_N, x_TH.dtype).cumsum(0).long()
        out_NH = []
        for expert in range(self.num_experts):
            start = int(ends_E[expert - 1]) if expert else 0
            end = int(ends_E[expert]) if expert + 1 < self.num_experts else len(rows_NH)
            gate, up = F.linear(rows_NH[start:end], self.gate_up_proj[expert]).chunk(2, -1)
            out_NH.append(F.linear(F.silu(gate) * up, self.down_proj[expert]))
        out_TKH = torch.cat(out_NH)[order_N.argsort()].unflatten(0, routing.experts_TK.shape)
        return (out_TKH * routing.weights_TK[..., None]).sum(1).to(x_TH.dtype)


class _BankThatCountsInModelDtype(SortingBank):
    def counts(self, experts_N: Tensor, dtype: torch.dtype) -> Tensor:
        return F.one_hot(experts_N, self.num_experts).to(dtype).sum(0)


@planted(
    "dispatched",
    "rows are counted in bf16, which skips whole numbers above 256: rows at an "
    "expert's edge go to its neighbour",
)
def rows_counted_in_bf16() -> Case:
    """`one_hot(...).to(x.dtype).sum(0)`: exact in fp32, and in bf16 below 257 rows an expert."""
    right = MoELayer(MixtralRouter(H, 4, K), ExpertBank(H, 4, I)).to(torch.bfloat16)
    wrong = copy.deepcopy(right)
    wrong.experts = _BankThatCountsInModelDtype(H, 4, I).to(torch.bfloat16)
    wrong.experts.load_state_dict(right.experts.state_dict())
    return Case(right, wrong, torch.randn(2, 397, H, dtype=torch.bfloat16))


class _GatherRows(torch.autograd.Function):
    """x[tokens], with a backward that scatters without adding."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, tokens_N: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_N)
        ctx.shape = x_TH.shape
        return x_TH[tokens_N]

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, None]:
        (tokens_N,) = ctx.saved_tensors
        grad_TH = grad_NH.new_zeros(ctx.shape)
        grad_TH[tokens_N] = grad_NH
        return grad_TH, None


class _BankWithOwnGather(SortingBank):
    def rows(self, x_TH: Tensor, tokens_N: Tensor) -> Tensor:
        return _GatherRows.apply(x_TH, tokens_N)  # type: ignore[no-any-return]


@planted("grad x", "the gather's backward overwrites where a token's K gradients should add up")
def gather_backward_overwrites() -> Case:
    """A permute kernel that was tested with K = 1. Every forward value is right, and so is every
    gradient of the experts."""
    right = MoELayer(MixtralRouter(H, E, K), ExpertBank(H, E, I))
    wrong = copy.deepcopy(right)
    wrong.experts = _BankWithOwnGather(H, E, I)
    wrong.experts.load_state_dict(right.experts.state_dict())
    return Case(right, wrong, torch.randn(2, 12, H))


@planted("logits", "the router sees the tokens in (S, B) order, the experts in (B, S) order")
def router_reads_sequence_first() -> Case:
    """Half of a port from a framework that keeps activations as (S, B, H). Right at batch 1."""

    def forward(block: Any, hidden_states: Tensor) -> Tensor:
        x_TH = hidden_states.flatten(0, 1)
        _, weights_TK, experts_TK = block.gate(hidden_states.transpose(0, 1).flatten(0, 1))
        return block.experts(x_TH, experts_TK, weights_TK).view_as(hidden_states)

    right = stock_block("qwen3_moe")
    return Case(right, patched(right, "", "forward", forward), torch.randn(2, 12, H))


@planted("weights", "a token's weights are in descending order, its experts in ascending order")
def numpy_pairs_backwards() -> Case:
    """A port to NumPy, whose argsort ascends. The experts are right as a set, and so are the
    weights."""
    right = MixtralRouter(H, E, K)
    weight_EH = right.weight.detach().numpy()

    def wrong(x_TH: Any) -> dict[str, Any]:
        logits_TE = x_TH.detach().numpy() @ weight_EH.T
        odds_TE = np.exp(logits_TE - logits_TE.max(-1, keepdims=True))
        scores_TE = odds_TE / odds_TE.sum(-1, keepdims=True)
        experts_TK = np.argsort(scores_TE, -1)[:, -K:]
        weights_TK = -np.sort(-scores_TE, -1)[:, :K]
        weights_TK = weights_TK / weights_TK.sum(-1, keepdims=True)
        return {
            "logits": logits_TE,
            "scores": scores_TE,
            "indices": experts_TK,
            "weights": weights_TK,
        }

    return Case(right, wrong, torch.randn(24, H))
