"""A block of a Transformers v5 model in stock form as a side.

Letters: T tokens, E experts, K choices a token, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.equivalence.sides.bank_view import BankView, bank_view
from moetk.equivalence.sides.base import Stages
from moetk.equivalence.sides.block import (
    BlockSide,
    block_leaves,
    call_block,
    gate_of,
    hooked,
)
from moetk.equivalence.sides.choosing import Choosing
from moetk.equivalence.sides.facts import bank_facts, router_facts
from moetk.equivalence.sides.inner import Asked, inner_stages
from moetk.equivalence.sides.products import Products
from moetk.equivalence.sides.routed import Given, check_given, output_stage
from moetk.equivalence.sides.untouched import untouched
from moetk.equivalence.trace import Leaf, Scattered
from moetk.errors import EquivalenceError
from moetk.layers.families import Family, family_of
from moetk.routing import TokenChoice


@dataclass(eq=False)
class _Call:
    """What was seen in one call: the gate's outputs, the block's own weights for the experts, what
    the experts were asked (with given weights, where there are any), and their output."""

    choosing: Choosing
    products: Products | None
    gate: list[Tensor] = field(default_factory=list)
    weights_TK: Tensor | None = None
    asked: Asked | None = None
    combined: Tensor | None = None
    output_TH: Tensor | None = None


class StockSide(BlockSide):
    """Runs the real block and overhears it. Which of its parts is what is told by dtype and shape,
    so that any block works whose experts are called with (T, H) rows, (T, K) ids and weights.

    A choice is forced where the gate takes it by a topk or from a table of ids. What the gate or
    the experts compute without a call that can be overheard is absent.
    """

    @property
    def _family(self) -> Family | None:
        return family_of(self.module)

    @property
    def _bank(self) -> BankView | None:
        return bank_view(self._experts, self._family)

    @property
    def facts(self) -> Mapping[str, Any]:
        gate, family = self._gate, self._family
        settings: dict[str, Any] = {"tie": "stock"}
        known = [cls.__name__ for cls in type(gate).__mro__]
        row = next((family.gates[n] for n in known if n in family.gates), None) if family else None
        if row is not None:
            settings |= row.settings(gate)
        return {**bank_facts(self._bank), **router_facts(gate, settings)}

    def leaves(self) -> Mapping[str, Leaf]:
        return block_leaves(self.module, self._bank)

    def run(self, x_TH: Tensor, given: Given) -> Stages:
        ctx = self._context(x_TH, {})
        if "indices" not in given:
            return self._shown(self._call(x_TH, ctx, given), x_TH, ctx, None, given)
        check_given(given, len(x_TH), self.facts.get("num_experts"), self.name)
        if bool((given["indices"] < 0).any()):
            raise EquivalenceError(
                f"{self.name} cannot take indices with -1: its gate fills every slot. Replace it "
                "by moetk, whose banks know unused slots."
            )
        with torch.no_grad():
            free = self._call(x_TH.detach(), ctx, {})
        own_TK = _asked(free).ids_TK
        number = free.choosing.number_of(own_TK)
        if number is None:
            raise EquivalenceError(
                f"{self.name} cannot take given indices: its gate chooses neither by a topk nor "
                "from a table of ids. Compare it with nothing forced, or replace it by moetk."
            )
        call = self._call(x_TH, ctx, given, number)
        if not torch.equal(_asked(call).ids_TK, given["indices"]):
            raise EquivalenceError(
                f"{self.name} did not take given indices {tuple(given['indices'].shape)}: what "
                "reached its experts are others. Compare it with nothing forced."
            )
        return {**self._shown(call, x_TH, ctx, number, given), "indices": own_TK}

    def returned(self, module: nn.Module, x_TH: Tensor) -> Tensor:
        return call_block(module, x_TH, self._context(x_TH, {}), self.name)

    def _call(
        self, x_TH: Tensor, ctx: RouterContext, given: Given, number: int | None = None
    ) -> _Call:
        bank = self._bank
        call = _Call(
            Choosing(self._gate, number, given.get("indices")),
            None if bank is None else Products(bank),
        )
        hooks = (
            self._gate.register_forward_hook(_note_gate(call)),
            self._experts.register_forward_pre_hook(
                _note_arguments(call, given, self.name), with_kwargs=True
            ),
            self._experts.register_forward_hook(_note_combined(call)),
        )
        with hooked(*hooks), untouched(self.module), call.choosing, call.products or nullcontext():
            call.output_TH = call_block(self.module, x_TH, ctx, self.name)
        if call.asked is None:
            raise EquivalenceError(
                f"{self.name} never called its experts with (T, H) rows, (T, K) integer ids and "
                "(T, K) weights: it cannot be read as a mixture-of-experts block."
            )
        return call

    def _shown(
        self, call: _Call, x_TH: Tensor, ctx: RouterContext, number: int | None, given: Given
    ) -> Stages:
        asked, combined = _asked(call), call.combined
        assert combined is not None and call.output_TH is not None
        assert call.weights_TK is not None
        ids_TK = asked.ids_TK
        stages: Stages = {"indices": ids_TK, "weights": call.weights_TK}
        logits = self._logits(call)
        if logits is not None:
            stages["logits"] = _flat(logits, len(x_TH))
        scores = call.choosing.scores(ids_TK, logits)
        if scores is not None and len(scores) == len(x_TH):
            stages["scores"] = scores
        chosen = call.choosing.number_of(ids_TK)
        choice = None if chosen is None else call.choosing.selections[chosen].choice_TE
        if choice is not None:
            stages["choice"] = choice
        wide = [t.shape[-1] for t in (choice, scores, logits) if t is not None]
        num_experts = wide[0] if wide else self.facts.get("num_experts")

        def forward(block: nn.Module, x_TH: Tensor) -> Tensor:
            with Choosing(gate_of(block), number, given.get("indices")):
                return call_block(block, x_TH, ctx, self.name)

        computed_TK = torch.ones_like(ids_TK, dtype=torch.bool)
        stages["combined"] = _flat(combined, len(x_TH))
        if call.products is not None:
            inner = inner_stages(call.products, asked, combined)
            stages |= inner.stages
            if inner.computed_TK is not None:
                computed_TK = inner.computed_TK
        stages["dispatched"] = computed_TK
        if num_experts is not None:
            routing = TokenChoice(ids_TK, call.weights_TK, num_experts, kept_TK=computed_TK)
            stages["counts"] = self._counts(routing, ctx, forward, x_TH)
        return stages | output_stage(call.output_TH, combined)

    def _logits(self, call: _Call) -> Tensor | None:
        """The gate's floating output that is neither the weights nor already a score."""
        for tensor in call.gate:
            if tensor.is_floating_point() and tensor is not call.weights_TK:
                return None if call.choosing.squashed(tensor) else tensor
        return None


