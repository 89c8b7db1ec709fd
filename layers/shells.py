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
from moetk.dispatch import Dispatcher, with_drops
from moetk.errors import ForeignExpertsError, ReplaceError, UnsupportedRoutingError
from moetk.experts import BankSpec, bank_forward
from moetk.layers.attach import Attachment
from moetk.layers.carrier import VISIT, Carrier, Visit
from moetk.layers.families import Family, Gate, Order, bank_weights
from moetk.recorded import check_obeyed
from moetk.routers.fused import choose_fused, why_not_fused
from moetk.routing import Routing, TokenChoice, check_routing, detached

SITE = "_moetk_site"
BOUND = "_moetk_bound"
PARTS = "_moetk_parts"
CUSTOM = "moetk"


class _Route:
    """The router of a site, in messages."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def __str__(self) -> str:
        return f"{self.site.label or self.site.gate_name} in {self.site.name}"


@dataclass(eq=False)
class Site:
    """What is constant for one mixture-of-experts layer of one model.

    layer: its decoder layer. index: its place among the mixture-of-experts layers.
    """

    name: str
    layer: int
    index: int
    top_k: int
    gate_name: str
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
    add_to_grad: bool = False

    def __post_init__(self) -> None:
        self.route = _Route(self)
        self.alone = RouterContext(where=self)  # of a layer that is called on its own

    def context(
        self, visit: Visit | None, token_ids: Tensor | None = None, router: Any = None
    ) -> RouterContext:
        if visit is None:
            if token_ids is None:
                return self.alone
            return RouterContext(token_ids=token_ids, where=self)
        previous = None
        if router is not None and self.index > 0:
            reads = getattr(router, "reads_previous", False)
            kept = visit.forward.previous.get(self.index - 1)
            previous = kept if reads else _Withheld(self.name, _UNDECLARED)
        return visit.context(self.layer, self, previous)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """For messages. Written only when one is: a name built on every call would be a constant
        of the compiled layer, and no two layers could share code."""
        return self.name

    def check_inside(self, visit: Visit | None) -> None:
        """Raise ReplaceError in a recompute that began below the decoder layer: it knows neither
        ids nor mask nor replay, and would choose other experts than the forward did."""
        if visit is None and self.carrier.count and recomputing():
            raise ReplaceError(
                f"{self.name} is recomputed on its own: activation checkpointing wraps the block, "
                "and what its router knew stays with the decoder layer. Checkpoint the decoder "
                "layer (model.gradient_checkpointing_enable())."
            )


class LayerShell:
    """In front of a decoder layer: hands its router and experts the forward they run in."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        carrier, layer, router, experts = self.__dict__[PARTS]
        forward = carrier.now
        if forward is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        call = forward.calls.get(layer, 0)
        forward.calls[layer] = call + 1
        if forward.positions is None and forward.batch_shape is not None:
            positions = kwargs.get("position_ids")
            if isinstance(positions, Tensor) and positions.ndim == 2:
                forward.positions = positions.expand(forward.batch_shape).reshape(-1)
        recomputed = getattr(self, "gradient_checkpointing", False) and self.training  # type: ignore[attr-defined]
        visit = Visit(forward, call, sealed=recomputed and torch.compiler.is_compiling())
        kwargs[VISIT] = visit
        # Set here as well as in forward: under torch.compile a checkpointed region may not set
        # attributes, so there this is the only place.
        before = router.__dict__.get(BOUND)
        router.__dict__[BOUND] = experts.__dict__[BOUND] = visit
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            router.__dict__[BOUND] = experts.__dict__[BOUND] = before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        visit = kwargs.pop(VISIT, None)
        if visit is None or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        _, _, router, experts = self.__dict__[PARTS]
        before = router.__dict__.get(BOUND)
        if before is visit:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        # A recompute, which begins here.
        router.__dict__[BOUND] = experts.__dict__[BOUND] = visit
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            router.__dict__[BOUND] = experts.__dict__[BOUND] = before


