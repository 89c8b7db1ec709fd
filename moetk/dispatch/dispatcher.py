"""Bringing tokens to their experts and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from moetk.context import RouterContext
from moetk.routing import Routing, TokenChoice


class Dispatcher(Protocol):
    """dispatch sends each row to where its experts are; combine brings the results home.

    The bank between them gathers, weighs and sums a row's own choices, so combine is a plain sum,
    and the two are transposes of each other.
    """

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, Any]:
        """(x_RH, routing over the experts of this place, a handle for the one combine after)."""
        ...

    def combine(self, y_RH: Tensor, handle: Any) -> Tensor:
        """y_TH, the rows in the order that dispatch was given."""
        ...


def with_drops(routing: Routing, local: Routing) -> Routing:
    """What the router wanted, with what a dispatcher of this rank then dropped: kept_TK and the
    weights are `local`'s, where it is still the same (T, K) choices."""
    if not isinstance(routing, TokenChoice) or not isinstance(local, TokenChoice):
        return routing
    if local.kept_TK is None or local.kept_TK.shape != routing.experts_TK.shape:
        return routing
    return replace(routing, kept_TK=local.kept_TK, weights_TK=local.weights_TK)
