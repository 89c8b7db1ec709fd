"""Which side a part is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.equivalence.sides.bank import BankSide
from moetk.equivalence.sides.bank_view import bank_view
from moetk.equivalence.sides.block import gate_of, is_block
from moetk.equivalence.sides.function import FunctionSide, returns_stages
from moetk.equivalence.sides.layer import LayerSide
from moetk.equivalence.sides.replaced import ReplacedSide
from moetk.equivalence.sides.replayed import TraceSide
from moetk.equivalence.sides.router import RouterSide
from moetk.equivalence.sides.stock import StockSide
from moetk.equivalence.trace import Side, Trace
from moetk.errors import EquivalenceError
from moetk.layers.moe import MoELayer
from moetk.layers.shells import SITE
from moetk.routing import Routing


def side_of(
    part: Any, x: Tensor, ctx: RouterContext | None = None, routing: Routing | None = None
) -> Side:
    """The side of a moetk.MoELayer, a block of a Transformers v5 model (stock or replaced), a bank,
    a router, a trace, or a function x_TH -> {stage: array}; a side is returned as it is.

    x: (B, S, H) or (T, H), the input that will be compared. ctx: what the routers may know; its
    batch shape, if None, is x's. routing: what a bare bank computes.
    Raises EquivalenceError for anything else.
    """
    ctx = RouterContext() if ctx is None else ctx
    if ctx.batch_shape is None and x.ndim == 3:
        ctx = replace(ctx, batch_shape=(x.shape[0], x.shape[1]))
    if isinstance(part, Side):
        return part
    if isinstance(part, MoELayer):
        return LayerSide(part, ctx)
    if is_block(part):
        return ReplacedSide(part, ctx) if SITE in vars(gate_of(part)) else StockSide(part, ctx)
    if isinstance(part, nn.Module) and _is_bank(part, routing):
        return BankSide(part, ctx, routing)
    if isinstance(part, Trace):
        return TraceSide(part, x.device)
    if callable(part):
        return FunctionSide(part, x) if returns_stages(part) else RouterSide(part, ctx)
    raise EquivalenceError(
        f"{type(part).__name__} cannot be compared. Pass a moetk.MoELayer, a mixture-of-experts "
        "block of a Transformers v5 model, a router, a bank, a stored trace, or a function x_TH -> "
        "{stage: array}."
    )


def _is_bank(part: nn.Module, routing: Routing | None) -> bool:
    """It has a bank's stacks; or it is asked to compute a routing, be it around a bank."""
    if bank_view(part) is not None:
        return True
    return routing is not None and not returns_stages(part)
