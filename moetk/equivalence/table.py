"""A report as plain text, for a terminal or a log of at most 120 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import torch

from moetk.equivalence.judge import Verdict
from moetk.equivalence.report import Report, Row
from moetk.equivalence.trace import EXACT

WIDTH = 120
HEAD = ("stage", "shape", "dtype", "equal", "max abs", "fp64", "local", "accum", "ulp 99",
        "worst at", "verdict")  # fmt: skip
LEGEND = (
    "equal: bitwise. fp64: error as a function. local, accum: error in units of the plain "
    "implementation's, up to 2 is rounding; at equal inputs of the stage, and left alone."
)
SHORT = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "bool",
}
_SCORES, _SLOTS, _INNER = ("token", "expert"), ("token", "slot"), ("token", "slot", "col")
AXES = {
    "logits": _SCORES,
    "scores": _SCORES,
    "choice": _SCORES,
    "indices": _SLOTS,
    "weights": _SLOTS,
    "counts": ("expert",),
    "dispatched": _SLOTS,
    "up": _INNER,
    "activation": _INNER,
    "expert_output": _INNER,
    "combined": ("token", "col"),
    "output": ("token", "col"),
    "losses": ("loss",),
    "grad losses": _SCORES,
    "grad x": ("token", "col"),
    "grad up_weight": ("expert", "row", "col"),
    "grad down_weight": ("expert", "row", "col"),
    "grad up_bias": ("expert", "row"),
    "grad down_bias": ("expert", "row"),
    "grad router.weight": ("expert", "col"),
    "grad router.bias": ("expert",),
}


def table(report: Report) -> str:
    """Every stage in a line, then the explanation."""
    lines = aligned(HEAD, [cells(row) for row in report.rows], left={0, 9, 10})
    return "\n".join([*lines, "", textwrap.fill(LEGEND, WIDTH), "", explain(report)])


def explain(report: Report) -> str:
    """How the two chose, where they first differ, why, and what to look at."""
    lines = [("compared", f"{report.b} against {report.a}"), *facts(report)]
    return "\n".join(fact(name, text) for name, text in lines)


def facts(report: Report) -> list[tuple[str, str]]:
    """The explanation's lines, each under its name."""
    found = []
    if report.choices is not None:
        found.append(("choices", choices_line(report)))
    first = report.first
    if first is None:
        found.append(("verdict", "no stage differs"))
    else:
        found.append(("first", f"{first.stage}: {first.why}"))
        found.append(("cause", report.cause))
        found += [("fix", one.fix) for one in report.causes]
    return found + [("note", note) for note in report.notes]


def choices_line(report: Report) -> str:
    """ "29 the same, 2 permuted, 1 swapped at a tie, 0 flipped, of 32 tokens; ..." """
    found = report.choices
    assert found is not None
    line = (
        f"{found.same} the same, {found.permuted} permuted, {found.tied} swapped at a tie, "
        f"{found.flipped} flipped, of {found.total} tokens; {found.border_ties} with a tie at the "
        "border"
    )
    whole = next(
        (row for row in reversed(report.rows) if row.stage in ("output", "combined")), None
    )
    if whole is None or whole.differing is None:
        return line
    alike = "none" if whole.alike is None else f"{whole.alike:.1e}"
    return (
        f"{line}. Relative difference of {whole.stage}: {alike} over tokens that chose alike, "
        f"{whole.differing:.1e} over the others"
    )


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, one cell for each name in HEAD."""
    return (
        row.stage,
        _both(_shape(row.shape), _shape(row.other_shape)),
        _both(_dtype(row.dtype), _dtype(row.other_dtype)),
        percent(row.equal),
        number(row.largest),
        number(row.function),
        ratio(row.local),
        ratio(row.accumulated),
        "-" if row.ulp is None else f"{row.ulp:.1f}" if row.ulp < 1e4 else f"{row.ulp:.0e}",
        place(row),
        verdict(row),
    )


def verdict(row: Row) -> str:
    """ "differs", "ok", or "-" where nothing could be judged."""
    if not row.ok:
        return "differs"
    judged = (row.function, row.local, row.accumulated)
    return "ok" if row.stage in EXACT or any(one is not None for one in judged) else "-"


def place(row: Row) -> str:
    """The worst index by the names of its axes: "token 5, expert 3"."""
    if row.worst is None:
        return "-"
    axes = AXES.get(row.stage, AXES.get(row.stage.removeprefix("grad "), ()))
    if len(axes) != len(row.worst):
        return str(row.worst)
    return ", ".join(f"{axis} {index}" for axis, index in zip(axes, row.worst, strict=True))


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: set[int]) -> list[str]:
    """Columns as wide as their widest cell; `left` are those that align there."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return [line(head), "  ".join("-" * width for width in widths), *map(line, rows)]


def number(value: float | None) -> str:
    """Two digits and a power of ten; "0" is exact."""
    if value is None or math.isnan(value):
        return "-"
    return "0" if value == 0 else f"{value:.1e}"


def ratio(judged: Verdict | None) -> str:
    """Error over what is allowed without question: up to 2 is within the pass rule."""
    if judged is None or math.isnan(judged.ratio):
        return "-"
    return f"{judged.ratio:.2f}" if judged.ratio < 1000 else f"{judged.ratio:.0e}"


def percent(share: float) -> str:
    """Rounded towards "not all": 100% means every element."""
    return "100%" if share == 1 else f"{min(100 * share, 99.9):.1f}%"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"


def _dtype(dtype: torch.dtype) -> str:
    return SHORT.get(dtype, str(dtype).removeprefix("torch."))


def _both(a: str, b: str) -> str:
    return a if a == b else f"{a}|{b}"


def fact(name: str, text: str) -> str:
    """A named line, wrapped."""
    indent = " " * 10
    return textwrap.fill(text, WIDTH, initial_indent=f"{name:<10}", subsequent_indent=indent)
