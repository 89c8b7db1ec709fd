"""Stand-ins that note what goes through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.dispatch import Dispatcher
from moetk.equivalence.sides.routed import Given, with_weights
from moetk.layers.attach import name_of
from moetk.routing import Routing


class WatchedRouter:
    """A router whose routing is kept; the layer behind it sees the given weights instead."""

    def __init__(self, router: Callable[[Tensor, RouterContext], Routing], given: Given) -> None:
        self.router, self.given = router, given
        self.__qualname__ = name_of(router)
        self.duplicates = getattr(router, "duplicates", False)
        self.routing: Routing

    def __call__(self, x_TH: Tensor, ctx: RouterContext) -> Routing:
        self.routing = self.router(x_TH, ctx)
        return with_weights(self.routing, self.given, self.__qualname__)


class WatchedDispatcher:
    """A dispatcher of which is kept what the experts were sent, and what came home."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.x_RH: Tensor
        self.local: Routing
        self.combined: Tensor

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, Any]:
        self.x_RH, self.local, handle = self.dispatcher.dispatch(x_TH, routing, ctx)
        return self.x_RH, self.local, handle

    def combine(self, y_RH: Tensor, handle: Any) -> Tensor:
        self.combined = self.dispatcher.combine(y_RH, handle)
        return self.combined


def stand_in(module: nn.Module, **parts: Any) -> Any:
    """A second object over the same parameters and submodules, with `parts` in the place of its
    own of those names."""
    twin = object.__new__(type(module))
    own = {name: one for name, one in module._modules.items() if name not in parts}
    vars(twin).update({**vars(module), "_modules": own, **parts})
    return twin
