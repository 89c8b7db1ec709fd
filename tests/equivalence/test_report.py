"""What a report says and draws."""

import json
from dataclasses import replace

import pytest
import torch

import moetk
from moetk.equivalence import table as tables
from moetk.equivalence.judge import Verdict
from moetk.equivalence.page import render
from moetk.equivalence.plot import choice_margins
from moetk.errors import ConfigError
from tests.equivalence.reported import E, H, K, T, hidden, layer, one_wrong, stages

# The table


def test_a_table_of_equals(alike):
    text = str(alike)
    assert text == alike.table()
    assert text.splitlines()[0].split()[:3] == ["stage", "shape", "dtype"]
    assert "verdict   no stage differs" in text and "differs" not in text.split("verdict   ")[0]
    assert max(map(len, text.splitlines())) <= 120
    assert alike.cause == "" and alike.explain() in text


def test_a_table_names_the_stage_the_cause_and_the_fix(unnormalised):
    assert unnormalised.first.stage == "weights"
    lines = unnormalised.table().splitlines()
    (row,) = [line for line in lines if line.startswith("weights")]
    assert row.endswith("differs") and f"{2 * T}x{K}" in row and "fp32" in row
    assert any(line.startswith("cause ") and "renormal" in line for line in lines)
    for cause in unnormalised.causes:
        assert cause.fix.split()[0] in unnormalised.explain()
    assert max(map(len, lines)) <= 120


def test_the_worst_index_is_named_by_its_axes():
    x = torch.zeros(T, H)
    x[7, 0] = 2.0
    report = moetk.compare(stages, one_wrong, x)
    assert report.first.stage == "scores"
    assert tables.place(report.first) == "token 7, expert 4"
    assert tables.place(replace(report.first, worst=None)) == "-"
    assert tables.place(replace(report.first, worst=(1, 2, 3))) == "(1, 2, 3)"
    assert tables.place(replace(report.first, stage="grad up", worst=(1, 0, 3))) == (
        "token 1, slot 0, col 3"
    )


def test_cells_say_how_two_sides_differ_in_form(alike):
    row = replace(alike.rows[0], other_shape=(T, E + 1), other_dtype=torch.bfloat16)
    assert tables.cells(row)[1:3] == (f"{T}x{E}|{T}x{E + 1}", "fp32|bf16")
    assert tables.cells(replace(row, dtype=torch.complex64))[2] == "complex64|bf16"
    assert tables.cells(replace(row, shape=()))[1].startswith("()|")


def test_a_verdict_is_a_dash_where_nothing_was_judged(alike):
    row = replace(alike.rows[0], function=None, local=None, accumulated=None)
    assert tables.verdict(row) == "-"
    assert tables.verdict(replace(row, stage="counts")) == "ok"
    assert tables.verdict(replace(row, ok=False)) == "differs"


def test_numbers_are_short_and_never_round_to_a_claim():
    assert tables.percent(1.0) == "100%" and tables.percent(0.99999) == "99.9%"
    assert tables.number(0.0) == "0" and tables.number(1.25e-7) == "1.2e-07"
    assert tables.number(None) == tables.number(float("nan")) == "-"
    assert tables.number(float("inf")) == "inf"
    verdict = Verdict("x", 3.0, 1.0, 0.0)
    assert tables.ratio(verdict) == "3.00" and tables.ratio(None) == "-"
    assert tables.ratio(replace(verdict, error=float("nan"))) == "-"
    assert tables.ratio(replace(verdict, error=5e4)) == "5e+04"


def test_choices_that_differ_are_counted_and_their_error_is_told_apart():
    a, b = layer(), layer()
    with torch.no_grad():
        b.router.weight[0] += 0.2
    report = moetk.compare(a, b, hidden(40))
    assert report.choices.flipped > 0
    line = tables.choices_line(report)
    whole = next(row for row in report.rows if row.stage == "combined")
    assert f"{report.choices.flipped} flipped, of 40 tokens" in line
    assert f"{whole.differing:.1e} over the others" in line


# JSON


