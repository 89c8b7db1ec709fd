"""The command line: exit codes, one-line errors, and what is shown while a sweep runs."""

import io
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from rich.console import Console

from moetk import cli
from moetk.equivalence.watch import watched
from moetk.sweep import runner
from moetk.sweep.plan import Cell
from moetk.sweep.watch import Bars, Lines, watch_for
from tests.tiny import tiny

CELL = """
import sys
from moetk.sweep.child import serve

def describe(job):
    code = {"moetk": {"a.py": "1"}, "modules": {}, "versions": {"python": "3"}}
    places = {"mine": "where/mine.py"}
    return {"data": {"kind": "fake", "sha256": "d"}, "code": code, "places": places}

def run(job, send):
    settings, seed = job["settings"], job["seed"]
    if settings["arm"]["router"]["name"] == "bad":
        raise RuntimeError("broken [on] purpose")
    send({"step": settings["steps"], "steps": settings["steps"], "loss": 1.0})
    result = {"status": "ok", "initial_loss": 5.0, "final_loss": 2.0 + seed, "causal": True,
              "max_violation": 0.5, "train_max_violation": 0.25, "drop_fraction": 0.0,
              "held_out": [[0, 5.0], [2, 2.0 + seed]], "batch_max_violation": [0.5, 0.5],
              "load": {"steps": [1, 2], "layers": {"0": [[1, 2], [2, 1]]}}}
    return {"key": job["key"], "arm": settings["arm"]["name"], "seed": seed, "config": settings,
            "data": job["data"], "code": job["code"], "result": result,
            "run": {"seconds": 1.0, "date": "2026-01-01"}}

serve(describe, run)
"""
TOML = """
[sweep]
name = "toy"
seeds = [0, 1]
steps = 2
baseline = "a"
[[arm]]
name = "a"
router = "good"
[[arm]]
name = "b"
router = "ROUTER"
"""


