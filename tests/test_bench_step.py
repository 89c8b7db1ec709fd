"""The bench of a training step and of loss curves, end to end on the CPU."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from moetk.bench.curves import (
    Verdict,
    compare_curves,
    judge,
    learnable_tokens,
    loss_curve,
    middle_seed,
)
from moetk.bench.meter import HostMeter
from moetk.bench.race import WARM_UP
from moetk.bench.report import curve_rows, curve_table, step_rows, step_table
from moetk.bench.shapes import ModelShape
from moetk.bench.step import (
    StepContender,
    StepResult,
    as_it_is,
    compiled,
    in_fp8,
    measure_steps,
    profile_step,
    replaced,
    step_contenders,
    step_contenders_named,
    training,
)
from moetk.errors import ConfigError

METER = HostMeter(torch.device("cpu"))
SHAPE = ModelShape(
    layers=1,
    batch=2,
    length=16,
    changes={
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 96,
    },
)


def steps_of(contenders: list[StepContender], **changes: Any) -> list[StepResult]:
    settings = {"steps": 2, "dtype": torch.float32, **changes}
    return measure_steps(SHAPE, contenders, METER, **settings)


def printed(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_libraries_are_loaded_before_anybodys_step(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def prepare(model: Any) -> None:
        order.append("prepare")

    monkeypatch.setattr("moetk.bench.step.import_module", order.append)
    late = StepContender("late", prepare, library="a.library")
    steps_of([StepContender("v5", prepare), late, late], steps=1)
    assert order == ["a.library", *["prepare"] * 4]
    monkeypatch.undo()
    [_, missing, _] = steps_of([StepContender("v5", as_it_is), late], steps=1)
    assert missing.error is None  # a library that is not there is its contender's to miss


def test_the_default_is_eight_layers_of_qwen3() -> None:
    config = ModelShape().config()
    assert (config.num_hidden_layers, config.num_experts, config.hidden_size) == (8, 128, 2048)
    assert ModelShape().tokens == 16384
    assert ModelShape(changes={"num_experts": 4}).config().num_experts == 4
    assert ModelShape(2, 1, 8, {"num_experts": 4}).words() == (
        "layers=2 batch=1 length=8 num_experts=4"
    )


def test_contenders_train_the_same_model() -> None:
    results = steps_of(step_contenders_named("v5,v5-checkpointing,moetk,moetk-step"))
    assert [result.name for result in results] == [
        "v5",
        "v5-checkpointing",
        "moetk",
        "moetk-step",
        "v5 again",
    ]
    for result in results:
        assert result.error is None and len(result.seconds) == len(result.losses) == 2
        assert result.losses == pytest.approx(results[0].losses, rel=1e-5)
        assert result.peak is None  # a CPU does not tell
    assert results[0].losses[1] < results[0].losses[0]
    assert "Local" in results[2].about and not results[0].about
    assert results[3].about.startswith(results[2].about) and results[3].about != results[2].about


def test_who_raises_says_so_and_the_others_go_on() -> None:
    def broken(model: Any) -> None:
        raise RuntimeError("no such\nkernel")

    results = steps_of([step_contenders()["v5"], StepContender("broken", broken)])
    assert [result.error for result in results] == [None, "RuntimeError: no such kernel", None]
    rows = step_rows(SHAPE, results, "words")
    told = [row for row in rows if row.who == "broken"]
    assert [(row.value, row.note) for row in told] == [
        (None, "error: RuntimeError: no such kernel")
    ]
    ratio = next(row for row in rows if row.what == "step ratio" and row.who == "v5")
    assert ratio.value == 1 and ratio.unit == "of v5"
    again = {row.what for row in rows if row.who == "v5 again"}
    assert {"step", "step ratio", "step throughput", "step loss"} <= again
    assert "broken: RuntimeError: no such kernel" in printed(step_table(SHAPE, results, "words"))


def test_a_baseline_that_raises_leaves_no_ratio() -> None:
    results = [StepResult("v5", error="gone"), StepResult("moetk", [1.0], [2.0])]
    rows = step_rows(SHAPE, results, "words")
    assert not any(row.what == "step ratio" for row in rows)
    assert "v5: gone" in printed(step_table(SHAPE, results, "words"))


class CountingMeter(HostMeter):
    """Every phase has a larger peak than the one before, up to the optimizer's."""

    has_memory = True

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.resets = 0

    def reset_peak(self) -> None:
        self.resets += 1

    def peak(self) -> int:
        return (self.resets - 1) % 4 * 2**30


