"""The two losses of noisy top-k: equal importance, and equal load made smooth by the noise.

Letters: T tokens, E experts, K choices a token. Both are squared coefficients of variation over
experts of sums over tokens, hence of one call: their mean over micro-batches is not the loss of
the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.losses.counted import as_token_choice, check_coefficient, counted_tokens
from moetk.routing import Routing, need


def squared_variation(x_E: Tensor) -> Tensor:
    """Variance over squared mean, the variance over all E (not E - 1); 0 where x is all zero.

    Not (std / mean)^2: the gradient of a standard deviation at 0 is NaN.
    """
    mean = x_E.mean()
    # Divided before it is squared: the square of a small mean is no number any more.
    return ((x_E - mean) / (mean + (mean == 0))).square().mean()


def smooth_load(clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, top_k: int) -> Tensor:
    """(T, E) fp32: the probability that each expert is among the top K if its own noise is drawn
    again and the others' stays.

    clean_TE: logits without noise. noisy_TE: clean_TE + std_TE * noise, what was chosen from.
    std_TE: > 0. The bar that expert e must clear is the K-th best of the others: the (K + 1)-th of
    all for a chosen e, else the K-th. arXiv 1701.06538, equations 8-10.
    """
    clean_TE, noisy_TE, std_TE = clean_TE.float(), noisy_TE.float(), std_TE.float()
    if top_k >= clean_TE.shape[-1]:
        return torch.ones_like(clean_TE) + 0 * clean_TE  # no others; a graph, and no gradient
    best = noisy_TE.topk(top_k + 1, -1).values
    out_T1, in_T1 = best[:, top_k - 1 : top_k], best[:, top_k:]
    bar_TE = torch.where(noisy_TE > in_T1, in_T1, out_T1)
    return 0.5 * torch.erfc((bar_TE - clean_TE) / (std_TE * math.sqrt(2)))


@dataclass(frozen=True)
class ImportanceLoss:
    """coefficient * CV^2 of each expert's summed weights. arXiv 1701.06538, equation 7 (0.1).

    Raises RouterConfigError; UnsupportedRoutingError for an ExpertChoice or SoftChoice.
    """

    coefficient: float

    reads = ()

    def __post_init__(self) -> None:
        check_coefficient(self)

    def __call__(self, routing: Routing, ctx: RouterContext) -> Tensor:
        routing = as_token_choice(routing, "ImportanceLoss")
        weights_TK = _of_counted(routing.weights_TK.float(), ctx)
        weights_TK = weights_TK.masked_fill(routing.experts_TK < 0, 0)
        importance_E = weights_TK.new_zeros(routing.num_experts).scatter_add(
            0, routing.experts_TK.clamp(min=0).flatten(), weights_TK.flatten()
        )
        return self.coefficient * squared_variation(importance_E)


@dataclass(frozen=True)
class LoadLoss:
    """coefficient * CV^2 of each expert's `smooth_load`. arXiv 1701.06538, equation 11 (0.1).

    Reads logits_TE (clean), choice_TE (noisy) and extras["std_TE"]. Raises RouterConfigError,
    MissingFieldError; UnsupportedRoutingError for an ExpertChoice or SoftChoice.
    """

    coefficient: float

    reads = ("logits_TE", "choice_TE", "extras")

    def __post_init__(self) -> None:
        check_coefficient(self)

    def __call__(self, routing: Routing, ctx: RouterContext) -> Tensor:
        top_k = as_token_choice(routing, "LoadLoss").experts_TK.shape[1]
        clean_TE, noisy_TE, std_TE = (
            need(routing, name, "LoadLoss") for name in ("logits_TE", "choice_TE", "std_TE")
        )
        load_TE = _of_counted(smooth_load(clean_TE, noisy_TE, std_TE, top_k), ctx)
        return self.coefficient * squared_variation(load_TE.sum(0))


def _of_counted(values_TX: Tensor, ctx: RouterContext) -> Tensor:
    counted_T = counted_tokens(ctx, values_TX.shape[0])
    return values_TX if counted_T is None else torch.where(counted_T[:, None], values_TX, 0)
