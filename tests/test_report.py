"""The report: its statistics against plain counting, and a page that stands alone."""

import csv
import html.parser
import itertools
import sys
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetk.errors import ConfigError, SaveFailedError
from moetk.io import RowFile, seal, write_file
from moetk.sweep import load_summary, write_csv, write_figures, write_parquet, write_report
from moetk.sweep.figures import colours, relative_load
from moetk.sweep.report import figure_blocks, headline, render
from moetk.sweep.summary import (
    bootstrap_interval,
    chance_agreement,
    paired_difference,
    summarise,
)

STEPS, WINDOWS = 8, [2, 4, 6, 8]


def result(loss, violation, **changes):
    return {
        "status": "ok",
        "initial_loss": 5.5,
        "final_loss": loss,
        "train_loss": [5.0] * STEPS,
        "held_out": [[0, 5.5], [4, loss + 0.3], [8, loss]],
        "batch_max_violation": [violation + step / 10 for step in range(STEPS)],
        "max_violation": violation,
        "max_violation_by_layer": [violation],
        "train_max_violation": violation / 2,
        "drop_fraction": 0.0,
        "unserved_fraction": 0.0,
        "causal": True,
        "load": {"steps": WINDOWS, "layers": {"0": [[8, 0, 4, 4]] * 4, "1": [[4, 4, 4, 4]] * 4}},
        **changes,
    }


def sweep_of(cells, baseline="none"):
    """(plan, rows) from {(arm, seed): result}."""
    names = list(dict.fromkeys(arm for arm, _ in cells))
    seeds = sorted({seed for _, seed in cells})
    part = {"name": "<b>Router</b>", "rate": 0.1}
    arm = {"router": part, "losses": [], "controllers": [part], "lr": 0.5, "backend": "grouped"}
    settings = {
        "sweep": {"name": "toy", "seeds": seeds, "steps": STEPS, "baseline": baseline},
        "model": {"experts": 4},
        "data": {"kind": "fake"},
        "train": {"lr": 1.0},
        "arms": dict.fromkeys(names, arm),
    }
    code = {"moetk": {"a.py": "1"}, "modules": {"mine.py": "2"}, "versions": {"torch": "2"}}
    plan = {
        "settings": settings,
        "data": {"kind": "fake", "sha256": "d" * 64, "files": 1234},
        "code": code,
        "source": "# <script>alert(1)</script>",
        "command": "moetk sweep sweep.toml",
        "cells": [{"key": f"{a}-{s}", "arm": a, "seed": s} for a, s in cells],
    }
    rows = [
        {
            "key": f"{name}-{seed}",
            "arm": name,
            "seed": seed,
            "config": {"steps": STEPS},
            "data": plan["data"],
            "code": {**code, "moetk": "c"},
            "result": found,
            "run": {"seconds": 1.5, "date": "2026-01-01", "processor": "<cpu>"},
        }
        for (name, seed), found in cells.items()
        if found is not None
    ]
    return plan, rows


def usual():
    return {
        ("none", 0): result(2.0, 2.0),
        ("sign", 0): result(1.9, 0.1),
        ("none", 1): result(2.2, 1.8),
        ("sign", 1): result(2.0, 0.2),
    }


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=4), st.sampled_from([0.5, 0.95]))
def test_the_interval_is_that_of_every_resample(values, level):
    low, high = bootstrap_interval(values, level)
    means = sorted(mean(drawn) for drawn in itertools.product(values, repeat=len(values)))
    tail = (1 - level) / 2
    assert sum(m < low for m in means) <= tail * len(means) + 1e-9
    assert sum(m > high for m in means) <= tail * len(means) + 1e-9
    assert min(values) <= low <= high <= max(values)


def test_many_seeds_are_drawn_the_same_each_time():
    values = [index / 10 for index in range(8)]
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values) and low < mean(values) < high
    assert chance_agreement(1) == 1.0 and chance_agreement(3) == 0.25


