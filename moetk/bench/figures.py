"""Figures over the rows of layers: time and memory against T, and the roofline. PNG, by the
`sweep` extra's matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetk.bench.ceilings import COPY, DENSE
from moetk.bench.report import BOTH, PEAK
from moetk.bench.rows import Row
from moetk.bench.shapes import LayerShape, parse_words
from moetk.io import write_file
from moetk.look import COLOURS, QUIET, drawing, encoded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Line and filling of what is not launched eagerly.
NOT_EAGER = {"one-thread": (":", "left"), "captured": ("--", "none")}
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
        with drawing(5.4 * len(panels), 4.4) as figure:
            every = figure.subplots(1, len(panels), squeeze=False)[0]
            for axes, (what, label) in zip(every, panels, strict=True):
                _lines(axes, [row for row in mine if row.what == what])
                axes.set_ylabel(label)
            _legend(figure, every)
            layer, routing, grads = case
            figure.suptitle(f"{layer}, {routing} routing, gradients: {grads}")
            found[f"tokens_{layer}_{routing}_{grads}.png"] = encoded(figure, "png")
    return found


def roofline(rows: Sequence[Row], shapes: Sequence[LayerShape]) -> bytes | None:
    """TFLOP/s over FLOP per byte of the least traffic, for every contender's balanced layers, a
    panel for each, under the measured ceilings. None where a ceiling or every layer is missing."""
    known = {shape.name: shape for shape in shapes}
    ceiling = {row.what: row.value for row in rows if row.what in (DENSE, COPY)}
    timed = [row for row in rows if row.what == BOTH and row.value and _case(row)[1] == "balanced"]
    timed = [row for row in timed if _case(row)[0] in known]
    dense, copy = ceiling.get(DENSE), ceiling.get(COPY)
    if not (dense and copy and timed):
        return None
    points = [(row, *_point(row, known)) for row in timed]
    ends = [across for _, across, _ in points]
    edge = dense / copy
    line = [min(*ends, edge) / 2, edge, max(*ends, edge) * 2]
    layers = list(dict.fromkeys(_case(row)[0] for row in timed))
    with drawing(2.4 + 3.4 * len(layers), 4.6) as figure:
        every = figure.subplots(1, len(layers), squeeze=False, sharex=True, sharey=True)[0]
        for axes, layer in zip(every, layers, strict=True):
            axes.plot(line, [line[0] * copy, dense, dense], color=QUIET, lw=1.9)
            mine = [point for point in points if _case(point[0])[0] == layer]
            for who, look in _looks(timed).items():
                held = [(across, up) for row, across, up in mine if _who(row) == who]
                axes.plot(*([*zip(*held, strict=True)] or ([], [])), **{**look, "ls": "", "ms": 7})
            for across, tokens in {x: parse_words(row.shape)["T"] for row, x, _ in mine}.items():
                beside = {"textcoords": "offset points", "xytext": (6, 4), "rotation": 90}
                foot = (across, 0)
                within = ("data", "axes fraction")
                axes.annotate(f"T={tokens}", foot, xycoords=within, fontsize=8, **beside)
            _doubling(axes, "xy")
            axes.set_title(layer)
        every[0].set_ylabel("TFLOP/s, forward + backward")
        figure.supxlabel(
            f"FLOP per byte, least traffic (ceilings here: {dense:.3g} TFLOP/s, {copy:.3g} TB/s)",
            fontsize=11,
        )
        _legend(figure, every)
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
    for who, look in _looks(rows).items():
        mine = [(int(parse_words(row.shape)["T"]), row) for row in rows if _who(row) == who]
        mine.sort(key=lambda entry: entry[0])
        across, values = [tokens for tokens, _ in mine], [row.value or 0.0 for _, row in mine]
        axes.plot(across, values, **look)
        if all(row.p20 is not None for _, row in mine):
            low = [row.p20 or 0.0 for _, row in mine]
            high = [row.p80 or 0.0 for _, row in mine]
            axes.fill_between(across, low, high, color=look["color"], alpha=0.18, lw=0)
    low, high = axes.dataLim.intervaly
    if high > 4 * low:
        _doubling(axes, "xy")
    else:  # a logarithmic axis would have one number, or none
        _doubling(axes, "x")
        axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens T")


def _legend(figure: Figure, every: Iterable[Axes]) -> None:
    """One for all panels: not everyone is in each."""
    found: dict[str, Any] = {}
    for axes in every:
        handles, names = axes.get_legend_handles_labels()
        found |= dict(zip(names, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside right center")


def _doubling(axes: Axes, which: str) -> None:
    """Powers of two, written as plain numbers."""
    for letter in which:
        getattr(axes, f"set_{letter}scale")("log", base=2)
        getattr(axes, f"{letter}axis").set_major_formatter(lambda at, _: _plain(at))


def _plain(number: float) -> str:
    return f"{number:g}" if number >= 1 else f"{number:.2g}"


def _who(row: Row) -> tuple[str, str]:
    return row.who, row.launch


def _looks(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Any]]:
    """matplotlib's words for each contender and launch: a contender keeps its colour and marker;
    the marker's filling and the line tell the launch."""
    names = list(dict.fromkeys(row.who for row in rows))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for who, launch in dict.fromkeys(map(_who, rows)):
        index = names.index(who)
        line, filling = NOT_EAGER.get(launch, ("-", "full"))
        found[who, launch] = {
            "color": COLOURS[index % len(COLOURS)],
            # After a round of colours the markers have moved on by one: no two are the same twice.
            "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
            "fillstyle": filling,
            "ls": line,
            "ms": 5,
            "lw": 1.6,
            "label": f"{who}, {launch}" if launch in NOT_EAGER else who,
        }
    return found


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
