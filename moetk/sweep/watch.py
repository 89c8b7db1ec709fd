"""What a sweep shows while it runs: bars on a terminal, one line per ten seconds elsewhere."""

from __future__ import annotations

import threading
import time
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moetk.sweep.plan import Cell

EVERY_S = 10.0


class Watch(Protocol):
    """Told what happens, from several threads."""

    def note(self, text: str) -> None: ...
    def begin(self, cells: int, done: int) -> None: ...
    def step(self, cell: Cell, event: dict[str, Any]) -> None: ...
    def finish(self, cell: Cell, row: dict[str, Any]) -> None: ...
    def tick(self) -> None: ...
    def end(self) -> None: ...


class Silent:
    """Shows nothing."""

    def note(self, text: str) -> None: ...
    def begin(self, cells: int, done: int) -> None: ...
    def step(self, cell: Cell, event: dict[str, Any]) -> None: ...
    def finish(self, cell: Cell, row: dict[str, Any]) -> None: ...
    def tick(self) -> None: ...
    def end(self) -> None: ...


class Lines:
    """For logs: a line when a cell ends, and one every ten seconds with what runs."""

    def __init__(self, console: Console, every: float = EVERY_S) -> None:
        self.console, self.every = console, every
        self.cells = self.done = 0
        self.running: dict[str, str] = {}
        self.last = time.monotonic()
        self.lock = threading.Lock()

    def note(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def begin(self, cells: int, done: int) -> None:
        self.cells, self.done = cells, done
        self.note(f"{done}/{cells} cells done")

    def step(self, cell: Cell, event: dict[str, Any]) -> None:
        with self.lock:
            self.running[cell.label] = describe_step(event)

    def finish(self, cell: Cell, row: dict[str, Any]) -> None:
        with self.lock:
            self.running.pop(cell.label, None)
            self.done += 1
        self.note(f"{self.done}/{self.cells} {cell.label} {describe_row(row)}")

    def tick(self) -> None:
        if time.monotonic() - self.last < self.every:
            return
        self.last = time.monotonic()
        with self.lock:
            running = ", ".join(f"{label} {text}" for label, text in sorted(self.running.items()))
        done = f"{self.done}/{self.cells} cells done; " if self.cells else ""
        self.note(f"{done}running: {running or 'starting'}")

    def end(self) -> None: ...


class Bars:
    """For a terminal: a bar for the sweep and one for each running cell."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
        )
        self.tasks: dict[str, Any] = {}
        self.lock = threading.Lock()

    def note(self, text: str) -> None:
        self.progress.console.print(escape(text), highlight=False, soft_wrap=True)

    def begin(self, cells: int, done: int) -> None:
        self.total = self.progress.add_task("[bold]cells", total=cells, completed=done, text="")
        self.progress.start()

    def step(self, cell: Cell, event: dict[str, Any]) -> None:
        with self.lock:
            if cell.label not in self.tasks:
                self.tasks[cell.label] = self.progress.add_task(
                    escape(cell.label), total=event["steps"], text=""
                )
        self.progress.update(
            self.tasks[cell.label], completed=event["step"], text=f"loss {event['loss']:.3f}"
        )

    def finish(self, cell: Cell, row: dict[str, Any]) -> None:
        with self.lock:
            task = self.tasks.pop(cell.label, None)
        if task is not None:
            self.progress.remove_task(task)
        self.progress.advance(self.total)
        self.note(f"{cell.label} {describe_row(row)}")

    def tick(self) -> None: ...

    def end(self) -> None:
        self.progress.stop()


def watch_for(console: Console) -> Watch:
    """Bars where somebody looks, lines where a file is written."""
    return Bars(console) if console.is_terminal else Lines(console)


def describe_step(event: dict[str, Any]) -> str:
    return f"step {event['step']}/{event['steps']} loss {event['loss']:.3f}"


def describe_row(row: dict[str, Any]) -> str:
    result, seconds = row["result"], row["run"].get("seconds", 0.0)
    if result["status"] != "ok":
        return f"{result['status']} after {seconds:.0f} s: {result.get('error', '')}"
    losses = f"held-out loss {result['initial_loss']:.3f} -> {result['final_loss']:.3f}"
    return f"{losses}, MaxVio {result['train_max_violation']:.2f}, {seconds:.0f} s"
