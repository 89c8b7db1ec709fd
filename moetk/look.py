"""How moetk's figures and pages look. matplotlib and jinja2 are imported here, when needed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from moetk.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXTRA = "install it with  pip install 'moetk[sweep]'"
INK, SOFT, GRID, QUIET = "#1f2933", "#52606d", "#e4e7eb", "#5b6470"
# Told apart by every kind of colour vision (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b")
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moetk",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the layout is the same everywhere
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
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
}


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure to draw on, in inches. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"A figure needs {error.name}; {EXTRA}.") from None
    with matplotlib.rc_context(STYLE):
        # Not through pyplot: no display, no global state.
        yield Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure) -> str:
    """The figure as an <svg> element for a page."""
    text = encoded(figure, "svg").decode()
    # Where that font is missing, a reader still gets one without serifs.
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Helvetica, Arial, sans-serif")
    return text[text.index("<svg") :]


def encoded(figure: Figure, kind: str) -> bytes:
    """The figure as a file of this kind: svg, png or pdf."""
    import matplotlib

    out = io.BytesIO()
    undated = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format=kind, dpi=160, metadata=undated.get(kind))
    return out.getvalue()


def page(room: str, name: str, **values: Any) -> str:
    """The template `name` of a room, filled in; every string is escaped, nothing is loaded from
    outside. Raises ConfigError without jinja2."""
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ConfigError(f"A report needs {error.name}; {EXTRA}.") from None
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files(room).joinpath(name).read_text(encoding="utf-8")
    style = files("moetk").joinpath("look.css").read_text(encoding="utf-8")
    text: str = environment.from_string(source).render(markup=Markup, style=Markup(style), **values)
    return text
