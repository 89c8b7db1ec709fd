"""What the rows of a sweep say: curves with their spread over seeds, and arms against a baseline.

Plain numbers, no plotting and no numpy: the report's figures and tables are drawn from here.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from moetk.sweep.store import Row

EXACT_UP_TO = 6
RESAMPLES = 10_000
WEAK = 0.05


@dataclass(frozen=True)
class Spread:
    """A mean with the smallest and the largest value over `n` seeds."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Arm minus baseline, seed by seed. low, high: 95% interval of the mean; None for one seed."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return "one seed"
        if self.low <= 0 <= self.high:
            return "within noise"
        lean = "lower" if self.mean < 0 else "higher"
        return lean if chance_agreement(self.n) <= WEAK else f"{lean}, weakly"


def chance_agreement(seeds: int) -> float:
    """How often this many seeds all lean one way when there is no difference at all."""
    return float(2.0 ** (1 - seeds))


@dataclass(frozen=True)
class Curve:
    """A value over steps: mean and extremes over the seeds that have it."""

    steps: tuple[int, ...]
    values: tuple[Spread, ...]


@dataclass(frozen=True)
class ArmSummary:
    """One arm. Numbers are over the cells that ended well; None where none did.

    max_violation: MaxVio of all held-out choices together; train_violation: of the last quarter of
    training. gap: held-out loss minus the baseline's of the same seed. difference and gap are
    left out where the baseline sees the future: nothing is to be gained on such a loss.
    """

    name: str
    settings: Mapping[str, Any]
    cells: tuple[Row, ...]
    final_loss: Spread | None
    max_violation: Spread | None
    train_violation: Spread | None
    drop_fraction: float | None
    difference: Difference | None
    causal: bool | None
    loss: Curve
    gap: Curve
    violation: Curve

    @property
    def good(self) -> tuple[Row, ...]:
        return good_cells(self.cells)


@dataclass(frozen=True)
class Summary:
    """A sweep: its plan and its arms, in the order of the TOML, the baseline first."""

    plan: Mapping[str, Any]
    rows: tuple[Row, ...]
    arms: tuple[ArmSummary, ...]
    baseline: str

    @property
    def missing(self) -> int:
        """Cells that are planned and have no row yet."""
        return len(self.plan["cells"]) - len(self.rows)

    @property
    def baseline_sees_future(self) -> bool:
        return any(arm.causal is False for arm in self.arms if arm.name == self.baseline)

    @property
    def shown(self) -> dict[str, Row]:
        """One good cell of each arm that has one, all of the same seed where there is such a seed:
        the first in the order of the TOML."""
        seeds = [{row["seed"]: row for row in arm.good} for arm in self.arms if arm.good]
        order = self.plan["settings"]["sweep"]["seeds"]
        common = [seed for seed in order if all(seed in found for found in seeds)]
        picked = [found[common[0]] if common else next(iter(found.values())) for found in seeds]
        return {row["arm"]: row for row in picked}

    @property
    def bad(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row["result"]["status"] != "ok")


def summarise(plan: Mapping[str, Any], rows: Sequence[Row]) -> Summary:
    """The summary of what read_sweep returns."""
    baseline = plan["settings"]["sweep"]["baseline"]
    # sweep.json has sorted keys; the cells are in the order of the TOML.
    names = list(dict.fromkeys(cell["arm"] for cell in plan["cells"]))
    names.sort(key=lambda name: name != baseline)
    arms = []
    others = good_cells([row for row in rows if row["arm"] == baseline])
    if _causal(others) is False:
        others = ()
    for name in names:
        cells = tuple(row for row in rows if row["arm"] == name)
        arms.append(_arm(name, plan["settings"]["arms"][name], cells, others, name == baseline))
    return Summary(plan, tuple(rows), tuple(arms), baseline)


def good_cells(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The cells that ended with a final loss."""
    return tuple(row for row in rows if row["result"]["status"] == "ok")


def _arm(
    name: str,
    settings: Mapping[str, Any],
    cells: tuple[Row, ...],
    baseline: Sequence[Row],
    is_baseline: bool,
) -> ArmSummary:
    results = [row["result"] for row in good_cells(cells)]
    drops = [result["drop_fraction"] for result in results if result["drop_fraction"] is not None]
    return ArmSummary(
        name=name,
        settings=settings,
        cells=cells,
        final_loss=spread([result["final_loss"] for result in results]),
        max_violation=spread([result["max_violation"] for result in results]),
        train_violation=spread([result["train_max_violation"] for result in results]),
        drop_fraction=mean(drops) if drops else None,
        difference=None if is_baseline else paired_difference(good_cells(cells), baseline),
        causal=_causal(good_cells(cells)),
        loss=_curve([dict(result["held_out"]) for result in results]),
        gap=_curve([] if is_baseline else _gaps(good_cells(cells), baseline)),
        violation=_curve([_windowed(result) for result in results]),
    )


def _causal(cells: Sequence[Row]) -> bool | None:
    """One seed that sees the future is enough; None where no seed was asked."""
    verdicts = {row["result"]["causal"] for row in cells}
    return False if False in verdicts else (True if verdicts == {True} else None)


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and extremes; None of nothing."""
    return Spread(mean(values), min(values), max(values), len(values)) if values else None


def paired_difference(cells: Sequence[Row], baseline: Sequence[Row]) -> Difference | None:
    """Final loss of the arm minus the baseline's, over the seeds that both have; None without one.

    The interval is the percentile bootstrap of the mean difference: over all n^n resamples up to
    n = 6, over 10 000 drawn ones beyond.
    """
    theirs = {row["seed"]: row["result"]["final_loss"] for row in baseline}
    differences = [
        row["result"]["final_loss"] - theirs[row["seed"]] for row in cells if row["seed"] in theirs
    ]
    if not differences:
        return None
    low, high = bootstrap_interval(differences) if len(differences) > 1 else (None, None)
    return Difference(mean(differences), low, high, len(differences))


def bootstrap_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of the mean of `values` under resampling with replacement: at most
    (1 - level) / 2 of the resampled means lie below it, and as many above."""
    n = len(values)
    if n <= EXACT_UP_TO:
        means = sorted(mean(drawn) for drawn in itertools.product(values, repeat=n))
    else:
        chance = random.Random(0)
        means = sorted(mean(chance.choices(values, k=n)) for _ in range(RESAMPLES))
    cut = int((1 - level) / 2 * len(means))
    return means[cut], means[-1 - cut]


def _gaps(cells: Sequence[Row], baseline: Sequence[Row]) -> list[dict[int, float]]:
    theirs = {row["seed"]: dict(row["result"]["held_out"]) for row in baseline}
    return [
        {step: loss - base[step] for step, loss in row["result"]["held_out"] if step in base}
        for row in cells
        if (base := theirs.get(row["seed"])) is not None
    ]


def _windowed(result: Mapping[str, Any]) -> dict[int, float]:
    """Batch MaxVio as means over the windows of the load counts: single steps are noise."""
    ends, values = result["load"]["steps"], result["batch_max_violation"]
    starts = [0, *ends[:-1]]
    return {end: mean(values[start:end]) for start, end in zip(starts, ends, strict=True)}


def _curve(series: Sequence[Mapping[int, float]]) -> Curve:
    steps = sorted({step for values in series for step in values})
    at = [[values[step] for values in series if step in values] for step in steps]
    spreads = [value for found in at if (value := spread(found)) is not None]
    return Curve(tuple(steps), tuple(spreads))
