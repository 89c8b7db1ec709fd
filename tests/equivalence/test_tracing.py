"""moetk.trace, and what a report and a trace look like where they are printed."""

import pytest
import torch

import moetk
from moetk.equivalence.stored import load_trace, save_trace
from moetk.errors import EquivalenceError
from tests.equivalence.reported import E, H, K, T, hidden, layer


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


def test_what_is_printed_names_tensors_and_holds_none(unnormalised):
    assert len(repr(unnormalised)) < 2000 and "tensor(" not in repr(unnormalised)
    assert f"weights ({2 * T}, {K})" in repr(unnormalised.own_a)
    assert f"grad router.weight ({E}, {H})" in repr(unnormalised.own_a)
    assert repr(unnormalised.question) == "Question(seed=0)"


def test_a_stored_trace_is_printed_alike(tmp_path):
    save_trace(moetk.trace(layer(), hidden(T)), tmp_path / "trace", scale=2.5)
    stored = load_trace(tmp_path / "trace")
    assert repr(stored).startswith("StoredTrace(") and f"logits ({T}, {E})" in repr(stored)
