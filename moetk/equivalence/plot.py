"""A report as a figure: the error of every stage, and how near each token's choice was."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moetk.equivalence.judge import Verdict
from moetk.equivalence.model_report import ModelReport
from moetk.equivalence.report import Report, Row
from moetk.errors import ConfigError
from moetk.io import write_file
from moetk.look import COLOURS, GRID, INK, QUIET, drawing, encoded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("svg", "png", "pdf")
WRONG, TIE = COLOURS[1], COLOURS[4]
SCORES = ("choice", "scores", "logits")


def plot(report: Report) -> Figure:
    """The error of every stage, and beside it the margins of the choices where both sides show
    them. Raises ConfigError without matplotlib."""
    margins = choice_margins(report)
    with drawing(13, 5) as figure:
        if margins is None:
            errors_over_stages(figure.subplots(), report)
        else:
            left, right = figure.subplots(1, 2, width_ratios=(2.4, 1))
            errors_over_stages(left, report)
            margin_histogram(right, *margins)
    return figure


def plot_layers(report: ModelReport) -> Figure:
    """The error of every layer: where nothing is handed down, and where it piles up. Raises
    ConfigError without matplotlib."""
    layers = report.layers
    worst = [
        max(
            filter(None, (_error(row.local or row.accumulated) for row in layer.report.rows)),
            default=0.0,
        )
        for layer in layers
    ]
    function = [
        max(filter(None, (row.function for row in layer.report.rows)), default=0.0)
        for layer in layers
    ]
    series: list[tuple[str, Sequence[float | None], Any]] = [
        ("entering, models left alone", [layer.entering for layer in layers] + [report.logits],
         {"marker": "o", "ms": 7.5, "mfc": "white", "mec": QUIET, "color": "#c3cbd4", "ls": "-"}),
        ("worst stage at equal inputs", worst, {"marker": "o", "ms": 5, "color": COLOURS[0]}),
        ("as a function, in fp64", function, {"marker": "D", "ms": 4.5, "color": COLOURS[2]}),
        ("around the layer, in fp64", [layer.around for layer in layers] + [report.after],
         {"marker": "s", "ms": 4.5, "color": COLOURS[3]}),
    ]  # fmt: skip
    scale = LogScale.of([values for _, values, _ in series])
    with drawing(13, 4.6) as figure:
        axes = figure.subplots()
        for name, values, look in series:
            axes.plot([scale.place(v) for v in values], label=name, **{"ls": "", **look})
        if report.first is not None:
            place = report.first.index
            axes.axvspan(place - 0.5, place + 0.5, color=WRONG, alpha=0.14, lw=0)
        scale.apply(axes)
        names = [layer.name.removeprefix("model.") for layer in layers]
        _name_stages(axes, [*names, "logits"])
        axes.set_title(f"{_short(report.b)}  against  {_short(report.a)}", loc="left", pad=30)
    return figure


def save(figure: Figure, path: Path | str | None) -> Figure:
    """Write the figure where there is a path. Raises ConfigError for a name that does not end in
    .svg, .png or .pdf, SaveFailedError."""
    if path is not None:
        kind = Path(path).suffix.removeprefix(".")
        if kind not in KINDS:
            raise ConfigError(f"{path} is not the name of a figure; end it in .svg, .png or .pdf.")
        write_file(Path(path), encoded(figure, kind))
    return figure


def errors_over_stages(axes: Axes, report: Report) -> None:
    """Relative error of b, log scale, over a strip for what is exactly 0."""
    rows = [row for row in report.rows if row.local or row.accumulated or row.function is not None]
    series: list[tuple[str, Callable[[Row], float | None], Any]] = [
        ("left alone", lambda row: _error(row.accumulated),
         {"marker": "o", "ms": 7.5, "mfc": "white", "mec": QUIET}),
        ("at equal inputs", lambda row: _error(row.local),
         {"marker": "o", "ms": 5, "color": COLOURS[0]}),
        ("as a function, in fp64", lambda row: row.function,
         {"marker": "D", "ms": 4.5, "color": COLOURS[2]}),
    ]  # fmt: skip
    values = [[pick(row) for row in rows] for _, pick, _ in series]
    allowed = [_allowed(row) for row in rows]
    scale = LogScale.of([*values, allowed])
    for (name, _, look), found in zip(series, values, strict=True):
        axes.plot(range(len(rows)), [scale.place(v) for v in found], ls="", label=name, **look)
    for index, limit in enumerate(allowed):
        label = "allowed at equal inputs" if index == 0 else None
        height = scale.place(limit)
        axes.plot([index - 0.38, index + 0.38], [height] * 2, color=INK, lw=1.3, label=label)
    _mark_first(axes, report, rows)
    scale.apply(axes)
    _name_stages(axes, [row.stage for row in rows])
    axes.set_title(f"{_short(report.b)}  against  {_short(report.a)}", loc="left", pad=30)


def _name_stages(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(range(len(names)), names, rotation=55, ha="right")
    axes.tick_params(axis="x", labelsize=9.5, length=0)
    axes.set_ylabel("relative error")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=4, fontsize=9.5,
                handletextpad=0.3, columnspacing=1.4)  # fmt: skip


@dataclass(frozen=True)
class LogScale:
    """Decades from `bottom` to `top`, a strip for 0 below them and room for words above."""

    bottom: float
    top: float

    @classmethod
    def of(cls, series: Sequence[Sequence[float | None]]) -> LogScale:
        drawn = [v for values in series for v in values if v is not None and 0 < v < math.inf]
        low, high = (min(drawn), max(drawn)) if drawn else (1e-16, 1.0)
        return cls(10 ** math.floor(math.log10(low)), max(high, 10 * low))

    @property
    def stretch(self) -> float:
        """A twelfth of the height, as a factor."""
        return math.pow(self.top / self.bottom, 1 / 12)

    def place(self, value: float | None) -> float:
        """Where it stands; infinity above all else, NaN for what there is not."""
        if value is None or math.isnan(value):
            return math.nan
        if value == 0:
            return self.bottom / self.stretch
        return min(value, self.top * self.stretch)

    def apply(self, axes: Axes) -> None:
        zero, low = self.place(0.0), self.bottom / self.stretch**1.8
        axes.set_yscale("log")
        axes.set_ylim(low, self.top * self.stretch**2.4)
        axes.axhspan(low, self.bottom / self.stretch**0.35, color=GRID, alpha=0.55, lw=0)
        first, last = math.ceil(math.log10(self.bottom)), math.floor(math.log10(self.top))
        powers = range(first, last + 1, max(1, math.ceil((last - first) / 8)))
        axes.set_yticks(
            [zero, *(10.0**power for power in powers)],
            ["0", *(f"$10^{{{power}}}$" for power in powers)],
        )
        axes.minorticks_off()


def margin_histogram(axes: Axes, margins_T: Tensor, tied_T: Tensor, flipped_T: Tensor) -> None:
    """How far the last chosen score lies above the first one that was not chosen; a triangle for
    each token that chose otherwise. A strip at the left holds what is exactly 0."""
    scale = LogScale.of([margins_T.tolist()])
    low, high = math.log10(scale.bottom), math.ceil(math.log10(scale.top) + 1e-9)
    edges = torch.logspace(low, high, 4 * round(high - low) + 1, dtype=torch.float64).tolist()
    zero = edges[0] / (edges[1] / edges[0]) ** 1.5
    if bool((margins_T == 0).any()):
        edges = [zero / (edges[1] / edges[0]) ** 0.5, edges[0] / (edges[1] / edges[0]), *edges]
    shown = [margin if margin > 0 else zero for margin in margins_T.tolist()]
    alike = int((~(tied_T | flipped_T)).sum())
    axes.hist(shown, bins=edges, color="#c3cbd4", ec="white", lw=0.6,
              label=f"all tokens, {alike} chose alike")  # fmt: skip
    for name, mask_T, colour in (("tie", tied_T, TIE), ("flipped", flipped_T, WRONG)):
        places = [value for value, is_in in zip(shown, mask_T.tolist(), strict=True) if is_in]
        if places:
            axes.plot(places, [0.035] * len(places), ls="", marker="^", ms=8, color=colour,
                      mec="white", mew=0.8, label=f"{name} ({len(places)})",
                      transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_xscale("log")
    has_zero = bool((margins_T == 0).any())
    powers = range(round(low) + has_zero, high + 1, max(1, math.ceil((high - low) / 4)))
    ticks = {10.0**power: f"$10^{{{power}}}$" for power in powers} | (
        {zero: "0"} if has_zero else {}
    )
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("score of the last chosen minus the next")
    axes.set_ylabel("tokens")
    axes.set_title("How near each choice was", loc="left", pad=30)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=3, fontsize=9.5,
                handlelength=1, handletextpad=0.4, columnspacing=1)  # fmt: skip


def choice_margins(report: Report) -> tuple[Tensor, Tensor, Tensor] | None:
    """The reference's margin of each token, and which tokens were swapped at a tie and flipped;
    None where a side shows no choice, or everything is chosen."""
    a, b, choices = report.own_a.values, report.own_b.values, report.choices
    name = next((name for name in SCORES if name in a), None)
    if choices is None or name is None or choices.total == 0:
        return None
    ids_a, ids_b, scores_TE = a["indices"], b["indices"], a[name].double()
    if ids_a.shape != ids_b.shape or ids_a.shape[1] >= scores_TE.shape[1]:
        return None
    best = scores_TE.nan_to_num().topk(ids_a.shape[1] + 1, -1).values
    margins_T = best[:, -2] - best[:, -1]
    differ_T = (ids_a.sort(-1).values != ids_b.sort(-1).values).any(-1)
    # Ties are the nearest of those that differ.
    order = torch.where(differ_T, margins_T, math.inf).argsort()
    tied_T = torch.zeros_like(differ_T)
    tied_T[order[: choices.tied]] = True
    return margins_T, tied_T, differ_T & ~tied_T


def _mark_first(axes: Axes, report: Report, rows: Sequence[Row]) -> None:
    """A band over the first stage that differs; a line before the next one drawn, where that stage
    is of whole numbers and has no error to draw."""
    first = report.first
    if first is None:
        return
    later = report.rows[report.rows.index(first) :]
    place: float = next((i for i, row in enumerate(rows) if row in later), len(rows))
    if first in rows:
        axes.axvspan(place - 0.5, place + 0.5, color=WRONG, alpha=0.14, lw=0)
    else:
        place -= 0.5
        axes.axvline(place, color=WRONG, lw=2)
    left = place > len(rows) / 2
    edge = place + (-0.55 if left else 0.55)
    axes.annotate(
        f"first: {first.stage}\n{report.cause}" if report.causes else f"first: {first.stage}",
        (edge, 1), xycoords=("data", "axes fraction"), xytext=(0, -5),
        textcoords="offset points", ha="right" if left else "left", va="top", color=WRONG,
        weight="bold", fontsize=9.5, bbox={"fc": "white", "ec": "none", "alpha": 0.85, "pad": 1},
    )  # fmt: skip


def _error(judged: Verdict | None) -> float | None:
    return None if judged is None else judged.error


def _allowed(row: Row) -> float | None:
    judged = row.local or row.accumulated
    return None if judged is None else max(2 * judged.eager_error, judged.floor)


def _short(name: str) -> str:
    return name if len(name) <= 40 else name[:39] + "…"
