from __future__ import annotations

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.kernels.recipe import Recipe
from moetk.kernels.selection import Tie, softmax_over, top_k
from moetk.routers.linear import LinearRouter
from moetk.routing import TokenChoice


class GptOssRouter(LinearRouter):
    """The best K logits, then a softmax over those K alone, in the model's dtype. arXiv 2508.10925

    bias=False, score_dtype=torch.float32 is the router of GraniteMoe.
    With top_k=1 the weight is 1 and no gradient reaches the router.
    """

    score_dtype: torch.dtype | None = None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = True,
        gemm_dtype: torch.dtype | None = None,
        score_dtype: torch.dtype | None = None,
        tie: Tie = "low",
    ) -> None:
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            bias=bias,
            gemm_dtype=gemm_dtype,
            score_dtype=score_dtype,
            tie=tie,
        )

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.in_score_dtype(self.logits(x_TH))
        experts_TK = top_k(logits_TE, self.top_k, ctx, self.tie)
        weights_TK = softmax_over(logits_TE, experts_TK)
        return TokenChoice(experts_TK, weights_TK, self.num_experts, logits_TE)

    def recipe(self) -> Recipe:
        """What forward does after the logits; see `moetk.routers.fused`."""
        return Recipe("identity", over_chosen=True, score_dtype=self.score_dtype)
