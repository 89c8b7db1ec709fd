from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moetk.context import RouterContext
from moetk.routing import Routing, TokenChoice


class Local:
    """All experts are here: rows stay where they are.

    capacity: (routing, ctx) -> routing with kept_TK, e.g. Capacity(1.25); None = nothing is
    dropped. It needs the batch shape in ctx to tell sequences apart; without ctx, or for a packed
    batch, all tokens are one sequence.
    """

    def __init__(
        self, capacity: Callable[[Routing, RouterContext], TokenChoice] | None = None
    ) -> None:
        self.capacity = capacity

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, None]:
        if self.capacity is not None:
            routing = self.capacity(routing, ctx or RouterContext())
        return x_TH, routing, None

    def combine(self, y_RH: Tensor, handle: None) -> Tensor:
        return y_RH
