"""A report on two models as plain text."""

from __future__ import annotations

import textwrap

from moetk.equivalence.model_report import LayerReport, ModelReport, TensorApart, agree
from moetk.equivalence.table import WIDTH, aligned, fact, facts, number, ratio

HEAD = ("layer", "around", "worst local", "flipped", "ties", "entering", "leaving", "verdict")
LEGEND = (
    "around: error in fp64 of what is not the block. worst local: largest error of a stage "
    "in units of the plain implementation's. entering, leaving: hidden states, models left alone. "
    "Not compared: the loss, and what happens in training alone."
)
SHOWN = 8  # of the tensors that differ


def table(report: ModelReport) -> str:
    """Every layer in a line, then the explanation."""
    rows = [*(layer_cells(layer) for layer in report.layers), logits_cells(report)]
    lines = aligned(HEAD, rows, left={0, 7})
    notes = [fact("note", note) for note in report.notes]
    return "\n".join([*lines, "", textwrap.fill(LEGEND, WIDTH), "", explain(report), *notes])


def explain(report: ModelReport) -> str:
    """Where the two first differ, why, and what to look at."""
    lines = [fact("compared", f"{report.b} against {report.a}"), tensors_line(report)]
    first = report.first
    if report.ok:
        return "\n".join([*lines, fact("verdict", "no layer differs, and nothing between them")])
    if first is None:
        where = "between the last mixture-of-experts layer and the logits"
        return "\n".join([*lines, fact("first", f"{where}: {number(report.after)} apart in fp64")])
    if not agree(first.around):
        where = f"around {first.name}, outside of the mixture-of-experts blocks"
        return "\n".join([*lines, fact("first", f"{where}: {number(first.around)} apart in fp64")])
    of_first = [fact(name, text) for name, text in facts(first.report)]
    return "\n".join([*lines, fact("layer", first.name), *of_first])


def tensors_line(report: ModelReport) -> str:
    """Which parameters are not the same."""
    if not report.tensors:
        return fact("tensors", "all bitwise equal")
    shown = "; ".join(tensor_words(one) for one in report.tensors[:SHOWN])
    more = len(report.tensors) - SHOWN
    return fact("tensors", f"{len(report.tensors)} differ: {shown}" + f"; {more} more" * (more > 0))


def tensor_words(one: TensorApart) -> str:
    """ "model.norm.weight by 1.2e-03" """
    if one.shape is None or one.other_shape is None:
        return f"{one.name} only in {'b' if one.shape is None else 'a'}"
    if one.error is None:
        return f"{one.name} {one.shape} and {one.other_shape}"
    return f"{one.name} by {number(one.error)}"


def layer_cells(layer: LayerReport) -> tuple[str, ...]:
    """A layer as text, one cell for each name in HEAD."""
    judged = [row.local or row.accumulated for row in layer.report.rows]
    worst = max((one for one in judged if one), key=lambda one: one.ratio, default=None)
    choices = layer.report.choices
    return (
        layer.name,
        number(layer.around),
        ratio(worst),
        "-" if choices is None else str(choices.flipped),
        "-" if choices is None else str(choices.tied),
        number(layer.entering),
        number(layer.leaving),
        layer_verdict(layer),
    )


def logits_cells(report: ModelReport) -> tuple[str, ...]:
    """The last line: what comes after the layers."""
    verdict = "ok" if agree(report.after) else "differs"
    return ("logits", number(report.after), "-", "-", "-", "-", number(report.logits), verdict)


def layer_verdict(layer: LayerReport) -> str:
    """ "ok", or at which stage it differs and why."""
    words = [] if agree(layer.around) else ["around it"]
    if layer.report.first is not None:
        words.append(f"at {layer.report.first.stage}: {layer.report.cause}")
    return f"differs {' and '.join(words)}" if words else "ok"
