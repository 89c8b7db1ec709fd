"""Stages that the reference's way of running hides are those of its plain implementation."""

import copy

import pytest
import torch

from moetk import MoELayer, compare
from tests.equivalence.steps import bank, inputs, loop, mixtral
from tests.layers.versions import block_of


def _run_by(implementation, block):
    block = copy.deepcopy(block)
    for one in block.modules():
        if getattr(one, "config", None) is not None:
            one.config = copy.deepcopy(one.config)
            one.config._experts_implementation = implementation
    return block


def _swapped(block):
    block = copy.deepcopy(block)
    with torch.no_grad():
        weight_EJH = block.experts.gate_up_proj
        weight_EJH.copy_(torch.cat(weight_EJH.chunk(2, 1)[::-1], 1))
    return block


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_defect_is_found_at_a_stage_that_the_reference_hides(implementation, dtype):
    block, x, ctx = block_of("mixtral", dtype)
    hiding = _run_by(implementation, block)
    report = compare(hiding, _swapped(block), x, ctx=ctx)
    assert (report.first.stage, report.cause) == ("up", "gate and up swapped"), report.table()
    same = compare(hiding, block, x, ctx=ctx)
    assert same.ok and {"up", "activation"} <= {row.stage for row in same.rows}, same.table()


def test_so_is_a_gradient():
    grouped = bank()
    grouped.backend = "grouped"
    halved = loop(bank(), down_bias=lambda self, y, expert: 0.5 * y + 0.5 * y.detach())
    report = compare(MoELayer(mixtral(), grouped), MoELayer(mixtral(), halved), inputs())
    assert report.first.stage == "grad expert_output", report.table()
    assert report.cause == "gradient scaled by a constant"
