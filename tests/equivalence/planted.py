"""A planted defect: a right part, a wrong one with the same parameters, and what compare must say.

The wrong parts are written as the mistakes are made: a step of a router, of a loop over experts, of
a dispatcher, of a loss or of a backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetk import RouterContext, TokenChoice
from moetk.equivalence.comparison import compare
from moetk.equivalence.report import Report
from tests.equivalence.steps import inputs


@dataclass(frozen=True)
class Planted:
    """right, wrong: build the two parts, with the same parameters. stage: the first that differs.
    causes: all that compare names; several where no input can tell them apart. x, ctx, routing:
    what they are compared on. dtypes: in which."""

    name: str
    right: Callable[[], Any]
    wrong: Callable[[], Any]
    stage: str
    causes: tuple[str, ...]
    x: Callable[[], Tensor] = inputs
    ctx: RouterContext | None = None
    routing: Callable[[], TokenChoice] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)

    def compare(self, dtype: torch.dtype) -> Report:
        routing = None if self.routing is None else self.routing()
        parts = [part() for part in (self.right, self.wrong)]
        parts = [part.to(dtype) if isinstance(part, torch.nn.Module) else part for part in parts]
        return compare(*parts, self.x().to(dtype), ctx=self.ctx, routing=routing)
