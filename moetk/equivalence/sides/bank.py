"""A bare expert bank as a side: moetk's (x_TH, routing), or transformers' (x_TH, ids, weights)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.equivalence.sides.bank_view import bank_view, experts_leaves
from moetk.equivalence.sides.base import ModuleSide, Stages
from moetk.equivalence.sides.facts import bank_facts
from moetk.equivalence.sides.inner import Asked, inner_stages
from moetk.equivalence.sides.products import Products
from moetk.equivalence.sides.routed import Given, computed_choices
from moetk.equivalence.sides.untouched import untouched
from moetk.equivalence.trace import Leaf
from moetk.errors import EquivalenceError
from moetk.layers.shells import for_foreign_experts
from moetk.routing import Routing, TokenChoice


class BankSide(ModuleSide):
    """The stages from dispatched to combined. Choices and weights are given, or `routing`'s; they
    are shown as the side's own, so that the weights' gradient is compared."""

    def __init__(self, experts: nn.Module, ctx: RouterContext, routing: Routing | None) -> None:
        super().__init__(experts, ctx)
        self.routing = routing

    @property
    def facts(self) -> Mapping[str, Any]:
        return bank_facts(bank_view(self.module))

    def leaves(self) -> Mapping[str, Leaf]:
        return experts_leaves(self.module, bank_view(self.module))

    def run(self, x_TH: Tensor, given: Given) -> Stages:
        return self._stages(x_TH, given)

    def _stages(self, x_TH: Tensor, given: Given) -> Stages:
        bank = bank_view(self.module)
        routing = self._routing(given, 0 if bank is None else len(bank.up))
        products = None if bank is None else Products(bank)
        with untouched(self.module), products or nullcontext():
            combined = self._combined(self.module, x_TH, routing)
        ids_TK = computed_choices(routing)
        stages: Stages = {
            "indices": routing.experts_TK,
            "weights": routing.weights_TK,
            "dispatched": ids_TK >= 0,
            "combined": combined,
        }
        if products is not None:
            inner = inner_stages(products, Asked(x_TH, ids_TK, routing.weights_TK), combined)
            stages |= inner.stages
            if inner.computed_TK is not None:
                stages["dispatched"] = inner.computed_TK
        return stages

    def returned(self, module: nn.Module, x_TH: Tensor) -> Tensor:
        return self._combined(module, x_TH, self._routing({}, 0))

    def _combined(self, experts: nn.Module, x_TH: Tensor, routing: TokenChoice) -> Tensor:
        combined: Tensor
        if _reads_a_routing(experts):
            combined = experts(x_TH, routing)
        else:
            combined = experts(x_TH, *for_foreign_experts(routing, "side", self.name))
        return combined

    def _routing(self, given: Given, num_experts: int) -> TokenChoice:
        routing = self.routing
        if routing is not None and not isinstance(routing, TokenChoice):
            raise EquivalenceError(
                f"{self.name} is compared at the choices of tokens, and routing= is a "
                f"{type(routing).__name__}. Pass a TokenChoice."
            )
        if routing is None:
            if "indices" not in given or "weights" not in given:
                raise EquivalenceError(
                    f"{self.name} is a bank without a router: pass routing=TokenChoice(ids, "
                    "weights, num_experts), what it is to compute."
                )
            return TokenChoice(given["indices"], given["weights"], num_experts)
        ids_TK = given.get("indices", routing.experts_TK)
        weights_TK = given.get("weights")
        if weights_TK is None:
            weights_TK = routing.weights_TK.detach().clone().requires_grad_()
        kept_TK = routing.kept_TK
        if kept_TK is not None and kept_TK.shape != ids_TK.shape:
            kept_TK = None
        return replace(routing, experts_TK=ids_TK, weights_TK=weights_TK, kept_TK=kept_TK)


def _reads_a_routing(experts: nn.Module) -> bool:
    """Called (x_TH, routing); transformers' take ids and weights as two arguments."""
    parameters = inspect.signature(experts.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return len(required) == 2
