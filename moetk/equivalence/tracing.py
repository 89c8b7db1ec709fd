"""`moetk.trace`: the values that `moetk.compare` reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moetk.context import RouterContext
from moetk.equivalence.sides.pick import side_of
from moetk.equivalence.trace import Trace, observe
from moetk.routing import Routing


def trace(
    part: Any,
    x: Tensor,
    *,
    ctx: RouterContext | None = None,
    routing: Routing | None = None,
    seed: int = 0,
) -> Trace:
    """What one implementation of a layer, router or bank computes at each stage, on one input.

    >>> seen = moetk.trace(layer, torch.randn(2, 16, 64))
    >>> seen.values["weights"], seen.grads["up_weight"]

    part, x, ctx, routing, seed: as moetk.compare takes them. Stages and their shapes are listed in
    `moetk.equivalence.trace`; the gradients are of the last one, which gets a gradient drawn from
    `seed`. The part does not change. Raises EquivalenceError where it cannot be read.
    """
    return observe(side_of(part, x, ctx, routing), x.detach().flatten(0, -2), seed=seed)
