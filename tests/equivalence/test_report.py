"""What a report says, draws and writes; the test it writes fails with the defect and passes
without."""

import copy
import json
import runpy
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moetk
from moetk.equivalence import table as tables
from moetk.equivalence.fewest import fewest, narrowed, part
from moetk.equivalence.judge import Verdict
from moetk.equivalence.page import render
from moetk.equivalence.plot import choice_margins
from moetk.equivalence.report import Question
from moetk.equivalence.repro import expected
from moetk.equivalence.source import source_of
from moetk.errors import ConfigError, EquivalenceError, SaveFailedError
from moetk.routers import MixtralRouter

T, H, E, K, I = 12, 16, 6, 2, 8


def layer(*, renormalise=True, seed=0):
    torch.manual_seed(seed)
    router = MixtralRouter(H, E, K, renormalise=renormalise)
    built = moetk.MoELayer(router, moetk.ExpertBank(H, E, I))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.4)
    return built


def hidden(*shape, seed=1):
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(seed))


def swapped(good):
    """Gate and up rows in the wrong order."""
    bad = copy.deepcopy(good)
    with torch.no_grad():
        weight = bad.experts.gate_up_proj
        weight.copy_(weight.roll(I, 1))
    return bad


@pytest.fixture(scope="module")
def alike():
    return moetk.compare(layer(), layer(), hidden(T))


@pytest.fixture(scope="module")
def unnormalised():
    return moetk.compare(layer(), layer(renormalise=False), hidden(2, T))


def stages(x_TH):
    """A stage function: what a router of another framework might show."""
    weight_EH = torch.linspace(-1, 1, E * H, dtype=x_TH.dtype).view(E, H).cos()
    logits_TE = x_TH @ weight_EH.T
    scores_TE = logits_TE.softmax(-1)
    weights_TK, indices_TK = scores_TE.topk(K)
    return {"logits": logits_TE, "scores": scores_TE, "indices": indices_TK, "weights": weights_TK}


def one_wrong(x_TH):
    """One score of the tokens whose first number is above 1.5."""
    found = stages(x_TH)
    scores_TE = found["scores"].clone()
    scores_TE[:, 4] += 1e-3 * (x_TH[:, 0] > 1.5)
    return {**found, "scores": scores_TE}


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


# The fewest tokens


@settings(max_examples=40)
@given(st.integers(1, 20), st.data())
def test_fewest_finds_the_culprits(n, data):
    culprits = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=2))
    tried = []

    def fails(units):
        tried.append(list(units))
        return culprits <= set(units)

    assert fewest(range(n), fails) == sorted(culprits)
    assert len(tried) <= 64


def test_one_token_is_left_where_one_is_wrong():
    x = hidden(T).clamp(-1, 1)
    x[5, 0] = 2.0
    report = narrowed(moetk.compare(stages, one_wrong, x))
    assert torch.equal(report.question.x, x[5:6])


def test_sequences_stay_whole():
    x = hidden(4, 3).clamp(-1, 1)
    x[2, 1, 0] = 2.0
    report = narrowed(moetk.compare(stages, one_wrong, x))
    assert torch.equal(report.question.x, x[2:3])


def test_a_part_of_a_question_takes_what_belongs_to_its_tokens():
    x = hidden(3, 4)
    ctx = moetk.RouterContext(
        token_ids=torch.arange(12), token_mask=torch.ones(12, dtype=torch.bool), batch_shape=(3, 4)
    )
    routing = moetk.TokenChoice(torch.arange(12).view(12, 1) % E, torch.ones(12, 1), E)
    found = part(Question(None, None, x, ctx, routing), [0, 2])
    tokens = [0, 1, 2, 3, 8, 9, 10, 11]
    assert torch.equal(found.x, x[[0, 2]]) and found.ctx.batch_shape == (2, 4)
    assert found.ctx.token_ids.tolist() == tokens and found.ctx.positions is None
    assert found.routing.experts_TK.flatten().tolist() == [t % E for t in tokens]
    flat = part(Question(None, None, x.flatten(0, 1), ctx, routing), [1, 11])
    assert flat.ctx.token_ids.tolist() == [1, 11] and flat.ctx.batch_shape is None


# The test that a report writes


def run(path):
    """The written test, as pytest would call it."""
    (function,) = [f for name, f in runpy.run_path(str(path)).items() if name.startswith("test_")]
    function()


def test_stored_values_fail_until_the_code_is_right(unnormalised, tmp_path):
    path = unnormalised.repro(tmp_path / "repro")
    assert path == tmp_path / "repro" / "test_repro.py"
    with pytest.raises(AssertionError):
        run(path)
    text = path.read_text()
    assert "weights differs" in text and 'x: T["x"]' in text and 'T["given.indices"]' in text
    torch.save(layer().router.weight.detach(), tmp_path / "weight.pt")
    right = (
        "import torch\n"
        f"    weight_EH = torch.load({str(tmp_path / 'weight.pt')!r}).double()\n"
        '    scores_TE = (T["x"].flatten(0, 1).double() @ weight_EH.T).softmax(-1)\n'
        '    weights_TK = scores_TE.gather(1, T["given.indices"])\n'
        "    return weights_TK / weights_TK.sum(-1, keepdim=True)"
    )
    path.write_text(text.replace('return T["b"]', right))
    run(path)
    path.write_text(text.replace('return T["b"]', right.partition(" / ")[0]))
    with pytest.raises(AssertionError):
        run(path)