def test_differences_are_paired_by_seed():
    summary = summarise(*sweep_of(usual()))
    base, arm = summary.arms
    assert base.name == "none" and base.difference is None
    assert arm.difference.mean == pytest.approx(-0.15)
    assert (arm.difference.low, arm.difference.high) == pytest.approx((-0.2, -0.1))
    assert arm.difference.verdict == "lower, weakly" and arm.difference.n == 2
    assert [v.mean for v in arm.gap.values] == pytest.approx([0.0, -0.15, -0.15])
    assert arm.violation.steps == tuple(WINDOWS)
    assert arm.violation.values[0].mean == pytest.approx(0.15 + 0.05)
    assert arm.train_violation.mean == pytest.approx(0.075)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([-0.1, 0.2], "within noise"),
        ([0.1, 0.2], "higher, weakly"),
        ([0.1], "one seed"),
        ([-0.1] * 6, "lower"),
        ([0.0, 0.0], "within noise"),
    ],
)
def test_verdicts(differences, verdict):
    cells = {}
    for seed, difference in enumerate(differences):
        cells["none", seed] = result(2.0, 1.0)
        cells["arm", seed] = result(2.0 + difference, 1.0)
    assert summarise(*sweep_of(cells)).arms[1].difference.verdict == verdict


def test_seeds_that_one_side_lacks_are_not_compared():
    cells = usual()
    cells["none", 1] = {"status": "failed", "error": "x"}
    difference = summarise(*sweep_of(cells)).arms[1].difference
    assert difference.n == 1 and difference.mean == pytest.approx(-0.1)
    assert paired_difference([], []) is None


def test_the_baseline_comes_first_and_keeps_its_colour():
    cells = {("b", 0): result(2, 1), ("a", 0): result(2, 1), ("c", 0): result(2, 1)}
    summary = summarise(*sweep_of(cells, baseline="c"))
    assert [arm.name for arm in summary.arms] == ["c", "b", "a"]
    assert len(set(colours(summary).values())) == 3


def test_relative_load():
    assert relative_load([[8, 0, 4, 4], [0, 0, 0, 0]]) == [[2, 0, 1, 1], [0, 0, 0, 0]]


class Page(html.parser.HTMLParser):
    """Collects what a page would load, and checks that its tags close."""

    VOID = {"meta", "link", "br", "img", "hr", "use", "input", "wbr"}

    def __init__(self, text):
        super().__init__()
        self.loads, self.open, self.tags, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:")):
                self.loads.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_escapes():
    text = render(summarise(*sweep_of(usual())))
    page = Page(text)
    assert page.loads == [] and "script" not in page.tags and "@import" not in text
    assert page.tags.count("svg") == 4 == page.tags.count("details") - 1
    assert "<b>Router</b>" in page.text and "<script>alert(1)</script>" in page.text
    assert "−0.150" in page.text and "lower, weakly" in page.text and "50 % of sweeps" in page.text
    assert "moetk sweep sweep.toml" in page.text and "d" * 64 in page.text


def test_every_figure_has_its_table():
    summary = summarise(*sweep_of(usual()))
    blocks = {block.name: block for block in figure_blocks(summary)}
    assert list(blocks) == ["loss", "violation", "load", "tradeoff"]
    for block in blocks.values():
        assert block.svg.startswith("<svg") and block.table.rows
        assert all(len(row) == len(block.table.columns) for row in block.table.rows)
    assert blocks["loss"].table.columns == ("step", "none, loss", "sign, loss", "sign, minus none")
    assert blocks["loss"].table.rows[-1] == (
        "8",
        "2.100 (2.000 to 2.200)",
        "1.950 (1.900 to 2.000)",
        "-0.150 (-0.200 to -0.100)",
    )
    assert blocks["load"].table.rows[0] == ("none", "0", "0", "2", "2.00", "0.00", "1.00", "1.00")
    assert len(blocks["load"].table.rows) == 2 * 2 * 4


def test_an_arm_that_sees_the_future_is_not_ranked():
    cells = usual()
    cells["sign", 1] = result(0.1, 0.0, causal=False, drop_fraction=None)
    summary = summarise(*sweep_of(cells))
    assert summary.arms[1].causal is False
    assert headline(summary) == [
        "Most even load in the last quarter of training: none, MaxVio 0.95."
    ]
    text = Page(render(summary)).text
    assert "not comparable" in text and "sees the future" in text


