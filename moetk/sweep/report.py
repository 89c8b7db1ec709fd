"""One self-contained page from a sweep's rows: figures, and the table behind each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetk.errors import ConfigError, SaveFailedError
from moetk.io import write_file
from moetk.look import page
from moetk.sweep import figures
from moetk.sweep.store import Row, read_sweep
from moetk.sweep.summary import ArmSummary, Curve, Summary, chance_agreement, summarise


@dataclass(frozen=True)
class Table:
    """Column names, and cells as they are shown."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class FigureBlock:
    """A figure with what it shows, and the numbers behind it. svg: None = nothing to draw."""

    name: str
    title: str
    about: str
    svg: str | None
    table: Table


def load_summary(root: Path) -> Summary:
    """The summary of a sweep's folder. Raises ConfigError where there is no sweep or no row yet,
    ShardCorruptError on a changed file."""
    try:
        summary = summarise(*read_sweep(root))
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None
    if not summary.rows:
        raise ConfigError(f"{root} holds no finished cell yet; run the sweep first.")
    return summary


def write_report(summary: Summary, path: Path) -> None:
    """Write the page. Raises ConfigError without jinja2 and matplotlib, SaveFailedError."""
    write_file(path, render(summary).encode())


def write_figures(summary: Summary, folder: Path) -> None:
    """Write every figure as NAME.svg. Raises ConfigError without matplotlib, SaveFailedError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveFailedError(
            error.errno, f"{folder} cannot be a folder of figures ({error.strerror})."
        ) from None
    for block in figure_blocks(summary):
        if block.svg is not None:
            write_file(folder / f"{block.name}.svg", block.svg.encode())


def render(summary: Summary) -> str:
    """The page as HTML; every string of the sweep is escaped, nothing is loaded from outside."""
    return page(
        "moetk.sweep",
        "report.html",
        summary=summary,
        sweep=summary.plan["settings"]["sweep"],
        headline=headline(summary),
        blocks=figure_blocks(summary),
        colours=figures.colours(summary),
        number=number,
        signed=signed,
        parts=parts,
        chance_agreement=chance_agreement,
        retry=retry_options(summary.bad),
        sees_future=[arm.name for arm in summary.arms if arm.causal is False],
        environment=environment_facts(summary),
        settings=json.dumps(shared_settings(summary), indent=2),
        code_files=len(summary.plan["code"]["moetk"]),
    )


def figure_blocks(summary: Summary) -> list[FigureBlock]:
    """The figures in the page's order."""
    seeds = "the band spans the seeds" if len(_seeds(summary)) > 1 else "one seed"
    gap = f", and its difference to {summary.baseline} with the same seed"
    load_seeds = {row["seed"] for row in summary.shown.values()}
    return [
        FigureBlock(
            "loss",
            "Held-out loss",
            f"Loss on files that no cell trained on{'' if summary.baseline_sees_future else gap}; "
            f"line = mean, {seeds}.",
            figures.loss_figure(summary),
            _curve_table(summary, "loss", "gap"),
        ),
        FigureBlock(
            "violation",
            "Balance over training",
            "MaxVio, the busiest expert's load over the mean load minus 1, of each training batch: "
            f"means over short windows and layers; {seeds}.",
            figures.violation_figure(summary),
            _curve_table(summary, "violation"),
        ),
        FigureBlock(
            "load",
            "Who gets the tokens",
            f"Load of every expert over training, {_one_or_each(load_seeds)}; white = even, "
            "red = more, blue = less, darkest blue = none.",
            figures.load_figure(summary),
            _load_table(summary),
        ),
        FigureBlock(
            "tradeoff",
            "Loss against balance",
            "One small dot a cell, one large dot an arm. Down and to the left is better.",
            figures.tradeoff_figure(summary),
            _cell_table(summary),
        ),
    ]


def headline(summary: Summary) -> list[str]:
    """What the numbers say, in sentences that a reader may quote."""
    sentences = []
    loads = {arm.name: arm.train_violation for arm in summary.arms if arm.causal is not False}
    known = {name: load.mean for name, load in loads.items() if load is not None}
    if known:
        best = min(known, key=lambda name: known[name])
        text = f"Most even load in the last quarter of training: {best}, MaxVio {known[best]:.2f}"
        if summary.baseline in known and best != summary.baseline:
            text += f" ({summary.baseline}: {known[summary.baseline]:.2f})"
        sentences.append(text + ".")
    if summary.baseline_sees_future:
        sentences.append(
            f"{summary.baseline}, the baseline, sees the future: no loss is compared with it."
        )
    verdicts: dict[str, list[str]] = {}
    for arm in summary.arms:
        if arm.difference is not None and arm.causal is not False:
            verdicts.setdefault(arm.difference.verdict, []).append(arm.name)
    for verdict, names in verdicts.items():
        ends = ", ".join(names)
        if verdict == "within noise":
            sentences.append(f"Final loss within noise of {summary.baseline}: {ends}.")
        elif verdict == "one seed":
            sentences.append(f"One seed says nothing about the loss of {ends}.")
        else:
            sentences.append(f"Final loss {_lean(verdict)} {summary.baseline}: {ends}.")
    return sentences


