"""The classes put in front of transformers' own: decoder layer, router, experts.

Each reads its `Site` (what is constant for this layer) from the instance, and its `Visit` (which
forward it runs in) from where the decoder layer put it. A site that is no longer active, because
FSDP2's class lies on top of ours and ours cannot be withdrawn, lets the stock forward through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.dispatch import Dispatcher
from moetk.errors import ForeignExpertsError, ReplaceError, UnsupportedRoutingError
from moetk.experts import BankSpec, bank_forward
from moetk.layers.attach import Attachment
from moetk.layers.carrier import VISIT, Carrier, Visit
from moetk.layers.families import Family, Gate, Order, bank_weights
from moetk.recorded import check_obeyed
from moetk.routing import Routing, TokenChoice, check_routing

SITE = "_moetk_site"
BOUND = "_moetk_bound"
PARTS = "_moetk_parts"
CUSTOM = "moetk"


@dataclass(eq=False)
class Site:
    """What is constant for one mixture-of-experts layer of one model.

    layer: its decoder layer. index: its place among the mixture-of-experts layers.
    """

    name: str
    layer: int
    index: int
    family: Family
    gate_row: Gate
    order: Order
    spec: BankSpec
    backend: str
    dispatcher: Dispatcher
    attachment: Attachment
    carrier: Carrier
    check: bool | None
    function: Callable[[Tensor, RouterContext], Routing] | None = None
    label: str | None = None
    frozen: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    active: bool = True

    def context(self, visit: Visit | None, token_ids: Tensor | None = None) -> RouterContext:
        if visit is None:
            return RouterContext(token_ids=token_ids, where=self.name)
        return visit.context(self.layer, self.index, self.name)


class LayerShell:
    """In front of a decoder layer: hands its router and experts the forward they run in."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        carrier: Carrier = self.__dict__[PARTS][0]
        forward = carrier.now
        if forward is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        layer = self.__dict__[PARTS][1]
        call = forward.calls.get(layer, 0)
        forward.calls[layer] = call + 1
        if forward.positions is None and forward.batch_shape is not None:
            positions = kwargs.get("position_ids")
            if isinstance(positions, Tensor) and positions.ndim == 2:
                forward.positions = positions.expand(forward.batch_shape).reshape(-1)
        recomputed = getattr(self, "gradient_checkpointing", False) and self.training  # type: ignore[attr-defined]
        visit = Visit(forward, call, sealed=recomputed and torch.compiler.is_compiling())
        # Set here as well as in forward: under torch.compile a checkpointed region may not set
        # attributes, so there this is the only place.
        before = self._moetk_bind(visit)
        try:
            return super().__call__(*args, **{**kwargs, VISIT: visit})  # type: ignore[misc]
        finally:
            self._moetk_unbind(before)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        visit = kwargs.pop(VISIT, None)
        if visit is None or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        before = self._moetk_bind(visit)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._moetk_unbind(before)

    def _moetk_bind(self, visit: Visit) -> Any:
        router, experts = self.__dict__[PARTS][2:]
        before = router.__dict__.get(BOUND)
        router.__dict__[BOUND] = visit
        experts.__dict__[BOUND] = visit
        return before

    def _moetk_unbind(self, before: Any) -> None:
        router, experts = self.__dict__[PARTS][2:]
        router.__dict__[BOUND] = before
        experts.__dict__[BOUND] = before


class RouterShell:
    """In front of a family's gate: runs the composed or the user's router, returns the family's
    tuple with a Routing in the index slot."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        site: Site = self.__dict__[SITE]
        if not site.active:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        visit: Visit | None = self.__dict__.get(BOUND)
        token_ids = next((a.reshape(-1) for a in args if isinstance(a, Tensor)), None)
        ctx = site.context(visit, token_ids)
        router = self._modules.get(CUSTOM, site.function)  # type: ignore[attr-defined]
        if router is None:
            routing = site.gate_row.router.forward(self, x_TH, ctx)
            if site.gate_row.weight_dtype == "model":
                routing = replace(routing, weights_TK=routing.weights_TK.to(x_TH.dtype))
            duplicates = True  # the catalogue's selections are distinct by construction, or mean it
        else:
            ctx = _guarded(ctx, x_TH)
            routing = router(x_TH, ctx)
            duplicates = getattr(router, "duplicates", False)
        check_routing(
            routing,
            len(x_TH),
            site.spec.num_ids,
            where=f"{site.label or type(self).__name__} in {site.name}",
            duplicates=duplicates,
            values=site.check,
            batch_shape=ctx.batch_shape,
        )
        if visit is not None:
            if visit.forward.replay is not None:
                routing = _obeyed(routing, ctx, visit, site)
            if not visit.sealed:
                visit.ctx = ctx
                if router is not None:
                    visit.forward.previous.setdefault(site.index, routing)
        return _as_family_tuple(routing, site.order)


class ExpertsShell:
    """In front of a family's experts: dispatch, bank, combine, attach."""

    def forward(self, hidden_states: Tensor, index: Any, weights: Any, **kwargs: Any) -> Tensor:
        site: Site = self.__dict__[SITE]
        if not site.active:
            return super().forward(hidden_states, index, weights, **kwargs)  # type: ignore[misc, no-any-return]
        visit: Visit | None = self.__dict__.get(BOUND)
        routing: Routing = (
            TokenChoice(index, weights, site.spec.num_ids) if isinstance(index, Tensor) else index
        )
        ctx = site.context(visit) if visit is None or visit.ctx is None else visit.ctx
        x_RH, local, handle = site.dispatcher.dispatch(hidden_states, routing, ctx)
        if site.backend == "stock":
            ids, stock_weights = for_foreign_experts(local, site.name, type(self).__name__)
            y_RH = super().forward(x_RH, ids, stock_weights, **kwargs)  # type: ignore[misc]
        else:
            y_RH = bank_forward(
                site.spec,
                bank_weights(self),  # type: ignore[arg-type]
                x_RH,
                local,
                site.backend,
                where=f"{site.name}.{site.family.experts}",
            )
        y_TH = site.dispatcher.combine(y_RH, handle)
        if visit is not None and visit.forward.recordings and not _recomputing():
            for recording in visit.forward.recordings:
                recording.add(site.layer, _with_drops(routing, local))
        if site.attachment and self.training:  # type: ignore[attr-defined]
            y_TH = site.attachment(y_TH, routing, ctx, None if visit is None else visit.forward)
        return y_TH


