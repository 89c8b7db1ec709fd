"""Run a test file's kernel cases in Triton's interpreter.

The interpreter is chosen where Triton is first imported, so a file runs itself in a process of its
own: `outcomes_of(__file__)` in a fixture, `tell(CASES)` where it is `__main__`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def outcomes_of(file: str) -> dict[str, str]:
    """Each case's traceback, "" where it passed. Skips where Triton does not run: it comes for
    Linux on x86-64, and for no other machine."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip(
            "Triton, which pip installs on Linux, is not here: no kernel can be interpreted"
        )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    result: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return result


def tell(cases: Mapping[str, Callable[[], None]]) -> None:
    """Run the cases and print how they ended."""
    print(json.dumps({name: _outcome(case) for name, case in cases.items()}))


def _outcome(case: Callable[[], None]) -> str:
    try:
        case()
    except Exception:
        return traceback.format_exc()
    return ""
