"""What a check found: every law with its outcome, to print, to draw, to store and to run again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moetk.errors import LawBrokenError
from moetk.io import write_file
from moetk.testing.law import Outcome, Setting, Status, raise_if_broken

WIDTH = 100  # of the printed table, in characters, wherever it is printed


@dataclass(frozen=True)
class Causality:
    """Whether a token's routing stays when later tokens of its sequence change.

    training: None = the part has no training mode (a plain function).
    """

    evaluation: bool
    training: bool | None = None

    def __bool__(self) -> bool:
        return self.evaluation and self.training is not False

    def __str__(self) -> str:
        words = {True: "causal", False: "sees later tokens", None: "the same (no such mode)"}
        return f"in evaluation {words[self.evaluation]}, in training {words[self.training]}"


@dataclass(frozen=True, eq=False)
class LawReport:
    """The outcomes of one check.

    what: the part's name. outcomes: one a law, in the laws' order.
    causal: measured for routers, None for other parts.
    subject_of: the importable function (part, **arguments) -> what the laws were checked on, and
        its plain arguments; with them `repro` writes a test that checks a law again.
    part: what was checked, where it can be found again by name.
    """

    what: str
    outcomes: tuple[Outcome, ...]
    causal: Causality | None = None
    subject_of: Callable[..., Any] | None = None
    arguments: Mapping[str, Setting] = field(default_factory=dict)
    part: Any = None

    @property
    def ok(self) -> bool:
        """No law is broken."""
        return not self.having("broken")

    def having(self, status: Status) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.status == status)

    def or_raise(self) -> LawReport:
        """Itself; raises LawBrokenError, whose `report` is this one, where a law is broken."""
        try:
            raise_if_broken(self.what, self.outcomes)
        except LawBrokenError as error:
            error.report = self
            raise
        return self

    def summary(self) -> str:
        """One line: how many laws were kept, broken, not applicable, and the time."""
        seconds = sum(outcome.seconds for outcome in self.outcomes)
        counts = {
            status: len(self.having(status)) for status in ("kept", "broken", "not applicable")
        }
        told = ", ".join(f"{number} {status}" for status, number in counts.items())
        return f"{self.what}: {told}; {seconds:.1f} s"

    def table(self) -> str:
        """The outcomes as plain text: number, title, status, examples, seconds. Then what broke,
        why the rest is not applicable, the summary, and causality where it was measured."""
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for column in ("law", "title", "status"):
            table.add_column(column)
        for column in ("examples", "seconds"):
            table.add_column(column, justify="right")
        for one in self.outcomes:
            ran = (str(one.examples), f"{one.seconds:.2f}")
            if one.status == "not applicable":
                ran = ("", "")
            table.add_row(one.law.number, one.law.title, one.status, *ran)
        console = Console(width=WIDTH, highlight=False, markup=False, color_system=None)
        with console.capture() as capture:
            console.print(table)
        lines = [line.rstrip() for line in capture.get().splitlines()]
        for one in self.having("broken"):
            lines += ["", *wrap(f"{one.law.number} broken: {one.reason}", WIDTH)]
            lines += wrap(f"on {one.case}", WIDTH, initial_indent="  ", subsequent_indent="  ")
        lines += ["", *self._not_applicable(), self.summary()]
        if self.causal is not None:
            lines.append(f"causality: {self.causal}")
        return "\n".join(lines)

    def _not_applicable(self) -> list[str]:
        """The reasons, each once, behind the numbers of the laws that gave it."""
        numbers: dict[str, list[str]] = {}
        for one in self.having("not applicable"):
            numbers.setdefault(one.reason, []).append(one.law.number)
        lines = []
        for reason, laws in numbers.items():
            told = f"{', '.join(laws)} not applicable: {reason}"
            lines += wrap(told, WIDTH, subsequent_indent="  ")
        return [*lines, ""] if lines else []

    def __str__(self) -> str:
        return self.table()

    def to_json(self, path: str | Path) -> Path:
        """Write everything but tensors, which are described by dtype and shape."""
        told = {
            "what": self.what,
            "ok": self.ok,
            "causal": None
            if self.causal is None
            else {"evaluation": self.causal.evaluation, "training": self.causal.training},
            "laws": [_as_json(outcome) for outcome in self.outcomes],
        }
        write_file(Path(path), (json.dumps(told, indent=1) + "\n").encode())
        return Path(path)

    def plot(self, path: str | Path) -> Path:
        """Draw the laws, and the routing of the smallest case that broke one. The file's ending
        says the format. Needs matplotlib."""
        from moetk.testing.figure import draw

        return draw(self, Path(path))

    def repro(self, folder: str | Path, build: str | None = None) -> list[Path]:
        """Write a pytest file and the smallest case, for each broken law; running the file checks
        the law on the part again.

        build: "module:function", a function without arguments that returns the part; or the pair
        of it and what was handed in beside it, check_dispatcher's with_capacity or
        check_controller's router. Not needed for what can be imported by its own name; without
        either, the test fails and says where to put it.
        """
        from moetk.testing.repro import write_repro

        return [write_repro(self, one, Path(folder), build) for one in self.having("broken")]


def _as_json(outcome: Outcome) -> dict[str, Any]:
    case = outcome.case
    return {
        "number": outcome.law.number,
        "title": outcome.law.title,
        "formula": outcome.law.formula,
        "source": outcome.law.source,
        "status": outcome.status,
        "reason": outcome.reason,
        "examples": outcome.examples,
        "seconds": round(outcome.seconds, 4),
        "settings": dict(case.settings) if case else {},
        "tensors": _shapes(case.tensors) if case else {},
        "shown": _shapes(outcome.shown),
    }


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{t.dtype} {tuple(t.shape)}" for name, t in tensors.items()}
