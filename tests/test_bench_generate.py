"""The bench of generation, end to end on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moetk.bench.generate import measure_generate
from moetk.bench.report import generate_rows, generate_table
from moetk.bench.rows import read_rows
from moetk.bench.step import StepContender, step_contenders
from tests.test_bench_command import TINY, bench
from tests.test_bench_step import METER, SHAPE, printed

__all__ = ["bench"]


def test_contenders_generate_from_the_same_weights() -> None:
    def raises(model: Any) -> None:
        raise RuntimeError("no such kernel")

    def other(model: Any) -> None:
        model.lm_head.weight.data.neg_()

    known = step_contenders()
    contenders = [
        known["v5"],
        known["moetk"],
        StepContender("broken", raises),
        StepContender("other", other),
    ]
    settings = {"new_tokens": 6, "rounds": 2, "dtype": torch.float32}
    results = measure_generate(SHAPE, contenders, METER, **settings)
    v5, moetk, broken, negated = results
    assert [len(one.times) for one in results] == [2, 2, 0, 2]
    assert v5.same == 1 and moetk.same == 1 and negated.same is not None and negated.same < 1
    assert "Local" in moetk.about and broken.error == "RuntimeError: no such kernel"
    rows = generate_rows(results, "words", 6)
    time = next(row for row in rows if row.what == "generate" and row.who == "moetk")
    assert time.value is not None and time.p20 is not None and time.p80 is not None
    assert 6 * time.p20 <= max(moetk.times) and 6 * time.p80 >= min(moetk.times)
    assert [row.who for row in rows if row.what == "generate ratio"] == ["v5", "moetk", "other"]
    table = printed(generate_table(results, "words", 6))
    assert "broken: RuntimeError: no such kernel" in table and "100.0%" in table


def test_a_baseline_that_raises_leaves_no_ratio() -> None:
    def raises(model: Any) -> None:
        raise RuntimeError("gone")

    contenders = [StepContender("v5", raises), step_contenders()["moetk"]]
    settings = {"new_tokens": 2, "rounds": 1, "dtype": torch.float32}
    results = measure_generate(SHAPE, contenders, METER, **settings)
    rows = generate_rows(results, "words", 2)
    assert results[1].same is None and not any(row.what == "generate ratio" for row in rows)
    assert "v5: RuntimeError: gone" in printed(generate_table(results, "words", 2))


def test_without_any_model_the_reasons_are_told() -> None:
    def raises(model: Any) -> None:
        raise RuntimeError("gone")

    settings = {"new_tokens": 2, "rounds": 1, "dtype": torch.float32}
    shape = replace(SHAPE, changes={**SHAPE.changes, "num_attention_heads": 0})
    (result,) = measure_generate(shape, [StepContender("v5", raises)], METER, **settings)
    assert result.error is not None and not result.times


def test_the_command(bench: Any, tmp_path: Path) -> None:
    words = [*TINY[:4], *TINY[6:], "--device", "cpu", "--out", tmp_path, "--rounds", 1]
    words += ["--cache", "static"]
    code, out, _ = bench("generate", *words, "--prompt", 4, "--new-tokens", 2)
    assert code == 0 and "equal tokens" in out and "Local" in out, out
    rows = read_rows(tmp_path / "generate.csv")
    assert {row.who for row in rows} == {
        "v5",
        "moetk",
        "moetk-eager",
        "moetk-step",
        "moetk-step-eager",
    }
    assert all("new=2" in row.shape and "cache=static" in row.shape for row in rows)
