"""One cell of a sweep: `python -m moetk.sweep.cell`, driven through its stdin by the runner.

Here, and in no other process, the TOML's folder is on the path and a user's code runs.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import moetk
from moetk.errors import ConfigError, SweepMismatchError
from moetk.sweep.child import Send, serve
from moetk.sweep.config import CellConfig
from moetk.sweep.plan import World
from moetk.sweep.store import Row

EVENT_EVERY_S = 0.5


def describe(job: dict[str, Any]) -> dict[str, Any]:
    """Take one short step with every arm, and say what data and code its cells stand on.

    Returns {"data": ..., "code": ..., "places": {a user's module: the file it was found in}}.
    Raises ConfigError naming the arm that cannot train.
    """
    from moetk.sweep.code import source_of
    from moetk.sweep.data import load_corpus
    from moetk.sweep.train import rehearse

    folder = _enter(job)
    cells = [CellConfig.from_settings(settings) for settings in job["cells"]]
    corpus = load_corpus(cells[0].data)
    for cell in cells:
        try:
            rehearse(cell, corpus)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"[[arm]] {cell.arm.name} cannot train a step: {type(error).__name__}: {error}"
            ) from error
    found = {name: source_of(sys.modules[name]) for name in sorted(_users_modules(cells))}
    places = {name: str(path) for name, path in found.items() if path is not None}
    return {"data": corpus.about, "code": _code(folder, cells), "places": places}


def run(job: dict[str, Any], send: Send) -> Row:
    """Train one arm with one seed; returns its row.

    Raises SweepMismatchError when code or data are not those of the key: a file was edited while
    the sweep ran, or a module is imported that describe() did not meet. Asked before training,
    which would be for nothing, and after it, when all is imported.
    """
    import torch

    from moetk.sweep.data import load_corpus
    from moetk.sweep.parts import import_users
    from moetk.sweep.train import train_arm

    start = time.monotonic()
    folder, cell = _enter(job), CellConfig.from_settings(job["settings"])
    world = World(job["data"], job["code"])
    torch.set_num_threads(cell.train.threads)
    corpus = load_corpus(cell.data)
    import_users(cell.arm)
    _must_be(world, corpus.about, _code(folder, [cell]))
    result = train_arm(cell, job["seed"], corpus, _Sparingly(send))
    _must_be(world, corpus.about, _code(folder, [cell]))
    return {
        "key": job["key"],
        "arm": cell.arm.name,
        "seed": job["seed"],
        "config": job["settings"],
        "data": dict(world.data),
        "code": world.brief(),
        "result": result,
        "run": {
            "seconds": round(time.monotonic() - start, 3),
            "host": platform.node(),
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "backend": _backend(cell),
            "moetk": moetk.__version__,
            "commit": _commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }


class _Sparingly:
    """Passes on an event every half second, and the last one."""

    def __init__(self, send: Send) -> None:
        self.send, self.last = send, 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self.last > EVENT_EVERY_S or event["step"] == event["steps"]:
            self.last = now
            self.send(event)


def _enter(job: dict[str, Any]) -> Path:
    folder = Path(job["folder_of_toml"])
    sys.path.insert(0, str(folder))
    return folder


def _must_be(world: World, data: dict[str, Any], code: dict[str, Any]) -> None:
    lines = world.differences(data, code)
    if lines:
        raise SweepMismatchError(
            f"code or data changed while the sweep ran: {'; '.join(lines[:5])}. The cell left no "
            "row: restore what changed and start the sweep again to resume, or use another --out. "
            "(nothing -> a module: it was imported late; import it at the top of the module that "
            "the TOML names.)"
        )


def _code(folder: Path, cells: list[CellConfig]) -> dict[str, Any]:
    from moetk.sweep.code import running_code

    return running_code(folder, _users_modules(cells))


def _users_modules(cells: list[CellConfig]) -> set[str]:
    parts = [part for cell in cells for part in cell.arm.parts if part.is_users]
    return {part.name.partition(":")[0] for part in parts}


def _backend(cell: CellConfig) -> str:
    """What the experts' products ran on: "auto" as the table resolved it for these batches."""
    import torch

    from moetk.experts import pick_backend

    if cell.arm.backend == "stock":
        return "stock"
    rows = cell.train.batch_size * cell.train.sequence_length * cell.model.top_k
    return pick_backend(cell.arm.backend, torch.float32, torch.device("cpu"), rows).name


def _processor() -> str:
    """The processor's own name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of a checkout of moetk, None for an installed one."""
    home = Path(moetk.__file__).parent.parent
    if not (home / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


if __name__ == "__main__":
    serve(describe, run)
