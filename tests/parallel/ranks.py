"""Run one function on several gloo processes, with a deadline."""

import datetime
import faulthandler
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 60


def run_on_ranks(body: Callable[[int], None], ranks: int = 2) -> None:
    """`body(rank)` on each rank; the test fails where one of them fails, or all hang."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(_rank, (ranks, str(Path(folder) / "store"), body), ranks, join=False)
        deadline = time.monotonic() + SECONDS
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    pytest.fail(f"{body.__name__} did not end on all ranks within {SECONDS} s.")
        finally:
            for process in context.processes:
                process.kill()


def _rank(rank: int, ranks: int, store: str, body: Callable[[int], None]) -> None:
    faulthandler.enable()  # a rank that is aborted from C++ says which line it was at
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",  # no port to collide with another test's
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=SECONDS / 2),
    )
    body(rank)
    dist.destroy_process_group()
    # At a normal exit C++ takes down gloo's threads while some still run, and aborts now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
