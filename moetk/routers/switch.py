from __future__ import annotations

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.kernels.selection import Tie, expert_capacity, gather, top_k, within_capacity
from moetk.routers.linear import LinearRouter
from moetk.routers.noise import jitter
from moetk.routing import TokenChoice
from moetk.settings import check_number


class SwitchRouter(LinearRouter):
    """The best expert, weighted by its probability; each takes C tokens of a sequence, first come.
    arXiv 2101.03961

    capacity_factor: C = ceil(capacity_factor * S * top_k / E). jitter: in training, what the router
    (not the experts) sees is multiplied by noise in 1 +- jitter; 0 = none, else ctx.seed is needed.
    Raises RouterConfigError on a capacity_factor that is not above 0, or a jitter outside [0, 1).
    """

    capacity_factor: float = 1.25
    jitter: float = 0.01
    gemm_dtype: torch.dtype | None = torch.float32

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        capacity_factor: float = 1.25,
        jitter: float = 0.01,
        gemm_dtype: torch.dtype | None = torch.float32,
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
        expert_capacity(1, top_k, num_experts, capacity_factor)
        check_number(type(self).__name__, "jitter", jitter, least=0, below=1)
        self.capacity_factor, self.jitter = capacity_factor, jitter

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        noisy = self.training and self.jitter > 0
        logits_TE = self.logits(jitter(x_TH, self.jitter, ctx) if noisy else x_TH)
        scores_TE = logits_TE.softmax(-1, dtype=self.score_dtype)
        experts_TK = top_k(scores_TE, self.top_k, ctx, self.tie)
        kept_TK = within_capacity(experts_TK, self.num_experts, self.capacity_factor, ctx)
        weights_TK = gather(scores_TE, experts_TK).masked_fill(~kept_TK, 0)
        return TokenChoice(
            experts_TK, weights_TK, self.num_experts, logits_TE, scores_TE, kept_TK=kept_TK
        )
