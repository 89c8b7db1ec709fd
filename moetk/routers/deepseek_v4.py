from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetk.context import RouterContext
from moetk.kernels.recipe import Recipe
from moetk.kernels.selection import Tie, gather, in_order, normalise, top_k_as_summed
from moetk.routers.hash_table import random_table
from moetk.routers.linear import LinearRouter
from moetk.routing import TokenChoice
from moetk.settings import check_number


class DeepSeekV4Router(LinearRouter):
    """Scores are sqrt(softplus(logits)). Scores plus bias choose; the scores alone weigh.
    arXiv 2606.19348

    scale: what the weights of a token sum to. score_dtype None: scores in the dtype of the logits.
    Raises RouterConfigError on a scale or eps that is no finite number, or an eps below 0.
    """

    scale: float = 1.0
    eps: float = 1e-20
    score_dtype: torch.dtype | None = None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scale: float = 1.0,
        eps: float = 1e-20,
        gemm_dtype: torch.dtype | None = None,
        score_dtype: torch.dtype | None = None,
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
        check_number(type(self).__name__, "scale", scale)
        check_number(type(self).__name__, "eps", eps, least=0)
        self.scale, self.eps = scale, eps

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.logits(x_TH)
        scores_TE = F.softplus(self.in_score_dtype(logits_TE)).sqrt()
        choice_TE = self.with_choice_bias(scores_TE)
        picked_TK, order_TK = top_k_as_summed(choice_TE, self.top_k, ctx, self.tie)
        weights_TK = normalise(gather(scores_TE, picked_TK), self.eps) * self.scale
        experts_TK, weights_TK = in_order(picked_TK, order_TK), in_order(weights_TK, order_TK)
        return TokenChoice(
            experts_TK, weights_TK, self.num_experts, logits_TE, scores_TE, choice_TE
        )

    def recipe(self) -> Recipe:
        """What forward does after the logits; see `moetk.routers.fused`."""
        return Recipe(
            "sqrt_softplus",
            renormalise=True,
            eps=self.eps,
            scale=self.scale,
            score_dtype=self.score_dtype,
        )


class DeepSeekV4HashRouter(LinearRouter):
    """A frozen table, token id to K experts, chooses; a learned matrix weighs. arXiv 2606.19348

    tid2eid: buffer (vocab_size, K) int64, random until a checkpoint is loaded into it. A row may
    name one expert twice: both choices count. Columns have no order of preference.
    Raises MissingContextError when ctx.token_ids is None; RouterConfigError as `DeepSeekV4Router`,
    and on a vocab_size that is no whole number from 1 on.
    """

    duplicates = True
    scale: float = 1.0
    eps: float = 1e-20
    score_dtype: torch.dtype | None = None
    tid2eid: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        vocab_size: int,
        scale: float = 1.0,
        eps: float = 1e-20,
        gemm_dtype: torch.dtype | None = None,
        score_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            hidden_size, num_experts, top_k, gemm_dtype=gemm_dtype, score_dtype=score_dtype
        )
        self.tid2eid = nn.Buffer(random_table(vocab_size, num_experts, top_k, seed))
        check_number(type(self).__name__, "scale", scale)
        check_number(type(self).__name__, "eps", eps, least=0)
        self.scale, self.eps = scale, eps

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.logits(x_TH)
        scores_TE = F.softplus(self.in_score_dtype(logits_TE)).sqrt()
        token_ids_T = ctx.require("token_ids", self)
        experts_TK = ctx.replayed(self.tid2eid[token_ids_T].long())
        weights_TK = normalise(gather(scores_TE, experts_TK), self.eps) * self.scale
        return TokenChoice(experts_TK, weights_TK, self.num_experts, logits_TE, scores_TE)
