"""The diagnosis of defects that were planted by somebody who had not read it.

The stage must be right. The cause must be right or unknown: a wrong one sends a reader elsewhere.
"""

from __future__ import annotations

import copy

import pytest
import torch

import moetk
from moetk import ExpertBank, MoELayer
from moetk.routers import MixtralRouter
from tests.blind.defects import DEFECTS, E, H, I, K, SortingBank

# The report's name for each planted cause; None = it knows no such kind.
CAUSES = {
    "bias_subtracted_again": None,
    "normaliser_without_gradient": "sum of the renormalisation detached",
    "second_choices_served_too_early": "all choices of a token served before the next token",
    "up_clamped_on_one_side": "up not clamped from below",
    "padding_in_the_loss": "padding counted in a loss",
    "shared_experts_read_the_wrong_tensor": None,
    "bias_rounded_with_the_model": None,
    "rows_counted_in_bf16": None,
    "choices_overwrite_each_other": "overwritten instead of added",
    "gather_backward_overwrites": None,
    "router_reads_sequence_first": "tokens in another order",
    "numpy_pairs_backwards": None,
}


# The planter took `dispatched` for the rows that reach an expert; it is the choices served,
# and all are. The first wrong computation is then an expert's product with another one's rows.
MEANT = {"rows_counted_in_bf16": "up"}

PLANTED = {defect.name: defect for defect in DEFECTS}


@pytest.mark.parametrize("name", CAUSES)
def test_names_the_stage_and_no_wrong_cause(name: str) -> None:
    defect = PLANTED[name]
    case = defect.case()
    report = moetk.compare(case.right, case.wrong, case.x, ctx=case.ctx)
    assert not report.ok and report.first is not None
    assert report.first.stage == MEANT.get(name, defect.stage), report.table()
    named = {cause.name for cause in report.causes}
    assert named <= {CAUSES[name]}, report.table()


@pytest.mark.parametrize("name", PLANTED)
def test_the_right_part_agrees_with_its_copy(name: str) -> None:
    case = PLANTED[name].case()
    report = moetk.compare(case.right, copy.deepcopy(case.right), case.x, ctx=case.ctx)
    assert report.ok, report.table()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bank_written_otherwise_is_no_defect(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours = MoELayer(MixtralRouter(H, E, K), ExpertBank(H, E, I)).to(dtype)
    theirs = copy.deepcopy(ours)
    theirs.experts = SortingBank(H, E, I).to(dtype)
    theirs.experts.load_state_dict(ours.experts.state_dict())
    report = moetk.compare(ours, theirs, torch.randn(2, 24, H, dtype=dtype))
    assert report.ok, report.table()
