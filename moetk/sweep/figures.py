"""The report's figures as SVG text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moetk.look import COLOURS, QUIET, drawing, svg
from moetk.sweep.summary import ArmSummary, Curve, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The baseline is the quiet one.
BASELINE_COLOUR = QUIET
# Arms that agree lie on one another: the later one is broken, so that both are seen.
DASHES = ("-", "-", "-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")


def colours(summary: Summary) -> dict[str, str]:
    """A colour for each arm, the same in every figure and table."""
    others = [arm.name for arm in summary.arms if arm.name != summary.baseline]
    found = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(others)}
    return {summary.baseline: BASELINE_COLOUR, **found}


def loss_figure(summary: Summary) -> str:
    """Held-out loss over steps, and beside it what the eye cannot see there: the difference to the
    baseline, seed by seed, where there is any. Bands span the seeds."""
    compared = any(arm.gap.steps for arm in summary.arms)
    with _drawn(10.6, 4.0) as (figure, text):
        left, *right = figure.subplots(1, 2 if compared else 1, squeeze=False)[0]
        _curves(left, summary, lambda arm: arm.loss)
        left.set_ylabel("held-out loss (nats per byte)")
        for axes in right:
            _curves(axes, summary, lambda arm: arm.gap)
            axes.axhline(0, color=BASELINE_COLOUR, lw=1.9)
            axes.set_ylabel(f"difference to {summary.baseline}")
        _legend(figure, left)
    return text[0]


def violation_figure(summary: Summary) -> str:
    """Batch MaxVio over training; the band spans the seeds."""
    with _drawn(10.6, 3.8) as (figure, text):
        axes = figure.subplots()
        _curves(axes, summary, lambda arm: arm.violation, marker="")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("MaxVio of a training batch")
        _legend(figure, axes)
    return text[0]


def tradeoff_figure(summary: Summary) -> str:
    """Final loss against global MaxVio: small dots are cells, large ones their arm's mean."""
    with _drawn(7.6, 4.4) as (figure, text):
        axes = figure.subplots()
        palette = colours(summary)
        for index, arm in enumerate(summary.arms):
            if arm.final_loss is None or arm.max_violation is None:
                continue
            look: Any = {"color": palette[arm.name], "marker": MARKERS[index % len(MARKERS)]}
            across = [row["result"]["max_violation"] for row in arm.good]
            down = [row["result"]["final_loss"] for row in arm.good]
            x, y = arm.max_violation.mean, arm.final_loss.mean
            for cell_x, cell_y in zip(across, down, strict=True):
                axes.plot([x, cell_x], [y, cell_y], color=palette[arm.name], lw=1, alpha=0.4)
            axes.scatter(across, down, s=20, alpha=0.5, lw=0, **look)
            axes.scatter(x, y, s=100, alpha=0.85, label=arm.name, ec="white", zorder=3, **look)
        axes.set_xlim(left=0)
        axes.margins(y=0.12)
        axes.set_xlabel("global MaxVio on held-out text (0 = even load)")
        axes.set_ylabel("final held-out loss (nats per byte)")
        _legend(figure, axes)
    return text[0]


def load_figure(summary: Summary) -> str | None:
    """Share of choices by expert over training, a row for each layer and a column for each arm:
    summary.shown. None where no cell counted anything."""
    shown = list(summary.shown.values())
    if not shown:
        return None
    layers = list(shown[0]["result"]["load"]["layers"])
    one_seed = len({cell["seed"] for cell in shown}) == 1
    with _drawn(2.55 * len(shown) + 1.1, 1.75 * len(layers) + 0.9) as (figure, text):
        grid = figure.subplots(len(layers), len(shown), squeeze=False, sharex=True, sharey=True)
        for column, cell in enumerate(shown):
            name, load = cell["arm"], cell["result"]["load"]
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
                    title = name if one_seed else f"{name}, seed {cell['seed']}"
                    axes.set_title(title, color=colours(summary)[name])
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
    axes: Axes, summary: Summary, pick: Callable[[ArmSummary], Curve], marker: str = "o"
) -> None:
    palette = colours(summary)
    for index, arm in enumerate(summary.arms):
        curve, colour = pick(arm), palette[arm.name]
        if not curve.steps:
            continue
        low, high = ([getattr(value, end) for value in curve.values] for end in ("low", "high"))
        axes.fill_between(curve.steps, low, high, color=colour, alpha=0.16, lw=0)
        means = [value.mean for value in curve.values]
        dashes = DASHES[index % len(DASHES)]
        axes.plot(
            curve.steps, means, dashes, color=colour, lw=1.9, marker=marker, ms=4, label=arm.name
        )
    axes.set_xlabel("step")
    axes.margins(x=0.01)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside right center", handlelength=2.2)


@contextmanager
def _drawn(width: float, height: float) -> Iterator[tuple[Figure, list[str]]]:
    """A figure to draw on, in inches; its SVG is in the list afterwards."""
    text: list[str] = []
    with drawing(width, height) as figure:
        yield figure, text
    text.append(svg(figure))
