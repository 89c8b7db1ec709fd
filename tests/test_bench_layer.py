"""The bench of a layer, end to end on the CPU: who is right, who drops out, what is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from moetk.bench.agreement import clear_choices, errors_of, truth_of, truth_that_fits, verdict
from moetk.bench.contenders import (
    Contender,
    block_of,
    ours,
    peer,
    stock,
    stock_model,
)
from moetk.bench.layer import LayerCase, LayerReport, measure_layer, profile_layer
from moetk.bench.loads import LOADS
from moetk.bench.meter import HostMeter, Phases
from moetk.bench.race import Racer, race
from moetk.bench.report import layer_rows, layer_table
from moetk.bench.shapes import LayerShape

CPU = torch.device("cpu")
METER = HostMeter(CPU)
SHAPE = LayerShape("own", 32, 16, 4, 2)


def case(**changes: Any) -> LayerCase:
    settings: dict[str, Any] = {"tokens": 64, "dtype": torch.float32}
    return LayerCase(SHAPE, **{**settings, **changes})


def model(dtype: torch.dtype = torch.float32, shape: LayerShape = SHAPE) -> Any:
    return stock_model(shape, CPU, dtype, seed=0)


def tokens(count: int = 64, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TH, dy_TH = torch.randn(2, count, SHAPE.hidden_size, generator=generator).unbind()
    return x_TH, dy_TH


def printed(report: LayerReport) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(layer_table(report))
    return captured.get()


def built(change: Callable[[Any], None]) -> Contender:
    """transformers' block with a change."""

    def build(stocked: Any) -> nn.Module:
        block = copy.deepcopy(block_of(stocked))
        change(block)
        return block  # type: ignore[no-any-return]

    return Contender("changed", build)


def test_the_truth_is_transformers_block_in_fp64() -> None:
    """transformers casts its softmax to fp32 in a double model too, hence the bound."""
    block, (x_TH, dy_TH) = block_of(model(torch.float64)), (t.double() for t in tokens())
    truth = truth_of(block, x_TH, dy_TH)
    assert truth.rows_T.all() and truth.border_share == 0
    x = x_TH[None].clone().requires_grad_()
    eager = stock("eager").build(model(torch.float64))
    eager(x).backward(dy_TH[None])
    for mine, true in [
        (x.grad, truth.dx_TH[None]),
        *((p.grad, truth.gradients[name]) for name, p in eager.named_parameters()),
    ]:
        assert mine is not None
        assert torch.allclose(mine, true, rtol=1e-5, atol=1e-7)
    x.grad = None
    eager.zero_grad()

    def step() -> Tensor:
        y: Tensor = eager(x)
        y.backward(dy)
        return y.detach()

    dy = dy_TH[None].clone()
    assert max(errors_of(eager, x, dy, step, truth).values()) < 1e-6
    assert torch.equal(dy[0], dy_TH)
    # Fewer tokens in the truth: the others' gradients are left out, and their values not looked at.
    part = truth_of(block, x_TH[:40], dy_TH[:40])
    x.data[:, 40:] += 1
    assert max(errors_of(eager, x, dy, step, part).values()) < 1e-6
    assert not any(leaf.grad.any() for leaf in (x, *eager.parameters()) if leaf.grad is not None)


def test_tied_and_nearly_tied_choices_are_not_clear() -> None:
    logits_TE = torch.tensor(
        [[3.0, 2.0, 1.0], [3.0, 2.0, 2.0], [2.0, 2.0, 1.0], [3.0, 2.0, 1.9999]]
    )
    assert clear_choices(logits_TE, 2).tolist() == [True, False, True, True]
    assert clear_choices(logits_TE.bfloat16(), 2).tolist() == [True, False, True, False]
    assert clear_choices(logits_TE, 3).all()
    assert clear_choices(logits_TE[:0], 2).tolist() == []


