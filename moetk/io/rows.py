"""Rows that survive kill -9: one sealed line of JSON each, only ever appended."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetk.errors import SaveFailedError, ShardCorruptError
from moetk.io.atomic import sync_folder
from moetk.io.digest import seal, unseal


def read_rows(path: Path) -> tuple[list[dict[str, Any]], bytes]:
    """The rows of a file, and the incomplete last line that a killed writer left (b"" = none).

    Changes nothing, so it needs no lock. A missing file has no rows. Raises ShardCorruptError for
    a bad line that is not the last: no torn append explains it.
    """
    if not path.exists():
        return [], b""
    lines = path.read_bytes().splitlines(keepends=True)
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ShardCorruptError(f"{path} ends inside line {number}")
            rows.append(unseal(line, f"{path}, line {number},"))
        except ShardCorruptError:
            if number < len(lines):
                raise
            return rows, line
    return rows, b""


class RowFile:
    """The one writer of a file of rows; the caller holds the lock.

    Opening moves an incomplete last line to `<name>.quarantine`: an append after it would lose
    both. `rows` is what the file holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows, torn = read_rows(path)
        self.quarantined = len(torn)
        if torn:
            # Kept first, cut second: a kill between the two keeps the bytes twice, not zero times.
            _append(path.with_name(path.name + ".quarantine"), torn + b"\n")
            os.truncate(path, path.stat().st_size - len(torn))

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; it is on the disk when this returns. Raises SaveFailedError, errno kept."""
        _append(self.path, seal(row))
        self.rows.append(dict(row))


def _append(path: Path, data: bytes) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(handle).st_size
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(handle, view) :]
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)
        sync_folder(path.parent)
    except OSError as error:
        raise SaveFailedError(
            error.errno, f"{path}: the row was not added ({error.strerror}); earlier rows stand"
        ) from error
