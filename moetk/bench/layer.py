"""One layer, forward and backward: contenders interleaved, on the same weights and tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from moetk.bench.agreement import Truth, errors_of, truth_that_fits, verdict
from moetk.bench.contenders import Contender, block_of, stock_model
from moetk.bench.loads import choice_rates, load_named
from moetk.bench.meter import Meter, Phases
from moetk.bench.profile import Kernel, largest_kernels
from moetk.bench.race import WARM_UP, Racer, race, told
from moetk.bench.shapes import LayerShape, layer_shape
from moetk.errors import ConfigError

GRADS = ("accumulate", "fresh")


@dataclass(frozen=True)
class LayerCase:
    """What is measured. routing: a name of LOADS. grads: "accumulate", the gradients of the step
    before stay and backward adds to them; "fresh", they are None and backward makes them."""

    shape: LayerShape
    tokens: int
    routing: str = "balanced"
    grads: str = "accumulate"
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def words(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.shape.words()} T={self.tokens} routing={self.routing} grads={self.grads} "
            f"dtype={dtype}"
        )


def layer_cases(
    shapes: str, tokens: str, routing: str, grads: str, dtype: torch.dtype, seed: int
) -> list[LayerCase]:
    """Every combination of comma-separated words. Raises ConfigError for one that is unknown."""
    for word in grads.split(","):
        if word not in GRADS:
            raise ConfigError(f"grads {word!r} is not one of {', '.join(GRADS)}.")
    for word in tokens.split(","):
        if not word.isdecimal() or int(word) < 1:
            raise ConfigError(f"tokens {word!r} is no number of tokens: 1 or more.")
    for word in routing.split(","):
        load_named(word)
    return [
        LayerCase(layer_shape(shape), int(count), load, grad, dtype, seed)
        for shape, load, grad, count in product(
            *(words.split(",") for words in (shapes, routing, grads, tokens))
        )
    ]


@dataclass(eq=False)
class LayerResult:
    """One contender's numbers. forward and both: milliseconds of each round. saved: bytes that the
    graph holds between forward and backward. peak: bytes over parameters, gradients and what lay
    there before, and the phase it falls into; None where the device does not tell."""

    name: str
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    saved: int | None = None
    peak: int | None = None
    peak_phase: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    wrong: str | None = None
    error: str | None = None


@dataclass(eq=False)
class LayerReport:
    """Results in the contenders' order. rates_E: share of the tokens that chose each expert.
    checked: tokens whose values and gradients were compared with fp64. border_share: of these,
    the ones whose choice rounding may turn, which were left out."""

    case: LayerCase
    results: list[LayerResult]
    rates_E: list[float]
    checked: int
    border_share: float


@dataclass(eq=False)
class _Entry:
    """A contender's layer with its own leaf of the shared tokens."""

    result: LayerResult
    layer: nn.Module
    x: Tensor
    dy: Tensor

    def forward(self) -> Tensor:
        y: Tensor = self.layer(self.x)
        return y

    def inference(self) -> None:
        with torch.no_grad():
            self.layer(self.x)

    def both(self) -> None:
        self.forward().backward(self.dy)

    def drop_gradients(self) -> None:
        self.layer.zero_grad(set_to_none=True)
        self.x.grad = None

    def leaves(self) -> list[Tensor]:
        return [self.x, *self.layer.parameters()]


def measure_layer(
    case: LayerCase, contenders: Sequence[Contender], meter: Meter, rounds: int = 20
) -> LayerReport:
    """Build every contender, check it against fp64, then time all of them round by round.

    The first contender is the baseline that the others' errors are held to. One that cannot be
    built, or raises, has the reason in its result.
    """
    model, x_TH, dy_TH = _inputs(case, meter.device)
    block = block_of(model)
    with torch.no_grad():
        rates_E = choice_rates(block.gate(x_TH)[0].float(), case.shape.top_k).tolist()
    results = [LayerResult(contender.name) for contender in contenders]
    entries = []
    for contender, result in zip(contenders, results, strict=True):
        layer = _guarded(result, partial(contender.build, model), meter)
        if layer is not None:
            x = x_TH.detach()[None].requires_grad_()
            entries.append(_Entry(result, layer.train(), x, dy_TH[None]))
    truth = _check(case, entries, block, x_TH, dy_TH, meter)
    checked, border_share = len(truth.rows_T), truth.border_share
    del model, block, truth
    meter.release()
    _time(case, entries, rounds, meter)
    if meter.has_memory:
        for entry in entries:
            if entry.result.error is None:
                _guarded(entry.result, partial(_memory, case, entry, meter), meter)
    return LayerReport(case, results, rates_E, checked, border_share)


