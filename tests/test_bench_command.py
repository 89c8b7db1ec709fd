"""`moetk bench`: what it prints, writes and returns."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moetk import cli
from moetk.bench.contenders import (
    stock,
)
from moetk.bench.rows import read_rows
from tests.test_bench_layer import built
from tests.test_bench_rows import Tile, TwoTiles

SMALL = ["--shapes", "H=32 I=16 E=4 K=2", "--tokens", "64", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `moetk bench ...`; returns (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moetk", "bench", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return call


def test_the_command(bench: Any, tmp_path: Path) -> None:
    words = [*SMALL, "--contenders", "v5,moetk-auto,te", "--rounds", 2, "--out", tmp_path / "o"]
    code, out, _ = bench(
        "layer", *words, "--profile", "--figures", "--grads", "fresh", "--one-thread"
    )
    assert code == 0, out
    assert "grads=fresh dtype=float32 launch=one-thread: largest load" in out
    assert "largest kernels of moetk-auto, eager" in out and "te: ModuleNotFoundError" in out
    rows = read_rows(tmp_path / "o/layer.csv")
    assert {"ceiling copy", "kernel", "layer forward", "routing largest load"} <= {
        row.what for row in rows
    }
    assert {row.launch for row in rows if row.what == "kernel"} == {"eager", "one-thread"}
    assert (tmp_path / "o/roofline.png").exists()
    assert (tmp_path / "o/tokens_own_balanced_fresh.png").exists()


def test_a_wrong_contender_is_exit_code_1(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def negate(block: Any) -> None:
        block.experts.down_proj.data.neg_()

    monkeypatch.setattr(
        "moetk.bench.contenders.contenders", lambda: {"v5": stock(), "changed": built(negate)}
    )
    code, out, _ = bench(
        "layer", *SMALL, "--contenders", "v5,changed", "--rounds", 1, "--out", tmp_path
    )
    assert code == 1 and "changed: WRONG" in out


def test_wrong_words_are_exit_code_2(bench: Any) -> None:
    code, _, err = bench("layer", *SMALL, "--contenders", "v6")
    assert code == 2 and err.startswith("ConfigError: contender 'v6' is not one of v5")
    code, _, err = bench("layer", *SMALL, "--captured")
    assert code == 2 and "device cpu has none" in err
    code, _, err = bench("layer", *SMALL, "--tune", "no_such_module:tiles")
    assert code == 2 and "names no tuner" in err


def test_tuning(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ModuleType("my_tiles")
    made.tuner = TwoTiles(Tile(128, 2.0), Tile(64, 1.5))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_tiles", made)
    code, out, _ = bench("layer", *SMALL, "--tune", "my_tiles:tuner", "--out", tmp_path)
    assert code == 0 and "up" in out
    text = (tmp_path / "tiles.csv").read_text()
    assert text.startswith("kernel,rows,ms,") and "\nup,64,1.5," in text


MODEL = (
    "hidden_size=32,moe_intermediate_size=16,intermediate_size=16,num_experts=4,"
    "num_experts_per_tok=2,num_attention_heads=2,num_key_value_heads=1,head_dim=16,vocab_size=96"
)
TINY = ["--layers", 1, "--batch", 2, "--length", 16, "--model", MODEL, "--dtype", "float32"]


def test_steps(bench: Any, tmp_path: Path) -> None:
    words = [*TINY, "--device", "cpu", "--steps", 2, "--out", tmp_path]
    code, out, _ = bench("step", *words, "--contenders", "v5,moetk", "--profile")
    assert code == 0, out
    assert "v5 again" in out and "largest kernels of moetk" in out and "Local" in out
    rows = read_rows(tmp_path / "step.csv")
    assert {row.who for row in rows} == {"v5", "moetk", "v5 again"}
    settings = "num_experts=4 ", "dtype=float32 attention=sdpa backend=auto"
    assert all(word in row.shape for row in rows for word in settings)
    assert {"device idle", "kernels in all"} <= {row.what for row in rows}
    assert "all kernels" in out


def test_loss_curves(bench: Any, tmp_path: Path) -> None:
    words = [*TINY, "--device", "cpu", "--out", tmp_path, "--contenders", "v5,v5-checkpointing"]
    code, out, _ = bench("step", *words, "--loss-curves", 3, 20)
    assert "loss of v5-checkpointing" in out
    (row,) = read_rows(tmp_path / "step.csv")
    assert row.what == "loss at step 20" and code == ("OUTSIDE" in row.note)
    assert bench("step", *words, "--loss-curves", 2, 20)[0] == 2


@pytest.mark.parametrize("name", ["layer", "step", "generate"])
def test_scripts_are_the_command(name: str) -> None:
    root = Path(cli.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, root / f"scripts/bench_{name}.py", "--help"],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--contenders" in done.stdout, done.stderr


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, moetk.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
