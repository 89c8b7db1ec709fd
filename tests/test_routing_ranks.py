"""What a router's kernel counted is used for the plan of that choice alone, and once; and the op of
that kernel is an op."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from moetk.kernels import sort_plan as room
from moetk.kernels.recipe import Recipe
from moetk.kernels.route import in_one_kernel, route
from moetk.kernels.sort_plan import Ranks, remember

NONE = torch.zeros(0, dtype=torch.int32)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def ids() -> Tensor:
    return torch.tensor([[0, 2], [1, 0]])


def remembered(experts_TK: Tensor, blocks: int = 1) -> Ranks:
    ranks = Ranks(NONE, torch.zeros(blocks, 3, dtype=torch.int32), 16)
    remember(experts_TK, ranks)
    return ranks


def test_the_choice_that_was_ranked_has_them_once() -> None:
    experts_TK = ids()
    ranks = remembered(experts_TK)
    assert room._recall(experts_TK, None, 3) is ranks
    assert room._recall(experts_TK, None, 3) is None


def test_no_other_choice_has_them() -> None:
    experts_TK = ids()
    ranks = remembered(experts_TK)
    assert room._recall(experts_TK.clone(), None, 3) is None
    assert room._recall(experts_TK.view(2, 2), None, 3) is None
    assert room._recall(experts_TK, None, 3) is ranks
    for change in ("written to", "dropped", "another bank's"):
        remembered(experts_TK)
        kept_TK = torch.ones(2, 2, dtype=torch.bool) if change == "dropped" else None
        if change == "written to":
            experts_TK.add_(0)
        assert room._recall(experts_TK, kept_TK, 4 if "bank" in change else 3) is None, change


def test_only_the_last_choice_is_remembered_and_not_kept_alive() -> None:
    first_TK, second_TK = ids(), ids()
    remembered(first_TK)
    ranks = remembered(second_TK)
    assert room._recall(first_TK, None, 3) is None
    assert room._recall(second_TK, None, 3) is ranks
    remembered(second_TK)
    del second_TK
    gc.collect()
    assert room._recall(ids(), None, 3) is None


def test_what_cannot_be_checked_or_counted_cheaply_is_not_remembered() -> None:
    with torch.inference_mode():
        experts_TK = ids()
        remembered(experts_TK)
        assert room._recall(experts_TK, None, 3) is None
    experts_TK = ids()
    remembered(experts_TK, blocks=5000)
    assert room._recall(experts_TK, None, 3) is None


@pytest.mark.parametrize(
    ("dtypes", "experts", "fits"),
    [
        ((BF16, BF16, BF16), 128, True),
        ((FP16, FP16, FP32), 6, True),
        ((BF16, BF16, FP16), 6, False),
        ((FP32, FP32, FP32), 6, False),
        ((BF16, FP32, FP32), 6, False),
        ((BF16, BF16, BF16), 129, False),
    ],
)
def test_whom_the_kernel_takes(dtypes: tuple[torch.dtype, ...], experts: int, fits: bool) -> None:
    x_TH, weight_EH = torch.zeros(2, 8, dtype=dtypes[0]), torch.zeros(experts, 8, dtype=dtypes[1])
    assert in_one_kernel(x_TH, weight_EH, dtypes[2]) == fits


RECIPES = {
    "softmax": Recipe("softmax", renormalise=True, score_dtype=FP32),
    "logits": Recipe("identity", over_chosen=True, score_dtype=FP32),
    "groups": Recipe("sigmoid", groups=4, top_groups=2, renormalise=True, eps=1e-20, scale=2.5),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_operator_is_the_product_and_the_choice(
    name: str, biases: bool, dtype: torch.dtype
) -> None:
    recipe, operator = RECIPES[name], torch.ops.moetk.route.default
    generator = torch.Generator().manual_seed(0)
    x_TH, weight_EH, bias_E, choice_bias_E = (
        torch.randn(*shape, generator=generator) for shape in ((7, 8), (12, 8), (12,), (12,))
    )
    leaves = [tensor.to(BF16).requires_grad_() for tensor in (x_TH, weight_EH, bias_E)]
    given = (*leaves, choice_bias_E) if biases else (*leaves[:2], None, None)
    leaves = leaves if biases else leaves[:2]
    settings = (4, dtype, BF16)
    weights_TK, experts_TK, logits_TE = operator(*given, *settings, *recipe)
    want = route(*given, 4, recipe, dtype, BF16)
    assert torch.equal(experts_TK, want[0]) and not experts_TK.requires_grad
    torch.testing.assert_close(weights_TK, want[1], rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(logits_TE, want[2], rtol=2e-2, atol=1e-3)
    arriving = [torch.randn(*t.shape, generator=generator).to(t.dtype) for t in want[1:]]
    for outputs, wanted, of in (
        ([weights_TK], [want[1]], arriving[:1]),
        ([logits_TE], [want[2]], arriving[1:]),
        ([weights_TK, logits_TE], list(want[1:]), arriving),
    ):
        mine = torch.autograd.grad(outputs, leaves, of, retain_graph=True)
        true = torch.autograd.grad(wanted, leaves, of, retain_graph=True)
        for left, right in zip(mine, true, strict=True):
            torch.testing.assert_close(left, right, rtol=3e-2, atol=3e-2)
    torch.library.opcheck(operator, (*given, *settings, *recipe))
