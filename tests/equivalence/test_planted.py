"""Every planted defect is found at its stage, with its cause and no other; every cause is planted;
and what the defects are planted in shows none without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moetk import compare
from moetk.dispatch import Capacity, Local
from moetk.equivalence.causes.all import CAUSES
from tests.equivalence.planted import Planted
from tests.equivalence.planted_blocks import BLOCKS
from tests.equivalence.planted_experts import EXPERTS, biased_bank, clamped_bank, gpt_oss_bank
from tests.equivalence.planted_gradients import GRADIENTS
from tests.equivalence.planted_layers import LAYERS, Served, crowded, layer
from tests.equivalence.planted_routers import ROUTERS
from tests.equivalence.steps import (
    GROUPED,
    V3,
    GptOss,
    Mixtral,
    bank,
    dense,
    gpt_oss,
    inputs,
    loop,
    mixtral,
    router,
    routing,
    v3,
)

PLANTED = (*ROUTERS, *EXPERTS, *LAYERS, *GRADIENTS, *BLOCKS)
CASES = [(planted, dtype) for planted in PLANTED for dtype in planted.dtypes]

# What the field has really shipped: the defect, and what compare calls it.
REAL = {
    "group mask multiplied in": "group mask multiplies by 0",
    "gathered from the choice": "choice bias in the weights",
    "norm_topk_prob left out of the config": "renormalisation missing",
    "w1 and w3 in the wrong order": "gate and up swapped",
    "gpt-oss with Mixtral's split": "interleaved read as concatenated",
    "K is not divided by": "K factor in a loss",
    "softmax of the kept logits": "softmax after top-k",
    "a scatter that overwrites": "one of two equal ids dropped",
    "product in bfloat16": "router GEMM in bfloat16",
    "gpt-oss clamp masked": "gradient clipped at the clamp bound",
    "a place too few": "capacity one too few",
    "counted in forward": "counted twice",
}


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


def test_defects_of_the_field_are_among_them() -> None:
    assert {one.name: one.causes for one in PLANTED if one.name in REAL} == {
        name: (cause,) for name, cause in REAL.items()
    }


def test_every_cause_is_planted() -> None:
    planted = {(name, one.stage) for one in PLANTED for name in one.causes}
    named = {name for name, _ in planted}
    assert {one.name for one in CAUSES} == named
    for one in CAUSES:
        assert any((one.name, stage) in planted for stage in one.stages), one.name


def test_names_say_which_cause() -> None:
    """One name at one stage is one cause."""
    seen = [(one.name, stage) for one in CAUSES for stage in one.stages]
    assert len(seen) == len(set(seen))


TWINS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "V3": lambda: (v3(), router(V3, GROUPED)),
    "Mixtral": lambda: (mixtral(), router(Mixtral, {})),
    "gpt-oss": lambda: (gpt_oss(), router(GptOss, {})),
    "bank": lambda: (bank(), loop(bank())),
    "biased bank": lambda: (biased_bank(), loop(biased_bank())),
    "clamped bank": lambda: (clamped_bank(), loop(clamped_bank())),
    "gpt-oss bank": lambda: (gpt_oss_bank(), loop(gpt_oss_bank())),
    "dense bank": lambda: (biased_bank(), dense(biased_bank())),
    "capacity": lambda: (
        layer(dispatcher=Local(capacity=Capacity(1.3))),
        layer(dispatcher=Local(capacity=Served(1.3))),
    ),
}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
def test_without_the_defect_nothing_differs(name: str, dtype: torch.dtype) -> None:
    right, written_out = (part.to(dtype) for part in TWINS[name]())
    x = (crowded() if name == "capacity" else inputs()).to(dtype)
    report = compare(right, written_out, x, routing=routing() if "bank" in name else None)
    assert report.ok, report.table()
    assert report.causes == () and report.cause == ""
