"""Contenders take turns: what slows the machine for a while slows them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moetk.bench.meter import Meter

WARM_UP = 3


@dataclass(eq=False)
class Racer:
    """`call` is timed, `before` is not. `times` are milliseconds; `error` ends the race for one."""

    name: str
    call: Callable[[], object]
    before: Callable[[], object]
    times: list[float] = field(default_factory=list)
    error: str | None = None


def race(racers: Sequence[Racer], rounds: int, meter: Meter) -> None:
    """Time every racer once a round, after three calls that do not count. Who raises drops out;
    its text is in `error`, and the others go on."""
    for _ in range(WARM_UP):
        for racer in racers:
            _turn(racer, meter)
    for racer in racers:
        racer.times.clear()
    for _ in range(rounds):
        for racer in racers:
            _turn(racer, meter)


def _turn(racer: Racer, meter: Meter) -> None:
    if racer.error is not None:
        return
    try:
        racer.before()
        racer.times.append(meter.milliseconds(racer.call))
    except Exception as error:  # out of memory, a missing kernel: it belongs in the row
        racer.error = told(error)
    if racer.error is not None:
        # Here and not above: an exception being handled keeps its frames' tensors.
        meter.release()


def told(error: Exception) -> str:
    """An exception in one line, of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
