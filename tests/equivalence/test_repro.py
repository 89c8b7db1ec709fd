"""The test that a report writes fails with the defect and passes without."""

import runpy
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import moetk
from moetk.equivalence.repro import expected
from moetk.equivalence.source import source_of
from moetk.errors import ConfigError, EquivalenceError, SaveFailedError
from tests.equivalence.reported import E, K, T, hidden, layer, one_wrong, stages, swapped


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
from tests.equivalence.reported import layer, swapped

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
    assert f"from {one_wrong.__module__} import one_wrong" in path.read_text()
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