def for_foreign_experts(routing: Routing, where: str, experts: str) -> tuple[Tensor, Tensor]:
    """Ids and weights that experts which are not moetk's can read.

    -1 reaches no stock bank: grouped_mm answers it with garbage, silently. With weight 0 it becomes
    expert 0. Raises ForeignExpertsError where it carries weight, UnsupportedRoutingError for a
    routing that is no TokenChoice.
    """
    if not isinstance(routing, TokenChoice):
        raise UnsupportedRoutingError(
            f"{experts} in {where} reads a TokenChoice; this router returns a "
            f'{type(routing).__name__}, which runs on moetk\'s banks only: backend="auto".'
        )
    ids, weights = routing.experts_TK, routing.weights_TK
    if not torch.compiler.is_compiling() and ids.device.type == "cpu":
        loose = (ids < 0) & (weights != 0)
        if bool(loose.any()):
            token, column = loose.nonzero()[0].tolist()
            raise ForeignExpertsError(
                f"{experts} in {where} cannot read -1: experts_TK {tuple(ids.shape)} has -1 at "
                f"token {token}, column {column} with weight {float(weights[token, column]):.2g}. "
                "An unused slot needs weight 0; mark a dropped choice in kept_TK instead."
            )
    return ids.clamp(min=0), weights


def _as_family_tuple(routing: Routing, order: Order) -> tuple[Any, Any, Any]:
    if isinstance(routing, TokenChoice):
        logits: Tensor | None = routing.logits_TE
        weights: Tensor | None = routing.weights_TK
    else:
        logits = getattr(routing, "logits_TE", None)
        weights = getattr(routing, "weights_EC", None)
    if order == "index_weights_logits":
        return routing, weights, logits
    return logits, weights, routing


def _recomputing() -> bool:
    """Inside backward: activation checkpointing is running this layer a second time."""
    return torch._C._current_graph_task_id() != -1


def _with_drops(routing: Routing, local: Routing) -> Routing:
    """What the router wanted, with what a local capacity then dropped."""
    if not isinstance(routing, TokenChoice) or not isinstance(local, TokenChoice):
        return routing
    if local.kept_TK is None or local.kept_TK.shape != routing.experts_TK.shape:
        return routing
    return replace(routing, kept_TK=local.kept_TK, weights_TK=local.weights_TK)


def _obeyed(routing: Routing, ctx: RouterContext, visit: Visit, site: Site) -> Routing:
    """The routing under replay; raises ReplayError where the router chose for itself."""
    check_obeyed(routing, ctx, f"{site.label or 'the router'} in {site.name}")
    if visit.forward.replay_weights != "stored":
        return routing
    assert visit.forward.replay is not None
    recorded = visit.forward.replay[site.layer]
    assert isinstance(recorded, TokenChoice) and isinstance(routing, TokenChoice)
    return replace(routing, weights_TK=recorded.weights_TK, kept_TK=recorded.kept_TK)


class _NoGraph:
    """Stands for the previous routing where reentrant checkpointing has cut its graph."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __getattr__(self, name: str) -> Any:
        raise ReplaceError(
            f"{self._where} reads ctx.previous.{name} under reentrant activation checkpointing, "
            "where the previous layer's routing has no gradient. Use "
            'gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )


def _guarded(ctx: RouterContext, x_TH: Tensor) -> RouterContext:
    """Reentrant checkpointing ran the previous layer without grad; its recompute comes later than
    this one. Whoever reads that routing now would silently lose a gradient."""
    previous = ctx.previous
    if previous is None or torch.compiler.is_compiling() or not _recomputing():
        return ctx
    weights = getattr(previous, "weights_TK", None)
    if weights is None or weights.requires_grad or not x_TH.requires_grad:
        return ctx
    return replace(ctx, previous=_NoGraph(ctx.where))  # type: ignore[arg-type]
