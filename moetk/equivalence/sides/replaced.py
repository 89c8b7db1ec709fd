"""A block of a transformers model that `replace_moe` has moetk's parts in, as a side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.dispatch import with_drops
from moetk.equivalence.sides.bank_view import bank_view
from moetk.equivalence.sides.base import Stages
from moetk.equivalence.sides.block import (
    BlockSide,
    block_leaves,
    call_block,
    experts_of,
    gate_of,
    hooked,
)
from moetk.equivalence.sides.counters import committed, step
from moetk.equivalence.sides.facts import attachment_facts, bank_facts, dispatch_facts, router_facts
from moetk.equivalence.sides.layer import layer_stages
from moetk.equivalence.sides.products import Products
from moetk.equivalence.sides.routed import Given, loss_stage, output_stage, with_weights
from moetk.equivalence.sides.untouched import copied, untouched
from moetk.equivalence.sides.watched import WatchedDispatcher
from moetk.equivalence.trace import Leaf
from moetk.layers.carrier import ModelForward, Visit
from moetk.layers.shells import BOUND, CUSTOM, SITE, Site
from moetk.routing import ExpertChoice, Routing, SoftChoice, TokenChoice

_ROUTINGS = (TokenChoice, ExpertChoice, SoftChoice)


class ReplacedSide(BlockSide):
    """Runs the block as its decoder layer would: with a `Visit` bound to router and experts, in
    which a choice is replayed."""

    @property
    def facts(self) -> Mapping[str, Any]:
        site, gate = _site(self.module), self._gate
        router = gate._modules.get(CUSTOM, site.function) or gate
        return {
            **bank_facts(bank_view(self._experts)),
            **router_facts(router, site.settings),
            **dispatch_facts(site.dispatcher),
            **attachment_facts(site.attachment),
        }

    def leaves(self) -> Mapping[str, Leaf]:
        return block_leaves(self.module, bank_view(self._experts))

    def _stages(self, x_TH: Tensor, given: Given) -> Stages:
        ctx, bank = self._context(x_TH, given), bank_view(self._experts)
        products = None if bank is None else Products(bank)
        routings: list[Routing] = []

        def note(gate: nn.Module, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
            routing = next(part for part in output if isinstance(part, _ROUTINGS))
            routings.append(routing)
            forced = with_weights(routing, given, self.name)
            return tuple(forced if part is routing else part for part in output)

        site = _site(self.module)
        dispatcher = WatchedDispatcher(site.dispatcher)
        with untouched(self.module), hooked(self._gate.register_forward_hook(note)):
            with _dispatching(site, dispatcher), products or nullcontext():
                y_TH = _visit(self.module, x_TH, ctx, self.name)
            stages = layer_stages(routings[0], dispatcher, products, ctx)
            stages |= loss_stage(site.attachment.losses, routings[0], ctx)
        stages |= output_stage(y_TH, dispatcher.combined)
        routing = with_drops(routings[0], dispatcher.local)
        if isinstance(routing, TokenChoice):
            stages["counts"] = self._counted(routing, x_TH, given)
        return stages

    def returned(self, module: nn.Module, x_TH: Tensor) -> Tensor:
        return self._forward(module, x_TH, self._trained_context(x_TH, {}))

    def _forward(self, block: nn.Module, x_TH: Tensor, ctx: RouterContext) -> Tensor:
        _site(block).attachment.aux_scale = 0.0  # it is a copy's: no loss is computed here
        return _visit(block, x_TH, ctx, self.name)

    def _counted(self, routing: TokenChoice, x_TH: Tensor, given: Given) -> Tensor:
        ctx = self._trained_context(x_TH, given)

        def forward(block: nn.Module, x_TH: Tensor) -> Tensor:
            return self._forward(block, x_TH, ctx)

        if _site(self.module).attachment.steered:
            block = copied(self.module).eval()
            experts_of(block).training = True
            told_E = committed(_site(block).attachment, lambda: step(block, forward, x_TH))
            if told_E is not None and len(told_E) == routing.num_experts:
                return told_E
        return self._counts(routing, ctx, forward, x_TH)


def _site(block: nn.Module) -> Site:
    site: Site = vars(gate_of(block))[SITE]
    return site


def _visit(block: nn.Module, x_TH: Tensor, ctx: RouterContext, name: str) -> Tensor:
    """The block within a forward of its own, as LayerShell binds one."""
    site, forward = _site(block), ModelForward()
    forward.token_ids, forward.positions = ctx.token_ids, ctx.positions
    forward.token_mask, forward.label_mask = ctx.token_mask, ctx.label_mask
    forward.batch_shape, forward.seed = ctx.batch_shape, ctx.seed
    if ctx.previous is not None:
        forward.previous[site.index - 1] = ctx.previous
    if ctx.replay is not None:
        weights_TK = torch.zeros(ctx.replay.shape, device=x_TH.device)
        forward.replay = {site.layer: [TokenChoice(ctx.replay, weights_TK, site.spec.num_ids)]}
    visit = Visit(forward, 0)
    parts = [vars(gate_of(block)), vars(experts_of(block))]
    before = [part.get(BOUND) for part in parts]
    try:
        for part in parts:
            part[BOUND] = visit
        return call_block(block, x_TH, ctx, name)
    finally:
        for part, old in zip(parts, before, strict=True):
            part[BOUND] = old


@contextmanager
def _dispatching(site: Site, dispatcher: WatchedDispatcher) -> Iterator[None]:
    own, site.dispatcher = site.dispatcher, dispatcher
    try:
        yield
    finally:
        site.dispatcher = own
