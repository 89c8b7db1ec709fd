"""Experts that multiply with copies of their matrices: what was not overheard is not missing."""

import pytest
import torch
from torch.nn.functional import silu

from moetk import compare
from moetk.routing import TokenChoice
from tests.equivalence.steps import Loop, bank, inputs, loop, routing
from tests.equivalence.test_planted import biased_bank

COPIED = 3


def _by_copies(self, x_NH, expert):
    """One expert's matrices are copied before they are used, as a cast copies them."""
    if expert != COPIED:
        return Loop.expert(self, x_NH, expert)
    gate_NI, up_NI = (x_NH @ self.gate_up_proj[expert].clone().T).chunk(2, -1)
    return (silu(gate_NI) * up_NI) @ self.down_proj[expert].clone().T


def _wrongly_by_copies(self, x_NH, expert):
    return _by_copies(self, x_NH, expert) * (1.5 if expert == COPIED else 1.0)


def _down_by_copies(self, inner_NI, expert):
    weight_HI = self.down_proj[expert]
    return inner_NI @ (weight_HI.clone() if expert == COPIED else weight_HI).T


def _down_in_bfloat16(self, inner_NI, expert):
    product = inner_NI.bfloat16() @ self.down_proj[expert].T.bfloat16()
    return product.to(inner_NI.dtype)


def _skipped(self, routing: TokenChoice, expert):
    tokens_N, weights_N = Loop.taken(self, routing, expert)
    rows = slice(0, 0) if expert == COPIED else slice(None)
    return tokens_N[rows], weights_N[rows]


def _report(right=bank, dtype=torch.float32, **steps):
    return compare(
        right().to(dtype), loop(right(), **steps).to(dtype), inputs().to(dtype), routing=routing()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "steps", [{"expert": _by_copies}, {"down": _down_by_copies}], ids=["both products", "one"]
)
def test_an_expert_that_uses_copies_is_the_same_function(steps, dtype):
    report = _report(dtype=dtype, **steps)
    assert report.ok, report.table()


@pytest.mark.parametrize("right", [bank, biased_bank])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_that_is_left_out_is_missing_in_what_was_dispatched(right, dtype):
    first = _report(right, dtype, taken=_skipped).first
    assert first is not None and first.stage == "dispatched"


def test_an_expert_that_nobody_hears_and_errs_shows_in_the_sum():
    first = _report(expert=_wrongly_by_copies).first
    assert first is not None and first.stage == "combined"


def test_a_product_of_cast_matrices_is_not_taken_for_a_missing_one():
    report = _report(down=_down_in_bfloat16)
    assert report.first is not None and report.first.stage == "combined", report.table()
    assert report.cause == "unknown"
