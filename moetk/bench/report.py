"""Results as rows of a CSV and as tables for the eye. Every ratio is to the first contender."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.markup import escape
from rich.table import Table

from moetk.bench.curves import CurveReport
from moetk.bench.generate import GenerateResult
from moetk.bench.layer import LayerReport, LayerResult
from moetk.bench.meter import Spread, spread
from moetk.bench.profile import Kernel, Profile
from moetk.bench.rows import Row
from moetk.bench.shapes import ModelShape
from moetk.bench.step import StepResult

MIB, GIB = 2**20, 2**30
FORWARD, BOTH = "layer forward", "layer forward+backward"
SAVED, PEAK = "layer saved", "layer peak"
STEP, STEP_PEAK = "step", "step peak"
GENERATE = "generate"


def layer_rows(report: LayerReport) -> list[Row]:
    """Times, ratios, memory and errors of every contender; the routing's own rows come first."""
    words, baseline = report.case.words(), report.results[0]
    load = max(report.rates_E) * len(report.rates_E) / report.case.shape.top_k
    shares = " ".join(f"{rate:.4f}" for rate in report.rates_E)
    rows = [
        Row("routing largest load", "router", words, load, "of even", note=f"shares {shares}"),
        Row(
            "routing border rows",
            "router",
            words,
            report.border_share,
            "of checked tokens",
            note=f"{report.checked} checked",
        ),
    ]
    for result in report.results:
        if result.error is not None:
            rows.append(Row(BOTH, result.name, words, None, "ms", note=f"error: {result.error}"))
        note = result.wrong or ""
        for what, times, base in (
            (FORWARD, result.forward, baseline.forward),
            (BOTH, result.both, baseline.both),
        ):
            if result.error is None:
                rows.append(Row.of(what, result.name, words, spread(times), "ms", note))
                if base and baseline.error is None:
                    unit = f"of {baseline.name}"
                    ratio = ratios(times, base)
                    rows.append(Row.of(f"{what} ratio", result.name, words, ratio, unit, note))
        if result.saved is not None and result.peak is not None:
            phase = f"in {result.peak_phase}"
            rows.append(Row(SAVED, result.name, words, result.saved / MIB, "MiB", note=note))
            noted = "; ".join(filter(None, (phase, note)))
            rows.append(Row(PEAK, result.name, words, result.peak / MIB, "MiB", note=noted))
        rows += [
            Row(f"layer error {name}", result.name, words, error, "relative", note=note)
            for name, error in result.errors.items()
        ]
    return [replace(row, launch=report.case.launch.name) for row in rows]


def ratios(times: Sequence[float], base: Sequence[float]) -> Spread:
    """The spread of the ratios round by round: within a round the contenders follow each other, so
    that drift counts for both."""
    return spread([mine / theirs for mine, theirs in zip(times, base, strict=True)])


