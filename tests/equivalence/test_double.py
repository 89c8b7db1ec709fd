"""The exact twin: which casts it takes for declarations, and what cannot be run in it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moetk import MoELayer, compare
from moetk.equivalence.double import InDouble, still_in_double
from moetk.kernels.selection import gather, normalise
from tests.equivalence.steps import bank, inputs, loop, mixtral, routing

CASTS = {
    "to": lambda x, dtype: x.to(dtype),
    "to dtype=": lambda x, dtype: x.to(dtype=dtype),
    "type": lambda x, dtype: x.type(dtype),
    "method": lambda x, dtype: getattr(x, _METHODS[dtype])(),
    "softmax": lambda x, dtype: x.softmax(-1, dtype=dtype),
}
_METHODS = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "half"}
NARROW = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("own", _METHODS)
def test_the_models_own_dtype_and_float32_are_widened_and_no_other(cast, own):
    x = torch.zeros(2, 3, dtype=torch.float64)
    with InDouble(own):
        found = {dtype: CASTS[cast](x, dtype).dtype for dtype in _METHODS}
    widened = {dtype for dtype, got in found.items() if got == torch.float64}
    assert widened == {torch.float32, own}


@pytest.mark.parametrize("own", _METHODS)
def test_what_runs_later_is_in_the_same_twin(own):
    with InDouble(own):
        later = still_in_double()
    assert later.own == own
    with still_in_double() as nothing:
        assert nothing is None


def _rounded_weights(self, scores_TE, ids_TK, choice_TE, logits_TE):
    return normalise(gather(scores_TE, ids_TK)).to(torch.bfloat16)


def _cast_to_the_logits(self, scores_TE, ids_TK, choice_TE, logits_TE):
    return normalise(gather(scores_TE, ids_TK)).to(logits_TE.dtype)


def test_a_cast_to_the_models_own_dtype_is_no_difference():
    """`.to(torch.bfloat16)` and `.to(x.dtype)` of a bfloat16 model are bitwise the same."""
    routers = [mixtral(weigh=weigh) for weigh in (_cast_to_the_logits, _rounded_weights)]
    report = compare(*(one.to(torch.bfloat16) for one in routers), inputs().to(torch.bfloat16))
    assert report.ok, report.table()
    assert all(row.equal == 1.0 for row in report.rows)
    assert all(row.function == 0 for row in report.rows if row.stage == "weights")


def test_the_same_cast_shows_in_a_float32_model():
    report = compare(mixtral(weigh=_cast_to_the_logits), mixtral(weigh=_rounded_weights), inputs())
    assert report.first is not None and report.first.stage == "weights", report.table()
    assert report.cause == "rounded to bfloat16"


@pytest.mark.parametrize("dtype", NARROW)
def test_a_cast_on_the_way_to_the_experts_sum_is_judged_as_rounding(dtype):
    """What was fp32 and is rounded to the model's dtype costs a rounding, not a function."""
    right, other = bank(), loop(bank(), weigh=lambda s, y, w: (y * w[:, None]).to(dtype))
    asked = {"routing": routing()}
    report = compare(right.to(dtype), other.to(dtype), inputs().to(dtype), **asked)
    assert report.ok, report.table()


class Checkpointed(MoELayer):
    """A layer that is run again in backward, where no mode is in force."""

    def forward(self, x, ctx=None):
        return checkpoint(super().forward, x, ctx, use_reentrant=False)


@pytest.mark.parametrize("part", ["right", "wrong"])
def test_a_checkpointed_layer_is_judged_in_its_own_dtype(part):
    wrong = {"weigh": lambda self, s, ids, c, l: gather(s, ids)} if part == "wrong" else {}
    report = compare(MoELayer(mixtral(), bank()), Checkpointed(mixtral(**wrong), bank()), inputs())
    assert "not judged as a function in fp64: CheckpointError" in " ".join(report.notes)
    assert not any("was not judged" in note for note in report.notes)
    assert report.cause == ("renormalisation missing" if wrong else ""), report.table()
