"""Figures over the rows of layers: time and memory against T, and the roofline. PNG, by the
`sweep` extra's matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moetk.bench.ceilings import COPY, DENSE
from moetk.bench.report import BOTH, PEAK
from moetk.bench.rows import Row
from moetk.bench.shapes import LayerShape, parse_words
from moetk.io import write_file
from moetk.look import COLOURS, QUIET, drawing, encoded

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PANELS = ((BOTH, "forward + backward (ms)"), (PEAK, "peak over parameters and gradients (MiB)"))


def against_tokens(rows: Sequence[Row]) -> dict[str, bytes]:
    """A PNG for each layer, routing and way with gradients: time and, where it was measured, peak
    memory over T, a line for each contender with its p20 to p80. The file's name is the key."""
    found = {}
    for case in _cases(rows):
        mine = [row for row in rows if row.value is not None and _case(row) == case]
        panels = [(what, label) for what, label in PANELS if any(r.what == what for r in mine)]
        if not panels:
            continue
        with drawing(5.4 * len(panels), 4.0) as figure:
            for axes, (what, label) in zip(
                figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
            ):
                _lines(axes, [row for row in mine if row.what == what])
                axes.set_ylabel(label)
            handles, names = axes.get_legend_handles_labels()
            figure.legend(handles, names, loc="outside right center")
            layer, routing, grads = case
            figure.suptitle(f"{layer}, {routing} routing, gradients: {grads}")
            found[f"tokens_{layer}_{routing}_{grads}.png"] = encoded(figure, "png")
    return found


def roofline(rows: Sequence[Row], shapes: Sequence[LayerShape]) -> bytes | None:
    """TFLOP/s over FLOP per byte of the least traffic, for every contender's balanced layers, under
    the measured ceilings. None where a ceiling or every layer is missing."""
    known = {shape.name: shape for shape in shapes}
    ceiling = {row.what: row.value for row in rows if row.what in (DENSE, COPY)}
    timed = [row for row in rows if row.what == BOTH and row.value and _case(row)[1] == "balanced"]
    timed = [row for row in timed if _case(row)[0] in known]
    dense, copy = ceiling.get(DENSE), ceiling.get(COPY)
    if not (dense and copy and timed):
        return None
    with drawing(7.6, 4.6) as figure:
        axes = figure.subplots()
        points = [(row, *_point(row, known)) for row in timed]
        edge = dense / copy
        ends = [point[1] for point in points]
        low, high = min(*ends, edge) / 2, max(*ends, edge) * 2
        axes.plot([low, edge, high], [low * copy, dense, dense], color=QUIET, lw=1.9)
        for name, colour, marker in _looks(timed):
            mine = [(x, y) for row, x, y in points if row.who == name]
            across, up = [x for x, _ in mine], [y for _, y in mine]
            axes.scatter(across, up, s=44, color=colour, marker=marker, label=name)
        _doubling(axes, "xy")
        axes.set_xlabel("FLOP per byte, least traffic")
        axes.set_ylabel("TFLOP/s, forward + backward")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
        return encoded(figure, "png")


def write_figures(folder: Path, rows: Sequence[Row], shapes: Sequence[LayerShape]) -> list[Path]:
    """Write every figure that the rows have numbers for. Raises ConfigError without matplotlib."""
    figures = against_tokens(rows)
    roof = roofline(rows, shapes)
    if roof is not None:
        figures["roofline.png"] = roof
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in figures.items():
        write_file(folder / name, data)
    return [folder / name for name in figures]


def _lines(axes: Axes, rows: Sequence[Row]) -> None:
    for name, colour, marker in _looks(rows):
        mine = [(int(parse_words(row.shape)["T"]), row) for row in rows if row.who == name]
        mine.sort(key=lambda entry: entry[0])
        across, values = [tokens for tokens, _ in mine], [row.value or 0.0 for _, row in mine]
        axes.plot(across, values, color=colour, marker=marker, ms=5, lw=1.6, label=name)
        if all(row.p20 is not None for _, row in mine):
            low = [row.p20 or 0.0 for _, row in mine]
            high = [row.p80 or 0.0 for _, row in mine]
            axes.fill_between(across, low, high, color=colour, alpha=0.18, lw=0)
    _doubling(axes, "x")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens T")


def _doubling(axes: Axes, which: str) -> None:
    """Powers of two, written as plain numbers."""
    for letter in which:
        getattr(axes, f"set_{letter}scale")("log", base=2)
        getattr(axes, f"{letter}axis").set_major_formatter("{x:g}")


def _looks(rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    names = dict.fromkeys(row.who for row in rows)
    for index, name in enumerate(names):
        yield name, COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def _cases(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys(_case(row) for row in rows if row.what in (BOTH, PEAK)))


def _case(row: Row) -> tuple[str, str, str]:
    words = parse_words(row.shape)
    return words.get("layer", ""), words.get("routing", ""), words.get("grads", "")


def _point(row: Row, known: dict[str, LayerShape]) -> tuple[float, float]:
    words = parse_words(row.shape)
    shape, tokens = known[words["layer"]], int(words["T"])
    flops = 3 * shape.flops(tokens)
    itemsize = {"float64": 8, "float32": 4}.get(words.get("dtype", ""), 2)
    assert row.value is not None
    return flops / shape.traffic(tokens, itemsize), flops / row.value / 1e9