class RouterShell:
    """In front of a family's gate: runs the composed or the user's router, returns the family's
    tuple with a Routing in the index slot."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        site: Site = self.__dict__[SITE]
        if not site.active:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        x_TH = hidden_states
        if x_TH.ndim != 2:
            x_TH = x_TH.reshape(-1, x_TH.shape[-1])
        visit: Visit | None = self.__dict__.get(BOUND)
        site.check_inside(visit)
        token_ids = None
        if args:
            token_ids = next((a.reshape(-1) for a in args if isinstance(a, Tensor)), None)
        router = self._modules.get(CUSTOM, site.function)  # type: ignore[attr-defined]
        ctx = site.context(visit, token_ids, router)
        if router is None:
            routing: Routing = _composed(self, site, x_TH, ctx, visit)
            duplicates = site.gate_row.router.duplicates
            # A table or a recording may name any expert; a selection names those there are.
            trusted = not duplicates and ctx.replay is None
        else:
            ctx = _guarded(ctx, x_TH)
            routing = router(x_TH, ctx)
            trusted, duplicates = False, getattr(router, "duplicates", False)
        check_routing(
            routing,
            x_TH.shape[0],
            site.spec.num_ids,
            where=site.route,
            duplicates=duplicates,
            trusted=trusted,
            values=site.check,
            batch_shape=ctx.batch_shape,
        )
        if visit is not None:
            if visit.forward.replay is not None:
                routing = _obeyed(routing, ctx, visit, site)
            if not visit.sealed:
                visit.ctx = ctx
                if site.carrier.keeps_previous:
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
        site.check_inside(visit)
        ctx = site.context(visit) if visit is None or visit.ctx is None else visit.ctx
        x_RH, local, handle = site.dispatcher.dispatch(hidden_states, routing, ctx)
        if site.backend == "stock":
            ids, stock_weights = for_foreign_experts(local, site.name, type(self).__name__)
            y_RH = super().forward(x_RH, ids, stock_weights, **kwargs)  # type: ignore[misc]
        else:
            y_RH = bank_forward(
                site.spec,
                bank_weights(self, site.add_to_grad),  # type: ignore[arg-type]
                x_RH,
                local,
                site.backend,
                where=site,
            )
        y_TH = site.dispatcher.combine(y_RH, handle)
        if visit is not None and visit.forward.recordings and not recomputing():
            fields = frozenset[str]().union(*(r.fields for r in visit.forward.recordings))
            entries = visit.forward.recorded.setdefault(site.layer, [])
            entries.append(detached(with_drops(routing, local), fields))
        if site.attachment and self.training:  # type: ignore[attr-defined]
            y_TH = site.attachment(y_TH, routing, ctx, None if visit is None else visit.forward)
        return y_TH


def _composed(
    gate: Any, site: Site, x_TH: Tensor, ctx: RouterContext, visit: Visit | None
) -> TokenChoice:
    """The family's own router: by its kernels where those run and nobody reads what they leave
    out."""
    row = site.gate_row
    dtype = x_TH.dtype if row.weight_dtype == "model" else None
    if _unread(site, visit) and why_not_fused(gate, ctx) is None:
        return choose_fused(gate, x_TH, ctx, dtype)
    routing: TokenChoice = row.router.forward(gate, x_TH, ctx)
    if dtype is None:
        return routing
    return replace(routing, weights_TK=routing.weights_TK.to(dtype))


_LEFT_OUT = frozenset(("scores_TE", "choice_TE"))


def _unread(site: Site, visit: Visit | None) -> bool:
    """No loss, controller, recording or later router reads the scores, and the experts run on
    moetk's kernels: who asks for another backend asks for its plain router too."""
    if site.backend not in ("auto", "fused") or site.carrier.keeps_previous:
        return False
    reads = site.attachment.reads
    if reads is None or reads & _LEFT_OUT:
        return False
    recordings = () if visit is None else visit.forward.recordings
    return not any(_LEFT_OUT & frozenset(one.fields) for one in recordings)


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


def recomputing() -> bool:
    """Inside backward: activation checkpointing is running this layer a second time."""
    # The question cannot be traced; a compiled region is recomputed without running Python.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _obeyed(routing: Routing, ctx: RouterContext, visit: Visit, site: Site) -> Routing:
    """The routing under replay; raises ReplayError where the router chose for itself."""
    check_obeyed(routing, ctx, f"{site.label or 'the router'} in {site.name}")
    if visit.forward.replay_weights != "stored":
        return routing
    recorded = visit.replayed(site.layer)
    assert isinstance(recorded, TokenChoice) and isinstance(routing, TokenChoice)
    return replace(routing, weights_TK=recorded.weights_TK, kept_TK=recorded.kept_TK)


_UNDECLARED = (
    "its router does not declare it. Set `reads_previous = True` on the router: routings, with "
    "their graph, are kept from layer to layer only where one reads them."
)
_REENTRANT = (
    "reentrant activation checkpointing has cut its gradient. Use "
    'gradient_checkpointing_kwargs={"use_reentrant": False}.'
)


class _Withheld:
    """Stands in ctx.previous for a routing that cannot be given; says why when it is read."""

    def __init__(self, where: str, why: str) -> None:
        self._where, self._why = where, why

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask for these
            raise AttributeError(name)
        raise ReplaceError(f"{self._where} reads ctx.previous.{name}: {self._why}")


def _guarded(ctx: RouterContext, x_TH: Tensor) -> RouterContext:
    """Reentrant checkpointing ran the previous layer without grad; its recompute comes later than
    this one. Whoever reads that routing now would silently lose a gradient."""
    previous = ctx.previous
    if (
        previous is None
        or isinstance(previous, _Withheld)
        or torch.compiler.is_compiling()
        or not recomputing()
    ):
        return ctx
    weights = getattr(previous, "weights_TK", None)
    if weights is None or weights.requires_grad or not x_TH.requires_grad:
        return ctx
    return replace(ctx, previous=_Withheld(ctx.where, _REENTRANT))  # type: ignore[arg-type]
