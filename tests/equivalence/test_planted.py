"""Every planted defect is found at its stage, with its cause and no other."""

from __future__ import annotations

import pytest
import torch

from tests.equivalence.planted import Planted
from tests.equivalence.planted_experts import EXPERTS
from tests.equivalence.planted_gradients import GRADIENTS
from tests.equivalence.planted_layers import LAYERS
from tests.equivalence.planted_routers import ROUTERS

PLANTED = (*ROUTERS, *EXPERTS, *LAYERS, *GRADIENTS)
CASES = [(planted, dtype) for planted in PLANTED for dtype in planted.dtypes]


def _id(case: object) -> str:
    return case.name if isinstance(case, Planted) else str(case).removeprefix("torch.")


@pytest.mark.parametrize(("planted", "dtype"), CASES, ids=_id)
def test_the_defect_is_found_at_its_stage_with_its_cause(
    planted: Planted, dtype: torch.dtype
) -> None:
    report = planted.compare(dtype)
    assert report.first is not None, report.table()
    found = tuple(one.name for one in report.causes)
    assert (report.first.stage, found) == (planted.stage, planted.causes), report.table()
