"""The report's figures as SVG text. matplotlib is imported here and nowhere else."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moetk.sweep.summary import ArmSummary, Curve, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The baseline is the quiet one; the others are told apart by every kind of colour vision
# (Okabe and Ito).
BASELINE_COLOUR = "#5b6470"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b")
INK, GRID = "#1f2933", "#e4e7eb"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moetk",
    "font.family": ["Helvetica", "Arial", "DejaVu Sans", "sans-serif"],
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def colours(summary: Summary) -> dict[str, str]:
    """A colour for each arm, the same in every figure and table."""
    others = [arm.name for arm in summary.arms if arm.name != summary.baseline]
    found = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(others)}
    return {summary.baseline: BASELINE_COLOUR, **found}


def loss_figure(summary: Summary) -> str:
    """Held-out loss over steps; the band spans the seeds."""
    return _curves(summary, lambda arm: arm.loss, "held-out loss (nats per byte)", marker="o")


def violation_figure(summary: Summary) -> str:
    """Batch MaxVio over training; the band spans the seeds."""
    return _curves(summary, lambda arm: arm.violation, "MaxVio of a training batch", floor=0.0)


def tradeoff_figure(summary: Summary) -> str:
    """Final loss against global MaxVio: small dots are cells, large ones their arm's mean."""
    with _drawn(6.4, 4.2) as (figure, text):
        axes = figure.subplots()
        for name, colour in colours(summary).items():
            arm = next(arm for arm in summary.arms if arm.name == name)
            if arm.final_loss is None or arm.max_violation is None:
                continue
            across = [row["result"]["max_violation"] for row in arm.good]
            down = [row["result"]["final_loss"] for row in arm.good]
            x, y = arm.max_violation.mean, arm.final_loss.mean
            for cell_x, cell_y in zip(across, down, strict=True):
                axes.plot([x, cell_x], [y, cell_y], color=colour, lw=1, alpha=0.45)
            axes.scatter(across, down, color=colour, s=22, alpha=0.55, lw=0)
            axes.scatter(x, y, color=colour, s=110, label=name, edgecolor="white", zorder=3)
        axes.set_xlim(left=0)
        axes.margins(y=0.12)
        axes.set_xlabel("global MaxVio on held-out text (0 = even load)")
        axes.set_ylabel("final held-out loss (nats per byte)")
        _legend(axes)
    return text[0]


def load_figure(summary: Summary) -> str | None:
    """Share of choices by expert over training, a row for each layer and a column for each arm,
    first seed. None where no cell counted anything."""
    shown = [(arm, arm.good[0]["result"]["load"]) for arm in summary.arms if arm.good]
    if not shown:
        return None
    layers = list(shown[0][1]["layers"])
    with _drawn(2.55 * len(shown) + 1.1, 1.75 * len(layers) + 0.9) as (figure, text):
        grid = figure.subplots(len(layers), len(shown), squeeze=False, sharex=True, sharey=True)
        for column, (arm, load) in enumerate(shown):
            for row, layer in enumerate(layers):
                axes = grid[row][column]
                shares = relative_load(load["layers"][layer])
                image = axes.imshow(
                    list(zip(*shares, strict=True)),
                    aspect="auto",
                    cmap="RdBu_r",
                    vmin=0.0,
                    vmax=2.0,
                    extent=(0, load["steps"][-1], len(shares[0]) - 0.5, -0.5),
                    interpolation="nearest",
                )
                axes.grid(False)
                if row == 0:
                    axes.set_title(arm.name, color=colours(summary)[arm.name])
                if row == len(layers) - 1:
                    axes.set_xlabel("step")
                if column == 0:
                    axes.set_ylabel(f"layer {layer}\nexpert")
        bar = figure.colorbar(image, ax=grid, shrink=0.8, pad=0.015, extend="max")
        bar.set_label("load / even load")
        bar.outline.set_visible(False)
    return text[0]


def relative_load(windows: list[list[int]]) -> list[list[float]]:
    """Counts (window x expert) over each window's mean: 1 = even."""
    return [[count * len(counts) / max(1, sum(counts)) for count in counts] for counts in windows]


def _curves(
    summary: Summary,
    pick: Callable[[ArmSummary], Curve],
    label: str,
    *,
    marker: str = "",
    floor: float | None = None,
) -> str:
    with _drawn(8.6, 4.0) as (figure, text):
        axes = figure.subplots()
        palette = colours(summary)
        for arm in summary.arms:
            curve, colour = pick(arm), palette[arm.name]
            if not curve.steps:
                continue
            low, high = ([getattr(v, end) for v in curve.values] for end in ("low", "high"))
            axes.fill_between(curve.steps, low, high, color=colour, alpha=0.16, lw=0)
            means = [value.mean for value in curve.values]
            axes.plot(curve.steps, means, color=colour, lw=1.9, marker=marker, ms=4, label=arm.name)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.margins(x=0.01)
        if floor is not None:
            axes.set_ylim(bottom=floor)
        _legend(axes)
    return text[0]


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=1.6)


@contextmanager
def _drawn(width: float, height: float) -> Iterator[tuple[Figure, list[str]]]:
    """A figure to draw on, in inches; its SVG is in the list afterwards."""
    import matplotlib
    from matplotlib.figure import Figure

    text: list[str] = []
    with matplotlib.rc_context(STYLE):
        # Not through pyplot: no display, no global state.
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, text
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    text.append(svg[svg.index("<svg") :])
