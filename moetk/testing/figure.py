"""The picture of a report: a tile for each law, and the routing that broke one.

matplotlib is imported here and nowhere else in moetk.testing.
"""

from __future__ import annotations

import io
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moetk.io import write_file
from moetk.testing.law import Outcome, Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moetk.testing.report import LawReport

# Okabe and Ito's colours: told apart by every kind of colour vision.
COLOURS: dict[Status, str] = {"kept": "#009e73", "broken": "#d55e00", "not applicable": "#e4e7eb"}
INK, QUIET = "#1f2933", "#7b8794"
TILES = 10  # a row
TITLE = 32  # characters a line, over the matrix
LARGEST = 24  # rows and columns of a matrix that are still read one by one
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the picture is the same everywhere
    "font.size": 9,
    "text.color": INK,
    "svg.hashsalt": "moetk",
}


def draw(report: LawReport, path: Path) -> Path:
    """Write the picture to `path`, in the format that its ending names."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    shown = next((one for one in report.outcomes if "routing_TE" in one.shown), None)
    rows = -(-len(report.outcomes) // TILES)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2 if shown else 5.6, 0.55 * rows + 1.5), dpi=110)
        panels = figure.subplots(
            1, 2 if shown else 1, squeeze=False, width_ratios=[3, 2][: 1 + bool(shown)]
        )
        _tiles(panels[0][0], report)
        if shown is not None:
            _matrix(panels[0][1], shown)
        figure.tight_layout()
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.suffix[1:] or "png", metadata=_undated(path))
    write_file(path, buffer.getvalue())
    return path


def _undated(path: Path) -> dict[str, None]:
    return {"Date": None} if path.suffix == ".svg" else {}


def _tiles(axes: Axes, report: LawReport) -> None:
    from matplotlib.patches import FancyBboxPatch

    for place, outcome in enumerate(report.outcomes):
        row, column = divmod(place, TILES)
        axes.add_patch(
            FancyBboxPatch(
                (column + 0.06, row + 0.06),
                0.88,
                0.88,
                boxstyle="round,pad=0,rounding_size=0.12",
                facecolor=COLOURS[outcome.status],
                edgecolor="none",
            )
        )
        colour = QUIET if outcome.status == "not applicable" else "white"
        weight = "bold" if outcome.status == "broken" else "normal"
        axes.text(
            column + 0.5,
            row + 0.5,
            outcome.law.number,
            ha="center",
            va="center",
            color=colour,
            fontweight=weight,
        )
    rows = -(-len(report.outcomes) // TILES)
    axes.set(xlim=(0, TILES), ylim=(rows + 1.1, 0), aspect="equal")
    axes.axis("off")
    axes.set_title(report.summary(), loc="left", fontsize=10, fontweight="bold")
    for place, (status, colour) in enumerate(COLOURS.items()):
        axes.scatter(3 * place + 0.4, rows + 0.65, s=60, marker="s", color=colour)
        number = len(report.having(status))
        axes.text(3 * place + 0.75, rows + 0.65, f"{number} {status}", va="center")


def _matrix(axes: Axes, outcome: Outcome) -> None:
    weights_TE: Tensor = outcome.shown["routing_TE"][:LARGEST, :LARGEST]
    axes.imshow(
        torch.nan_to_num(weights_TE, nan=0.0).numpy(), cmap="Oranges", vmin=0, aspect="equal"
    )
    for token, expert in (~weights_TE.isnan()).nonzero().tolist():
        weight = float(weights_TE[token, expert])
        dark = weight > 0.6 * float(weights_TE.nan_to_num().max())
        ink = "white" if dark else INK
        axes.text(expert, token, f"{weight:.2g}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(weights_TE.shape[1]))
    axes.set_yticks(range(weights_TE.shape[0]))
    axes.set(xlabel="expert", ylabel="token")
    axes.tick_params(length=0, labelsize=8, colors=QUIET)
    axes.spines[:].set_visible(False)
    law = fill(f"{outcome.law.number} {outcome.law.title}", TITLE)
    axes.set_title(f"{law}\nbreaks on this routing", loc="left", fontsize=9)
