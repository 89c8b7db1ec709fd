"""A stored trace as a side: what was computed elsewhere, or by another version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from moetk.equivalence.sides.routed import Given
from moetk.equivalence.stored import StoredTrace
from moetk.equivalence.trace import Leaf, Trace
from moetk.errors import EquivalenceError


class TraceSide:
    """Returns what the trace holds, on the device of what it is compared with. It can neither be
    forced nor be run in float64."""

    name = "stored trace"

    def __init__(self, trace: Trace, device: torch.device) -> None:
        self.values, self.grads = _on(device, trace.values), _on(device, trace.grads)
        self.facts = _on(device, trace.facts) if isinstance(trace, StoredTrace) else {}

    def leaves(self) -> Mapping[str, Leaf]:
        return {}

    def run(self, x_TH: Tensor, given: Given) -> dict[str, Tensor]:
        if given:
            raise EquivalenceError(
                f"A stored trace cannot take given {', '.join(given)}: nothing is computed. Make "
                "it the reference, a."
            )
        stored_TH = self.grads.get("x")
        if stored_TH is not None and stored_TH.shape != x_TH.shape:
            raise EquivalenceError(
                f"The stored trace is of an input {tuple(stored_TH.shape)}, compared on "
                f"{tuple(x_TH.shape)}: pass the x that it was observed on."
            )
        gradients = {f"grad {name}": gradient for name, gradient in self.grads.items()}
        return {**self.values, **gradients}

    def eager(self) -> Self:
        return self

    def in_double(self) -> Self:
        raise EquivalenceError("A stored trace has no float64 copy: nothing is computed.")


def _on(device: torch.device, held: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: one.to(device) if isinstance(one, Tensor) else one for name, one in held.items()}