def test_peaks_have_phases() -> None:
    meter = CountingMeter()
    results = measure_steps(
        SHAPE, [StepContender("v5", as_it_is)], meter, steps=2, dtype=torch.float32
    )
    gib = {phase: peak / 2**30 for phase, peak in results[0].peaks.items()}
    assert gib == {"forward": 0, "loss": 1, "backward": 2, "optimizer": 3}
    assert results[0].peak == ("optimizer", 3 * 2**30)
    rows = {row.what: row for row in step_rows(SHAPE, results[:1], "words")}
    assert rows["step peak"].value == 3 and rows["step peak"].note == "in optimizer"
    assert rows["step peak in loss"].value == 1
    assert "3.0 in optimizer" in printed(step_table(SHAPE, results, "words"))


def test_a_contenders_memory_is_free_before_the_next() -> None:
    alive: list[weakref.ref[Any]] = []

    def watched(model: Any) -> None:
        assert not any(reference() for reference in alive)
        alive.append(weakref.ref(model))

    steps_of([StepContender("a", watched), StepContender("b", watched)])
    for seed in range(2):
        loss_curve(SHAPE, StepContender("c", watched), METER, seed, 1, torch.float32)
    gc.collect()
    assert len(alive) == 5 and not any(reference() for reference in alive)


def test_what_ran_is_told_by_the_contender() -> None:
    class Told:
        def explain(self) -> str:
            return "norms: fused"

    contender = StepContender("told", lambda model: Told())
    with training(SHAPE, contender, METER, dtype=torch.float32) as run:
        assert run.about() == "norms: fused"


def test_layers_compiled_by_instance() -> None:
    """With a backend that runs the traced graphs as they are: what inductor makes of them is
    torch's own business."""
    run = [
        StepContender("v5", as_it_is),
        StepContender("v5-compiled", compiled(as_it_is, backend="eager")),
        StepContender("moetk-compiled", compiled(replaced("grouped"), backend="eager")),
    ]
    shape = replace(SHAPE, layers=2)
    results = measure_steps(shape, run, METER, steps=2, dtype=torch.float32)
    for result in results:
        assert result.error is None, result.error
        assert result.losses == pytest.approx(results[0].losses, rel=1e-5)
        assert result.first is not None and result.first > 0
    stock, compiled_stock, ours, again = results
    assert compiled_stock.about == "decoder layers compiled: 1 graphs, 0 graph breaks"
    assert "Local" in ours.about and "graphs, 0 graph breaks" in ours.about
    assert not stock.about and not again.about
    assert compiled_stock.first > stock.first  # type: ignore[operator]
    row = next(row for row in step_rows(shape, results, "") if row.who == "v5-compiled")
    assert row.what == "step" and row.note.startswith("the first one, not timed: ")


def test_the_profile_of_a_step() -> None:
    found = profile_step(SHAPE, step_contenders()["v5"], METER, dtype=torch.float32)
    assert "aten::mm" in {kernel.name for kernel in found.kernels}
    assert not any("AdamW.step" in kernel.name for kernel in found.kernels)  # an annotation
    assert found.idle < found.span


def test_an_unknown_contender() -> None:
    with pytest.raises(
        ConfigError, match="contender 'v6' is not one of v5, v5-checkpointing, v5-c"
    ):
        step_contenders_named("v5,v6")


