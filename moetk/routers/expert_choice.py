from __future__ import annotations

from torch import Tensor

from moetk.context import RouterContext
from moetk.kernels.selection import top_tokens
from moetk.routers.linear import LinearRouter
from moetk.routing import ExpertChoice


class ExpertChoiceRouter(LinearRouter):
    """Each expert takes its best top_k * S / E tokens of a sequence, so load is exact.
    arXiv 2202.09368

    top_k: experts of an average token; one token may get none, or all. Weights are the softmax
    scores, not rescaled. Not causal: a later token can push an earlier one out.
    """

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> ExpertChoice:
        logits_TE = self.logits(x_TH)
        scores_TE = logits_TE.softmax(-1, dtype=self.score_dtype)
        tokens_EC, weights_EC = top_tokens(scores_TE, self.top_k, ctx, self.tie)
        return ExpertChoice(tokens_EC, weights_EC, len(x_TH), logits_TE, scores_TE)