def test_nothing_is_ranked_against_a_baseline_that_sees_the_future():
    cells = usual()
    cells["none", 1] = result(0.1, 0.0, causal=False)
    summary = summarise(*sweep_of(cells))
    assert summary.arms[1].difference is None and summary.arms[1].gap.steps == ()
    assert headline(summary) == [
        "Most even load in the last quarter of training: sign, MaxVio 0.08.",
        "none, the baseline, sees the future: no loss is compared with it.",
    ]
    assert "difference" not in figure_blocks(summary)[0].about
    text = Page(render(summary)).text
    assert "Not compared with none, which sees the future" in text and "weakly" not in text


def test_the_heat_map_shows_one_seed_of_all_arms_and_names_it():
    def block(cells):
        summary = summarise(*sweep_of(cells))
        return next(block for block in figure_blocks(summary) if block.name == "load")

    cells = usual()
    assert "seed 0;" in block(cells).about
    cells["sign", 0] = {"status": "failed", "error": "x"}
    one = block(cells)
    assert "seed 1;" in one.about and {row[1] for row in one.table.rows} == {"1"}
    cells["none", 1] = {"status": "failed", "error": "x"}
    each = block(cells)
    assert "a seed of each arm" in each.about
    assert {row[:2] for row in each.table.rows} == {("none", "0"), ("sign", "1")}
    assert "none, seed 0" in each.svg and "sign, seed 1" in each.svg


def test_a_sweep_with_failures_and_holes_still_reports():
    cells = usual()
    cells["sign", 0] = {"status": "failed", "error": "killed by SIGKILL <oom>"}
    cells["sign", 1] = None
    cells["late", 0] = {"status": "diverged", "error": "nan", "final_loss": None}
    summary = summarise(*sweep_of(cells))
    assert summary.missing == 1 and len(summary.bad) == 2
    text = Page(render(summary)).text
    assert "killed by SIGKILL <oom>" in text and "1 not run yet" in text
    assert "Run them again with --retry diverged --retry failed." in text


def test_nothing_ended_well():
    cells = {("none", 0): {"status": "timeout", "error": "late"}}
    text = Page(render(summarise(*sweep_of(cells)))).text
    assert "No cell has anything to draw." in text


@pytest.fixture
def folder(tmp_path):
    plan, rows = sweep_of(usual())
    write_file(tmp_path / "sweep.json", seal(plan))
    file = RowFile(tmp_path / "results.jsonl")
    for row in reversed(rows):
        file.append(row)
    return tmp_path


def test_files_beside_the_page(folder):
    summary = load_summary(folder)
    write_report(summary, folder / "page.html")
    write_csv(summary, folder / "cells.csv")
    write_parquet(summary, folder / "cells.parquet")
    write_figures(summary, folder / "figures")
    assert (folder / "page.html").read_text() == render(summary)  # the same each time
    records = list(csv.DictReader((folder / "cells.csv").open()))
    assert [(r["arm"], r["seed"], r["final_loss"]) for r in records] == [
        ("none", "0", "2.0"),
        ("sign", "0", "1.9"),
        ("none", "1", "2.2"),
        ("sign", "1", "2.0"),
    ]
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / "cells.parquet").to_pylist()
    assert table[0]["train_loss"] == [5.0] * STEPS and table[1]["arm"] == "sign"
    names = sorted(path.name for path in (folder / "figures").iterdir())
    assert names == ["load.svg", "loss.svg", "tradeoff.svg", "violation.svg"]


def test_figures_into_a_file_are_refused(folder):
    with pytest.raises(SaveFailedError, match="results.jsonl cannot be a folder of figures"):
        write_figures(load_summary(folder), folder / "results.jsonl")


def test_folders_without_a_sweep(tmp_path, folder):
    with pytest.raises(ConfigError, match="holds no sweep"):
        load_summary(tmp_path / "none")
    (folder / "results.jsonl").unlink()
    with pytest.raises(ConfigError, match="holds no finished cell yet"):
        load_summary(folder)


@pytest.mark.parametrize(
    ("module", "write", "message"),
    [
        ("jinja2", write_report, "A report needs jinja2"),
        ("matplotlib", write_report, "A figure needs matplotlib"),
        ("matplotlib", write_figures, "A figure needs matplotlib"),
        ("pyarrow", write_parquet, "--parquet needs pyarrow"),
    ],
)
def test_missing_packages_are_named(folder, monkeypatch, module, write, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=message) as caught:
        write(load_summary(folder), folder / "out")
    assert "moetk[sweep]" in str(caught.value)
