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
from moetk.bench.launch import EAGER, Launch, Step, nothing
from moetk.bench.loads import choice_rates, load_named
from moetk.bench.meter import Meter, Phases
from moetk.bench.profile import Profile, largest_kernels
from moetk.bench.race import WARM_UP, Racer, race, told
from moetk.bench.shapes import LayerShape, layer_shape
from moetk.errors import ConfigError

GRADS = ("accumulate", "fresh")


@dataclass(frozen=True)
class LayerCase:
    """What is measured. routing: a name of LOADS. grads: "accumulate", the gradients of the step
    before stay and backward adds to them; "fresh", they are None and backward makes them. launch:
    how every contender gets to the device."""

    shape: LayerShape
    tokens: int
    routing: str = "balanced"
    grads: str = "accumulate"
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    launch: Launch = EAGER

    def words(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.shape.words()} T={self.tokens} routing={self.routing} grads={self.grads} "
            f"dtype={dtype}"
        )


def layer_cases(
    shapes: str,
    tokens: str,
    routing: str,
    grads: str,
    dtype: torch.dtype,
    seed: int,
    launches: Sequence[Launch] = (EAGER,),
) -> list[LayerCase]:
    """Every combination of comma-separated words and launches. Raises ConfigError for an unknown
    word."""
    for word in grads.split(","):
        if word not in GRADS:
            raise ConfigError(f"grads {word!r} is not one of {', '.join(GRADS)}.")
    for word in tokens.split(","):
        if not word.isdecimal() or int(word) < 1:
            raise ConfigError(f"tokens {word!r} is no number of tokens: 1 or more.")
    for word in routing.split(","):
        load_named(word)
    words = product(*(each.split(",") for each in (shapes, routing, grads, tokens)))
    return [
        LayerCase(layer_shape(shape), int(count), load, grad, dtype, seed, launch)
        for shape, load, grad, count in words
        for launch in launches
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
    """A contender's layer with its own leaf of the shared tokens, and its two steps in the way
    they are launched."""

    contender: Contender
    result: LayerResult
    layer: nn.Module
    x: Tensor
    dy: Tensor
    forward: Step = field(init=False)
    both: Step = field(init=False)

    def make_ready(self, grads: str, launch: Launch) -> None:
        forward, both = _steps(self.layer, self.x, self.dy, fresh=grads == "fresh")
        self.forward, self.both = launch.ready(forward), launch.ready(both)

    def leaves(self) -> list[Tensor]:
        return [self.x, *self.layer.parameters()]


def _steps(layer: nn.Module, x: Tensor, dy: Tensor, *, fresh: bool) -> tuple[Step, Step]:
    """Forward alone, and forward and backward. They hold no entry, which holds them: in a circle
    its memory would wait for the garbage collector while the next case is built."""

    def forward() -> Tensor:
        with torch.no_grad():
            y: Tensor = layer(x)
        return y

    def both() -> Tensor:
        y: Tensor = layer(x)
        y.backward(dy)
        return y.detach()

    def drop() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return Step(forward), Step(both, drop if fresh else nothing)


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
            entries.append(_Entry(contender, result, layer.train(), x, dy_TH[None]))
    truth = truth_that_fits(block, x_TH, dy_TH, meter)
    _check(case, entries, contenders[0], truth, meter)
    checked, border_share = len(truth.rows_T), truth.border_share
    del model, block, truth
    meter.release()
    _time(entries, rounds, meter)
    if meter.has_memory and case.launch.allocates:
        for entry in entries:
            if entry.result.error is None and entry.contender.allocates:
                _guarded(entry.result, partial(_memory, entry, meter), meter)
    return LayerReport(case, results, rates_E, checked, border_share)


def profile_layer(case: LayerCase, contender: Contender, meter: Meter) -> Profile:
    """The largest kernels of one warm forward and backward."""
    model, x_TH, dy_TH = _inputs(case, meter.device)
    layer = contender.build(model).train()
    x, result = x_TH[None].requires_grad_(), LayerResult(contender.name)
    entry = _Entry(contender, result, layer, x, dy_TH[None])
    entry.make_ready(case.grads, case.launch)
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
    case: LayerCase, entries: Sequence[_Entry], first: Contender, truth: Truth, meter: Meter
) -> None:
    """Errors of the very steps that will be timed, and verdicts by those of `first`."""

    def errors(entry: _Entry, launch: Launch) -> dict[str, float]:
        entry.make_ready(case.grads, launch)
        for _ in range(entry.contender.warm_up):
            entry.both()
        return errors_of(entry.layer, entry.x, entry.dy, entry.both.call, truth)

    for entry in entries:
        call = partial(errors, entry, case.launch)
        entry.result.errors = _guarded(entry.result, call, meter) or {}
    baseline: dict[str, float] = {}
    for entry in entries:
        if entry.contender is first:
            baseline = entry.result.errors
            if not baseline:  # not launched this way; the others are held to what it computes
                aside, call = LayerResult(first.name), partial(errors, entry, EAGER)
                baseline = _guarded(aside, call, meter) or {}
    shape, dtype = case.shape, case.dtype
    longest = max(shape.hidden_size, shape.intermediate_size, len(truth.rows_T))
    for entry in entries:
        mine, operands = entry.result.errors, entry.contender.operands
        if mine and baseline:
            entry.result.wrong = verdict(mine, baseline, dtype, longest, operands)
        elif mine:
            entry.result.wrong = f"WRONG or not: {first.name} failed, nothing to hold it to"


def _time(entries: Sequence[_Entry], rounds: int, meter: Meter) -> None:
    alive = [entry for entry in entries if entry.result.error is None]
    forward = [Racer(e.result.name, e.forward.call, e.forward.before) for e in alive]
    race(forward, rounds, meter)
    both = [Racer(e.result.name, e.both.call, e.both.before) for e in alive]
    race(both, rounds, meter)
    for entry, one, two in zip(alive, forward, both, strict=True):
        entry.result.forward, entry.result.both = one.times, two.times
        entry.result.error = one.error or two.error


def _memory(entry: _Entry, meter: Meter) -> None:
    """Saved and peak bytes of one more step. Gradients count as lying there before it, whether
    the step adds to them or makes them."""
    entry.both.before()
    meter.synchronize()
    meter.release()
    before = meter.allocated()
    missing = sum(leaf.nbytes for leaf in entry.leaves() if leaf.grad is None)
    phases = Phases(meter)
    phases.enter("forward")
    y = entry.layer(entry.x)
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
