"""Does training go on as before? Loss curves within those of stock models of several seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from moetk.bench.meter import Meter
from moetk.bench.race import told
from moetk.bench.shapes import ModelShape
from moetk.bench.step import StepContender, load_libraries, training
from moetk.errors import ConfigError

EVERY = 20
RATE = 3e-4  # at 1e-5 most updates of a bf16 weight round away


def learnable_tokens(shape: ModelShape, vocab_size: int, generator: Generator) -> Tensor:
    """Token ids (B, S) that a model can learn from: with probability 1/2 the successor of the one
    before, else drawn by Zipf's law. Uniform ones would leave every curve flat."""
    size = (shape.batch, shape.length)
    ranks = torch.arange(1, vocab_size + 1, dtype=torch.float64)
    below = (1 / ranks).cumsum(0)
    drawn = torch.searchsorted(below / below[-1], torch.rand(size, generator=generator).double())
    place = torch.arange(shape.length).expand(size)
    fresh = torch.rand(size, generator=generator) < 0.5
    fresh[:, 0] = True
    since = torch.where(fresh, place, 0).cummax(1).values
    return (drawn.clamp(max=vocab_size - 1).gather(1, since) + place - since) % vocab_size


def loss_curve(
    shape: ModelShape,
    contender: StepContender,
    meter: Meter,
    seed: int,
    steps: int,
    dtype: torch.dtype = torch.bfloat16,
) -> list[float]:
    """The loss of each step. The seed draws the weights; the tokens are the same for every seed,
    so that the range of seeds is one of models and not of batches."""
    losses = []
    with training(shape, contender, meter, dtype=dtype, seed=seed, rate=RATE) as run:
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            token_ids = learnable_tokens(shape, run.model.config.vocab_size, generator)
            losses.append(run.step(token_ids.to(meter.device)))
        return [float(loss) for loss in losses]


@dataclass(frozen=True)
class Verdict:
    """At one step (counted from 1): a contender's loss, its twin's (the stock model of the same
    seed), and the stock seeds' range. `ok`: it lies within."""

    step: int
    loss: float
    twin: float
    low: float
    high: float

    @property
    def ok(self) -> bool:
        return self.low <= self.loss <= self.high


@dataclass(frozen=True)
class CurveReport:
    """One contender against the stock seeds. verdicts: one at every 20th step. error: what ended
    its training, which then has no verdict."""

    name: str
    seed: int
    verdicts: Sequence[Verdict] = ()
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and all(verdict.ok for verdict in self.verdicts)


def compare_curves(
    shape: ModelShape,
    contenders: Sequence[StepContender],
    meter: Meter,
    seeds: Sequence[int],
    steps: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[CurveReport]:
    """The first contender runs once for each seed, the others once each, with `middle_seed`. Each
    is told when it is through; one that raises has the reason in its report, and the others go on.

    Raises ConfigError for fewer than three seeds or twenty steps.
    """
    if steps < EVERY:
        raise ConfigError(f"{steps} steps of a loss curve; {EVERY} or more are judged.")
    if len(seeds) < 3:  # told before the training, not after it
        raise ConfigError(f"{len(seeds)} seeds of the stock model; a range needs 3 or more.")
    return _compared(shape, contenders, meter, seeds, steps, dtype)


def _compared(
    shape: ModelShape,
    contenders: Sequence[StepContender],
    meter: Meter,
    seeds: Sequence[int],
    steps: int,
    dtype: torch.dtype,
) -> Iterator[CurveReport]:
    load_libraries(contenders)
    first, *others = contenders
    stock = {seed: loss_curve(shape, first, meter, seed, steps, dtype) for seed in seeds}
    seed = middle_seed(stock)
    for other in others:
        try:
            curve = loss_curve(shape, other, meter, seed, steps, dtype)
        except Exception as error:  # whatever it is, it belongs in the report
            yield CurveReport(other.name, seed, error=told(error))
        else:
            yield CurveReport(other.name, seed, judge(stock, seed, curve))


def judge(
    stock: Mapping[int, Sequence[float]], seed: int, curve: Sequence[float], every: int = EVERY
) -> list[Verdict]:
    """A verdict at every 20th step."""
    return [
        Verdict(
            step,
            curve[step - 1],
            stock[seed][step - 1],
            min(losses[step - 1] for losses in stock.values()),
            max(losses[step - 1] for losses in stock.values()),
        )
        for step in range(every, len(curve) + 1, every)
    ]


def middle_seed(stock: Mapping[int, Sequence[float]], every: int = EVERY) -> int:
    """The seed that keeps farthest from the edges of the range at the judged steps. A contender
    runs with it: at an edge, another order of summation falls outside every other time.
    """
    judged = {seed: losses[every - 1 :: every] for seed, losses in stock.items()}
    ranges = [(min(losses), max(losses)) for losses in zip(*judged.values(), strict=True)]

    def margins(seed: int) -> list[float]:
        pairs = zip(judged[seed], ranges, strict=True)
        return sorted(min(loss - low, high - loss) for loss, (low, high) in pairs)

    # The narrowest margin decides; where several seeds touch an edge, the next narrowest.
    return max(stock, key=margins)