MODULE = """
import torch
from tests.equivalence.test_report import layer, swapped

def good():
    return layer()

def bad():
    return DEFECT(layer())
"""


def test_parts_that_can_be_built_are_compared_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = tmp_path / "my_parts_of_a_repro.py"
    mine.write_text(MODULE.replace("DEFECT", "swapped"))
    ctx = moetk.RouterContext(token_ids=torch.arange(2 * T), batch_shape=(2, T))
    report = moetk.compare(layer(), swapped(layer()), hidden(2, T), ctx=ctx)
    path = report.repro(tmp_path / "repro", "my_parts_of_a_repro:good", "my_parts_of_a_repro:bad")
    text = path.read_text()
    assert "from my_parts_of_a_repro import bad" in text and f"batch_shape=(1, {T})" in text
    with pytest.raises(AssertionError, match="gate and up swapped"):
        run(path)
    mine.write_text(MODULE.replace("DEFECT", ""))
    monkeypatch.delitem(sys.modules, "my_parts_of_a_repro")
    run(path)


def test_functions_that_were_compared_need_no_builder(tmp_path):
    x = hidden(T).clamp(-1, 1)
    x[5, 0] = 2.0
    path = moetk.compare(stages, one_wrong, x).repro(tmp_path / "repro")
    assert f"from {__name__} import one_wrong" in path.read_text()
    with pytest.raises(AssertionError, match="scores"):
        run(path)


def test_a_bank_takes_its_routing_along(tmp_path):
    good = layer()
    routing = moetk.TokenChoice(torch.arange(T).view(T, 1) % E, torch.full((T, 1), 0.5), E)
    report = moetk.compare(good.experts, swapped(good).experts, hidden(T), routing=routing)
    path = report.repro(tmp_path / "repro")
    text = path.read_text()
    assert 'T["given.indices"]' in text and 'T["given.weights"]' in text
    with pytest.raises(AssertionError):
        run(path)
    path.write_text(text.replace('return T["b"]', 'return T["a"]'))
    run(path)


class Clipped(nn.Module):
    """The layer, with its gradient clipped on the way back."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x_TH, ctx):
        logits = nn.functional.linear(x_TH, self.inner.weight)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        scores = logits.softmax(-1)
        weights, indices = scores.topk(K)
        weights = weights / weights.sum(-1, keepdim=True)
        return moetk.TokenChoice(indices, weights, E, logits, scores)


def test_a_gradient_comes_with_the_gradient_that_entered(tmp_path):
    bad = layer()
    bad.router = Clipped(bad.router)
    report = moetk.compare(layer(), bad, hidden(T))
    assert report.first.stage.startswith("grad ")
    path = report.repro(tmp_path / "repro")
    assert 'grad combined: T["given.grad combined"]' in path.read_text()
    with pytest.raises(AssertionError):
        run(path)


def test_in_low_precision_the_expected_value_is_the_truth():
    class Low(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x_TH, ctx):
            found = self.inner(x_TH, ctx)
            rough = found.weights_TK.bfloat16().to(found.weights_TK.dtype)
            return replace(found, weights_TK=rough)

    bad = layer()
    bad.router = Low(bad.router)
    report = moetk.compare(layer(), bad, hidden(T))
    assert report.first.stage == "weights"
    wanted = expected(report)
    assert wanted.dtype == torch.float64
    error = (report.evidence.found.double() - wanted).norm() / wanted.norm()
    assert error > report.evidence.tolerance


def test_where_nothing_differs_there_is_nothing_to_write(alike, tmp_path):
    with pytest.raises(EquivalenceError, match="does what .* does: there is nothing to show"):
        alike.repro(tmp_path / "repro")


def test_a_folder_that_is_there_is_not_written_over(unnormalised, tmp_path):
    (tmp_path / "repro").mkdir()
    (tmp_path / "repro" / "mine").write_text("kept")
    with pytest.raises(SaveFailedError):
        unnormalised.repro(tmp_path / "repro")
    assert (tmp_path / "repro" / "mine").read_text() == "kept"


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (lambda: None, "has no name that a test can import"),
        ("nowhere_at_all:build", "'nowhere_at_all:build' cannot be imported: No module named"),
        ("json:build", "module 'json' has no 'build'"),
        ("math:pi", "'math:pi' is a float, not a function"),
        ("no/such/folder", "no/such/folder is not a folder"),
    ],
)
def test_a_builder_that_cannot_be_written_down_is_refused(builder, message):
    with pytest.raises(ConfigError, match=message):
        source_of(builder)


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match="holds no config.json, so it is no checkpoint"):
        source_of(tmp_path)


# moetk.trace


def test_a_trace_holds_values_and_gradients():
    made, x = layer(), hidden(T)
    seen = moetk.trace(made, x)
    y, routing = made(x)
    assert torch.equal(seen.values["combined"], y)
    assert torch.equal(seen.values["indices"], routing.experts_TK)
    again = moetk.trace(made, x, seed=1)
    assert not torch.equal(seen.grads["x"], again.grads["x"])
    assert all(parameter.grad is None for parameter in made.parameters())


def test_what_is_no_part_is_refused():
    with pytest.raises(EquivalenceError):
        moetk.trace(3, hidden(T))
