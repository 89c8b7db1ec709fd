"""Run the cells of a sweep, each in a process of its own; only this process writes rows."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from moetk.errors import ConfigError
from moetk.sweep.child import STOPS
from moetk.sweep.config import Config
from moetk.sweep.plan import Cell, World, plan_cells
from moetk.sweep.process import CellProcess, Event
from moetk.sweep.store import Row, SweepStore
from moetk.sweep.watch import Silent, Watch

CELL = (sys.executable, "-P", "-m", "moetk.sweep.cell")
STATUSES = ("failed", "timeout", "diverged")

T = TypeVar("T")


def run_sweep(
    config: Config,
    root: Path,
    *,
    workers: int | None = None,
    retry: Sequence[str] = (),
    watch: Watch | None = None,
    command: Sequence[str] = CELL,
) -> list[Row]:
    """Run every cell that has no row yet; returns the rows of all cells, in the plan's order.

    root: the sweep's folder; the same call again resumes there.
    workers: cells at a time, None = usable cores // [train] threads.
    retry: statuses ("failed", "timeout", "diverged") whose cells run again.
    command: the program that is a cell; it speaks the protocol of moetk.sweep.child.

    A cell that crashes, hangs or diverges becomes a row with that status and hurts no other.
    Raises ConfigError, SweepMismatchError, SweepLockedError, SaveFailedError. After a cell met one
    of STOPS, which would fail the next one too, the sweep ends and that cell has no row.
    """
    watch = watch or Silent()
    workers = workers or max(1, usable_cores() // config.train.threads)
    with SweepStore(root) as store:
        if store.results.quarantined:
            watch.note(f"An incomplete last row was moved to {store.results.path}.quarantine.")
        _announce(config, watch)
        watch.note("Taking one step with every arm, to check names and code.")
        crew = Crew(config, store, command)
        world = _describe(crew, watch)
        cells = plan_cells(config, world)
        store.begin(config, world, cells)
        adopted = store.adopt(cells)
        if adopted:
            watch.note(f"{len(adopted)} finished cells were found without a row and adopted.")
        rows = store.rows
        waiting = [
            cell
            for cell in cells
            if cell.key not in rows or rows[cell.key]["result"]["status"] in retry
        ]
        watch.begin(len(cells), len(cells) - len(waiting))
        try:
            _run_cells(crew, waiting, world, workers, watch)
        finally:
            watch.end()
        return [store.rows[cell.key] for cell in cells]


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _announce(config: Config, watch: Watch) -> None:
    names = sorted({part.name for arm in config.arms for part in arm.parts if part.is_users})
    if names:
        watch.note(f"Runs your code: {', '.join(names)}; {config.folder} is searched first.")


def _describe(crew: Crew, watch: Watch) -> World:
    with _pool(crew, 1) as pool:
        (future,) = _ended([pool.submit(crew.describe)], watch)
        world, places = future.result()
    for module, place in places.items():
        watch.note(f"Found {module} in {place}.")
    return world


def _run_cells(crew: Crew, cells: Sequence[Cell], world: World, workers: int, watch: Watch) -> None:
    with _pool(crew, workers) as pool:
        futures = {pool.submit(crew.run, cell, world, watch): cell for cell in cells}
        for future in _ended(futures, watch):
            row = future.result()
            crew.store.results.append(row)
            watch.finish(futures[future], row)


@contextmanager
def _pool(crew: Crew, workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that wait for processes; all of both end when anything is raised."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            crew.stop()
            raise


def _ended(futures: Iterable[Future[T]], watch: Watch) -> Iterator[Future[T]]:
    """Each as it ends; in between, the watch is told twice a second that time goes by."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
        yield from done
        watch.tick()


class Crew:
    """Starts cells and turns whatever becomes of each into a row."""

    def __init__(self, config: Config, store: SweepStore, command: Sequence[str]) -> None:
        self.config, self.store, self.command = config, store, command
        self.running: set[CellProcess] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def describe(self) -> tuple[World, dict[str, str]]:
        """Ask a cell process for the data and the code, and where each of the user's modules lies;
        every arm takes a step there, so that a wrong name costs seconds, not a night. Raises
        ConfigError with the cell's own words."""
        job = {
            "do": "describe",
            "cells": [self.config.cell(arm).settings() for arm in self.config.arms],
        }
        log = self.store.root / "logs" / "describe.txt"
        said, error, _ = self._talk(job, log, lambda event: None)
        if "described" not in said:
            raise ConfigError(f"{error.removeprefix('ConfigError: ')} (log: {log})")
        found = said["described"]
        return World(found["data"], found["code"]), found["places"]

    def run(self, cell: Cell, world: World, watch: Watch) -> Row:
        """Run one cell to its end, good or bad. Raises STOPS."""
        self.store.forget(cell)
        job = {
            "do": "run",
            "folder": str(self.store.cell_folder(cell).resolve()),
            "key": cell.key,
            "settings": cell.settings,
            "seed": cell.seed,
            "data": world.data,
            "code": world.code,
        }
        start = time.monotonic()
        said, error, late = self._talk(job, self.store.log(cell), partial(watch.step, cell))
        for stop in STOPS:
            if said.get("stop") == stop.__name__:
                raise stop(f"{cell.label}: {error.removeprefix(f'{stop.__name__}: ')}")
        row = self.store.finished(cell)
        if row is not None:
            return row
        return {
            "key": cell.key,
            "arm": cell.arm,
            "seed": cell.seed,
            "config": cell.settings,
            "data": dict(world.data),
            "code": world.brief(),
            "result": {"status": "timeout" if late else "failed", "error": error},
            "run": {
                "seconds": round(time.monotonic() - start, 3),
                "host": platform.node(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        }

    def stop(self) -> None:
        """Kill every running cell, and start no more."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.kill()

    def _talk(
        self, job: dict[str, Any], log: Path, on_step: Callable[[Event], None]
    ) -> tuple[Event, str, bool]:
        """What a new process said to this job, why it failed if it did, whether it was too late."""
        sweep, train = self.config.sweep, self.config.train
        with self.lock:
            if self.stopped:
                raise CancelledError
            process = CellProcess(self.command, log, train.threads, self.store.lock.fd)
            self.running.add(process)
        try:
            job = {**job, "folder_of_toml": str(self.config.folder)}
            said = process.listen(job, sweep.timeout, on_step)
        finally:
            with self.lock:
                self.running.discard(process)
        if process.late:
            error = f"ran past [sweep] timeout = {sweep.timeout:g} s; raise it or lower steps"
        else:
            error = said.get("error") or process.death()
        # Any text may come from a cell, also one that no file and no terminal can take.
        return said, error.encode("utf-8", "backslashreplace").decode(), process.late
