"""A sweep's folder: what was planned, one sealed row a cell, and the cells' own results.

    sweep.json      the plan: settings, data, code (every file listed), keys
    results.jsonl   rows, appended by the runner alone; the last row of a key counts
    cells/KEY/row.json   a finished cell, renamed into place by the cell itself
    logs/KEY.txt    what the cell printed
    lock            held by the runner and every cell it started

A row: key, arm, seed, config, data, code, `result` (equal in every run of the same key) and `run`
(time, host, and all else that is not).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moetk.errors import SaveFailedError, ShardCorruptError, SweepLockedError, SweepMismatchError
from moetk.io import (
    FileLock,
    Locked,
    RowFile,
    canonical,
    read_rows,
    remove_temporaries,
    seal,
    sha256,
    unseal,
    write_file,
    write_folder,
)
from moetk.sweep.config import Config
from moetk.sweep.plan import Cell, World, changes

Row = dict[str, Any]


class SweepStore:
    """The one writer of a sweep's folder. Use it in a `with`, or call close()."""

    def __init__(self, root: Path) -> None:
        """Create or open the folder and take its lock.

        Raises SweepLockedError when another runner, or a cell it left behind, holds it,
        SaveFailedError where nothing can be written, and ShardCorruptError on a changed row.
        """
        self.root = root
        try:
            (root / "cells").mkdir(parents=True, exist_ok=True)
            (root / "logs").mkdir(exist_ok=True)
            self.lock = FileLock(root / "lock")
        except OSError as error:
            raise SaveFailedError(
                error.errno,
                f"{root} cannot be a sweep's folder ({error.strerror}); use another --out.",
            ) from None
        except Locked as locked:
            raise SweepLockedError(
                f"{root} is being written by process {locked.pid}. Wait for it, stop it, or use "
                "another --out."
            ) from None
        try:
            for folder in (root, root / "cells"):
                remove_temporaries(folder)
            self.results = RowFile(root / "results.jsonl")
        except BaseException:
            self.lock.release()
            raise

    def __enter__(self) -> SweepStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.lock.release()

    @property
    def rows(self) -> dict[str, Row]:
        """The row that counts, by key."""
        return {row["key"]: row for row in self.results.rows}

    def begin(self, config: Config, world: World, cells: Sequence[Cell]) -> None:
        """Write the plan, after comparing it with the one that is here.

        More arms, more seeds, another baseline or timeout leave every planned cell as it was and
        pass. Raises SweepMismatchError, with the differences, where a planned cell would be lost.
        """
        path = self.root / "sweep.json"
        plan = {
            "settings": config.settings(),
            "data": dict(world.data),
            "code": dict(world.code),
            "source": config.source,
            "command": config.command,
            "cells": [{"key": cell.key, "arm": cell.arm, "seed": cell.seed} for cell in cells],
        }
        if path.exists():
            old = unseal(path.read_bytes(), str(path))
            if not {cell["key"] for cell in old["cells"]} <= {cell.key for cell in cells}:
                raise SweepMismatchError(self._mismatch(old, plan))
        write_file(path, seal(plan))

    def _mismatch(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
        lines = changes(old["settings"], new["settings"])
        lines += changes({"data": old["data"]}, {"data": new["data"]})
        lines += changes({"code": old["code"]}, {"code": new["code"]})
        shown = "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
        done = sum(cell["key"] in self.rows for cell in old["cells"])
        return (
            f"{self.root} was started from another sweep: {shown} ({done} of {len(old['cells'])} "
            f"cells done). Use --out {self.root}2, or restore the value to resume."
        )

    def adopt(self, cells: Sequence[Cell]) -> list[Row]:
        """Add the rows of cells that finished after their runner was killed; returns them."""
        known = {sha256(canonical(row)) for row in self.results.rows}
        adopted = []
        for cell in cells:
            row = self.finished(cell)
            if row is not None and sha256(canonical(row)) not in known:
                self.results.append(row)
                adopted.append(row)
        return adopted

    def finished(self, cell: Cell) -> Row | None:
        """The row that the cell itself left, None where it left none.

        Raises ShardCorruptError when it is not what the cell wrote, or another cell's.
        """
        path = self.cell_folder(cell) / "row.json"
        if not path.exists():
            return None
        row = unseal(path.read_bytes(), str(path))
        if row.get("key") != cell.key:
            raise ShardCorruptError(f"{path} belongs to another cell, {row.get('key')!r}.")
        return row

    def forget(self, cell: Cell) -> None:
        """Make room for another try. The old row stays, and counts until the next one is added."""
        shutil.rmtree(self.cell_folder(cell), ignore_errors=True)

    def cell_folder(self, cell: Cell) -> Path:
        return self.root / "cells" / cell.key

    def log(self, cell: Cell) -> Path:
        return self.root / "logs" / f"{cell.key}.txt"


def leave_row(folder: Path, row: Mapping[str, Any]) -> None:
    """Called in the cell: its whole result, or nothing, at `folder`. Raises SaveFailedError."""
    write_folder(folder, {"row.json": seal(row)})


def read_sweep(root: Path) -> tuple[dict[str, Any], list[Row]]:
    """The plan and, in its order, the row that counts of every cell that has one. Changes nothing.

    Raises FileNotFoundError where no sweep was started, ShardCorruptError on a changed file.
    """
    path = root / "sweep.json"
    if not path.exists():
        raise FileNotFoundError(f"{root} holds no sweep: {path} is missing.")
    plan = unseal(path.read_bytes(), str(path))
    rows, _ = read_rows(root / "results.jsonl")
    last = {row["key"]: row for row in rows}
    return plan, [last[cell["key"]] for cell in plan["cells"] if cell["key"] in last]
