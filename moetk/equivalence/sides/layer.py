"""A moetk.MoELayer as a side."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Self

from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.dispatch import with_drops
from moetk.equivalence.sides.bank_view import bank_view, experts_leaves, own_leaves
from moetk.equivalence.sides.base import ModuleSide, Stages, require_module
from moetk.equivalence.sides.counters import committed, step
from moetk.equivalence.sides.facts import attachment_facts, bank_facts, dispatch_facts, router_facts
from moetk.equivalence.sides.inner import Asked, inner_stages
from moetk.equivalence.sides.products import Products
from moetk.equivalence.sides.routed import (
    Given,
    computed_choices,
    loss_stage,
    output_stage,
    routing_stages,
)
from moetk.equivalence.sides.untouched import copied, untouched
from moetk.equivalence.sides.watched import WatchedDispatcher, WatchedRouter, stand_in
from moetk.equivalence.trace import Leaf
from moetk.layers.moe import MoELayer
from moetk.routing import Routing, TokenChoice


class LayerSide(ModuleSide):
    """Every stage of the layer's own forward. A choice is forced through ctx.replay.

    counts: what a controller that sums one vector was given in a training step, else what a counter
    of the layer gained in one, else the choices. Where experts or slots choose (ExpertChoice,
    SoftChoice), the stages that speak of a token's choices are absent, and nothing can be forced.
    """

    module: MoELayer

    @property
    def facts(self) -> Mapping[str, Any]:
        layer = self.module
        return {
            **bank_facts(bank_view(layer.experts)),
            **router_facts(layer.router),
            **dispatch_facts(layer.dispatcher),
            **attachment_facts(layer.attachment),
        }

    def leaves(self) -> Mapping[str, Leaf]:
        layer = self.module
        router = layer.router if isinstance(layer.router, nn.Module) else None
        leaves = experts_leaves(layer.experts, bank_view(layer.experts))
        if router is not None:
            leaves |= own_leaves(router, rename="router.{}".format)
        return leaves | own_leaves(layer, skip=(router, layer.experts))

    def in_double(self) -> Self:
        require_module(self.module.router, self.name)
        return super().in_double()

    def _stages(self, x_TH: Tensor, given: Given) -> Stages:
        ctx, bank = self._context(x_TH, given), bank_view(self.module.experts)
        products = None if bank is None else Products(bank)
        with untouched(self.module):
            router = WatchedRouter(self.module.router, given)
            dispatcher = WatchedDispatcher(self.module.dispatcher)
            twin = stand_in(self.module, router=router, dispatcher=dispatcher)
            with products or nullcontext():
                y_TH, _ = twin(x_TH, ctx)
            stages = layer_stages(router.routing, dispatcher, products, ctx)
            stages |= loss_stage(self.module.attachment.losses, router.routing, ctx)
        stages |= output_stage(y_TH, dispatcher.combined)
        routing = with_drops(router.routing, dispatcher.local)
        if isinstance(routing, TokenChoice):
            stages["counts"] = self._counted(routing, x_TH, given)
        return stages

    def returned(self, module: nn.Module, x_TH: Tensor) -> Tensor:
        return self._forward(module, x_TH, self._trained_context(x_TH, {}))

    @staticmethod
    def _forward(layer: nn.Module, x_TH: Tensor, ctx: RouterContext) -> Tensor:
        y_TH: Tensor = layer(x_TH, ctx)[0]
        return y_TH

    def _counted(self, routing: TokenChoice, x_TH: Tensor, given: Given) -> Tensor:
        ctx = self._trained_context(x_TH, given)

        def forward(layer: nn.Module, x_TH: Tensor) -> Tensor:
            return self._forward(layer, x_TH, ctx)

        if self.module.attachment.steered:
            layer = copied(self.module).eval()
            layer.training = True
            told_E = committed(layer.attachment, lambda: step(layer, forward, x_TH))
            if told_E is not None and len(told_E) == routing.num_experts:
                return told_E
        return self._counts(routing, ctx, forward, x_TH)


def layer_stages(
    routing: Routing, dispatcher: WatchedDispatcher, products: Products | None, ctx: RouterContext
) -> Stages:
    """From a router's own routing and what its layer then dispatched, computed and combined."""
    local = dispatcher.local
    stages: Stages = {**routing_stages(routing, ctx), "combined": dispatcher.combined}
    final = with_drops(routing, local)
    if isinstance(final, TokenChoice):
        stages["dispatched"] = computed_choices(final) >= 0
    if products is not None and isinstance(local, TokenChoice):
        asked = Asked(dispatcher.x_RH, computed_choices(local), local.weights_TK)
        if asked.ids_TK.shape == getattr(routing, "experts_TK", asked.ids_TK).shape:
            stages |= inner_stages(products, asked, dispatcher.combined).stages
    return stages
