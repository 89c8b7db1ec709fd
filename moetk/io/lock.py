"""One writer at a time, through a lock that the kernel drops when its last holder dies."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

PATIENCE_S = 5.0


class Locked(Exception):
    """The lock is held. `pid` is the process that took it, None when that is not known."""

    def __init__(self, pid: int | None) -> None:
        super().__init__(f"held by process {pid}")
        self.pid = pid


class FileLock:
    """An exclusive flock on `path`, taken on construction.

    The lock belongs to the open file: a child that inherits `fd` holds it too, so the children of a
    killed parent keep everybody out until the last of them is gone. `patience` (seconds) is the
    time such children get to notice; after it, `Locked` is raised.
    """

    def __init__(self, path: Path, patience: float = PATIENCE_S) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + patience
        while not self._taken():
            if time.monotonic() > deadline:
                written = os.pread(self.fd, 32, 0)
                os.close(self.fd)
                raise Locked(int(written) if written.isdigit() else None)
            time.sleep(0.05)
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, str(os.getpid()).encode(), 0)

    def _taken(self) -> bool:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Close this process's hold; children that inherited it keep theirs."""
        os.close(self.fd)
