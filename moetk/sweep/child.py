"""The cell's side of the pipe. Imports nothing heavy: it must be listening before torch loads.

The runner writes one line of JSON to stdin, the job, and keeps the pipe open; when the pipe closes
the runner is gone and the process ends at once, with the helpers it started, so that nobody writes
behind a resumed sweep.
Events go back as lines of JSON. What the job prints goes to stderr, which is the cell's log.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from moetk.errors import SaveFailedError, SweepMismatchError
from moetk.sweep.store import Row, leave_row

RUNNER_GONE = 75
STOPS = (SaveFailedError, SweepMismatchError)

Send = Callable[[dict[str, Any]], None]
Describe = Callable[[dict[str, Any]], dict[str, Any]]
Run = Callable[[dict[str, Any], Send], Row]


def serve(describe: Describe, run: Run) -> NoReturn:
    """Do the one job that stdin brings, then exit.

    {"do": "describe", ...}: describe(job) is sent back as {"described": ...}.
    {"do": "run", "folder": ..., ...}: run(job, send) returns the row, which is left in the folder.
    An exception is sent back as {"error": ...} and exits with 1; its traceback is in the log. One
    of STOPS is {"error": ..., "stop": its name} instead: it is not about this cell alone.
    """
    send = _private_stdout()
    line = sys.stdin.buffer.readline()
    if not line:
        os._exit(RUNNER_GONE)
    job = json.loads(line)
    threading.Thread(target=_exit_with_runner, daemon=True).start()
    try:
        if job["do"] == "describe":
            send({"described": describe(job)})
        else:
            leave_row(Path(job["folder"]), run(job, send))
    except BaseException as error:
        stop = {"stop": type(error).__name__} if isinstance(error, STOPS) else {}
        send({"error": f"{type(error).__name__}: {error}", **stop})
        with suppress(OSError):  # on a full disk there is no log
            traceback.print_exc()
        _end(1)
    _end(0)


def _private_stdout() -> Send:
    """Keep the pipe for events; anything that prints, in C too, writes to the log instead."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # While a helper held it, the runner would wait for a cell that has ended: it gets the log too.
    os.register_at_fork(after_in_child=lambda: os.dup2(2, pipe.fileno(), inheritable=False))
    lock = threading.Lock()

    def send(event: dict[str, Any]) -> None:
        with lock:
            pipe.write(json.dumps(event) + "\n")
            pipe.flush()

    return send


def _exit_with_runner() -> None:
    while os.read(0, 4096):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(RUNNER_GONE)


def _end(code: int) -> NoReturn:
    # A user's own threads and exit hooks must not keep a finished cell alive.
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
