"""How evenly the experts are used: functions of counts, and the counts of a routing.

Counts add up: over micro-batches, layers and ranks, `tokens_per_expert` may be summed and each
function applied to the sum (global MaxVio), or applied to each and averaged (batch MaxVio). Special
experts (zero, copy, ...) come last in a count; `counts_E[:num_real]` leaves them out. Nothing here
waits for the device; every result is a tensor. Letters: T tokens, E experts, K choices, C places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.kernels.counting import count_choices
from moetk.metrics.choices import chosen, unmasked_tokens
from moetk.routing import Routing


def tokens_per_expert(routing: Routing, ctx: RouterContext | None = None) -> Tensor:
    """(E,) int64: choices of unmasked tokens that name each expert, before capacity.

    For an ExpertChoice, the unmasked tokens that each expert took. Raises UnsupportedRoutingError
    for a SoftChoice, which uses every expert for every token.
    """
    experts_N, tokens_N = chosen(routing)
    counted_N, unmasked_T = tokens_N >= 0, unmasked_tokens(routing, ctx)
    if unmasked_T is not None:
        counted_N = counted_N & unmasked_T[tokens_N.clamp(min=0)]
    return count_choices(experts_N[:, None], routing.num_experts, counted_N)[0]


def max_violation(counts_E: Tensor) -> Tensor:
    """MaxVio: the largest count over the mean, minus 1, fp32; 0 = even, and 0 where all are zero.

    arXiv 2408.15664, section 4.1.
    """
    counts_E = counts_E.float()
    mean = counts_E.mean()
    return torch.where(mean > 0, counts_E.max() / mean - 1, 0)


def min_violation(counts_E: Tensor) -> Tensor:
    """1 minus the smallest count over the mean, fp32; 0 = even, 1 = some expert has no token."""
    counts_E = counts_E.float()
    mean = counts_E.mean()
    return torch.where(mean > 0, 1 - counts_E.min() / mean, 0)


def coefficient_of_variation(counts_E: Tensor) -> Tensor:
    """Standard deviation over mean, fp32, the deviation over all E; 0 where all are zero."""
    counts_E = counts_E.float()
    mean = counts_E.mean()
    return torch.where(mean > 0, counts_E.std(correction=0) / mean, 0)


def load_entropy(counts_E: Tensor) -> Tensor:
    """exp(entropy of the counts) / E, fp32: the share of experts that are in effect used.

    1 = even, and 1 where all are zero; 1 / E = one expert takes everything.
    """
    total = counts_E.sum()
    share_E = counts_E.float() / total.clamp(min=1)
    entropy = -torch.special.xlogy(share_E, share_E).sum()
    return torch.where(total > 0, entropy.exp() / counts_E.numel(), 1)


def dead_experts(counts_E: Tensor) -> Tensor:
    """How many experts no token chose, int64."""
    return (counts_E == 0).sum()


class Load:
    """Counts over many batches: `load.add(routing, ctx)`, then `max_violation(load.counts_E)`."""

    counts_E: Tensor

    def __init__(self, num_experts: int) -> None:
        self.counts_E = torch.zeros(num_experts, dtype=torch.int64)

    def add(self, routing: Routing, ctx: RouterContext | None = None) -> None:
        """Raises as `tokens_per_expert`."""
        new_E = tokens_per_expert(routing, ctx)
        self.counts_E = self.counts_E.to(new_E.device) + new_E

    def reset(self) -> None:
        self.counts_E = torch.zeros_like(self.counts_E)
