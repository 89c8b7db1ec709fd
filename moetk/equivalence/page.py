"""A comparison as one self-contained page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetk.equivalence.as_json import environment
from moetk.equivalence.model_report import ModelReport, agree
from moetk.equivalence.model_table import HEAD as LAYER_HEAD
from moetk.equivalence.model_table import LEGEND as LAYER_LEGEND
from moetk.equivalence.model_table import layer_cells, logits_cells, tensor_words
from moetk.equivalence.plot import plot, plot_layers
from moetk.equivalence.report import Report
from moetk.equivalence.table import HEAD, LEGEND, cells, choices_line, number
from moetk.io import write_file
from moetk.look import page, svg

TENSORS = 40  # of those that differ


@dataclass(frozen=True)
class Line:
    """A line of a table: its cells, whether it passed, and what there is to say."""

    cells: tuple[str, ...]
    ok: bool
    why: str = ""


@dataclass(frozen=True)
class Section:
    """One layer: its stages, and how the two chose there."""

    title: str
    ok: bool
    choices: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...]


def write_page(report: Report | ModelReport, path: Path, command: str = "") -> None:
    """Write the page. command: what was typed. Raises ConfigError without jinja2 or matplotlib,
    SaveFailedError."""
    write_file(path, render(report, command).encode())


def render(report: Report | ModelReport, command: str = "") -> str:
    """The page as HTML; nothing is loaded from outside, every string is escaped."""
    values = _of_models(report) if isinstance(report, ModelReport) else _of_parts(report)
    return page(
        "moetk.equivalence",
        "page.html",
        **values,
        report=report,
        stage_head=HEAD,
        stage_legend=LEGEND,
        layer_head=LAYER_HEAD,
        layer_legend=LAYER_LEGEND,
        environment=environment(report.environment),
        command=command,
    )


def _of_parts(report: Report) -> dict[str, Any]:
    return {
        "headline": _headline(report),
        "first": report,
        "layers": (),
        "sections": (_section(report, f"{report.b} against {report.a}"),),
        "tensors": (),
        "figures": [("Every stage", svg(plot(report)))],
    }


def _of_models(report: ModelReport) -> dict[str, Any]:
    first = report.first
    shown = report.layers[-1] if first is None else first
    return {
        "headline": _model_headline(report),
        "first": shown.report,
        "layers": (
            *(Line(layer_cells(layer), layer.ok) for layer in report.layers),
            Line(logits_cells(report), agree(report.after)),
        ),
        "sections": tuple(_section(layer.report, layer.name) for layer in report.layers),
        "tensors": _tensors(report),
        "figures": [
            ("Every layer", svg(plot_layers(report))),
            (f"Every stage of {shown.name}", svg(plot(shown.report))),
        ],
    }


def _headline(report: Report) -> str:
    if report.first is None:
        return "No stage differs."
    return f"They first differ at {report.first.stage}: {report.first.why}."


def _model_headline(report: ModelReport) -> str:
    if report.ok:
        return "No layer differs, and nothing between them."
    if report.first is None:
        apart = number(report.after)
        return f"They first differ between the last layer and the logits: {apart} apart in fp64."
    if not agree(report.first.around):
        apart = number(report.first.around)
        where = f"around {report.first.name}, outside of its block"
        return f"They first differ {where}: {apart} apart in fp64."
    stage = report.first.report.first
    assert stage is not None
    return f"They first differ in {report.first.name}, at {stage.stage}: {stage.why}."


def _section(report: Report, title: str) -> Section:
    lines = tuple(Line(cells(row), row.ok, row.why) for row in report.rows)
    choices = "" if report.choices is None else choices_line(report)
    return Section(title, report.ok, choices, lines, report.notes)


def _tensors(report: ModelReport) -> tuple[str, ...]:
    shown = [tensor_words(one) for one in report.tensors[:TENSORS]]
    more = len(report.tensors) - TENSORS
    return (*shown, f"and {more} more") if more > 0 else tuple(shown)