def _lean(verdict: str) -> str:
    word, _, weakly = verdict.partition(", ")
    return f"leans {word}, {weakly}, than" if weakly else f"{word} than"


def environment_facts(summary: Summary) -> list[tuple[str, str]]:
    """What the cells ran on and with, one line a fact; several values where cells differ."""

    def of(key: str) -> str:
        found = [row["run"].get(key) for row in summary.rows]
        return ", ".join(dict.fromkeys(str(value) for value in found if value is not None))

    versions = summary.plan["code"]["versions"]
    data = summary.plan["data"]
    dates = sorted(row["run"]["date"] for row in summary.rows)
    seconds = sum(row["run"].get("seconds", 0.0) for row in summary.rows)
    facts = [
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("moetk", " · ".join(filter(None, (of("moetk"), of("commit"))))),
        ("processor", of("processor")),
        ("threads a cell", of("threads")),
        ("experts' backend", of("backend")),
        ("run", f"{dates[0]} to {dates[-1]}, {seconds:.0f} s of cells"),
        ("data", f"{data['kind']}, {_sizes(data)}"),
        ("data sha256", data["sha256"]),
        ("code sha256", summary.rows[0]["code"]["moetk"]),
    ]
    return [(name, value) for name, value in facts if value]


def retry_options(bad: Sequence[Row]) -> str:
    """What runs these cells again: "--retry failed --retry timeout"."""
    return " ".join(f"--retry {status}" for status in sorted({r["result"]["status"] for r in bad}))


def shared_settings(summary: Summary) -> dict[str, Any]:
    settings = dict(summary.plan["settings"])
    return {table: settings[table] for table in ("sweep", "model", "data", "train")}


def parts(arm: ArmSummary) -> list[tuple[str, str]]:
    """An arm's router, losses and controllers, and what else it sets: (name, arguments)."""
    settings = arm.settings
    found = [
        (
            part["name"],
            ", ".join(f"{key}={value!r}" for key, value in part.items() if key != "name"),
        )
        for part in (settings["router"], *settings["losses"], *settings["controllers"])
    ]
    if settings["lr"] is not None:
        found.append(("lr", f"{settings['lr']:g}"))
    if settings["backend"] != "auto":
        found.append(("backend", settings["backend"]))
    return found


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def _seeds(summary: Summary) -> list[int]:
    seeds: list[int] = summary.plan["settings"]["sweep"]["seeds"]
    return seeds


def _one_or_each(seeds: set[int]) -> str:
    return f"seed {min(seeds)}" if len(seeds) == 1 else "a seed of each arm: none is good in all"


def _sizes(data: dict[str, Any]) -> str:
    sizes = {key: value for key, value in data.items() if key not in ("kind", "sha256")}
    return ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in sizes.items())


def _curve_table(summary: Summary, *names: str) -> Table:
    """A column for each arm and curve: the mean, and the range over seeds."""
    words = {"loss": "loss", "gap": f"minus {summary.baseline}", "violation": "MaxVio"}
    columns: dict[str, dict[int, str]] = {}
    for name in names:
        for arm in summary.arms:
            curve: Curve = getattr(arm, name)
            columns[f"{arm.name}, {words[name]}"] = {
                step: f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"
                for step, value in zip(curve.steps, curve.values, strict=True)
            }
    shown = {title: cells for title, cells in columns.items() if cells}
    steps = sorted({step for cells in shown.values() for step in cells})
    rows = [(str(step), *(cells.get(step, "–") for cells in shown.values())) for step in steps]
    return Table(("step", *shown), tuple(rows))


def _load_table(summary: Summary) -> Table:
    rows: list[tuple[str, ...]] = []
    experts = 0
    for name, cell in summary.shown.items():
        load, seed = cell["result"]["load"], str(cell["seed"])
        for layer, windows in load["layers"].items():
            for step, shares in zip(load["steps"], figures.relative_load(windows), strict=True):
                experts = max(experts, len(shares))
                rows.append((name, seed, layer, str(step), *(f"{share:.2f}" for share in shares)))
    return Table(
        ("arm", "seed", "layer", "to step", *(f"e{e}" for e in range(experts))), tuple(rows)
    )


def _cell_table(summary: Summary) -> Table:
    rows = []
    for row in summary.rows:
        result = row["result"]
        rows.append(
            (
                row["arm"],
                str(row["seed"]),
                result["status"],
                number(result.get("initial_loss")),
                number(result.get("final_loss")),
                number(result.get("train_max_violation")),
                number(result.get("max_violation")),
                f"{row['run'].get('seconds', 0.0):.0f}",
                row["key"][:12],
            )
        )
    before = ("arm", "seed", "status", "loss before", "loss after")
    columns = (*before, "MaxVio in training", "MaxVio held-out", "seconds", "key")
    return Table(columns, tuple(rows))
