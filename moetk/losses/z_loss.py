"""The router z-loss keeps logits small, so that rounding them changes little.

Letters: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moetk.context import RouterContext
from moetk.losses.counted import check_coefficient, counted_tokens, mean_over
from moetk.routing import Routing, need


def router_z(logits_TE: Tensor, counted_T: Tensor | None = None) -> Tensor:
    """mean_t (log sum_e exp logits_te)^2, a fp32 scalar; (ln E)^2 at zero logits.

    Its gradient is 2 * logsumexp_t * softmax(logits_t) / T. logits_TE: floating. counted_T: bool,
    None = all; raises MoeShapeError when it is not (T,). arXiv 2202.08906, equation 5.
    """
    return mean_over(logits_TE.float().logsumexp(-1).square(), counted_T)


@dataclass(frozen=True)
class RouterZLoss:
    """coefficient * `router_z`, over the tokens that carry a label, else the unmasked ones.

    arXiv 2202.08906 (coefficient 1e-3). Raises RouterConfigError, MissingFieldError without
    logits_TE.
    """

    coefficient: float

    reads = ("logits_TE",)

    def __post_init__(self) -> None:
        check_coefficient(self)

    def __call__(self, routing: Routing, ctx: RouterContext) -> Tensor:
        logits_TE = need(routing, "logits_TE", "RouterZLoss")
        return self.coefficient * router_z(logits_TE, counted_tokens(ctx, logits_TE.shape[0]))