@pytest.fixture
def moetk(tmp_path, monkeypatch, capfd):
    """Runs the console script's function; returns (exit code, stdout, stderr)."""
    (tmp_path / "cell.py").write_text(CELL)
    monkeypatch.chdir(tmp_path)
    command = (sys.executable, "-P", str(tmp_path / "cell.py"))
    monkeypatch.setattr(runner, "run_sweep", partial(runner.run_sweep, command=command))

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["moetk", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capfd.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return call


def test_a_sweep_and_its_report(moetk, tmp_path):
    (tmp_path / "toy.toml").write_text(TOML.replace("ROUTER", "mine:router"))
    code, out, _ = moetk("sweep", "toy.toml", "--workers", 2)
    assert code == 0, out
    assert f"Runs your code: mine:router; {tmp_path} is searched first." in out
    assert "Found mine in where/mine.py." in out and "0/4 cells done" in out
    assert "held-out loss 5.000 -> 2.000, MaxVio 0.25" in out
    assert out.splitlines()[-1] == "moetk report runs/toy"
    code, out, _ = moetk("sweep", "toy.toml")
    assert code == 0 and "4/4 cells done" in out

    code, out, _ = moetk("report", "runs/toy", "--csv", "cells.csv", "--out", "page.html")
    assert code == 0 and out.split() == ["page.html", "cells.csv"]
    assert (tmp_path / "cells.csv").read_text().count("\n") == 5
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert moetk("report", "runs/toy")[1].strip() == "runs/toy/report.html"


def test_cells_that_failed_are_exit_code_1(moetk, tmp_path):
    (tmp_path / "toy.toml").write_text(TOML.replace("ROUTER", "bad"))
    code, out, _ = moetk("sweep", "toy.toml", "--out", "there")
    assert code == 1 and "2 of 4 cells did not end well; --retry failed runs them again." in out
    assert "b/0 failed" in out and "RuntimeError: broken [on] purpose" in out
    code, out, _ = moetk("sweep", "toy.toml", "--out", "there", "--retry", "failed")
    assert code == 1 and "2/4 cells done" in out
    assert moetk("report", "there")[0] == 0


def test_errors_are_one_line(moetk, tmp_path):
    code, out, err = moetk("sweep", "none.toml")
    assert (code, out) == (2, "")
    assert err == "ConfigError: none.toml cannot be read: No such file or directory.\n"
    (tmp_path / "toy.toml").write_text(TOML)
    assert moetk("sweep", "toy.toml", "--limit-steps", 0)[::2] == (
        2,
        "ConfigError: --limit-steps 0; allowed: 1 or more.\n",
    )
    code, _, err = moetk("sweep", "toy.toml", "--out", "toy.toml")
    assert code == 1 and err.count("\n") == 1
    assert "toy.toml cannot be a sweep's folder (Not a directory)" in err
    assert moetk("report", "nowhere")[0] == 2
    assert moetk("sweep", "toy.toml", "--limit-steps", 1)[0] == 0
    code, _, err = moetk("sweep", "toy.toml")
    assert code == 1 and err.count("\n") == 1
    assert "SweepMismatchError: runs/toy was started from another sweep: sweep steps 1 -> 2" in err


def test_wrong_words_are_exit_code_2(moetk, tmp_path):
    (tmp_path / "toy.toml").write_text(TOML)
    for words in (["sweeep"], ["sweep"], ["sweep", "toy.toml", "--workers", "0"]):
        assert moetk(*words)[0] == 2
    code, _, err = moetk("sweep", "toy.toml", "--retry", "ok")
    assert code == 2 and "failed, timeout, diverged" in err


PARTS = """
import torch
import moetk
from moetk.routers import MixtralRouter

def layer(hidden_size=16, renormalise=True):
    torch.manual_seed(0)
    router = MixtralRouter(hidden_size, 4, 2, renormalise=renormalise)
    return moetk.MoELayer(router, moetk.ExpertBank(hidden_size, 4, 8))

def wrong():
    return layer(renormalise=False)

def wide():
    return layer(24)

def stages(x_TH):
    return {"logits": x_TH * 2}

def broken():
    raise RuntimeError("no [luck]")
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """The name of a module that lies in the current folder and nowhere else."""
    name = f"parts_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(PARTS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_equal_parts_are_exit_code_0(moetk, parts, tmp_path):
    code, out, err = moetk("compare", f"{parts}:layer", f"{parts}:layer", "--repro", "repro")
    assert code == 0 and "verdict   no stage differs" in out and err == ""
    assert not (tmp_path / "repro").exists()
    code, out, _ = moetk("compare", f"{parts}:stages", f"{parts}:stages", "--hidden-size", 8)
    assert code == 0 and "logits" in out and "64x8" in out


def test_parts_that_differ_are_exit_code_1_and_leave_a_page_and_a_test(moetk, parts, tmp_path):
    files = ("--out", "page.html", "--json", "found.json", "--repro", "repro")
    words = (f"{parts}:layer", f"{parts}:wrong", "--batch", 1, "--length", 12, "--seed", 3)
    code, out, _ = moetk("compare", *words, *files, "--dtype", "float64")
    assert code == 1 and "first     weights" in out and "12x16" in out and "fp64" in out
    page = (tmp_path / "page.html").read_text()
    assert f"moetk compare {parts}:layer {parts}:wrong --batch 1" in page
    assert json.loads((tmp_path / "found.json").read_text())["seed"] == 3
    assert f"from {parts} import wrong" in (tmp_path / "repro" / "test_repro.py").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere", "HERE:layer"), "ConfigError: nowhere is not a folder. Name a checkpoint's"),
        (("HERE:layer", "HERE:none"), "has no 'none'"),
        (("HERE:layer", "HERE:wide"), "a has hidden size 16, b has 24: no x fits both."),
        (("HERE:stages", "HERE:stages"), "give it by --hidden-size"),
        (("HERE:broken", "HERE:layer"), ":broken cannot be made: RuntimeError: no [luck]"),
        (("HERE:layer", "HERE:layer", "--dtype", "int4"), "one of float64, float32, bfloat16"),
        (("HERE:layer", "HERE:layer", "--text", "t"), "parts are compared on hidden states"),
    ],
)
def test_what_cannot_be_compared_is_exit_code_2(moetk, parts, words, message):
    code, out, err = moetk("compare", *(word.replace("HERE", parts) for word in words))
    assert code == 2 and out == ""
    assert message in " ".join(err.replace("│", "").split())


def test_two_checkpoints(moetk, tmp_path, monkeypatch):
    model = tiny("qwen3_moe")
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "b")
    tiny("qwen3_moe", num_hidden_layers=1).save_pretrained(tmp_path / "short")
    (tmp_path / "text").write_bytes(bytes(range(256)))
    monkeypatch.setattr(sys, "path", list(sys.path))

    words = ("--text", "text", "--batch", 2, "--length", 8)
    code, out, err = moetk("compare", "a", "b", *words, "--repro", "repro", "--out", "page.html")
    assert code == 1 and "layer     model.layers.1.mlp" in out and "compared  b against a" in out
    assert "Loading" not in err
    assert 'get_submodule("model.layers.1.mlp")' in (tmp_path / "repro/test_repro.py").read_text()
    assert "<title>b against a" in (tmp_path / "page.html").read_text()

    code, _, err = moetk("compare", "a", "short")
    assert code == 2 and "mixture-of-experts layers: 2 in a" in err and "1 in b" in err
    code, _, err = moetk("compare", "a", "b", "--text", "text", "--length", 999)
    assert code == 2 and "text has 256 bytes; 2 sequences of 999 need 1998" in err
    code, _, err = moetk("compare", "a", "b", "--text", "missing")
    assert code == 2 and "missing cannot be read (No such file or directory)" in err
    (tmp_path / "b" / "model.safetensors").write_bytes(b"short")
    code, _, err = moetk("compare", "a", "b")
    assert code == 2 and "b cannot be made: SafetensorError" in err


def test_a_model_and_a_part_are_not_compared(moetk, parts, tmp_path):
    tiny("qwen3_moe").save_pretrained(tmp_path / "a")
    code, _, err = moetk("compare", "a", f"{parts}:layer")
    assert code == 2 and "a is a model" in err and "is no model: compare two models" in err


def test_comparing_shows_a_bar_on_a_terminal_alone():
    for terminal in (True, False):
        out = io.StringIO()
        with watched(Console(file=out, width=80, force_terminal=terminal)) as progress:
            progress("model.layers.[0].mlp", 1, 3)
        assert ("model.layers.[0].mlp" in out.getvalue()) == terminal


def test_the_module_runs_without_torch_for_a_wrong_file(tmp_path):
    script = "import sys; from moetk import cli; sys.argv = ['moetk', 'sweep', 'x.toml']\n"
    script += "try: cli.main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr


def row(status="ok"):
    result = {"status": status, "initial_loss": 5.0, "final_loss": 2.0, "train_max_violation": 0.5}
    return {"result": {**result, "error": "why [not]"}, "run": {"seconds": 3.2}}


CELL_A = Cell("k", "a", 0, {})


def test_a_log_gets_a_line_every_ten_seconds(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("moetk.sweep.watch.time.monotonic", lambda: now[0])
    out = io.StringIO()
    watch = watch_for(Console(file=out, width=40))
    assert isinstance(watch, Lines)
    watch.begin(4, 1)
    for second in range(25):
        now[0] = 100.0 + second
        if second == 12:
            watch.step(CELL_A, {"step": 7, "steps": 9, "loss": 1.5})
        watch.tick()
    watch.finish(CELL_A, row())
    watch.finish(CELL_A, row("failed"))
    watch.end()
    assert out.getvalue().splitlines() == [
        "1/4 cells done",
        "1/4 cells done; running: starting",
        "1/4 cells done; running: a/0 step 7/9 loss 1.500",
        "2/4 a/0 held-out loss 5.000 -> 2.000, MaxVio 0.50, 3 s",
        "3/4 a/0 failed after 3 s: why [not]",
    ]


def test_a_terminal_gets_bars():
    out = io.StringIO()
    watch = watch_for(Console(file=out, width=120, force_terminal=True))
    assert isinstance(watch, Bars)
    watch.begin(2, 0)
    watch.step(CELL_A, {"step": 7, "steps": 9, "loss": 1.5})
    watch.tick()
    watch.progress.refresh()
    assert len(watch.progress.tasks) == 2
    watch.finish(CELL_A, row())
    watch.end()
    assert len(watch.progress.tasks) == 1 and "a/0" in out.getvalue() and "7/9" in out.getvalue()
    assert "held-out loss 5.000 -> 2.000" in out.getvalue()
