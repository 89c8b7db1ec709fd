"""Why does a stage differ? A cause states what the stage would read with a known defect.

A cause is believed only where its prediction is what was read, to rounding; so a cause that is
named is right, or cannot be told apart from the right one on this input, and then both are named.
What matches nothing is "unknown".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moetk.context import RouterContext
from moetk.equivalence.judge import relative_error
from moetk.equivalence.trace import EXACT, Trace

UNEXPLAINED = 0.1  # of the difference may be left over, at most
FEW = 2  # choices must differ: one alone is what any of several defects may give


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known where two sides first differ.

    stage: "weights", or "grad up" for a gradient. a, b: both sides on equal inputs of the stage;
    in fp64 where both have a twin in fp64, else in their own dtype. own_a, own_b: the same left to
    themselves, each with its own choices. x_TH: the layer's input, in the dtype of a and b.
    facts: the reference's (see Side.facts), other_facts: the other's. parameters: the reference's,
    by common names and in common layouts, in the dtype of a. tolerance: relative error up to which
    a prediction counts as what was read. ctx: what the routers were told.
    seed: of the gradient that entered backward.
    """

    stage: str
    a: Trace
    b: Trace
    own_a: Trace
    own_b: Trace
    x_TH: Tensor
    facts: Mapping[str, Any]
    other_facts: Mapping[str, Any]
    parameters: Mapping[str, Tensor]
    tolerance: float
    ctx: RouterContext = field(default_factory=RouterContext)
    seed: int = 0

    @property
    def wanted(self) -> Tensor:
        """The stage as the reference has it."""
        return read(self.own_a if self.stage == "indices" else self.a, self.stage)

    @property
    def found(self) -> Tensor:
        """The stage as the other side has it."""
        return read(self.own_b if self.stage == "indices" else self.b, self.stage)

    def equals(self, predicted: Tensor) -> bool:
        """Whether `predicted` is what the other side read, and not also what it should read."""
        found, wanted = self.found, self.wanted
        if self.stage in EXACT:
            return _identical(found, predicted, self) and _apart(found, wanted, self) >= FEW
        # A prediction near a small difference is no explanation of it.
        left, apart = deviation(found, predicted), deviation(found, wanted)
        return apart > 0 and left <= min(self.tolerance, UNEXPLAINED * apart)


def read(trace: Trace, stage: str) -> Tensor:
    """A stage's value, or for "grad NAME" its gradient. What a layer returns is its experts' sum
    where it adds nothing to that."""
    if stage.startswith("grad "):
        return trace.grads[stage.removeprefix("grad ")]
    if stage == "output" and stage not in trace.values:
        stage = "combined"
    return trace.values[stage]


def _identical(value: Tensor, other: Tensor, evidence: Evidence) -> bool:
    return value.shape == other.shape and _apart(value, other, evidence) == 0


def _apart(value: Tensor, other: Tensor, evidence: Evidence) -> int:
    """How many choices make the difference; all where the shapes differ."""
    if value.shape != other.shape:
        return value.numel()
    if evidence.stage == "counts":
        apart = (value.double() - other.double()).abs()
        return math.ceil(apart.nan_to_num(nan=FEW, posinf=FEW, neginf=FEW).sum())
    if evidence.stage == "indices":  # in which column an expert stands is no difference
        value, other = value.sort(-1).values, other.sort(-1).values
    return int((value != other).sum())


def deviation(value: Tensor, truth: Tensor, scale: float = 0.0) -> float:
    """Relative error over the entries that are finite in both; inf where one of them is not
    finite and the other is another number.

    scale: the norm that the truth has where its terms do not cancel; the error is relative to the
    larger of the two.
    """
    value, truth = value.detach().double(), truth.detach().double()
    if value.shape != truth.shape:
        return float("inf")
    finite = value.isfinite() & truth.isfinite()
    agree = (value == truth) | (value.isnan() & truth.isnan())
    if not bool((finite | agree).all()):
        return float("inf")
    value, truth = value.masked_fill(~finite, 0), truth.masked_fill(~finite, 0)
    if float(truth.norm()) < scale:
        return float((value - truth).norm()) / scale
    return relative_error(value, truth)


@dataclass(frozen=True)
class Cause:
    """name: as a reader of a report should see it, "renormalisation missing". stages: where it
    shows first. fix: what to look at. matches: whether it explains the evidence.

    general: it only describes the difference ("scaled by a constant"), and is named where nothing
    says more.
    """

    name: str
    stages: tuple[str, ...]
    fix: str
    matches: Callable[[Evidence], bool]
    general: bool = False


def cause(
    name: str, *stages: str, fix: str, general: bool = False
) -> Callable[[Callable[[Evidence], Iterator[Tensor]]], Cause]:
    """Make a cause of a function that yields what the stage reads with the defect: once for each
    way in which the defect is written, not at all where it cannot be said."""

    def make(predict: Callable[[Evidence], Iterator[Tensor]]) -> Cause:
        def matches(evidence: Evidence) -> bool:
            return any(evidence.equals(predicted) for predicted in predict(evidence))

        return Cause(name, stages, fix, matches, general)

    return make


def diagnose(
    evidence: Evidence,
    causes: Sequence[Cause],
    on_error: Callable[[Cause, Exception], None] | None = None,
) -> tuple[Cause, ...]:
    """Every cause of this stage that explains the evidence, the general ones only where no other
    does; none = unknown. on_error: told of a cause that cannot be tried here, which then explains
    nothing; None = it raises."""
    found = []
    for one in causes:
        if evidence.stage not in one.stages:
            continue
        try:
            if one.matches(evidence):
                found.append(one)
        except Exception as error:
            if on_error is None:
                raise
            on_error(one, error)
    return tuple(one for one in found if not one.general) or tuple(found)
