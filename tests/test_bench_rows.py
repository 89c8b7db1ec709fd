"""What a bench writes down: spreads, rows and their world, tiles, figures."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from moetk.bench.ceilings import COPY, DENSE, ceilings
from moetk.bench.figures import _looks, against_tokens, roofline, write_figures
from moetk.bench.meter import HostMeter, meter_for, spread
from moetk.bench.profile import Kernel, Profile, gaps, largest_kernels
from moetk.bench.report import kernel_rows, kernel_table, ratios
from moetk.bench.rows import COLUMNS, Row, World, append_rows, read_rows
from moetk.bench.shapes import LAYERS, LayerShape, config_changes, dtype_named, layer_shape
from moetk.bench.tune import load_tuner, tune, write_choices
from moetk.errors import ConfigError

PNG = b"\x89PNG"
METER = HostMeter(torch.device("cpu"))


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30))
@settings(max_examples=30)
def test_a_spread_is_in_order_and_within_the_values(values: list[float]) -> None:
    found = spread(values)
    inside = [min(values), found.low, found.median, found.high, max(values)]
    assert all(a <= b * (1 + 1e-12) for a, b in zip(inside, inside[1:], strict=False))


def test_a_spread_of_eleven() -> None:
    found = spread([float(value) for value in range(11)])
    assert (found.median, found.low, found.high) == (5, 2, 8)


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that slows down threefold in the middle changes no ratio."""
    found = ratios([2.0, 6.0, 2.0], [1.0, 3.0, 1.0])
    assert (found.median, found.low, found.high) == (2, 2, 2)


def world(**changes: Any) -> World:
    return World(**{**vars(World.here(METER, "moetk bench", 3)), **changes})


def test_rows_carry_their_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETK_COMMIT", "abc1234")
    path = tmp_path / "new" / "layer.csv"
    rows = [
        Row("layer forward", "v5", "T=4", 1.5, "ms", 1.25, 1.75),
        Row(
            "layer forward", "liger", "T=4", None, "ms", None, None, "error: no\nmodule", "captured"
        ),
    ]
    append_rows(path, rows[:1], World.here(METER, "moetk bench", 3))
    append_rows(path, rows[1:], World.here(METER, "moetk bench", 3))
    assert read_rows(path) == [
        rows[0],
        replace(rows[1], note="error: no module"),
    ]
    with path.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert tuple(lines[0]) == COLUMNS and len(lines) == 2
    assert lines[1]["value"] == lines[1]["p20"] == ""
    assert (lines[0]["commit"], lines[0]["seed"], lines[0]["gpu"]) == ("abc1234", "3", "none")
    assert f"torch {torch.__version__}" in lines[0]["versions"]


def test_the_commit_is_gits_where_nothing_else_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETK_COMMIT", raising=False)
    told = World.here(METER, "", 0).commit
    assert told == "unknown" or int(told, 16) >= 0


def test_a_file_with_other_columns_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "layer.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"layer\.csv has other columns \(a,b\); name another"):
        append_rows(path, [Row("x", "y", "", 1.0, "ms")], world())
    assert path.read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize("name", LAYERS)
def test_work_of_a_layer(name: str) -> None:
    """18 T K H I with backward, and the bytes of each tensor written out."""
    shape = layer_shape(name)
    rows, inner = 16384 * shape.top_k, shape.intermediate_size
    products = [(2 * inner, shape.hidden_size), (shape.hidden_size, inner)]
    assert shape.flops(16384) == sum(2 * rows * n * k for n, k in products)
    weights = sum(shape.num_experts * n * k for n, k in products)
    x, h = 16384 * shape.hidden_size, rows * 2 * inner
    assert shape.traffic(16384, 2) == 2 * (3 * weights + 5 * x + 2 * h)


def test_a_shape_of_ones_own() -> None:
    assert layer_shape("H=32 I=16 E=4 K=2") == LayerShape("own", 32, 16, 4, 2)
    for wrong in ("qwen", "H=32 I=16 E=4", "H=32 I=16 E=4 K=two"):
        with pytest.raises(ConfigError, match=f"'{wrong}' is no layer's shape: one of qwen3-30b"):
            layer_shape(wrong)


