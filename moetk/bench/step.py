"""A whole training step: forward, loss, backward, AdamW; contenders one after the other.

Two models and their optimizers do not fit side by side, so that the first contender runs again at
the end: how far its two medians differ is how far the machine drifted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moetk.bench.contenders import run_in_fp8
from moetk.bench.meter import Meter, Phases
from moetk.bench.profile import Profile, largest_kernels
from moetk.bench.race import WARM_UP, told
from moetk.bench.shapes import ModelShape
from moetk.errors import ConfigError

AGAIN = " again"
ATTENTION = "sdpa"
TE = "transformer_engine.pytorch"
Prepare = Callable[[Any], Any]


def torch_adamw(parameters: Iterable[Tensor], rate: float) -> torch.optim.Optimizer:
    """torch's fused AdamW."""
    return torch.optim.AdamW(parameters, lr=rate, fused=True)


def moetk_adamw(parameters: Iterable[Tensor], rate: float) -> torch.optim.Optimizer:
    """moetk's AdamW: the same step, in one kernel a parameter."""
    from moetk.train import AdamW

    return AdamW(parameters, lr=rate)


@dataclass(frozen=True)
class StepContender:
    """`prepare` changes the stock model in place before its optimizer is made by `optimizer`, from
    parameters and learning rate. What `prepare` returns may have an `explain()`, whose text says
    what ran. library: a module that is loaded before anybody's step."""

    name: str
    prepare: Prepare
    optimizer: Callable[[Iterable[Tensor], float], torch.optim.Optimizer] = torch_adamw
    library: str | None = None


def load_libraries(contenders: Iterable[StepContender]) -> None:
    """Transformer Engine finds a cuDNN of its own, which can no longer be loaded once torch has
    loaded its. Where a library is missing, its contender will say so."""
    for library in {one.library for one in contenders if one.library is not None}:
        with suppress(Exception):
            import_module(library)


def as_it_is(model: Any) -> None:
    """transformers' defaults."""


def checkpointed(model: Any) -> None:
    """transformers' gradient checkpointing: every decoder layer runs again in backward."""
    model.gradient_checkpointing_enable()


def replaced(backend: str, graphs: int | None = None) -> Prepare:
    """moetk's router and experts in every layer, with this backend; graphs as in `replace_moe`."""

    def prepare(model: Any) -> Any:
        from moetk.layers.replace import replace_moe

        return replace_moe(model, backend=backend, graphs=graphs)

    return prepare


def sped_up(backend: str, graphs: int | None = None) -> Prepare:
    """`replaced`, and moetk's norms, rotary embedding and loss."""

    def prepare(model: Any) -> Any:
        from moetk.layers.step import speed_up

        return _Explained((replaced(backend, graphs)(model), speed_up(model)))

    return prepare


def in_fp8(recipe: str) -> Prepare:
    """`sped_up("te")`, the whole model within Transformer Engine's autocast: the experts' products
    run in FP8, by a recipe of this name; all else as before."""

    def prepare(model: Any) -> Any:
        prepared = sped_up("te")(model)
        run_in_fp8(model, recipe)
        return prepared

    return prepare


def compiled(prepare: Prepare, **options: Any) -> Prepare:
    """`prepare`, and each decoder layer compiled by torch.compile, by instance. options: of
    torch.compile."""

    def prepare_and_compile(model: Any) -> Any:
        from torch._dynamo.utils import counters

        torch.compiler.reset()  # what others compiled counts against the limit of recompilations
        counters.clear()
        prepared = prepare(model)
        for layer in model.base_model.layers:
            layer.compile(dynamic=False, **options)
        return _Explained((prepared, _Compiled(counters)))

    return prepare_and_compile


@dataclass(frozen=True)
class _Compiled:
    """counters: those of torch.compile."""

    counters: Mapping[str, Mapping[str, int]]

    def explain(self) -> str:
        """What torch.compile made of the layers until now. Equal layers share a graph; one a step
        is a layer compiled anew every time, and past its limit it runs as Python does."""
        graphs, breaks = self.counters["stats"], self.counters["graph_break"]
        return (
            f"decoder layers compiled: {graphs.get('unique_graphs', 0)} graphs, "
            f"{sum(breaks.values())} graph breaks"
        )


@dataclass(frozen=True)
class _Explained:
    parts: Sequence[Any]

    def explain(self) -> str:
        return "\n".join(part.explain() for part in self.parts if part is not None)


def step_contenders(backend: str = "auto") -> dict[str, StepContender]:
    """Everyone by name, transformers' defaults first."""
    everyone = (
        StepContender("v5", as_it_is),
        StepContender("v5-checkpointing", checkpointed),
        StepContender("v5-compiled", compiled(as_it_is)),
        StepContender("moetk", replaced(backend)),
        StepContender("moetk-eager", replaced(backend, graphs=0)),
        StepContender("moetk-step", sped_up(backend)),
        StepContender("moetk-step-eager", sped_up(backend, graphs=0)),
        StepContender("moetk-step-compiled", compiled(sped_up(backend))),
        StepContender("moetk-step-adamw", sped_up(backend), moetk_adamw),
        StepContender("moetk-step-te", sped_up("te"), moetk_adamw, TE),
        StepContender("moetk-step-te-fp8", in_fp8("Float8CurrentScaling"), moetk_adamw, TE),
        StepContender("moetk-step-te-fp8-block", in_fp8("Float8BlockScaling"), moetk_adamw, TE),
    )
    return {contender.name: contender for contender in everyone}