def layer_table(report: LayerReport) -> Table:
    case, baseline = report.case, report.results[0]
    table = _table(
        f"{case.words()} launch={case.launch.name}: largest load {_largest_load(report)}"
    )
    for column in ("layer", "forward", "forward+backward", f"of {baseline.name}", "TFLOP/s"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for column in ("saved MiB", "peak MiB", "worst error"):
        table.add_column(column, justify="right")
    for result in report.results:
        if result.error is None:
            table.add_row(*_layer_line(report, result, baseline))
    notes = [(result.name, result.error or result.wrong) for result in report.results]
    return _with_notes(table, notes)


def _layer_line(report: LayerReport, result: LayerResult, baseline: LayerResult) -> list[str]:
    both = spread(result.both)
    flops = 3 * report.case.shape.flops(report.case.tokens)
    ratio = ratios(result.both, baseline.both) if baseline.error is None else None
    worst = max(result.errors, key=lambda name: result.errors[name])
    return [
        result.name,
        _ranged(spread(result.forward), "ms"),
        _ranged(both, "ms"),
        "" if ratio is None else _ranged(ratio),
        f"{flops / both.median / 1e9:.3g}",
        "" if result.saved is None else f"{result.saved / MIB:.0f}",
        "" if result.peak is None else f"{result.peak / MIB:.0f} in {result.peak_phase}",
        f"{worst} {result.errors[worst]:.1e}",
    ]


def _largest_load(report: LayerReport) -> str:
    rates = sorted(report.rates_E, reverse=True)
    even = report.case.shape.top_k / len(rates)
    first = ", ".join(f"{rate:.1%}" for rate in rates[:4])
    return f"{rates[0] / even:.2f} of even (share of tokens: {first}, ...)"


def step_rows(shape: ModelShape, results: Sequence[StepResult], words: str) -> list[Row]:
    """Seconds, tokens a second, ratio, peaks by phase and the last loss of every contender."""
    base = results[0]
    rows = []
    for result in results:
        if result.error is not None:
            rows.append(Row(STEP, result.name, words, None, "s", note=f"error: {result.error}"))
            continue
        time = spread(result.seconds)
        rate = spread([shape.tokens / second for second in result.seconds])
        first = "" if result.first is None else f"the first one, not timed: {result.first:.3g} s"
        rows.append(Row.of(STEP, result.name, words, time, "s", note=first))
        rows.append(Row.of("step throughput", result.name, words, rate, "tokens/s"))
        if base.error is None:
            against = _against(result, base)
            rows.append(Row.of("step ratio", result.name, words, against, f"of {base.name}"))
        rows += [
            Row(f"{STEP_PEAK} in {phase}", result.name, words, peak / GIB, "GiB")
            for phase, peak in result.peaks.items()
        ]
        if result.peak is not None:
            phase, peak = result.peak
            rows.append(Row(STEP_PEAK, result.name, words, peak / GIB, "GiB", note=f"in {phase}"))
        rows.append(Row("step loss", result.name, words, result.losses[-1], "nats", note="last"))
    return rows


def step_table(shape: ModelShape, results: Sequence[StepResult], words: str) -> Table:
    base = results[0]
    table = _table(words)
    ratio = f"of {base.name}"
    for column in ("step", "seconds", ratio, "tokens/s", "peak GiB", "last loss", "first s"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for result in results:
        if result.error is not None:
            continue
        time, peak = spread(result.seconds), result.peak
        table.add_row(
            result.name,
            _ranged(time, "s"),
            _ranged(_against(result, base)) if base.error is None else "",
            f"{shape.tokens / time.median:,.0f}",
            "" if peak is None else f"{peak[1] / GIB:.1f} in {peak[0]}",
            f"{result.losses[-1]:.4f}",
            "" if result.first is None else f"{result.first:.2f}",
        )
    return _with_notes(table, [(result.name, result.error) for result in results])


def generate_rows(results: Sequence[GenerateResult], words: str, new_tokens: int) -> list[Row]:
    """Milliseconds of the whole generate() by new token (of every sequence at once), ratio and
    equal tokens."""
    base = results[0]
    rows = []
    for result in results:
        if result.error is not None:
            note = f"error: {result.error}"
            rows.append(Row(GENERATE, result.name, words, None, "ms a token", note=note))
            continue
        time = spread([one / new_tokens for one in result.times])
        rows.append(Row.of(GENERATE, result.name, words, time, "ms a token"))
        if base.error is None:
            ratio, unit = ratios(result.times, base.times), f"of {base.name}"
            rows.append(Row.of("generate ratio", result.name, words, ratio, unit))
        if result.same is not None:
            unit = f"of {base.name}'s tokens"
            rows.append(Row("generate equal tokens", result.name, words, result.same, unit))
    return rows


def generate_table(results: Sequence[GenerateResult], words: str, new_tokens: int) -> Table:
    base = results[0]
    table = _table(words)
    for column in ("generate", "a token", f"of {base.name}", "equal tokens"):
        table.add_column(column, justify="left" if column == "generate" else "right")
    for result in results:
        if result.error is None:
            table.add_row(
                result.name,
                _ranged(spread([one / new_tokens for one in result.times]), "ms"),
                _ranged(ratios(result.times, base.times)) if base.error is None else "",
                "" if result.same is None else f"{result.same:.1%}",
            )
    return _with_notes(table, [(result.name, result.error) for result in results])


def _against(result: StepResult, base: StepResult) -> Spread:
    """Contenders did not run side by side: their steps, over the baseline's median."""
    middle = spread(base.seconds).median
    return spread([second / middle for second in result.seconds])


def kernel_rows(profile: Profile, who: str, words: str, launch: str = "eager") -> list[Row]:
    """Each kernel's time, then the sum of all, listed or not, and the device's idle time."""
    rows = [
        Row("kernel", who, words, one.milliseconds, "ms", note=_words(one))
        for one in profile.kernels
    ]
    rows.append(Row("kernels in all", who, words, profile.total, "ms"))
    note = f"of {profile.span:.4g} ms from the first kernel's start to the last one's end"
    rows.append(Row("device idle", who, words, profile.idle, "ms", note=note))
    return [replace(row, launch=launch) for row in rows]


def _words(kernel: Kernel) -> str:
    return f"{kernel.share:.1%}, {kernel.calls} calls: {kernel.name}"


def kernel_table(profile: Profile, who: str) -> Table:
    table = _table(f"largest kernels of {who}")
    for column in ("ms", "share", "calls", "kernel"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for kernel in profile.kernels:
        share = f"{kernel.share:.1%}"
        name = escape(kernel.name[:100])
        table.add_row(f"{kernel.milliseconds:.2f}", share, str(kernel.calls), name)
    listed = sum(kernel.milliseconds for kernel in profile.kernels)
    share = f"{listed / (profile.total or 1):.1%}"
    table.add_section()
    table.add_row(f"{listed:.2f}", share, "", f"these {len(profile.kernels)}")
    table.add_row(f"{profile.total:.2f}", "100.0%", "", "all kernels")
    table.add_row(f"{profile.span:.2f}", "", "", "from the first one's start to the last one's end")
    table.add_row(f"{profile.idle:.2f}", "", "", "idle: of these, when none ran")
    return table


def curve_rows(curve: CurveReport, words: str) -> list[Row]:
    """The loss at each judged step; the note has the stock seeds' range."""
    if curve.error is not None:
        return [Row("loss curve", curve.name, words, None, "nats", note=f"error: {curve.error}")]
    return [
        Row(
            f"loss at step {verdict.step}",
            curve.name,
            words,
            verdict.loss,
            "nats",
            note=(
                f"{'within' if verdict.ok else 'OUTSIDE'} {verdict.low:.6g} to {verdict.high:.6g} "
                f"of the stock seeds; {verdict.loss - verdict.twin:+.2g} to the stock model of "
                f"its seed {curve.seed}"
            ),
        )
        for verdict in curve.verdicts
    ]


def curve_table(curve: CurveReport) -> Table:
    table = _table(f"loss of {curve.name}, seed {curve.seed}, in the range of the stock seeds")
    for column in ("step", "loss", "lowest", "highest", "to its stock twin", ""):
        table.add_column(column, justify="right")
    for verdict in curve.verdicts:
        table.add_row(
            str(verdict.step),
            *(f"{value:.4f}" for value in (verdict.loss, verdict.low, verdict.high)),
            f"{verdict.loss - verdict.twin:+.1e}",
            "within" if verdict.ok else "[red]outside[/]",
        )
    return _with_notes(table, [(curve.name, curve.error)])


def _with_notes(table: Table, notes: Sequence[tuple[str, str | None]]) -> Table:
    """Errors below the table: in a cell they would squeeze the numbers."""
    lines = [f"[red]{escape(name)}: {escape(note)}[/]" for name, note in notes if note]
    table.caption = "\n".join(lines) or None
    table.caption_justify = "left"
    return table


def _ranged(found: Spread, unit: str = "") -> str:
    return f"{found.median:.4g} {unit}".rstrip() + f" ({found.low:.4g} to {found.high:.4g})"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
