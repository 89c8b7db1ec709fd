"""What one forward in evaluation does not show: a second call, training, and what moves a router
between steps. It is not compared; where one side does something there that the other does not, the
report says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moetk.equivalence.cause import deviation
from moetk.equivalence.chance import same_chance
from moetk.equivalence.double import InDouble
from moetk.equivalence.passes import NO_TWIN
from moetk.equivalence.rows import PARITY
from moetk.equivalence.sides.base import ModuleSide
from moetk.equivalence.trace import Side
from moetk.errors import MoetkError

SECOND = "on a second call than on the first"
TRAINING = "in training than in evaluation"
# Facts of what acts between or behind forwards, and what the part has where it says nothing.
_ACTING: Mapping[str, Any] = {"controllers": (), "aux_scale": 1.0}


def unseen(a: Side, b: Side, x_TH: Tensor) -> list[str]:
    """Notes of what a comparison that found no difference could not see."""
    notes = [_moved(which, one) for which, one in _alone(_moves(a, x_TH), _moves(b, x_TH), a, b)]
    for name, usual in _ACTING.items():
        ours, theirs = a.facts.get(name, usual), b.facts.get(name, usual)
        if ours != theirs:
            notes.append(
                f"not compared, and the two differ in it: {name} {ours} in a, {theirs} in b"
            )
    return notes


def _alone(
    a_moves: frozenset[str] | None, b_moves: frozenset[str] | None, a: Side, b: Side
) -> list[tuple[str, str]]:
    """(occasion, who) where exactly one of the two does something else."""
    if a_moves is None or b_moves is None:
        return []
    whose = {True: f"a, {a.name},", False: f"b, {b.name},"}
    return [(which, whose[which in a_moves]) for which in sorted(a_moves ^ b_moves)]


def _moved(which: str, who: str) -> str:
    return f"not compared: {who} returns something else {which}, the other does not"


def _moves(side: Side, x_TH: Tensor) -> frozenset[str] | None:
    """On which occasions a side returns something else, in fp64; None where it cannot be told."""
    if not isinstance(side, ModuleSide):
        return None
    try:
        with torch.no_grad(), InDouble(x_TH.dtype):
            x_TH = x_TH.double()
            twin = side.in_double()
            module = twin.module.eval()
            first, second = (_returned(twin, module, x_TH) for _ in range(2))
            module = side.in_double().module.train()
            trained = _returned(twin, module, x_TH)
    except (MoetkError, *NO_TWIN):
        return None
    found = {SECOND: second, TRAINING: trained}
    return frozenset(which for which, value in found.items() if _apart(value, first))


def _returned(side: ModuleSide, module: nn.Module, x_TH: Tensor) -> Tensor:
    with same_chance(x_TH):
        return side.returned(module, x_TH)


def _apart(value: Tensor, first: Tensor) -> bool:
    return not deviation(value, first) <= PARITY