def step_contenders_named(names: str, backend: str = "auto") -> list[StepContender]:
    """Of "v5,moetk". Raises ConfigError for an unknown one."""
    known = step_contenders(backend)
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise ConfigError(f"contender {unknown[0]!r} is not one of {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(names.split(","))]


@dataclass(eq=False)
class StepResult:
    """seconds and losses: of each timed step. first: seconds of the very first step, which compiles
    kernels, and is not timed. peaks: bytes of the allocator's largest moment in
    each phase, parameters and the optimizer's state in; empty where the device does not tell.
    about: what ran, in the contender's own words."""

    name: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    first: float | None = None
    peaks: dict[str, int] = field(default_factory=dict)
    about: str = ""
    error: str | None = None

    @property
    def peak(self) -> tuple[str, int] | None:
        """The phase of the peak, and the peak in bytes."""
        if not self.peaks:
            return None
        phase = max(self.peaks, key=lambda name: self.peaks[name])
        return phase, self.peaks[phase]


@dataclass(eq=False)
class Training:
    """A model with its optimizer: one call is one step, and returns the detached loss. prepared:
    what the contender returned."""

    model: Any
    optimizer: torch.optim.Optimizer
    phases: Phases
    prepared: Any

    def about(self) -> str:
        """What runs, in the contender's own words."""
        text: str = getattr(self.prepared, "explain", str)()
        return text

    def close(self) -> None:
        """Let go of the model: who still holds this holds no memory."""
        del self.model, self.optimizer, self.prepared

    def step(self, token_ids: Tensor) -> Tensor:
        self.phases.enter("forward")
        loss: Tensor = self.model(input_ids=token_ids, labels=token_ids).loss
        self.phases.enter("backward")
        loss.backward()
        self.phases.enter("optimizer")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.phases.leave()
        return loss.detach()


def stock_causal_model(shape: ModelShape, meter: Meter, dtype: torch.dtype, seed: int) -> Any:
    """transformers' model of this shape, its weights drawn from the seed on the meter's device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with meter.device:
        return AutoModelForCausalLM.from_config(
            shape.config(), dtype=dtype, attn_implementation=ATTENTION
        )


@contextmanager
def training(
    shape: ModelShape,
    contender: StepContender,
    meter: Meter,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    rate: float = 1e-5,
) -> Iterator[Training]:
    """A contender's model with random weights and its AdamW, ready to step. The memory is free
    again afterwards."""
    model = stock_causal_model(shape, meter, dtype, seed)
    prepared = contender.prepare(model)
    model.train()
    optimizer = contender.optimizer(model.parameters(), rate)
    phases = Phases(meter)
    # What runs after the decoder stack is the head and the loss, in one kernel or in many.
    hook = model.base_model.register_forward_hook(lambda *_: phases.enter("loss"))
    run = Training(model, optimizer, phases, prepared)
    del model, optimizer, prepared
    try:
        yield run
    finally:
        hook.remove()
        run.close()
        meter.release()


def measure_steps(
    shape: ModelShape,
    contenders: Sequence[StepContender],
    meter: Meter,
    *,
    steps: int = 10,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> list[StepResult]:
    """Time every contender from the same weights on the same tokens, after three steps that do not
    count, then the first one again.

    A contender that raises has the reason in its result, and the others go on.
    """
    load_libraries(contenders)
    first, *_ = contenders
    order = [*contenders, replace(first, name=first.name + AGAIN)]
    results = []
    for contender in order:
        result = StepResult(contender.name)
        try:
            _measure(shape, contender, meter, result, steps, dtype, seed)
        except Exception as error:  # out of memory, a part that is missing: it belongs in the row
            result.error = told(error)
        meter.release()
        results.append(result)
    return results


def profile_step(
    shape: ModelShape,
    contender: StepContender,
    meter: Meter,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Profile:
    """The largest kernels of one warm step."""
    with training(shape, contender, meter, dtype=dtype, seed=seed) as run:
        tokens_BS = token_ids(shape, run.model.config.vocab_size, seed).to(meter.device)
        for _ in range(WARM_UP):
            run.step(tokens_BS)
        return largest_kernels(lambda: run.step(tokens_BS), meter)


def token_ids(shape: ModelShape, vocab_size: int, seed: int) -> Tensor:
    """(B, S), uniform."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (shape.batch, shape.length), generator=generator)


def _measure(
    shape: ModelShape,
    contender: StepContender,
    meter: Meter,
    result: StepResult,
    steps: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    with training(shape, contender, meter, dtype=dtype, seed=seed) as run:
        tokens_BS = token_ids(shape, run.model.config.vocab_size, seed).to(meter.device)
        result.first = meter.wall(lambda: run.step(tokens_BS))[0] / 1e3
        for _ in range(WARM_UP - 1):
            run.step(tokens_BS)
        run.phases.peaks.clear()
        for _ in range(steps):
            milliseconds, loss = meter.wall(lambda: run.step(tokens_BS))
            result.seconds.append(milliseconds / 1e3)
            result.losses.append(float(loss))
        if meter.has_memory:
            result.peaks = dict(run.phases.peaks)
        result.about = run.about()
