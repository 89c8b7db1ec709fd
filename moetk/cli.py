"""The command line: thin verbs over the public functions.

Exit codes: 0 = done; 1 = it ran and something failed; 2 = the command or a file it names is wrong.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moetk.bench.command import app as bench
from moetk.errors import ConfigError, EquivalenceError, MoetkError

app = typer.Typer(
    help="Mixture-of-experts parts that compose.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")


@app.command()
def doctor() -> None:
    """What this machine can run, and what is missing for the rest."""
    from moetk.doctor import doctor as look

    raise typer.Exit(look(Console()))


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep's TOML file.")],
    out: Annotated[
        Path | None, typer.Option(help="Its folder; the same again resumes. [runs/NAME]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Cells at a time. [cores // threads]")
    ] = None,
    retry: Annotated[
        list[str] | None, typer.Option(help="Run failed, timeout or diverged cells again.")
    ] = None,
    limit_steps: Annotated[int | None, typer.Option(help="At most this many steps.")] = None,
) -> None:
    """Run every arm with every seed; stop it at any time and start it again."""
    from moetk.sweep.config import load_config
    from moetk.sweep.report import retry_options
    from moetk.sweep.runner import STATUSES, run_sweep
    from moetk.sweep.watch import watch_for

    for status in retry or ():
        if status not in STATUSES:
            raise typer.BadParameter(
                f"{status!r}; one of {', '.join(STATUSES)}", param_hint="--retry"
            )
    config = load_config(file)
    if limit_steps is not None:
        config = config.limited(limit_steps)
    root = out or Path("runs", config.sweep.name)
    console = Console()
    rows = run_sweep(config, root, workers=workers, retry=retry or (), watch=watch_for(console))
    bad = [row for row in rows if row["result"]["status"] != "ok"]
    if bad:
        console.print(
            f"{len(bad)} of {len(rows)} cells did not end well; "
            f"{retry_options(bad)} runs them again.",
            soft_wrap=True,
            highlight=False,
        )
    console.print(f"moetk report {root}", soft_wrap=True, markup=False)
    raise typer.Exit(1 if bad else 0)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A sweep's folder.")],
    out: Annotated[Path | None, typer.Option(help="The page. [FOLDER/report.html]")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write one line a cell.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="The same with the curves.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also write each figure as SVG here.")
    ] = None,
) -> None:
    """Write what a sweep found: one page that needs nothing but a browser."""
    from moetk.sweep import load_summary, write_csv, write_figures, write_parquet, write_report

    summary = load_summary(folder)
    written = [out or folder / "report.html"]
    write_report(summary, written[0])
    for path, write in ((csv, write_csv), (parquet, write_parquet), (figures, write_figures)):
        if path is not None:
            write(summary, path)
            written.append(path)
    for path in written:
        Console().print(str(path), soft_wrap=True, markup=False, highlight=False)


@app.command()
def compare(
    a: Annotated[
        str, typer.Argument(help='The reference: a checkpoint\'s folder or "module:function".')
    ],
    b: Annotated[str, typer.Argument(help="What should do the same.")],
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 2,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 32,
    hidden_size: Annotated[
        int | None, typer.Option(min=1, help="Of x, where parts do not tell it.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float64, float32, bfloat16, float16. [as stored]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the input and the gradient.")] = 0,
    text: Annotated[
        Path | None, typer.Option(help="A file whose bytes are the tokens. [random]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all numbers here.")] = None,
    repro: Annotated[
        Path | None, typer.Option(help="Write a failing test into this new folder.")
    ] = None,
) -> None:
    """Where do two models or parts first differ: at a tie, in the rounding, or by a bug?

    A function without required parameters makes the part; one with a parameter is it.
    """
    import torch

    from moetk.equivalence.command import Inputs, compare_sources
    from moetk.equivalence.page import write_page
    from moetk.equivalence.source import DTYPES, source_of
    from moetk.equivalence.watch import watched

    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r}; one of {', '.join(DTYPES)}", param_hint="--dtype")
    sys.path.insert(0, str(Path.cwd()))  # where a reader's own functions lie
    sources = source_of(a, dtype), source_of(b, dtype)
    given = Inputs(batch, length, seed, text, hidden_size, getattr(torch, dtype) if dtype else None)
    with watched(Console(stderr=True)) as progress:
        found = compare_sources(*sources, given, progress)
    Console().print(str(found), soft_wrap=True, markup=False, highlight=False)
    if out is not None:
        write_page(found, out, shlex.join(["moetk", *sys.argv[1:]]))
    if json is not None:
        found.to_json(json)
    if repro is not None and not found.ok:
        found.repro(repro, *sources)
    raise typer.Exit(0 if found.ok else 1)


def main() -> None:
    """The console script. An error of moetk's is one line; any other keeps its traceback."""
    try:
        app()
    except MoetkError as error:
        Console(stderr=True).print(
            f"{type(error).__name__}: {error}", soft_wrap=True, markup=False, highlight=False
        )
        sys.exit(2 if isinstance(error, ConfigError | EquivalenceError) else 1)


if __name__ == "__main__":
    main()
