from __future__ import annotations

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.kernels.recipe import Recipe
from moetk.kernels.selection import Tie, gather, normalise, top_k
from moetk.routers.linear import LinearRouter
from moetk.routing import TokenChoice


class MixtralRouter(LinearRouter):
    """Softmax over all experts; the best K, rescaled to sum to one. arXiv 2401.04088

    renormalise=False keeps the probabilities as they are (OLMoE, arXiv 2409.02060). Also the router
    of Qwen3-MoE and Qwen3-Next. choice_bias=True adds the bias of loss-free balancing (arXiv
    2408.15664) to the choice.
    """

    renormalise: bool = True

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        renormalise: bool = True,
        choice_bias: bool = False,
        gemm_dtype: torch.dtype | None = None,
        score_dtype: torch.dtype | None = torch.float32,
        tie: Tie = "low",
    ) -> None:
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            choice_bias=choice_bias,
            gemm_dtype=gemm_dtype,
            score_dtype=score_dtype,
            tie=tie,
        )
        self.renormalise = renormalise

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.logits(x_TH)
        scores_TE = logits_TE.softmax(-1, dtype=self.score_dtype)
        choice_TE = self.with_choice_bias(scores_TE)
        experts_TK = top_k(choice_TE, self.top_k, ctx, self.tie)
        weights_TK = gather(scores_TE, experts_TK)
        if self.renormalise:
            weights_TK = normalise(weights_TK)
        return TokenChoice(
            experts_TK, weights_TK, self.num_experts, logits_TE, scores_TE, choice_TE
        )

    def recipe(self) -> Recipe:
        """What forward does after the logits; see `moetk.routers.fused`."""
        return Recipe("softmax", renormalise=self.renormalise, score_dtype=self.score_dtype)
