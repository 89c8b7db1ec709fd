"""A bare router as a side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moetk.context import RouterContext
from moetk.equivalence.sides.bank_view import own_leaves
from moetk.equivalence.sides.base import ModuleSide, Stages, require_module
from moetk.equivalence.sides.facts import router_facts
from moetk.equivalence.sides.routed import Given, routing_stages
from moetk.equivalence.sides.untouched import untouched
from moetk.equivalence.trace import Leaf
from moetk.layers.attach import name_of
from moetk.recorded import check_obeyed
from moetk.routing import Routing, TokenChoice, check_routing


class RouterSide(ModuleSide):
    """(x_TH, ctx) -> Routing: the stages up to the weights, and which choices it keeps."""

    def __init__(
        self, router: Callable[[Tensor, RouterContext], Routing], ctx: RouterContext
    ) -> None:
        super().__init__(router if isinstance(router, nn.Module) else _Called(router), ctx)
        self.name = name_of(router)

    @property
    def _router(self) -> Any:
        return self.module.function if isinstance(self.module, _Called) else self.module

    @property
    def facts(self) -> Mapping[str, Any]:
        return router_facts(self._router)

    def leaves(self) -> Mapping[str, Leaf]:
        return own_leaves(self.module, rename="router.{}".format)

    def in_double(self) -> Self:
        require_module(self._router, self.name)
        return super().in_double()

    def returned(self, module: nn.Module, x_TH: Tensor) -> Tensor:
        routing = module(x_TH, self._trained_context(x_TH, {}))
        held = [one for one in tree_leaves(routing) if isinstance(one, Tensor)]
        return torch.cat([one.flatten().to(x_TH) for one in held])

    def _stages(self, x_TH: Tensor, given: Given) -> Stages:
        ctx = self._context(x_TH, given)
        with untouched(self.module):
            routing = self.module(x_TH, ctx)
        duplicates = getattr(self._router, "duplicates", False)
        check_routing(routing, len(x_TH), 0, where=self.name, duplicates=duplicates)
        check_obeyed(routing, ctx, self.name)
        stages: Stages = {**routing_stages(routing, ctx)}
        if isinstance(routing, TokenChoice):
            ctx = replace(ctx, seed=ctx.seed or 0)

            def forward(router: nn.Module, x_TH: Tensor) -> Tensor:
                weights: Tensor = router(x_TH, ctx).weights_TK
                return weights

            stages["counts"] = self._counts(routing, ctx, forward, x_TH)
        return stages


class _Called(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Callable[[Tensor, RouterContext], Routing]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> Routing:
        return self.function(x_TH, ctx)
