"""What a comparison found: a row a stage, the first that differs, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from moetk.equivalence.cause import Cause, Evidence
from moetk.equivalence.judge import Choices, Verdict
from moetk.equivalence.trace import Trace


@dataclass(frozen=True, eq=False)
class Row:
    """One stage, or the gradient at one ("grad up").

    function: relative error of b to a with everything in fp64 and equal inputs of the stage; None
        where one of them has no twin in fp64.
    local: the same in their own dtypes under the pass rule, at equal inputs of the stage; None
        where the stage cannot be given its inputs.
    accumulated: b left to itself, from x on, at its own choices.
    equal: share of elements that are bitwise equal, each side left to itself. largest: the largest
    difference and worst its index, e.g. (token, expert). ulp: the 99th percentile of the distance
    in units of the last place, where the reference is above its floor.
    alike, differing: relative difference of the two over tokens with equal and with other choices;
    None where there are none, or the stage has no row a token.
    """

    stage: str
    shape: tuple[int, ...]
    other_shape: tuple[int, ...]
    dtype: torch.dtype
    other_dtype: torch.dtype
    function: float | None
    local: Verdict | None
    accumulated: Verdict | None
    equal: float
    largest: float
    worst: tuple[int, ...] | None
    ulp: float | None
    alike: float | None
    differing: float | None
    ok: bool
    why: str = ""


@dataclass(frozen=True, eq=False)
class Report:
    """a against b, stage by stage; rows in the order of computation, gradients in reverse.

    first: the first row that differs. causes: what explains it; several where this input cannot
    tell them apart, none where nothing known does. choices: how the two chose. notes: what a
    reader should know besides (ties, stages that only one side shows, what could not be judged).
    only_a, only_b: stages that one side alone shows.
    """

    a: str
    b: str
    rows: tuple[Row, ...]
    causes: tuple[Cause, ...]
    choices: Choices | None
    notes: tuple[str, ...]
    own_a: Trace
    own_b: Trace
    evidence: Evidence | None
    x: torch.Tensor
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.first is None

    @property
    def first(self) -> Row | None:
        return next((row for row in self.rows if not row.ok), None)

    @property
    def cause(self) -> str:
        """ "" where nothing differs; "unknown"; else the names of what explains it."""
        if self.ok:
            return ""
        return " or ".join(one.name for one in self.causes) or "unknown"