def _asked(call: _Call) -> Asked:
    assert call.asked is not None
    return call.asked


def _note_gate(call: _Call) -> Any:
    def note(gate: nn.Module, args: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        call.gate.extend(part for part in outputs if isinstance(part, Tensor))

    return note


def _note_arguments(call: _Call, given: Given, name: str) -> Any:
    def note(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        ids = next((t for t in tensors if not t.is_floating_point() and t.ndim == 2), None)
        floats = [t for t in tensors if t.is_floating_point()]
        if ids is None or len(floats) < 2 or floats[1].shape != ids.shape:
            return None
        if call.asked is not None:
            raise EquivalenceError(
                f"{name} calls its experts more than once; compare knows blocks that do it once."
            )
        forced = given.get("weights")
        call.weights_TK = floats[1]
        call.asked = Asked(floats[0], ids, floats[1] if forced is None else forced)
        if forced is None:
            return None
        if forced.shape != ids.shape:
            raise EquivalenceError(
                f"{name} cannot take weights {tuple(forced.shape)}: it chose {tuple(ids.shape)}; "
                "give indices of the weights' shape too."
            )

        def swap(value: Any) -> Any:
            return forced if value is floats[1] else value

        return tuple(map(swap, args)), {key: swap(value) for key, value in kwargs.items()}

    return note


def _note_combined(call: _Call) -> Any:
    def note(experts: nn.Module, args: Any, output: Any) -> Any:
        call.combined = output
        return output.clone()  # blocks that add to it in place leave the noted value alone

    return note


def _flat(tensor: Tensor, num_tokens: int) -> Tensor | Scattered:
    """(T, ...) of a tensor that may be (B, S, ...): the tensor itself is what has the gradient."""
    if tensor.ndim == 2 and len(tensor) == num_tokens:
        return tensor
    width = tensor.shape[-1]
    return Scattered((tensor,), lambda whole: whole[0].reshape(num_tokens, width))
