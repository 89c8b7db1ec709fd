"""What the sides of modules share: copies, and the choice a side makes when none is forced."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.equivalence.sides.counters import Forward, gained_by_counter
from moetk.equivalence.sides.loads import loads
from moetk.equivalence.sides.routed import Given, check_given, counts_of, forcing
from moetk.equivalence.sides.untouched import copied
from moetk.equivalence.trace import Scattered
from moetk.errors import EquivalenceError
from moetk.experts import ExpertBank
from moetk.layers.shells import SITE, Site
from moetk.routing import TokenChoice

Stages = dict[str, Tensor | Scattered]
CHOICE_BIAS = "e_score_correction_bias"


class ModuleSide:
    """A side that runs one nn.Module; a subclass gives `_stages`, one run of it."""

    def __init__(self, module: nn.Module, ctx: RouterContext) -> None:
        self.module, self.ctx = module, ctx
        self.name = type(module).__name__

    def run(self, x_TH: Tensor, given: Given) -> Stages:
        check_given(given, len(x_TH), self.facts.get("num_experts"), self.name)
        with forcing(given, self.name):
            stages = self._stages(x_TH, given)
            if "indices" in given and "indices" in stages:
                with torch.no_grad():
                    stages["indices"] = self._stages(x_TH.detach(), {})["indices"]
        return stages

    def eager(self) -> Self:
        side = self._of_copy()
        for one in side.module.modules():
            _run_plainly(one)
        return side

    def in_double(self) -> Self:
        side = self._of_copy()
        for one in side.module.modules():
            _run_eagerly(one)  # transformers' other implementations do not take float64
        side.module.double()
        return side

    @property
    def facts(self) -> Mapping[str, Any]:
        raise NotImplementedError

    def returned(self, module: nn.Module, x_TH: Tensor) -> Tensor:
        """What `module`, a copy of the side's in whatever mode, returns on one plain call."""
        raise NotImplementedError

    def _stages(self, x_TH: Tensor, given: Given) -> Stages:
        raise NotImplementedError

    def _of_copy(self) -> Self:
        side = copy.copy(self)
        side.module = copied(self.module)
        return side

    def _trained_context(self, x_TH: Tensor, given: Given) -> RouterContext:
        """The same for a run in training, where noise is drawn from a seed."""
        ctx = self._context(x_TH, given)
        return replace(ctx, seed=ctx.seed or 0)

    def _context(self, x_TH: Tensor, given: Given) -> RouterContext:
        """The context of one run. Raises EquivalenceError where it was made for other tokens."""
        shape = self.ctx.batch_shape
        if shape is not None and shape[0] * shape[1] != len(x_TH):
            raise EquivalenceError(
                f"{self.name} got T={len(x_TH)} tokens, but its context says batch_shape={shape}; "
                "pass the ctx of this input."
            )
        return replace(self.ctx, replay=given.get("indices", self.ctx.replay))

    def _counts(
        self, routing: TokenChoice, ctx: RouterContext, forward: Forward, x_TH: Tensor
    ) -> Tensor:
        """(E,) int64: what a counter of the module's counts, else the choices themselves.

        routing: with kept_TK, also what was dropped on the way to the experts."""
        biases = [b for n, b in self.module.named_buffers() if n.rsplit(".", 1)[-1] == CHOICE_BIAS]
        known = loads(routing, ctx)
        gained_E = gained_by_counter(self.module, forward, x_TH, known, biases)
        if gained_E is not None:
            return gained_E
        return counts_of(routing.experts_TK, routing.num_experts, ctx)


def require_module(router: object, name: str) -> None:
    """Raise EquivalenceError for a router that nobody can cast to float64."""
    if not isinstance(router, nn.Module):
        raise EquivalenceError(
            f"{name} has no float64 copy: its router is a {type(router).__name__}, and what that "
            "holds cannot be cast. Make it an nn.Module."
        )


def _run_plainly(module: nn.Module) -> None:
    """Experts by a loop in plain torch, whoever's they are."""
    _run_eagerly(module)
    site = vars(module).get(SITE)
    if isinstance(site, Site):
        site.backend = "reference"
    elif isinstance(module, ExpertBank):
        module.backend = "reference"


def _run_eagerly(module: nn.Module) -> None:
    """Transformers' experts by their own loop."""
    config = vars(module).get("config")
    if getattr(config, "_experts_implementation", None) is not None:
        config._experts_implementation = "eager"  # type: ignore[union-attr]