def test_tokens_can_be_learnt() -> None:
    shape = ModelShape(1, 8, 512)
    token_ids = learnable_tokens(shape, 96, torch.Generator().manual_seed(0))
    assert token_ids.shape == (8, 512) and token_ids.dtype is torch.int64
    assert token_ids.min() >= 0 and token_ids.max() < 96
    follows = (token_ids[:, 1:] - token_ids[:, :-1]) % 96 == 1
    assert 0.47 < follows.double().mean() < 0.6
    again = learnable_tokens(shape, 96, torch.Generator().manual_seed(0))
    assert torch.equal(token_ids, again)


STOCK = {0: [3.0, 2.0, 1.0, 0.5], 1: [3.2, 2.4, 1.3, 0.7], 2: [3.5, 2.2, 1.2, 0.6]}


def test_verdicts_of_a_curve() -> None:
    found = judge(STOCK, 2, [9.0, 2.4, 9.0, 0.71], every=2)
    assert found == [Verdict(2, 2.4, 2.2, 2.0, 2.4), Verdict(4, 0.71, 0.6, 0.5, 0.7)]
    assert [verdict.ok for verdict in found] == [True, False]
    assert not Verdict(2, float("nan"), 2.0, 1.0, 3.0).ok


def test_the_middle_seed_keeps_off_the_edges() -> None:
    assert middle_seed(STOCK, every=2) == 2
    assert middle_seed({7: [1.0], 8: [3.0], 9: [2.0]}, every=1) == 9


def test_loss_curves_end_to_end() -> None:
    def dead(model: Any) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.model.embed_tokens.weight.requires_grad_(True).register_hook(torch.zeros_like)
        model.lm_head.weight.data.mul_(50)

    def broken(model: Any) -> None:
        raise RuntimeError("no such library")

    wanted = [
        *step_contenders_named("v5,moetk"),
        StepContender("broken", broken),
        StepContender("dead", dead),
    ]
    good, lost, bad = compare_curves(SHAPE, wanted, METER, range(3), 20, torch.float32)
    assert [verdict.step for verdict in good.verdicts] == [20]
    verdict = good.verdicts[0]
    assert verdict.loss == pytest.approx(verdict.twin, rel=1e-4)
    assert not lost.ok and not lost.verdicts  # the others are told all the same
    assert curve_rows(lost, "words")[0].note == "error: RuntimeError: no such library"
    assert "no such library" in printed(curve_table(lost))
    assert not bad.ok
    assert "OUTSIDE" in curve_rows(bad, "words")[0].note
    assert "outside" in printed(curve_table(bad)) and f"seed {bad.seed}" in printed(
        curve_table(bad)
    )
    for seeds, steps, message in [
        (range(2), 20, "2 seeds of the stock model; a range needs 3 or more"),
        (range(3), 19, "19 steps of a loss curve; 20 or more are judged"),
    ]:
        with pytest.raises(ConfigError, match=message):
            compare_curves(SHAPE, wanted, METER, seeds, steps, torch.float32)


def test_a_model_in_fp8_runs_within_the_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward alone, by the recipe that was named; the model is the same function."""
    inside: list[str] = []

    @contextmanager
    def autocast(enabled: bool, recipe: Any) -> Iterator[None]:
        assert enabled
        inside.append(recipe)
        yield
        inside.append("left")

    te = ModuleType("transformer_engine.pytorch")
    recipes = ModuleType("transformer_engine.common.recipe")
    common, above = ModuleType("transformer_engine.common"), ModuleType("transformer_engine")
    vars(te)["autocast"], vars(recipes)["Mine"] = autocast, lambda: "mine"
    vars(common)["recipe"], vars(above)["pytorch"] = recipes, te
    for made in (te, recipes, common, above):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setattr("moetk.bench.step.sped_up", lambda backend: as_it_is)
    stock, fp8, _ = steps_of(
        [StepContender("v5", as_it_is), StepContender("fp8", in_fp8("Mine"))], steps=1
    )
    assert fp8.error is None and fp8.losses == stock.losses
    assert inside == ["mine", "left"] * (WARM_UP + 1)