def test_json_holds_everything_under_pinned_keys(unnormalised, tmp_path):
    text = unnormalised.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == text
    found = json.loads(text)
    assert list(found) == [
        "format", "ok", "a", "b", "first", "cause", "causes", "choices", "rows", "notes", "x",
        "seed", "environment",
    ]  # fmt: skip
    assert list(found["rows"][0]) == [
        "stage", "ok", "why", "shape", "other_shape", "dtype", "other_dtype", "function", "local",
        "accumulated", "equal", "largest", "worst", "ulp", "alike", "differing",
    ]  # fmt: skip
    assert [row["stage"] for row in found["rows"]] == [row.stage for row in unnormalised.rows]
    assert found["first"] == "weights" and found["ok"] is False
    assert found["x"] == {"shape": [2, T, H], "dtype": "float32"}
    assert found["environment"]["moetk"] == moetk.__version__
    assert found["environment"]["torch"] == torch.__version__
    row = next(row for row in found["rows"] if row["stage"] == "weights")
    assert row["local"]["error"] == unnormalised.first.local.error and not row["local"]["ok"]


def test_json_keeps_what_is_not_finite(alike):
    rows = (replace(alike.rows[0], function=float("inf"), largest=float("nan")),)
    (row,) = json.loads(replace(alike, rows=rows).to_json())["rows"]
    assert row["function"] == "inf" and row["largest"] == "nan"


# Figures


@pytest.mark.parametrize(
    ("kind", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_a_plot_is_written(unnormalised, tmp_path, kind, magic):
    figure = unnormalised.plot(tmp_path / f"plot.{kind}")
    assert (tmp_path / f"plot.{kind}").read_bytes().startswith(magic)
    errors, margins = figure.axes
    assert [label.get_text() for label in errors.get_xticklabels()][0] == "logits"
    words = " ".join(text.get_text() for text in errors.texts)
    assert "first: weights" in words
    assert margins.get_ylabel() == "tokens"


def test_a_plot_needs_a_name_that_says_its_kind(alike, tmp_path):
    with pytest.raises(ConfigError, match=r"plot.jpg is not the name of a figure; end it in .svg"):
        alike.plot(tmp_path / "plot.jpg")


def test_margins_are_of_the_last_chosen_and_mark_who_chose_otherwise():
    a, b = layer(), layer()
    with torch.no_grad():
        b.router.weight[0] += 0.2
    report = moetk.compare(a, b, hidden(40))
    margins_T, tied_T, flipped_T = choice_margins(report)
    best = report.own_a.values["scores"].double().sort(-1, descending=True).values
    assert torch.equal(margins_T, best[:, K - 1] - best[:, K])
    assert int(flipped_T.sum()) == report.choices.flipped
    assert int(tied_T.sum()) == report.choices.tied


def test_without_a_choice_there_is_one_panel():
    report = moetk.compare(lambda x: {"logits": x}, lambda x: {"logits": x * 1}, hidden(T))
    assert choice_margins(report) is None and len(report.plot().axes) == 1


def test_a_stage_of_whole_numbers_is_marked_between_the_errors():
    def shifted(x_TH):
        found = stages(x_TH)
        return {**found, "indices": (found["indices"] + 1) % E}

    report = moetk.compare(stages, shifted, hidden(T))
    assert report.first.stage == "indices"
    texts = [text.get_text() for text in report.plot().axes[0].texts]
    assert any(text.startswith("first: indices") for text in texts)


# The page


def test_a_page_stands_alone_and_escapes(unnormalised):
    page = render(replace(unnormalised, b="<b>mine</b>"), "moetk compare a:b c:d")
    assert "<b>mine</b>" not in page and "&lt;b&gt;mine&lt;/b&gt;" in page
    assert "They first differ at weights" in page and "moetk compare a:b c:d" in page
    assert all(f"<b>{cause.name}</b>" in page for cause in unnormalised.causes)
    assert "src=" not in page and "<script" not in page and "@import" not in page
    assert torch.__version__ in page


def test_a_page_of_equals(alike):
    page = render(alike)
    assert "No stage differs." in page and "What to look at" not in page
