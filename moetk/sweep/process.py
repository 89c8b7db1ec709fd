"""One cell as a process: give it a job, listen, and end it together with all it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import site
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import moetk

Event = dict[str, Any]
STEP = {"step", "steps", "loss"}


class CellProcess:
    """A started cell. It leads a session of its own, so that one signal reaches its helpers too.

    command: a program that speaks the protocol of moetk.sweep.child. log: where its stderr goes.
    threads: for its numerical libraries. lock: a file descriptor that it inherits and holds open.
    """

    def __init__(self, command: Sequence[str], log: Path, threads: int, lock: int) -> None:
        self.log = log
        with open(log, "wb") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=_environment(threads),
                pass_fds=(lock,),
                start_new_session=True,
            )
        self._late = threading.Event()

    def listen(
        self, job: Mapping[str, Any], timeout: float, on_step: Callable[[Event], None]
    ) -> Event:
        """Send the job, pass every step event on, and wait for the end, at most `timeout` seconds.

        Returns what the other events said, merged. The pipe to the cell stays open all the while:
        the cell takes its closing for our death.
        """
        process, said = self._process, Event()
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(timeout, self._out_of_time)
        timer.daemon = True
        timer.start()
        try:
            # A cell that died at once says why in its log.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(job).encode() + b"\n")
                process.stdin.flush()
            for line in process.stdout:
                event = _event(line)
                if event.keys() >= STEP:
                    on_step(event)
                else:
                    said.update(event)
            # Not reaped yet: its number cannot belong to another process when helpers are killed.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        finally:
            timer.cancel()
            self.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        return said

    def kill(self) -> None:
        """End the cell and whatever it started. Harmless when it has ended."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    @property
    def late(self) -> bool:
        """Whether it was ended because its time was over."""
        return self._late.is_set()

    def death(self) -> str:
        """How a cell ended that could not say so itself."""
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        if code == -signal.SIGKILL:
            how += " (often: out of memory)"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{how}; its last line: {lines[-1] if lines else '(nothing)'}"

    def _out_of_time(self) -> None:
        self._late.set()
        self.kill()


def _event(line: bytes) -> Event:
    """What a line says; nothing when it is no JSON object, which a user's code can write too."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def _environment(threads: int) -> dict[str, str]:
    """Ours, with the threads fixed and, for a checkout that is not installed, moetk to be found."""
    home = Path(moetk.__file__).parent.parent
    installed = {Path(folder) for folder in (*site.getsitepackages(), site.getusersitepackages())}
    given = os.environ.get("PYTHONPATH", "")
    path = given if home in installed else os.pathsep.join(filter(None, (str(home), given)))
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONPATH": path,
        "PYTHONHASHSEED": "0",
    }
