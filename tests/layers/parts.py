"""Routers, losses and controllers of a user's own, and a batch of unequal labels to train on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moetk import BlockSpec, RouterContext, TokenChoice
from moetk.routers import gather, normal_like, top_k
from tests.tiny import VOCAB


def data() -> tuple[Tensor, Tensor]:
    """Eight sequences and their labels, some of which are mostly -100: 64 of 88 count."""
    generator = torch.Generator().manual_seed(5)
    ids_BS = torch.randint(3, VOCAB, (8, 12), generator=generator)
    labels_BS = ids_BS.clone()
    labels_BS[0, 3:] = -100
    labels_BS[3, :8] = -100
    labels_BS[6, 5:] = -100
    labels_BS[7, 4] = -100
    return ids_BS, labels_BS


def predicting(labels_BS: Tensor) -> Tensor:
    """(T,) bool: the positions whose next token is a label."""
    mask_BS = torch.zeros_like(labels_BS, dtype=torch.bool)
    mask_BS[:, :-1] = labels_BS[:, 1:] != -100
    return mask_BS.flatten()


class CosineRouter(nn.Module):
    """Cosine similarity, a learned temperature, and a bias that a controller may move."""

    def __init__(self, hidden_size: int, num_experts: int, k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, hidden_size))
        self.sharpness = nn.Parameter(torch.full((1,), 4.0))
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))
        self.k = k

    def wanted(self, scores_TE: Tensor, ctx: RouterContext) -> Tensor:
        return scores_TE + self.e_score_correction_bias

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.sharpness * normalize(x_TH, dim=-1) @ normalize(self.weight, dim=-1).T
        scores_TE = logits_TE.softmax(-1)
        experts_TK = top_k(self.wanted(scores_TE, ctx), self.k, ctx)
        weights_TK = gather(scores_TE, experts_TK)
        return TokenChoice(experts_TK, weights_TK, len(self.weight), logits_TE, scores_TE)


class NoisyRouter(CosineRouter):
    """Chooses with noise in training: another choice for every forward that is counted."""

    def wanted(self, scores_TE: Tensor, ctx: RouterContext) -> Tensor:
        wanted_TE = super().wanted(scores_TE, ctx)
        return wanted_TE + 0.1 * normal_like(scores_TE, ctx) if self.training else wanted_TE


def cosine(spec: BlockSpec) -> CosineRouter:
    torch.manual_seed(100 + spec.layer)
    return CosineRouter(spec.hidden_size, spec.num_experts, spec.top_k)


def noisy(spec: BlockSpec) -> NoisyRouter:
    torch.manual_seed(100 + spec.layer)
    return NoisyRouter(spec.hidden_size, spec.num_experts, spec.top_k)


class ExactZLoss:
    """The z-loss in the dtype of the logits, so that float64 shows what is exact."""

    reads = ("logits_TE",)

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def __call__(self, routing: TokenChoice, ctx: RouterContext) -> Tensor:
        per_token_T = routing.logits_TE.logsumexp(-1).square()
        counted_T = ctx.token_mask if ctx.label_mask is None else ctx.label_mask
        return self.coefficient * (
            per_token_T.mean() if counted_T is None else per_token_T[counted_T].mean()
        )


class Tally:
    """Keeps the counts it was given, one entry a step."""

    accumulate = "sum"
    reads = ()

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def observe(self, routing: TokenChoice, ctx: RouterContext) -> Tensor:
        return torch.bincount(routing.experts_TK.flatten(), minlength=routing.num_experts)

    def step(self, observed: Tensor) -> None:
        self.given.append(observed)

    def state_dict(self) -> dict[str, Any]:
        return {f"given.{index}": counts_E for index, counts_E in enumerate(self.given)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = [state[f"given.{index}"] for index in range(len(state))]
