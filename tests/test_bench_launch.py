"""How steps are launched. CUDA graphs are stood in for by a recording of torch's operators."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moetk.bench.contenders import ours, stock
from moetk.bench.launch import CAPTURED, EAGER, ONE_THREAD, Launch, launches
from moetk.bench.layer import measure_layer, profile_layer
from moetk.bench.report import layer_rows
from moetk.errors import ConfigError
from tests.driver import Driver
from tests.test_bench_layer import CPU, METER, ScriptedMeter, built, case, printed


def when(happens: Callable[[], bool], change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """A block whose output changes when something happens."""

    def give(block: Any) -> None:
        block.register_forward_hook(lambda _, __, y: change(y) if happens() else None)

    return give


@pytest.mark.parametrize("grads", ["accumulate", "fresh"])
def test_replays_are_checked_and_timed(driver: Driver, grads: str) -> None:
    mine = [stock(), ours("grouped")]
    report = measure_layer(case(grads=grads, launch=CAPTURED), mine, METER, rounds=2)
    for result in report.results:
        assert result.error is None and result.wrong is None
        assert len(result.errors) == 5 and max(result.errors.values()) < 1e-6
        assert len(result.forward) == len(result.both) == 2
    assert len(driver.pools) == len(set(driver.pools)) == 4  # forward, and forward with backward
    assert {row.launch for row in layer_rows(report)} == {"captured"}
    assert "dtype=float32 launch=captured: largest load" in printed(report)


def test_replays_add_to_the_gradients_that_are_there(driver: Driver) -> None:
    """Three replays and two that count add five times; fresh gradients are written anew."""
    kept: list[Any] = []
    for grads in ("accumulate", "fresh"):
        contenders = [stock(), built(kept.append)]
        measure_layer(case(grads=grads, launch=CAPTURED), contenders, METER, rounds=2)
    accumulated, fresh = (block.gate.weight.grad for block in kept)
    assert fresh.any()
    assert torch.allclose(accumulated, 5 * fresh, rtol=1e-4, atol=1e-6)


def test_a_replay_that_differs_from_the_eager_step_is_wrong(driver: Driver) -> None:
    changed = built(when(lambda: bool(driver.recording), lambda y: y * 1.01))
    report = measure_layer(case(), [stock(), changed], METER, rounds=1)
    assert report.results[1].wrong is None
    report = measure_layer(case(launch=CAPTURED), [stock(), changed], METER, rounds=1)
    assert str(report.results[1].wrong).startswith("WRONG: ")


@pytest.mark.parametrize("broken", [True, False], ids=["the capture breaks", "the call raises"])
@pytest.mark.parametrize("place", [0, 1])
def test_who_cannot_be_captured_says_why(driver: Driver, broken: bool, place: int) -> None:
    """As a baseline too; the others go on, held to what the eager baseline computes."""

    def waits(y: Tensor) -> Tensor:
        driver.broken = broken
        try:
            raise KeyError("what a library tries first")
        except KeyError:
            raise RuntimeError("operation not permitted when stream is capturing")  # noqa: B904

    mine = [ours("reference"), ours("grouped")]
    mine.insert(place, built(when(lambda: bool(driver.recording), waits)))
    results = measure_layer(case(launch=CAPTURED), mine, METER, rounds=1).results
    failed = results.pop(place)
    assert failed.error == "RuntimeError: operation not permitted when stream is capturing"
    assert not failed.both and not failed.errors
    for result in results:
        assert result.error is None and result.wrong is None
        assert len(result.both) == 1 and max(result.errors.values()) < 1e-6
    assert driver.stream == "default" and not driver.recording and not driver.generator_waits


def test_a_replay_allocates_nothing(driver: Driver) -> None:
    result = measure_layer(case(launch=CAPTURED), [stock()], ScriptedMeter(), 1).results[0]
    assert result.error is None and (result.saved, result.peak) == (None, None)


@pytest.mark.parametrize("launch", [EAGER, ONE_THREAD, CAPTURED])
def test_layers_are_free_when_they_are_measured(driver: Driver, launch: Launch) -> None:
    """At once: the next case's are built before anybody collects circles."""
    alive: list[weakref.ref[Any]] = []
    watched = built(lambda block: alive.append(weakref.ref(block)))
    gc.collect()
    gc.disable()
    try:
        measure_layer(case(launch=launch), [stock(), watched], METER, rounds=1)
        assert [reference() for reference in alive] == [None]
    finally:
        gc.enable()


def test_a_replay_has_a_profile(driver: Driver) -> None:
    found = profile_layer(case(launch=CAPTURED), stock(), METER)
    assert "aten::copy_" in {kernel.name for kernel in found.kernels}


def test_backward_in_the_calling_thread() -> None:
    seen: list[bool] = []

    def look(block: Any) -> None:
        def note(_: Tensor) -> None:
            seen.append(torch._C._is_multithreading_enabled())

        block.gate.weight.register_hook(note)

    for launch, expected in ((EAGER, True), (ONE_THREAD, False)):
        report = measure_layer(case(launch=launch), [stock(), built(look)], METER, rounds=1)
        assert [result.wrong for result in report.results] == [None, None]
        assert seen and set(seen) == {expected}
        assert {row.launch for row in layer_rows(report)} == {launch.name}
        seen.clear()
    assert torch._C._is_multithreading_enabled()


def test_launches_that_are_wanted() -> None:
    cuda = torch.device("cuda")
    assert launches(CPU, one_thread=False, captured=False) == [EAGER]
    every = launches(cuda, one_thread=True, captured=True)
    assert every == [EAGER, ONE_THREAD, CAPTURED]
    assert [launch.name for launch in every] == ["eager", "one-thread", "captured"]
    with pytest.raises(ConfigError, match="--captured records CUDA graphs; device cpu has none"):
        launches(CPU, one_thread=False, captured=True)
