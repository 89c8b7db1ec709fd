"""What a comparison found: a row a stage, the first that differs, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.equivalence.cause import Cause, Evidence
from moetk.equivalence.judge import Choices, Verdict
from moetk.equivalence.trace import Trace
from moetk.routing import Routing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Question:
    """What `compare` was asked, so that it can be asked again, of fewer tokens."""

    a: Any = field(repr=False)
    b: Any = field(repr=False)
    x: Tensor = field(repr=False)
    ctx: RouterContext | None = field(default=None, repr=False)
    routing: Routing | None = field(default=None, repr=False)
    seed: int = 0


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
    rows: tuple[Row, ...] = field(repr=False)
    causes: tuple[Cause, ...]
    choices: Choices | None
    notes: tuple[str, ...]
    own_a: Trace = field(repr=False)
    own_b: Trace = field(repr=False)
    evidence: Evidence | None = field(repr=False)
    question: Question = field(repr=False)
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

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Every stage in a line, then what `explain` says; at most 120 columns wide."""
        from moetk.equivalence.table import table

        return table(self)

    def explain(self) -> str:
        """How the two chose, where they first differ, why, and what to look at."""
        from moetk.equivalence.table import explain

        return explain(self)

    def plot(self, path: Path | str | None = None) -> Figure:
        """The error of every stage, and how far each token was from another choice. Written to
        `path` (.svg, .png, .pdf) where there is one.

        Raises ConfigError without matplotlib, SaveFailedError."""
        from moetk.equivalence.plot import plot, save

        return save(plot(self), path)

    def to_json(self, path: Path | str | None = None) -> str:
        """All of it but the tensors, as JSON, written to `path` where there is one. null: not
        judged; numbers that are not finite are "nan" and "inf". Raises SaveFailedError."""
        from moetk.equivalence.as_json import report_fields, to_json

        return to_json(report_fields(self), path)

    def repro(self, folder: Path | str, build_a: Any = None, build_b: Any = None) -> Path:
        """Write `test_repro.py` and its tensors into the new folder: the fewest tokens on which the
        same stage still differs first. Returns the test's path.

        build_a, build_b: how the test makes the parts: "module:function", a function that can be
        imported, or the folder of a checkpoint. Without both the test judges the stored values and
        says where the code goes.

        Raises EquivalenceError where nothing differs, ConfigError for a builder that cannot be
        named in a file, SaveFailedError.
        """
        from moetk.equivalence.repro import write_repro

        return write_repro(self, Path(folder), build_a, build_b)
