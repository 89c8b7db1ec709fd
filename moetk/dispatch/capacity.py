"""Capacity: how many choices an expert may take, who is served first, and what was dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.errors import UnsupportedRoutingError
from moetk.kernels.counting import mask_of, used_choices
from moetk.kernels.selection import expert_capacity, within_capacity
from moetk.routing import Routing, TokenChoice

Order = Callable[[TokenChoice], Tensor | None]


def first_come(routing: TokenChoice) -> None:
    """Earlier tokens are served first (arXiv 2101.03961)."""


def by_weight(routing: TokenChoice) -> Tensor:
    """Tokens with a larger best weight are served first: batch priority (arXiv 2106.05974)."""
    return routing.weights_TK.detach().amax(-1)


@dataclass(frozen=True)
class Capacity:
    """Each expert serves ceil(factor * S * K / E) choices of a sequence; the rest are dropped.

    order: (routing) -> priority_T, larger first, or None for the order of the tokens. All first
    choices are served before any second one.

    Raises RouterConfigError when the factor is not a finite number above 0.
    """

    factor: float
    order: Order = first_come

    def __post_init__(self) -> None:
        expert_capacity(1, 1, 1, self.factor)

    def __call__(self, routing: Routing, ctx: RouterContext) -> TokenChoice:
        """The routing with kept_TK False and weight 0 where a choice found no place.

        What the router itself dropped stays dropped and takes no place. Raises
        UnsupportedRoutingError unless tokens choose experts: the other kinds cannot overflow.
        """
        if not isinstance(routing, TokenChoice):
            raise UnsupportedRoutingError(
                f"Capacity(factor={self.factor}) limits what tokens choose, but this routing is a "
                f"{type(routing).__name__}, whose load is fixed already. Use Local() without one."
            )
        experts_TK = routing.experts_TK
        if routing.kept_TK is not None:
            experts_TK = experts_TK.masked_fill(~routing.kept_TK, -1)
        kept_TK = within_capacity(
            experts_TK, routing.num_experts, self.factor, ctx, self.order(routing)
        )
        weights_TK = routing.weights_TK.masked_fill(~kept_TK, 0)
        return replace(routing, kept_TK=kept_TK, weights_TK=weights_TK)


def dropped(routing: Routing, ctx: RouterContext | None = None) -> Tensor:
    """How many choices were wanted and not kept: int64 scalar on the routing's device, no wait.

    Unused slots (-1) were not wanted. Padding takes no place under a capacity; give its ctx, so
    that it does not count as dropped. 0 for the kinds of routing that drop nothing. Their share of
    what was wanted is `moetk.metrics.drop_fraction`.

    Raises MoeShapeError when ctx.token_mask is not (T,).
    """
    if not isinstance(routing, TokenChoice):
        device = next(t.device for t in vars(routing).values() if isinstance(t, Tensor))
        return torch.zeros((), dtype=torch.int64, device=device)
    unmasked_T = None if ctx is None else mask_of(ctx, routing.experts_TK.shape[0])
    wanted_TK = used_choices(routing.experts_TK, unmasked_T)
    lost_TK = torch.zeros_like(wanted_TK) if routing.kept_TK is None else ~routing.kept_TK
    return (wanted_TK & lost_TK).sum()