def test_settings_of_a_model() -> None:
    found = config_changes("num_experts=4,norm_topk_prob=false,hidden_act=silu")
    assert found == {"num_experts": 4, "norm_topk_prob": False, "hidden_act": "silu"}
    assert config_changes("") == {}
    with pytest.raises(ConfigError, match="'4' is no setting of the model: write name=value"):
        config_changes("4")


def test_dtypes_by_name() -> None:
    assert dtype_named("bfloat16") is torch.bfloat16
    for wrong in ("int64", "nn", "half_of_it"):
        with pytest.raises(ConfigError, match=f"dtype '{wrong}' is none of"):
            dtype_named(wrong)


@dataclass(frozen=True)
class Tile:
    rows: int
    ms: float

    def row(self) -> dict[str, int]:
        return {"rows": self.rows}


class TwoTiles:
    """Tiles with known times; `rows=0` does not run."""

    kernels = ("up", "down")

    def __init__(self, *tiles: Tile) -> None:
        self.tiles = tiles
        self.timed: list[int] = []

    def candidates(self, kernel: str, shape: LayerShape, tokens: int) -> tuple[Tile, ...]:
        return self.tiles

    def time(self, candidate: Tile) -> float:
        self.timed.append(candidate.rows)
        if candidate.rows == 0:
            raise RuntimeError("out of shared memory")
        return candidate.ms


SHAPE = LayerShape("own", 32, 16, 4, 2)


