from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetk.context import RouterContext
from moetk.kernels.selection import Tie, softmax_over, top_k
from moetk.routers.linear import LinearRouter
from moetk.routers.noise import normal_like
from moetk.routing import TokenChoice


class NoisyTopKRouter(LinearRouter):
    """Normal noise of a learned, per-token width on the logits; the best K, softmax over those.
    arXiv 1701.06538, equations 3 to 5

    Noise in training only, where ctx.seed is needed. Both matrices start at zero (appendix A): no
    signal, some noise. Its load loss reads logits_TE (clean), choice_TE (noisy), extras["std_TE"].
    """

    noise_weight: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        gemm_dtype: torch.dtype | None = None,
        score_dtype: torch.dtype | None = torch.float32,
        tie: Tie = "low",
    ) -> None:
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            gemm_dtype=gemm_dtype,
            score_dtype=score_dtype,
            tie=tie,
        )
        nn.init.zeros_(self.weight)
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.in_score_dtype(self.logits(x_TH))
        dtype = self.gemm_dtype or x_TH.dtype
        widths_TE = F.linear(x_TH.to(dtype), self.noise_weight.to(dtype))
        std_TE = F.softplus(self.in_score_dtype(widths_TE))
        noisy_TE = logits_TE + std_TE * normal_like(std_TE, ctx) if self.training else logits_TE
        experts_TK = top_k(noisy_TE, self.top_k, ctx, self.tie)
        weights_TK = softmax_over(noisy_TE, experts_TK)
        return TokenChoice(
            experts_TK,
            weights_TK,
            self.num_experts,
            logits_TE,
            choice_TE=noisy_TE,
            extras={"std_TE": std_TE},
        )
