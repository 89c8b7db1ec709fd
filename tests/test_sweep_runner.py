"""Cells that crash, hang or outlive their runner; a runner that is killed and comes back."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial

import pytest

from moetk.errors import (
    ConfigError,
    SaveFailedError,
    ShardCorruptError,
    SweepLockedError,
    SweepMismatchError,
)
from moetk.io import FileLock
from moetk.sweep import load_config, read_sweep, run_sweep, store
from moetk.sweep.watch import Silent

# A cell without torch: its router's args say how it behaves, and it notes that it ran.
CELL = """
import os, sys, time
from pathlib import Path
from moetk.errors import SaveFailedError, SweepMismatchError
from moetk.sweep.child import serve

def describe(job):
    for settings in job["cells"]:
        if settings["arm"]["router"]["name"] == "unknown":
            raise ValueError("no such router")
    code = {"moetk": {"a.py": "1"}, "modules": {}, "versions": {"python": "3"}}
    return {"data": {"kind": "fake", "sha256": "d"}, "code": code, "places": {}}

def run(job, send):
    settings, seed = job["settings"], job["seed"]
    args = settings["arm"]["router"]
    with open(args["log"], "a") as log:
        log.write(settings["arm"]["name"] + "/" + str(seed) + "\\n")
    print("said on stdout")
    send({"step": 1, "steps": settings["steps"], "loss": 1.0})
    helper = os.fork() if seed == args.get("helper") else None
    if helper == 0:
        if "left" in args:
            os.setsid()
            Path(args["left"]).write_text(str(os.getpid()))
        Path(args["log"]).open("a").write("helper\\n")
        time.sleep(600)
    time.sleep(args.get("sleep", 0))
    if seed == args.get("crash"):
        raise RuntimeError("broken on \\udce9 purpose")
    if seed == args.get("stale") and Path(args["edited"]).exists():
        raise SweepMismatchError("edited")
    if seed == args.get("full"):
        raise SaveFailedError(28, "no room")
    if seed == args.get("die"):
        os.abort()
    diverged = seed == args.get("diverge")
    result = {"status": "diverged" if diverged else "ok", "loss": seed + settings["train"]["lr"]}
    return {"key": job["key"], "arm": settings["arm"]["name"], "seed": seed, "config": settings,
            "data": job["data"], "code": {}, "result": result, "run": {"pid": os.getpid()}}