def test_the_fastest_tile_is_written(tmp_path: Path) -> None:
    tuner = TwoTiles(Tile(128, 2.0), Tile(0, 0.1), Tile(64, 1.5))
    choices = tune(tuner, SHAPE, 64, rounds=3)
    assert [(c.kernel, c.settings, c.milliseconds.median) for c in choices] == [
        ("up", {"rows": 64}, 1.5),
        ("down", {"rows": 64}, 1.5),
    ]
    assert all(choice.runner_up == 2.0 and choice.failed == 1 for choice in choices)
    assert tuner.timed[:7] == [128, 0, 64, 128, 64, 128, 64]  # in turn; who raised is out
    write_choices(tmp_path / "tiles.csv", choices, world())
    write_choices(tmp_path / "tiles.csv", choices[:1], world())
    with (tmp_path / "tiles.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["kernel"] for line in lines] == ["up", "down", "up"]
    assert (lines[0]["rows"], lines[0]["ms"], lines[0]["runner_up_ms"]) == ("64", "1.5", "2")


def test_a_kernel_without_a_tile_that_runs() -> None:
    with pytest.raises(ConfigError, match="Kernel 'up' cannot be tuned here: .*out of shared"):
        tune(TwoTiles(Tile(0, 1.0)), SHAPE, 64)
    with pytest.raises(ConfigError, match="Kernel 'up' cannot be tuned here: it has no candid"):
        tune(TwoTiles(), SHAPE, 64)
    assert tune(TwoTiles(Tile(8, 1.0)), SHAPE, 64)[0].runner_up is None


def test_a_tuner_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_tuner", type(sys)("my_tuner"))
    sys.modules["my_tuner"].tiles = TwoTiles()  # type: ignore[attr-defined]
    assert load_tuner("my_tuner:tiles") is sys.modules["my_tuner"].tiles
    for wrong in ("my_tuner:other", "no_such_module:tiles", "my_tuner", ":tiles"):
        with pytest.raises(ConfigError, match=f"'{wrong}' names no tuner, as module:object would"):
            load_tuner(wrong)


def test_the_largest_kernels() -> None:
    a = torch.randn(64, 64)
    found = largest_kernels(lambda: (a @ a).sin(), METER)
    kernels = list(found.kernels)
    assert {"aten::mm", "aten::sin"} <= {kernel.name for kernel in kernels}
    assert math.isclose(sum(kernel.share for kernel in kernels), 1, abs_tol=1e-6)
    assert math.isclose(sum(kernel.milliseconds for kernel in kernels), found.total)
    assert kernels == sorted(kernels, key=lambda kernel: -kernel.milliseconds)
    assert 0 <= found.idle < found.span
    few = largest_kernels(lambda: (a @ a).sin(), METER, count=1)
    assert len(few.kernels) == 1 and few.total > few.kernels[0].milliseconds


def test_an_annotation_is_no_kernel() -> None:
    """torch wraps an optimizer's step in one; counted, its kernels would count twice."""
    a = torch.randn(64, 64)

    def call() -> None:
        with torch.profiler.record_function("Optimizer.step#Mine"):
            a @ a

    assert not any("Mine" in kernel.name for kernel in largest_kernels(call, METER).kernels)


def test_gaps() -> None:
    assert gaps([]) == (0, 0)
    assert gaps([(1, 2)]) == (1, 0)
    # One inside another, two that overlap, two that touch, out of order, and one gap of 3.
    assert gaps([(10, 12), (0, 4), (1, 2), (3, 6), (6, 7)]) == (12, 3)


def test_a_profile_in_rows_and_in_a_table() -> None:
    kernels = [Kernel("a[0]", 2, 3.0, 0.3), Kernel("b", 1, 2.0, 0.2)]
    found = Profile(kernels, total=10.0, span=12.0, idle=2.5)
    rows = kernel_rows(found, "v5", "T=4", "captured")
    assert [(row.what, row.value, row.unit) for row in rows] == [
        ("kernel", 3, "ms"), ("kernel", 2, "ms"), ("kernels in all", 10, "ms"),
        ("device idle", 2.5, "ms"),
    ]  # fmt: skip
    assert rows[0].note == "30.0%, 2 calls: a[0]" and "of 12 ms from the first" in rows[3].note
    assert {row.launch for row in rows} == {"captured"}
    console = Console(width=120)
    with console.capture() as captured:
        console.print(kernel_table(found, "v5"))
    lines = [" ".join(line.split()) for line in captured.get().splitlines()]
    assert "3.00 30.0% 2 a[0]" in lines
    assert "5.00 50.0% these 2" in lines and "10.00 100.0% all kernels" in lines
    assert "2.50 idle: of these, when none ran" in lines


def test_ceilings_of_a_cpu() -> None:
    dense, copy = ceilings(meter_for("cpu"), torch.float32, side=32, rounds=3)
    assert (dense.what, dense.unit, copy.what, copy.unit) == (DENSE, "TFLOP/s", COPY, "TB/s")
    assert dense.value is not None and dense.p20 is not None and dense.p80 is not None
    assert 0 < dense.p20 <= dense.value <= dense.p80


def layer_row(what: str, who: str, tokens: int, value: float | None, **changes: Any) -> Row:
    words = f"{SHAPE.words()} T={tokens} routing=balanced grads=fresh dtype=bfloat16"
    return Row(what, who, words, value, "ms", value, value, **changes)


def test_figures(tmp_path: Path) -> None:
    both = "layer forward+backward"
    rows = [layer_row(both, who, tokens, tokens / 64) for who in "ab" for tokens in (64, 128)]
    rows.append(layer_row("layer peak", "a", 64, 3.0))
    rows.append(layer_row(both, "c", 64, None, note="error: none"))
    drawn = against_tokens(rows)
    assert list(drawn) == ["tokens_own_balanced_fresh.png"]
    assert all(data.startswith(PNG) for data in drawn.values())
    assert roofline(rows, [SHAPE]) is None  # no ceilings
    rows += [Row(DENSE, "torch", "", 700.0, "TFLOP/s"), Row(COPY, "torch", "", 4.0, "TB/s")]
    written = write_figures(tmp_path / "new", rows, [SHAPE])
    assert [path.name for path in written] == ["tokens_own_balanced_fresh.png", "roofline.png"]
    assert all(path.read_bytes().startswith(PNG) for path in written)
    looks = _looks([*rows, replace(rows[0], launch="captured")])
    assert looks["a", "captured"]["label"] == "a, captured" and looks["a", "eager"]["label"] == "a"
    mine, other = looks["a", "captured"], looks["a", "eager"]
    assert mine["color"] == other["color"] and mine["ls"] != other["ls"]
    many = _looks([layer_row(both, str(n), 64, 1.0) for n in range(21)]).values()
    assert len({(look["color"], look["marker"]) for look in many}) == 21
    assert roofline(rows, []) is None  # none of the layers is known
    assert write_figures(tmp_path / "none", [rows[5]], [SHAPE]) == []  # only an error