def profile_layer(case: LayerCase, contender: Contender, meter: Meter) -> list[Kernel]:
    """The largest kernels of one warm forward and backward."""
    model, x_TH, dy_TH = _inputs(case, meter.device)
    layer = contender.build(model).train()
    entry = _Entry(LayerResult(contender.name), layer, x_TH[None].requires_grad_(), dy_TH[None])
    for _ in range(WARM_UP):
        entry.both()
    return largest_kernels(entry.both, meter)


def _inputs(case: LayerCase, device: torch.device) -> tuple[Any, Tensor, Tensor]:
    load = load_named(case.routing)
    model = stock_model(case.shape, device, case.dtype, case.seed)
    generator = torch.Generator(device).manual_seed(case.seed + 1)
    x_TH, dy_TH = (
        torch.randn(
            (case.tokens, case.shape.hidden_size),
            generator=generator,
            device=device,
            dtype=case.dtype,
        )
        for _ in range(2)
    )
    load(block_of(model).gate.weight.data, x_TH, case.shape.top_k, generator)
    return model, x_TH, dy_TH


def _check(
    case: LayerCase,
    entries: Sequence[_Entry],
    block: Any,
    x_TH: Tensor,
    dy_TH: Tensor,
    meter: Meter,
) -> Truth:
    truth = truth_that_fits(block, x_TH, dy_TH, meter)
    x_TH, dy_TH = x_TH[: len(truth.rows_T)], dy_TH[: len(truth.rows_T)]
    for entry in entries:
        check = partial(errors_of, entry.layer, x_TH, dy_TH, truth)
        errors = _guarded(entry.result, check, meter)
        entry.result.errors = errors or {}
    baseline = entries[0].result.errors if entries else {}
    longest = max(case.shape.hidden_size, case.shape.intermediate_size, len(x_TH))
    for entry in entries:
        if baseline and entry.result.errors:
            entry.result.wrong = verdict(entry.result.errors, baseline, case.dtype, longest)
    return truth


def _time(case: LayerCase, entries: Sequence[_Entry], rounds: int, meter: Meter) -> None:
    def nothing() -> None:
        pass

    alive = [entry for entry in entries if entry.result.error is None]
    forward = [Racer(e.result.name, e.inference, nothing) for e in alive]
    race(forward, rounds, meter)
    fresh = case.grads == "fresh"
    both = [Racer(e.result.name, e.both, e.drop_gradients if fresh else nothing) for e in alive]
    race(both, rounds, meter)
    for entry, one, two in zip(alive, forward, both, strict=True):
        entry.result.forward, entry.result.both = one.times, two.times
        entry.result.error = one.error or two.error


def _memory(case: LayerCase, entry: _Entry, meter: Meter) -> None:
    """Saved and peak bytes of one more step. Gradients count as lying there before it, whether
    the step adds to them or makes them."""
    if case.grads == "fresh":
        entry.drop_gradients()
    meter.synchronize()
    meter.release()
    before = meter.allocated()
    missing = sum(leaf.nbytes for leaf in entry.leaves() if leaf.grad is None)
    phases = Phases(meter)
    phases.enter("forward")
    y = entry.forward()
    meter.synchronize()
    entry.result.saved = meter.allocated() - before
    phases.enter("backward")
    y.backward(entry.dy)
    meter.synchronize()
    phases.leave()
    phases.peaks["backward"] -= missing
    entry.result.peak_phase, peak = phases.largest()
    entry.result.peak = peak - before


def _guarded(result: LayerResult, call: Callable[[], Any], meter: Meter) -> Any:
    """What `call` returns; None where it raises, and then the reason is in the result."""
    try:
        return call()
    except Exception as error:  # whatever it is, it belongs in the row
        result.error = told(error)
    meter.release()
    return None
