"""What a part makes of its experts' sum, where its values do not show it."""

import copy

import pytest
import torch

from moetk import MoELayer, compare
from tests.equivalence.steps import bank, inputs, mixtral
from tests.layers.versions import block_of

CHANGES = {
    "gradient scaled by a constant": lambda y: 0.5 * y + 0.5 * y.detach(),
    "no gradient: detached": lambda y: y.detach(),
}


def changed(change):
    class Changed(MoELayer):
        def forward(self, x, ctx=None):
            y, routing = super().forward(x, ctx)
            return change(y), routing

    return Changed(mixtral(), bank())


@pytest.mark.parametrize("cause", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_changes_behind_the_experts_sum_is_seen(cause, dtype):
    layer, wrong = MoELayer(mixtral(), bank()).to(dtype), changed(CHANGES[cause]).to(dtype)
    report = compare(layer, wrong, inputs().to(dtype))
    assert all(row.equal == 1.0 for row in report.rows if not row.stage.startswith("grad "))
    assert report.first is not None and report.first.stage.startswith("grad "), report.table()
    assert report.cause == cause
    assert compare(wrong, copy.deepcopy(wrong), inputs().to(dtype)).ok


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("backend", [None, "reference"], ids=["stock", "replaced"])
def test_so_it_is_in_a_block_of_transformers(family, backend):
    block, x, ctx = block_of(family, torch.float32, backend)
    wrong, scaled = copy.deepcopy(block), CHANGES["gradient scaled by a constant"]
    kind = type(wrong)
    wrong.__class__ = type(
        kind.__name__, (kind,), {"forward": lambda s, *a, **k: scaled(kind.forward(s, *a, **k))}
    )
    report = compare(block, wrong, x, ctx=ctx)
    assert report.first is not None and report.first.stage.startswith("grad "), report.table()
    assert report.cause == "gradient scaled by a constant"


def test_an_output_that_is_the_experts_sum_is_no_stage_of_its_own():
    class Passing(MoELayer):
        def forward(self, x, ctx=None):
            y, routing = super().forward(x, ctx)
            return y.clone().view_as(x), routing

    report = compare(MoELayer(mixtral(), bank()), Passing(mixtral(), bank()), inputs())
    assert report.ok and "output" not in {row.stage for row in report.rows}
