"""A law is a statement that every part of a kind keeps: a number, a formula, where it is from, and
a part that breaks it.

A law is checked by hypothesis over drawn cases. A case is plain: named tensors and named settings,
so that the smallest one on which a law breaks can be written to a file and read again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable, UnsatisfiedAssumption
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from moetk.errors import LawBrokenError

S = TypeVar("S")  # what is checked: a router with its sizes, a bank, a dispatcher, ...
Setting = bool | int | float | str | None
Status = Literal["kept", "broken", "not applicable"]


@contextmanager
def untouched_random() -> Iterator[None]:
    """Random numbers of its own, the same each time: torch's on the CPU and Python's start from 0
    inside, and go on outside as if nothing had been drawn. A check runs in it, from its first
    probe on, so that it neither hangs on the numbers drawn before it nor changes those after it.
    """
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would format a stack for every kind of device, each time
        torch.default_generator.manual_seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(state)


class Breach(AssertionError):
    """A law does not hold. tensors: what shows it, beside the case."""

    def __init__(self, message: str, **tensors: Tensor) -> None:
        super().__init__(message)
        self.tensors = tensors


def hold(condition: bool | Tensor, message: str, **tensors: Tensor) -> None:
    """Raise Breach unless `condition` (all of it, for a tensor)."""
    if not bool(condition.all() if isinstance(condition, Tensor) else condition):
        raise Breach(message, **tensors)


@dataclass(frozen=True, eq=False)
class Case:
    """One drawn input. `case["x_TH"]` reads a tensor, `case.settings["k"]` a setting."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def __repr__(self) -> str:
        shapes = [f"{k}: {t.dtype} {tuple(t.shape)}" for k, t in self.tensors.items()]
        plain = [f"{k}={v!r}" for k, v in self.settings.items()]
        return f"Case({', '.join([*shapes, *plain])})"


@dataclass(frozen=True, eq=False)
class Law(Generic[S]):
    """number: "R3". formula: in words of maths. source: paper with equation, or reference code.

    cases: (subject) -> strategy of Case. check: (subject, case) raises Breach.
    broken: () -> a subject on which the law must fail.
    unless: (subject) -> why the law does not speak about this subject, or None.
    """

    number: str
    title: str
    formula: str
    source: str
    check: Callable[[S, Case], None]
    cases: Callable[[S], SearchStrategy[Case]]
    broken: Callable[[], S]
    unless: Callable[[S], str | None]

    def judge(self, subject: S, case: Case) -> None:
        """Check one case. The same case is the same world: a part's own randomness starts anew,
        and gradients are on, whatever the last case or the caller left."""
        with untouched_random(), torch.enable_grad():
            self.check(subject, case)


def law(
    number: str,
    title: str,
    *,
    formula: str,
    source: str,
    cases: Callable[[S], SearchStrategy[Case]],
    broken: Callable[[], S],
    unless: Callable[[S], str | None] = lambda _: None,
) -> Callable[[Callable[[S, Case], None]], Law[S]]:
    """Make a law of a function (subject, case) -> None that raises Breach."""

    def make(check: Callable[[S, Case], None]) -> Law[S]:
        return Law(number, title, formula, source, check, cases, broken, unless)

    return make


@dataclass(frozen=True, eq=False)
class Outcome:
    """One law on one part. case: the smallest on which it broke. reason: why it is not
    applicable, or what broke."""

    law: Law[Any]
    status: Status
    reason: str = ""
    case: Case | None = None
    shown: Mapping[str, Tensor] = field(default_factory=dict)
    examples: int = 0
    seconds: float = 0.0


def judge_law(the_law: Law[S], subject: S, *, examples: int, derandomize: bool = True) -> Outcome:
    """Check one law over `examples` drawn cases; of the cases that break it, the smallest."""
    reason = the_law.unless(subject)
    if reason is not None:
        return Outcome(the_law, "not applicable", reason)
    start, tried = time.perf_counter(), 0
    last: list[tuple[Case, Exception]] = []

    @settings(
        max_examples=examples,
        derandomize=derandomize,
        deadline=None,
        database=None,
        print_blob=False,
        # Not explain: ten times the time of finding the case, for a text that nobody is shown.
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=the_law.cases(subject))
    def run(case: Case) -> None:
        nonlocal tried
        tried += 1
        try:
            the_law.judge(subject, case)
        except UnsatisfiedAssumption:
            raise
        except Exception as error:
            last.append((case, error))
            raise

    try:
        run()
    except Unsatisfiable:
        return Outcome(the_law, "not applicable", "no drawn case could be judged", examples=tried)
    except Exception:
        if not last:  # the strategy itself failed: not the part's fault
            raise
        # hypothesis runs the smallest failing case last
        case, cause = last[-1]
        told = str(cause) if isinstance(cause, Breach) else f"{type(cause).__name__}: {cause}"
        shown = cause.tensors if isinstance(cause, Breach) else {}
        return Outcome(the_law, "broken", told, case, shown, tried, time.perf_counter() - start)
    return Outcome(the_law, "kept", examples=tried, seconds=time.perf_counter() - start)


def judge_laws(
    laws: Iterable[Law[S]],
    subject: S,
    *,
    examples: int,
    derandomize: bool = True,
) -> list[Outcome]:
    return [judge_law(one, subject, examples=examples, derandomize=derandomize) for one in laws]


def raise_if_broken(what: str, outcomes: Sequence[Outcome]) -> None:
    """Raise LawBrokenError that names every broken law with its smallest case."""
    broken = [outcome for outcome in outcomes if outcome.status == "broken"]
    if broken:
        lines = [
            f"{o.law.number} {o.law.title} [{o.law.formula}]: {o.reason}\n    on {o.case}"
            for o in broken
        ]
        raise LawBrokenError(
            f"{what} breaks {len(broken)} of {len(outcomes)} laws:\n  " + "\n  ".join(lines)
        )