def test_a_truth_that_does_not_fit_takes_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def small_gpu(block: Any, x_TH: Tensor, dy_TH: Tensor) -> int:
        sizes.append(len(x_TH))
        if len(x_TH) > 16:
            raise torch.OutOfMemoryError("64 GiB")
        return len(dy_TH)

    monkeypatch.setattr("moetk.bench.agreement.truth_of", small_gpu)
    assert truth_that_fits(None, *tokens(), METER) == 16 and sizes == [64, 32, 16]
    monkeypatch.setattr("moetk.bench.agreement.truth_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        truth_that_fits(None, *tokens(), METER)


def test_verdicts() -> None:
    def judge(y: float, dtype: torch.dtype = torch.bfloat16) -> str | None:
        return verdict({"y": y, "dx": 1e-3}, {"y": 1e-3, "dx": 1e-3}, dtype, 64)

    assert judge(2e-3) is None
    assert judge(2.1e-3) == "WRONG: y has error 0.0021, the baseline 0.001; allowed 0.002"
    assert judge(float("nan")) == "WRONG: y has error nan, the baseline 0.001; allowed 0.002"
    assert verdict({"y": 9e-7}, {"y": 0.0}, torch.float32, 64) is None  # rounding of 64 terms
    assert verdict({"y": 2e-6}, {"y": 0.0}, torch.float32, 64) is not None


def test_narrow_operands_have_a_bound_of_their_own() -> None:
    def judge(y: float, baseline: float = 5e-3) -> str | None:
        errors, of_stock = {"y": y}, {"y": baseline}
        return verdict(errors, of_stock, torch.bfloat16, 64, torch.float8_e4m3fn)

    assert judge(9.4e-2) is None  # the largest error of right products
    assert judge(0.13) == "WRONG: y has error 0.13, the baseline 0.005; allowed 0.12"
    assert judge(0.13, baseline=0.07) is None
    assert verdict({"y": 0.02}, {"y": 5e-3}, torch.bfloat16, 64) is not None
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    rounded = (x.to(torch.float8_e4m3fn).float() - x).norm() / x.norm()
    assert 0.02 < rounded < 0.03  # one rounding; what is allowed is that of some twenty operands


def test_who_raises_drops_out_and_the_others_go_on() -> None:
    order: list[str] = []

    def falls() -> None:
        order.append("b")
        if order.count("b") == 5:
            raise RuntimeError("two\nlines")

    racers = [
        Racer("a", lambda: order.append("a"), lambda: order.append("before")),
        Racer("b", falls, lambda: None),
    ]
    race(racers, rounds=4, meter=METER)
    assert len(racers[0].times) == 4 and racers[0].error is None
    assert racers[1].error == "RuntimeError: two lines"
    assert "".join(name[0] for name in order if name != "before") == "abababababaa"
    assert order.count("before") == 7


@pytest.mark.parametrize("routing", LOADS)
@pytest.mark.parametrize("grads", ["accumulate", "fresh"])
def test_a_layer_end_to_end(routing: str, grads: str) -> None:
    mine = [stock(), ours("grouped"), ours("reference"), peer("liger")]
    report = measure_layer(case(routing=routing, grads=grads), mine, METER, rounds=3)
    assert report.checked == 64 and sum(report.rates_E) == pytest.approx(2)
    *right, missing = report.results
    for result in right:
        assert result.error is None and result.wrong is None
        assert len(result.forward) == len(result.both) == 3
        assert set(result.errors) == {
            "y", "dx", "dgate.weight", "dexperts.gate_up_proj", "dexperts.down_proj"
        }  # fmt: skip
        assert max(result.errors.values()) < 1e-6
    assert missing.error == "ModuleNotFoundError: No module named 'liger_kernel'"

    rows = layer_rows(report)
    of_stock = {row.what: row for row in rows if row.who == "v5"}
    assert of_stock["layer forward+backward ratio"].value == 1
    assert f"routing={routing} grads={grads} dtype=float32" in of_stock["layer forward"].shape
    liger = [row for row in rows if row.who == "liger"]
    assert [row.value for row in liger] == [None] and "No module" in liger[0].note
    assert not any(row.what in ("layer saved", "layer peak") for row in rows)  # a CPU
    text = printed(report)
    assert "moetk-grouped" in text and "liger: ModuleNotFoundError" in text


def test_a_wrong_contender_is_called_wrong() -> None:
    def shrink(block: Any) -> None:
        block.experts.down_proj.data *= 1.001

    def poison(block: Any) -> None:
        block.experts.down_proj.data[0, 0, 0] = float("nan")

    for change in (shrink, poison):
        report = measure_layer(case(), [stock(), built(change)], METER, rounds=1)
        assert report.results[0].wrong is None
        assert str(report.results[1].wrong).startswith("WRONG: ")
        assert all(row.note for row in layer_rows(report) if row.who == "changed")
        assert "changed: WRONG" in printed(report)


def test_nobody_is_right_beside_a_baseline_that_failed() -> None:
    def leave_out(block: Any) -> None:
        raise RuntimeError("not installed")

    report = measure_layer(case(), [built(leave_out), stock()], METER, rounds=1)
    assert report.results[0].error == "RuntimeError: not installed"
    assert report.results[1].error is None and len(report.results[1].both) == 1
    assert report.results[1].wrong == "WRONG or not: changed failed, nothing to hold it to"
    alone = measure_layer(case(), [built(leave_out)], METER, rounds=1)
    assert "changed: RuntimeError: not installed" in printed(alone)


def test_gradients_accumulate_or_are_fresh() -> None:
    """After n steps with the same dy the gate's gradient is n-fold, or the last step's."""
    kept: list[Any] = []
    for grads in ("accumulate", "fresh"):
        measure_layer(case(grads=grads), [stock(), built(kept.append)], METER, rounds=2)
    accumulated, fresh = (block.gate.weight.grad for block in kept)
    assert torch.allclose(accumulated, 5 * fresh, rtol=1e-4, atol=1e-6)


class ScriptedMeter(HostMeter):
    """An allocator with a script: 100 bytes before, 160 after forward, peaks of 170 and 400."""

    has_memory = True

    def __init__(self) -> None:
        super().__init__(CPU)
        self.held, self.tops = iter([100, 160]), iter([170, 400])

    def allocated(self) -> int:
        return next(self.held)

    def peak(self) -> int:
        return next(self.tops)


def test_memory_is_over_parameters_and_gradients() -> None:
    accumulate = measure_layer(case(), [stock()], ScriptedMeter(), 1).results[0]
    assert (accumulate.saved, accumulate.peak) == (60, 300)
    assert accumulate.peak_phase == "backward"
    # Fresh gradients are made in backward; they are no part of the peak over them.
    fresh = measure_layer(case(grads="fresh"), [stock()], ScriptedMeter(), 1).results[0]
    made = 4 * (sum(p.numel() for p in block_of(model()).parameters()) + 64 * 32)
    assert made > 400
    assert (fresh.saved, fresh.peak, fresh.peak_phase) == (60, 70, "forward")


def test_phases_keep_their_largest_moment() -> None:
    meter = ScriptedMeter()
    meter.tops = iter([5, 9, 7])
    phases = Phases(meter)
    for name in ("forward", "backward", "forward"):
        phases.enter(name)
    phases.leave()
    phases.leave()
    assert phases.peaks == {"forward": 7, "backward": 9} and phases.largest() == ("backward", 9)


def test_the_profile_of_a_layer() -> None:
    found = profile_layer(case(), ours("reference"), METER)
    assert "aten::mm" in {kernel.name for kernel in found.kernels}