# What a user's code that finds the pipe may write on it.
os.write(1, b"junk\\n[1]\\n\\xff\\n" + b"[" * 100_000 + b'\\n{"step": 1}\\n')
serve(describe, run)
"""
RUNNER = """
import sys
from pathlib import Path
from moetk.sweep import load_config, run_sweep
toml, root, cell = sys.argv[1:]
run_sweep(load_config(Path(toml)), Path(root), workers=2, command=(sys.executable, "-P", cell))
"""


class Sweep:
    """A TOML file, a fake cell, and the list of what ran."""

    def __init__(self, folder):
        self.folder, self.root = folder, folder / "out"
        self.cell, self.log = folder / "cell.py", folder / "ran.txt"
        self.cell.write_text(CELL)
        self.command = (sys.executable, "-P", str(self.cell))

    def write(self, arms, *, seeds=(0, 1), timeout=60, steps=5, lr=0.5):
        text = (
            f'[sweep]\nname = "s"\nseeds = {list(seeds)}\nsteps = {steps}\nbaseline = "a"\n'
            f"timeout = {timeout}\n[train]\nlr = {lr}\n"
        )
        for name, args in arms.items():
            args = {"log": str(self.log), **args}
            router = args.pop("router", "fake")
            table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in args.items())
            text += f'[[arm]]\nname = "{name}"\nrouter = "{router}"\nargs = {{ {table} }}\n'
        path = self.folder / "sweep.toml"
        path.write_text(text)
        return path

    def run(self, path=None, root=None, **options):
        config = load_config(path or self.folder / "sweep.toml")
        return run_sweep(
            config, root or self.root, **{"workers": 2, "command": self.command, **options}
        )

    def start(self, path):
        """The same in a process of its own, to be killed."""
        return subprocess.Popen(
            [sys.executable, "-c", RUNNER, str(path), str(self.root), str(self.cell)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    @property
    def ran(self):
        return Counter(self.log.read_text().split()) if self.log.exists() else Counter()


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


def results(rows):
    return {(row["arm"], row["seed"]): row["result"] for row in rows}


def statuses(rows):
    return {cell: result["status"] for cell, result in results(rows).items()}


def test_every_cell_runs_once_and_again_means_nothing_to_do(sweep):
    sweep.write({"a": {}, "b": {}})
    rows = sweep.run()
    assert [(row["arm"], row["seed"]) for row in rows] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert results(rows)["b", 1] == {"status": "ok", "loss": 1.5}
    assert sweep.run() == rows and set(sweep.ran.values()) == {1} and len(sweep.ran) == 4
    plan, stored = read_sweep(sweep.root)
    assert stored == rows and len(plan["cells"]) == 4
    assert "said on stdout" in (sweep.root / "logs" / f"{rows[0]['key']}.txt").read_text()


def test_a_bad_cell_is_a_row_and_hurts_no_other(sweep):
    sweep.write({"a": {}, "b": {"crash": 0, "die": 1}, "c": {"diverge": 0}})
    rows = sweep.run()
    found = results(rows)
    assert statuses(rows) == {
        ("a", 0): "ok",
        ("a", 1): "ok",
        ("b", 0): "failed",
        ("b", 1): "failed",
        ("c", 0): "diverged",
        ("c", 1): "ok",
    }
    assert found["b", 0]["error"] == "RuntimeError: broken on \\udce9 purpose"
    assert "killed by SIGABRT" in found["b", 1]["error"]
    before = sweep.ran
    assert sweep.run() == rows and sweep.ran == before  # only on request
    sweep.run(retry=["failed"])
    assert sweep.ran - before == Counter({"b/0": 1, "b/1": 1})
    sweep.run(retry=["diverged"])
    assert sweep.ran["c/0"] == 2 and len(read_sweep(sweep.root)[1]) == 6


def test_a_cell_out_of_time_is_killed_with_its_helpers(sweep):
    sweep.write({"a": {"sleep": 60, "helper": 0}}, seeds=[0], timeout=2)
    started = time.monotonic()
    rows = sweep.run()
    assert time.monotonic() - started < 30
    assert statuses(rows) == {("a", 0): "timeout"}
    assert results(rows)["a", 0]["error"].startswith("ran past [sweep] timeout = 2 s")
    FileLock(sweep.root / "lock", patience=2).release()


def test_a_finished_or_dead_cell_is_not_waited_for_because_of_its_helpers(sweep):
    # The helpers sleep for ten minutes and hold the pipe and the lock.
    sweep.write({"a": {"helper": 0}, "b": {"helper": 0, "die": 0}}, seeds=[0], timeout=500)
    started = time.monotonic()
    assert statuses(sweep.run()) == {("a", 0): "ok", ("b", 0): "failed"}
    assert time.monotonic() - started < 60
    FileLock(sweep.root / "lock", patience=2).release()


def test_a_helper_that_left_the_session_does_not_hold_the_sweep(sweep):
    left = sweep.folder / "pid"
    sweep.write({"a": {"helper": 0, "left": str(left), "sleep": 1}}, seeds=[0], timeout=500)
    started = time.monotonic()
    try:
        assert statuses(sweep.run()) == {("a", 0): "ok"}
        assert time.monotonic() - started < 60
    finally:
        os.kill(int(left.read_text()), signal.SIGKILL)


def test_helpers_end_with_a_killed_runner(sweep):
    path = sweep.write({"a": {"helper": 0, "sleep": 600}}, seeds=[0], timeout=900)
    runner = sweep.start(path)
    deadline = time.monotonic() + 60
    while not sweep.ran["helper"]:
        assert time.monotonic() < deadline and runner.poll() is None
        time.sleep(0.01)
    runner.kill()
    runner.wait()
    FileLock(sweep.root / "lock", patience=20).release()


def test_what_is_not_about_one_cell_ends_the_sweep_and_leaves_no_row(sweep):
    edited = sweep.folder / "edited"
    edited.touch()
    sweep.write({"a": {"stale": 1, "edited": str(edited)}}, seeds=[0, 1, 2])
    with pytest.raises(SweepMismatchError, match=r"^a/1: edited$"):
        sweep.run(workers=1)
    assert statuses(read_sweep(sweep.root)[1]) == {("a", 0): "ok"} and "a/2" not in sweep.ran
    edited.unlink()
    assert set(statuses(sweep.run()).values()) == {"ok"}
    assert sweep.ran == Counter({"a/0": 1, "a/1": 2, "a/2": 1})


def test_a_full_disk_ends_the_sweep_with_its_own_words(sweep):
    sweep.write({"a": {"full": 0}}, seeds=[0])
    with pytest.raises(SaveFailedError, match=r"^a/0: \[Errno 28\] no room$"):
        sweep.run()
    assert read_sweep(sweep.root)[1] == []


def test_an_error_is_told_where_no_log_can_be_written(sweep):
    sweep.write({"a": {"router": "unknown"}})
    (sweep.root / "logs").mkdir(parents=True)
    (sweep.root / "logs" / "describe.txt").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="ValueError: no such router"):
        sweep.run()


def test_a_folder_that_cannot_be_one(sweep):
    sweep.write({"a": {}})
    sweep.root.write_text("a file")
    for root in (sweep.root, sweep.root / "below"):
        with pytest.raises(SaveFailedError, match="cannot be a sweep's folder .*; use another"):
            sweep.run(root=root)


def test_time_goes_by_while_the_arms_are_tried(sweep):
    class Counting(Silent):
        ticks = began = 0

        def tick(self):
            self.ticks += 1

        def begin(self, cells, done):
            self.began = self.ticks

    sweep.write({"a": {}}, seeds=[0])
    watch = Counting()
    sweep.run(watch=watch)
    assert watch.began >= 1


def test_a_wrong_name_stops_the_sweep_before_it_starts(sweep):
    sweep.write({"a": {}, "b": {"router": "unknown"}})
    with pytest.raises(ConfigError, match="ValueError: no such router"):
        sweep.run()
    assert not sweep.ran and not (sweep.root / "sweep.json").exists()


def test_a_changed_sweep_is_refused_with_the_difference(sweep):
    sweep.write({"a": {}, "b": {"x": 1}})
    sweep.run()
    sweep.write({"a": {}, "b": {"x": 2}})
    with pytest.raises(SweepMismatchError) as caught:
        sweep.run()
    assert "arms.b.router x 1 -> 2 (4 of 4 cells done)" in str(caught.value)
    assert f"Use --out {sweep.root}2" in str(caught.value)


def test_more_arms_and_seeds_only_add_cells(sweep):
    sweep.write({"a": {}}, seeds=[0])
    sweep.run()
    sweep.write({"a": {}, "b": {}}, seeds=[0, 1], timeout=50)
    assert len(sweep.run()) == 4 and set(sweep.ran.values()) == {1}


def test_changed_code_and_data_are_named(sweep):
    sweep.write({"a": {}}, seeds=[0])
    sweep.run()
    sweep.cell.write_text(CELL.replace('"a.py": "1"', '"a.py": "2"').replace(': "d"', ': "e"'))
    with pytest.raises(SweepMismatchError, match=r"data sha256 d -> e; code.moetk a.py 1 -> 2"):
        sweep.run()


def test_a_second_runner_is_turned_away(sweep, monkeypatch):
    monkeypatch.setattr(store, "FileLock", partial(FileLock, patience=0.1))
    sweep.write({"a": {}}, seeds=[0])
    sweep.root.mkdir()
    lock = FileLock(sweep.root / "lock")
    try:
        with pytest.raises(SweepLockedError, match=f"written by process {os.getpid()}"):
            sweep.run()
    finally:
        lock.release()
    assert sweep.run()


def test_a_result_renamed_before_its_row_was_written_is_adopted(sweep):
    sweep.write({"a": {}, "b": {}})
    rows = sweep.run()
    path = sweep.root / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:-9])  # the third is torn, the fourth is lost
    assert sweep.run() == rows and set(sweep.ran.values()) == {1}
    assert path.with_name("results.jsonl.quarantine").exists()


def test_a_foreign_or_damaged_cell_is_not_adopted(sweep):
    sweep.write({"a": {}})
    first, second = sweep.run()
    (sweep.root / "results.jsonl").unlink()
    path = sweep.root / "cells" / first["key"] / "row.json"
    path.write_bytes((sweep.root / "cells" / second["key"] / "row.json").read_bytes())
    with pytest.raises(ShardCorruptError, match="belongs to another cell"):
        sweep.run()
    path.write_bytes(b"{}")
    with pytest.raises(ShardCorruptError, match="carries no sha256"):
        sweep.run()


def test_kill_9_in_the_middle_then_resume(sweep):
    path = sweep.write({"a": {"sleep": 0.1}, "b": {"sleep": 0.6}, "c": {"sleep": 1}})
    runner = sweep.start(path)
    results_file = sweep.root / "results.jsonl"
    deadline = time.monotonic() + 60
    while not (results_file.exists() and results_file.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline and runner.poll() is None
        time.sleep(0.01)
    runner.send_signal(signal.SIGKILL)
    runner.wait()

    # Its children notice, let the lock go, and write nothing any more.
    FileLock(sweep.root / "lock").release()
    kept = results_file.read_bytes()
    finished = set(os.listdir(sweep.root / "cells"))
    before = sweep.ran
    time.sleep(1.5)
    assert set(os.listdir(sweep.root / "cells")) == finished and len(finished) < 6

    rows = sweep.run()
    assert results_file.read_bytes().startswith(kept)
    again = sweep.ran - before
    done = {f"{row['arm']}/{row['seed']}" for row in rows if row["key"] in finished}
    assert not done & set(again) and set(again) | done == {
        f"{x}/{s}" for x in "abc" for s in (0, 1)
    }
    assert set(again.values()) == {1}
    assert len(results_file.read_bytes().splitlines()) == 6


def test_ctrl_c_kills_the_cells_and_keeps_what_is_done(sweep):
    class Impatient(Silent):
        def finish(self, cell, row):
            raise KeyboardInterrupt

    sweep.write({"a": {"sleep": 0.1}, "b": {"sleep": 60}}, seeds=[0])
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sweep.run(watch=Impatient())
    assert time.monotonic() - started < 30
    FileLock(sweep.root / "lock", patience=2).release()
    assert statuses(read_sweep(sweep.root)[1]) == {("a", 0): "ok"}
