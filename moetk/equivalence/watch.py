"""What `moetk compare` shows while it runs: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from moetk.equivalence.models import Progress


@contextmanager
def watched(console: Console) -> Iterator[Progress]:
    """A bar that goes away when the work is done; Transformers' own are off meanwhile."""
    from transformers.utils import logging

    theirs = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    try:
        with Bars(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as bars:
            task = bars.add_task("", total=None)
            yield lambda what, done, total: bars.update(
                task, description=what, completed=done, total=total
            )
    finally:
        if theirs:
            logging.enable_progress_bar()
