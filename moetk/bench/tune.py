"""Which tile each kernel takes: every candidate timed in turn, the fastest written to a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

from moetk.bench.meter import Spread, spread
from moetk.bench.race import told
from moetk.bench.rows import World, append_table
from moetk.bench.shapes import LayerShape
from moetk.errors import ConfigError


class Candidate(Protocol):
    """One way to run a kernel on one shape."""

    def row(self) -> Mapping[str, Any]:
        """The columns that tell it in the table: those of the shape, then its own settings. The
        same names for every candidate of a tuner."""
        ...


C = TypeVar("C", bound=Candidate)


class Tuner(Protocol[C]):
    """Kernels that can be run in several ways."""

    kernels: Sequence[str]

    def candidates(self, kernel: str, shape: LayerShape, tokens: int) -> Sequence[C]:
        """The ways worth trying for this kernel in this layer."""
        ...

    def time(self, candidate: C) -> float:
        """Milliseconds of one warm run. Raises where the candidate does not run here."""
        ...


@dataclass(frozen=True)
class Choice:
    """The fastest candidate of a kernel. settings: its row. runner_up: milliseconds of the next
    best, None where it was alone. failed: how many candidates raised."""

    kernel: str
    settings: Mapping[str, Any]
    milliseconds: Spread
    runner_up: float | None
    failed: int


def load_tuner(where: str) -> Tuner[Any]:
    """The object that "module:object" names. Raises ConfigError where there is none."""
    module, _, name = where.partition(":")
    try:
        found: Tuner[Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where!r} names no tuner, as module:object would: {error}.") from None
    return found


def tune(tuner: Tuner[C], shape: LayerShape, tokens: int, rounds: int = 5) -> list[Choice]:
    """The fastest candidate of every kernel for one layer, by the median over rounds in which the
    candidates take turns. One that raises drops out.

    Raises ConfigError where none of a kernel's candidates runs.
    """
    return [
        _choose(kernel, tuner.candidates(kernel, shape, tokens), tuner, rounds)
        for kernel in tuner.kernels
    ]


def _choose(kernel: str, candidates: Sequence[C], tuner: Tuner[C], rounds: int) -> Choice:
    times: dict[int, list[float]] = {index: [] for index in range(len(candidates))}
    reason = "it has no candidates"
    for _ in range(rounds):
        for index in list(times):
            try:
                times[index].append(tuner.time(candidates[index]))
            except Exception as error:  # too large a tile for this GPU, out of memory
                reason = told(error)
                del times[index]
    if not times:
        raise ConfigError(f"Kernel {kernel!r} cannot be tuned here: {reason}.")
    ranked = sorted((spread(values).median, index) for index, values in times.items())
    best = ranked[0][1]
    return Choice(
        kernel,
        candidates[best].row(),
        spread(times[best]),
        ranked[1][0] if len(ranked) > 1 else None,
        len(candidates) - len(times),
    )


def write_choices(path: Path, choices: Sequence[Choice], world: World) -> None:
    """Append the choices to a CSV: kernel, the candidates' own columns, the times, the world.

    Raises ConfigError where the file has other columns.
    """
    if not choices:
        return
    lines = [
        {
            "kernel": choice.kernel,
            **choice.settings,
            "ms": choice.milliseconds.median,
            "ms_p20": choice.milliseconds.low,
            "ms_p80": choice.milliseconds.high,
            "runner_up_ms": choice.runner_up,
            "failed": choice.failed,
            **asdict(world),
        }
        for choice in choices
    ]
    append_table(path, list(lines[0]), lines)
