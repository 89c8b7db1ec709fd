"""The words of `moetk bench`: what to measure, and where the rows go."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from moetk.bench.layer import LayerCase
    from moetk.bench.rows import World

app = typer.Typer(
    help="Measure layers, training steps and generation beside transformers and peers.",
    no_args_is_help=True,
)
Contenders = Annotated[
    str | None, typer.Option(help="Names, comma between them; the first is the baseline. [all]")
]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16, float32, float64.")]
Seed = Annotated[int, typer.Option(help="Of weights and tokens.")]
Device = Annotated[str | None, typer.Option(help="cuda, cpu. [a GPU where there is one]")]
Out = Annotated[Path, typer.Option(help="Folder of the CSV files and figures.")]
Profile = Annotated[bool, typer.Option("--profile", help="Also name the largest kernels.")]
Layers = Annotated[int, typer.Option(min=1, help="Decoder layers of the model.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences.")]
Changes = Annotated[
    str, typer.Option(help='Settings other than Qwen3-30B-A3B\'s: "num_experts=64,...".')
]
Experts = Annotated[str, typer.Option(help="Of moetk's experts.")]
Rounds = Annotated[int, typer.Option(min=1, help="Each contender runs once a round.")]
OUT = Path("runs/bench")


@app.command()
def layer(
    shapes: Annotated[
        str, typer.Option(help='Names, or "H=32 I=16 E=4 K=2"; comma between them.')
    ] = "qwen3-30b-a3b,olmoe-1b-7b,mixtral-8x7b,dsv3-ep8",
    tokens: Annotated[str, typer.Option(help="T; comma between several.")] = "16384",
    routing: Annotated[str, typer.Option(help="balanced, zipf, same.")] = "balanced",
    grads: Annotated[
        str, typer.Option(help="accumulate: backward adds to gradients; fresh: it makes them.")
    ] = "accumulate",
    contenders: Contenders = None,
    rounds: Rounds = 20,
    dtype: Dtype = "bfloat16",
    seed: Seed = 0,
    device: Device = None,
    out: Out = OUT,
    one_thread: Annotated[
        bool, typer.Option("--one-thread", help="Also with backward in the calling thread.")
    ] = False,
    captured: Annotated[
        bool, typer.Option("--captured", help="Also replayed from a CUDA graph: no host's time.")
    ] = False,
    figures: Annotated[
        bool, typer.Option("--figures", help="Also draw time, memory and roofline.")
    ] = False,
    profile: Profile = False,
    tune: Annotated[
        str | None, typer.Option(help='Instead: the fastest tiles of a tuner, "module:object".')
    ] = None,
) -> None:
    """One mixture-of-experts layer, forward and backward, contenders in turn."""
    from moetk.bench.ceilings import ceilings
    from moetk.bench.contenders import contenders_here, contenders_named
    from moetk.bench.figures import write_figures
    from moetk.bench.launch import launches
    from moetk.bench.layer import layer_cases, measure_layer, profile_layer
    from moetk.bench.meter import meter_for
    from moetk.bench.report import kernel_rows, kernel_table, layer_rows, layer_table
    from moetk.bench.rows import World, append_rows
    from moetk.bench.shapes import dtype_named

    console, meter, kind = _console(), meter_for(device), dtype_named(dtype)
    world = World.here(meter, _command(), seed)
    if tune is not None:
        cases = layer_cases(shapes, tokens, routing, grads, kind, seed)
        _tune(tune, cases, rounds, world, out / "tiles.csv", console)
        return
    ways = launches(meter.device, one_thread=one_thread, captured=captured)
    cases = layer_cases(shapes, tokens, routing, grads, kind, seed, ways)
    wanted = contenders_named(contenders) if contenders else contenders_here(meter.device, kind)
    path, rows, wrong = out / "layer.csv", [], False
    if figures:
        rows = ceilings(meter, kind)
        append_rows(path, rows, world)
    for case in cases:
        report = measure_layer(case, wanted, meter, rounds)
        found = layer_rows(report)
        console.print(layer_table(report))
        wrong |= any(result.wrong is not None for result in report.results)
        for result, contender in zip(report.results, wanted, strict=True):
            if profile and result.error is None:
                kernels = profile_layer(case, contender, meter)
                found += kernel_rows(kernels, contender.name, case.words(), case.launch.name)
                console.print(kernel_table(kernels, f"{contender.name}, {case.launch.name}"))
        append_rows(path, found, world)
        rows += found
    if figures:
        _told(console, *write_figures(out, rows, [case.shape for case in cases]))
    _told(console, path)
    raise typer.Exit(1 if wrong else 0)


@app.command()
def step(
    layers: Layers = 8,
    batch: Batch = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 4096,
    model: Changes = "",
    contenders: Contenders = None,
    backend: Experts = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Timed, after three that are not.")] = 10,
    loss_curves: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Instead: SEEDS of v5 and STEPS of each; are the others within?"),
    ] = None,
    dtype: Dtype = "bfloat16",
    seed: Seed = 0,
    device: Device = None,
    out: Out = OUT,
    profile: Profile = False,
) -> None:
    """A whole training step: forward, loss, backward, AdamW."""
    from moetk.bench.curves import compare_curves
    from moetk.bench.meter import meter_for
    from moetk.bench.report import (
        curve_rows,
        curve_table,
        kernel_rows,
        kernel_table,
        step_rows,
        step_table,
    )
    from moetk.bench.rows import World, append_rows
    from moetk.bench.shapes import ModelShape, config_changes, dtype_named
    from moetk.bench.step import ATTENTION, measure_steps, profile_step, step_contenders_named

    console, meter, kind = _console(), meter_for(device), dtype_named(dtype)
    world = World.here(meter, _command(), seed)
    shape = ModelShape(layers, batch, length, config_changes(model))
    words = f"{shape.words()} dtype={dtype} attention={ATTENTION} backend={backend}"
    path = out / "step.csv"
    if loss_curves is not None:
        wanted = step_contenders_named(contenders or "v5,moetk-step", backend)
        seeds, count = loss_curves
        outside = False
        for curve in compare_curves(shape, wanted, meter, range(seed, seed + seeds), count, kind):
            console.print(curve_table(curve))
            append_rows(path, curve_rows(curve, words), world)
            outside |= not curve.ok
        _told(console, path)
        raise typer.Exit(1 if outside else 0)
    wanted = step_contenders_named(contenders or "v5,v5-checkpointing,moetk,moetk-step", backend)
    results = measure_steps(shape, wanted, meter, steps=steps, dtype=kind, seed=seed)
    rows = step_rows(shape, results, words)
    console.print(step_table(shape, results, words))
    for contender, result in zip(wanted, results, strict=False):  # the first ran again, at the end
        if result.about:
            console.print(result.about, markup=False, highlight=False)
        if profile and result.error is None:
            kernels = profile_step(shape, contender, meter, dtype=kind, seed=seed)
            rows += kernel_rows(kernels, contender.name, words)
            console.print(kernel_table(kernels, contender.name))
    append_rows(path, rows, world)
    _told(console, path)


@app.command()
def generate(
    layers: Layers = 8,
    batch: Batch = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each before the new ones.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that each is continued by.")] = 64,
    model: Changes = "",
    contenders: Contenders = None,
    backend: Experts = "auto",
    cache: Annotated[
        str | None, typer.Option(help="cache_implementation of transformers. [its default]")
    ] = None,
    rounds: Rounds = 10,
    dtype: Dtype = "bfloat16",
    seed: Seed = 0,
    device: Device = None,
    out: Out = OUT,
) -> None:
    """transformers' generate(), greedy, with a cache; contenders in turn."""
    from moetk.bench.generate import measure_generate
    from moetk.bench.meter import meter_for
    from moetk.bench.report import generate_rows, generate_table
    from moetk.bench.rows import World, append_rows
    from moetk.bench.shapes import ModelShape, config_changes, dtype_named
    from moetk.bench.step import ATTENTION, step_contenders_named

    console, meter, kind = _console(), meter_for(device), dtype_named(dtype)
    world = World.here(meter, _command(), seed)
    shape = ModelShape(layers, batch, prompt, config_changes(model))
    words = (
        f"{shape.words()} new={new_tokens} dtype={dtype} attention={ATTENTION} backend={backend} "
        f"cache={cache or 'default'}"
    )
    results = measure_generate(
        shape,
        step_contenders_named(
            contenders or "v5,moetk,moetk-eager,moetk-step,moetk-step-eager", backend
        ),
        meter,
        new_tokens=new_tokens,
        rounds=rounds,
        cache=cache,
        dtype=kind,
        seed=seed,
    )
    console.print(generate_table(results, words, new_tokens))
    for result in results:
        if result.about:
            console.print(result.about, markup=False, highlight=False)
    append_rows(out / "generate.csv", generate_rows(results, words, new_tokens), world)
    _told(console, out / "generate.csv")


def _tune(
    where: str,
    cases: Sequence[LayerCase],
    rounds: int,
    world: World,
    path: Path,
    console: Console,
) -> None:
    from moetk.bench.tune import load_tuner, tune, write_choices

    tuner = load_tuner(where)
    for case in cases:
        choices = tune(tuner, case.shape, case.tokens, rounds)
        write_choices(path, choices, world)
        for choice in choices:
            console.print(f"{case.words()}: {choice}", soft_wrap=True, highlight=False)
    _told(console, path)


def _told(console: Console, *paths: Path) -> None:
    for path in paths:
        console.print(str(path), soft_wrap=True, markup=False, highlight=False)


def _console() -> Console:
    """A file has no width: tables get the one they need."""
    console = Console()
    return console if console.is_terminal else Console(width=180)


def _command() -> str:
    return shlex.join(["moetk", *sys.argv[1:]])
