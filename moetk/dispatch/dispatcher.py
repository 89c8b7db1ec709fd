"""Bringing tokens to their experts and back."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from moetk.context import RouterContext
from moetk.routing import Routing


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
