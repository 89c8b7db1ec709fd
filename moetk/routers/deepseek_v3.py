from __future__ import annotations

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.errors import RouterConfigError
from moetk.kernels.recipe import Recipe
from moetk.kernels.selection import (
    Tie,
    gather,
    in_best_groups,
    in_order,
    normalise,
    top_k_as_summed,
)
from moetk.routers.linear import LinearRouter
from moetk.routing import TokenChoice
from moetk.settings import check_number, check_whole


class DeepSeekV3Router(LinearRouter):
    """Sigmoid scores. Scores plus bias, within the best groups, choose; the scores alone weigh.
    arXiv 2412.19437, equations 13 to 16

    groups: groups of neighbouring experts, of which a token may use its top_groups best;
    groups=1 = no limit (Kimi K2, GLM-4.5). scale: what the weights sum to when renormalised.
    Raises RouterConfigError when top_k experts do not fit into top_groups groups, on a scale that
    is no finite number, and on an eps that is no finite number >= 0.
    """

    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    renormalise: bool = True
    eps: float = 1e-20
    gemm_dtype: torch.dtype | None = torch.float32

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        renormalise: bool = True,
        eps: float = 1e-20,
        gemm_dtype: torch.dtype | None = torch.float32,
        score_dtype: torch.dtype | None = torch.float32,
        tie: Tie = "low",
    ) -> None:
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            choice_bias=True,
            gemm_dtype=gemm_dtype,
            score_dtype=score_dtype,
            tie=tie,
        )
        who = type(self).__name__
        check_whole(who, groups=groups, top_groups=top_groups)
        _check_groups(who, num_experts, top_k, groups, top_groups)
        check_number(who, "scale", scale)
        check_number(who, "eps", eps, least=0)
        self.groups, self.top_groups = groups, top_groups
        self.scale, self.renormalise, self.eps = scale, renormalise, eps

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.logits(x_TH)
        scores_TE = self.in_score_dtype(logits_TE).sigmoid()
        choice_TE = in_best_groups(
            self.with_choice_bias(scores_TE), self.groups, self.top_groups, self.tie
        )
        picked_TK, order_TK = top_k_as_summed(choice_TE, self.top_k, ctx, self.tie)
        weights_TK = gather(scores_TE, picked_TK)
        if self.renormalise:
            weights_TK = normalise(weights_TK, self.eps)
        experts_TK = in_order(picked_TK, order_TK)
        weights_TK = in_order(weights_TK * self.scale, order_TK)
        return TokenChoice(
            experts_TK, weights_TK, self.num_experts, logits_TE, scores_TE, choice_TE
        )

    def recipe(self) -> Recipe:
        """What forward does after the logits; see `moetk.routers.fused`."""
        return Recipe(
            "sigmoid",
            groups=self.groups,
            top_groups=self.top_groups,
            renormalise=self.renormalise,
            eps=self.eps,
            scale=self.scale,
            score_dtype=self.score_dtype,
        )


def _check_groups(who: str, num_experts: int, top_k: int, groups: int, top_groups: int) -> None:
    if num_experts % groups:
        raise RouterConfigError(
            f"{who}: groups={groups} does not divide num_experts={num_experts}."
        )
    if top_groups > groups:
        raise RouterConfigError(
            f"{who}: top_groups={top_groups}; need 1 <= top_groups <= groups={groups}."
        )
    size = num_experts // groups
    if top_groups < groups and size < 2:
        raise RouterConfigError(
            f"{who}: groups={groups} leaves one expert a group, but a group is judged by its two "
            f"best; use groups <= {num_experts // 2}."
        )
    if top_k > top_groups * size:
        raise RouterConfigError(
            f"{who}: top_k={top_k} but top_groups={top_groups} groups hold {top_groups * size} "
            "experts; raise top_groups or lower top_k."
        )
