"""The Triton kernels of router and sort plan against their torch twins, in Triton's interpreter.

The interpreter is chosen where Triton is first imported, so this file runs itself in a process of
its own. It is trusted with float32, float16 and whole numbers alone.
"""

import math
import re
from collections.abc import Callable
from dataclasses import astuple
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetk.equivalence.judge import floor
from moetk.errors import MoeDtypeError, RouterConfigError
from moetk.kernels.choose import choose_backward_in_torch, choose_in_torch
from moetk.kernels.recipe import Recipe
from moetk.kernels.sort_plan import sort_in_torch
from tests.interpreted import outcomes_of, tell

RECIPES = {
    "softmax": Recipe("softmax", renormalise=True),
    "softmax, sum kept": Recipe("softmax", score_dtype=torch.float32),
    "softmax over chosen": Recipe("identity", over_chosen=True),
    "softmax twice": Recipe("softmax", over_chosen=True, renormalise=True, eps=0.5),
    "sigmoid": Recipe("sigmoid", renormalise=True, eps=1e-20, scale=2.5),
    "sigmoid in 4 groups": Recipe("sigmoid", groups=4, top_groups=2, eps=1e-20, scale=2.5),
    "sigmoid in groups": Recipe(
        "sigmoid", groups=3, top_groups=2, renormalise=True, eps=1e-20, scale=2.5
    ),
    "sqrt of softplus": Recipe("sqrt_softplus", renormalise=True, eps=1e-20, scale=1.5),
}
SIZES = [(0, 6, 2), (1, 6, 6), (19, 12, 4), (70, 42, 5), (3, 1, 1)]  # T, E, K


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits(seed: int, num_tokens: int, num_experts: int) -> Tensor:
    """Ordinary rows, and one each with: a tie of all, of half, NaN all over, one NaN, -inf."""
    logits_TE = normal(seed, num_tokens, num_experts) * 3
    if num_tokens >= 19:
        logits_TE[1], logits_TE[2, : num_experts // 2] = 0.5, 1.25
        logits_TE[3], logits_TE[4, 2] = math.nan, math.nan
        logits_TE[5, 1:4] = -math.inf
        logits_TE[6], logits_TE[7] = -60, 60
        logits_TE[8, ::2], logits_TE[8, 1::2] = 0.0, -0.0
    return logits_TE


def agree(got: Tensor, want: Tensor, terms: int, what: str) -> None:
    """Equal where not finite; elsewhere as near, row by row, as the rounding of exp lets them."""
    assert got.shape == want.shape and got.dtype == want.dtype, what
    assert torch.equal(got.isnan(), want.isnan()), what
    error = (got - want).nan_to_num().double().norm(dim=-1)
    size = want.nan_to_num().double().norm(dim=-1) + 1
    assert bool((error <= 64 * floor(torch.float32, terms) * size).all()), (what, error.max())


def fits(recipe: Recipe, num_experts: int, top_k: int) -> bool:
    """Groups of two and more, of which the best hold top_k experts."""
    size = num_experts // recipe.groups
    grouped = num_experts % recipe.groups == 0 and size >= 2
    return not recipe.limited or (grouped and top_k <= recipe.top_groups * size)


def choosing(recipe: Recipe) -> None:
    from moetk.kernels.gpu.choose import choose_backward_on_gpu, choose_on_gpu

    for seed, (num_tokens, num_experts, top_k) in enumerate(SIZES):
        if not fits(recipe, num_experts, top_k):
            continue
        logits_TE = logits(seed, num_tokens, num_experts)
        for bias_E in (None, normal(seed + 50, num_experts) * 0.2):
            experts_TK, weights_TK = choose_on_gpu(logits_TE, bias_E, top_k, recipe, None)
            want_TK, want_weights_TK = choose_in_torch(logits_TE, bias_E, top_k, recipe)
            what = f"T={num_tokens} E={num_experts} K={top_k}"
            assert torch.equal(experts_TK, want_TK), what
            agree(weights_TK, want_weights_TK, num_experts, what)
            dweights_TK = normal(seed + 60, num_tokens, top_k)
            agree(
                choose_backward_on_gpu(dweights_TK, logits_TE, experts_TK, recipe),
                choose_backward_in_torch(dweights_TK, logits_TE, experts_TK, recipe),
                num_experts,
                what,
            )


def one_node(recipe: Recipe) -> None:
    """`route` in one node of the graph is the two ops: values, and gradients of weights and logits,
    of either alone and of both."""
    from moetk.kernels import route as room

    shapes = (7, 8), (12, 8), (12,)
    x_TH, weight_EH, bias_E = (
        normal(seed, *shape).requires_grad_() for seed, shape in enumerate(shapes)
    )
    dweights_TK, dlogits_TE = normal(3, 7, 4), normal(4, 7, 12)
    for bias in (None, bias_E):
        leaves = [x_TH, weight_EH] if bias is None else [x_TH, weight_EH, bias]
        given = (x_TH, weight_EH, bias, normal(5, 12), 4, recipe, None, torch.float32)
        want = room.route(*given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(room, "direct", lambda tensor: True)
            got = room.route(*given)
        assert torch.equal(got[0], want[0]) and not got[0].requires_grad
        for name, mine, true in zip(("weights", "logits"), got[1:3], want[1:3], strict=True):
            agree(mine, true, 12, name)
        for which in ([1], [2], [1, 2]):
            arriving = [None, dweights_TK, dlogits_TE]
            grads = [
                torch.autograd.grad(
                    [routed[i] for i in which],
                    leaves,
                    [arriving[i] for i in which],
                    retain_graph=True,
                )
                for routed in (got, want)
            ]
            for mine, true in zip(*grads, strict=True):
                agree(mine, true, 12, f"gradients of {which}")


def one_node_that_casts() -> None:
    """Operands of other dtypes than the product's: what is cast comes back in its own."""
    from moetk.kernels import route as room

    half, whole, recipe = torch.float16, torch.float32, RECIPES["softmax"]
    for dtypes, gemm in (((half, half, whole), whole), ((whole, half, half), None)):
        x_TH, weight_EH, bias_E = (
            normal(seed, *shape).to(dtype).requires_grad_()
            for seed, (shape, dtype) in enumerate(
                zip(((7, 8), (12, 8), (12,)), dtypes, strict=True)
            )
        )
        given = (x_TH, weight_EH, bias_E, None, 4, recipe, gemm, None)
        want = room.route(*given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(room, "direct", lambda tensor: True)
            got = room.route(*given)
        assert torch.equal(got[0], want[0])
        dweights_TK = normal(3, 7, 4).to(want[1].dtype)
        leaves = [x_TH, weight_EH, bias_E]
        grads = [torch.autograd.grad(each[1], leaves, dweights_TK) for each in (got, want)]
        pairs = zip((*got[1:3], *grads[0]), (*want[1:3], *grads[1]), strict=True)
        for mine, true in pairs:
            assert mine.dtype == true.dtype
            torch.testing.assert_close(mine, true, rtol=2e-3, atol=2e-3)


def one_kernel_in_one_node() -> None:
    """The node around the kernel: as the two ops, recomputed by a checkpoint, without gradients."""
    from moetk.kernels import route as room

    half, recipe = torch.float16, RECIPES["sigmoid"]
    leaves = [
        normal(seed, *shape).to(half).requires_grad_()
        for seed, shape in enumerate(((7, 8), (12, 8), (12,)))
    ]
    given = (*leaves, normal(5, 12), 4, recipe, torch.float32, torch.float32)
    dweights_TK = normal(3, 7, 4)
    want = room.route(*given)
    true = torch.autograd.grad(want.weights_TK, leaves, dweights_TK)

    def routed(*tensors: Tensor) -> Tensor:
        return room.route(*tensors, *given[3:]).weights_TK

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "direct", lambda tensor: True)
        got = room.route(*given)
        assert torch.equal(got.experts_TK, want.experts_TK)
        assert got.known is not None and got.known.holds_for(got.experts_TK, None, 12)
        outputs = [got.weights_TK]
        for reentrant in (False, True):
            outputs.append(checkpoint(routed, *leaves, use_reentrant=reentrant))
        with torch.no_grad():
            alone = room.route(*given)
        assert torch.equal(alone.weights_TK, got.weights_TK) and not alone.weights_TK.requires_grad
        assert alone.known is not None
        for weights_TK in outputs:
            torch.testing.assert_close(weights_TK, want.weights_TK, rtol=2e-3, atol=2e-3)
            for leaf in leaves:
                leaf.grad = None
            weights_TK.backward(dweights_TK)
            for leaf, grad in zip(leaves, true, strict=True):
                torch.testing.assert_close(leaf.grad, grad, rtol=1e-2, atol=1e-2)


def one_kernel(recipe: Recipe) -> None:
    """Product, choice and plan, in two kernels for several blocks of tokens, else in one; odd
    sizes."""
    from moetk.kernels.gpu.route import route_on_gpu
    from moetk.kernels.route import in_one_kernel

    half, whole = torch.float16, torch.float32
    for num_tokens, hidden, num_experts, top_k in (
        (0, 8, 6, 2),
        (70, 72, 12, 4),
        (70, 40, 16, 3),
        (20, 64, 6, 3),
    ):
        narrow = normal(0, 1, hidden).to(half), normal(0, num_experts, hidden).to(half), half
        if not fits(recipe, num_experts, top_k) or not in_one_kernel(*narrow, recipe):
            continue
        x_TH = normal(1, num_tokens, hidden).to(half)
        weight_EH = (normal(2, num_experts, hidden) * hidden**-0.5).to(half)
        for bias_E, choice_bias_E, dtype in (
            (None, normal(4, num_experts), half),
            (normal(3, num_experts).to(half), None, whole),
        ):
            weights_TK, experts_TK, logits_TE, plan = route_on_gpu(
                x_TH, weight_EH, bias_E, choice_bias_E, top_k, recipe, dtype, None, True
            )
            true_TE = x_TH.double() @ weight_EH.double().t()
            true_TE = true_TE if bias_E is None else true_TE + bias_E.double()
            bound = 1e-6 if logits_TE.dtype == whole and dtype == whole else 2e-3
            torch.testing.assert_close(logits_TE.double(), true_TE, rtol=bound, atol=bound)
            want_TK, want_weights_TK = choose_in_torch(logits_TE, choice_bias_E, top_k, recipe)
            assert torch.equal(experts_TK, want_TK)
            torch.testing.assert_close(weights_TK, want_weights_TK, rtol=2e-3, atol=1e-6)
            assert (plan is None) == (num_tokens == 0)
            if plan is None:
                continue
            true = sort_in_torch(experts_TK, None, num_experts)
            for mine_, true_ in zip(astuple(plan)[:4], true, strict=True):
                assert mine_.dtype == true_.dtype and torch.equal(mine_, true_)


def who_makes_the_plan() -> None:
    """The router's own kernel up to 64 tokens, one more behind it, which is left out where nobody
    wants the plan or where it would look at too many counts."""
    from moetk.kernels.gpu import route as room

    weight_EH, asked = normal(0, 6, 8).half(), []
    place_on_gpu = room.place_on_gpu

    def placed(experts_TK: Tensor, *rest: Any) -> Any:
        asked.append(experts_TK.shape[0])
        return place_on_gpu(experts_TK, *rest)

    def planned(num_tokens: int, wants_plan: bool, most: int = room._MOST_BLOCKS) -> bool:
        with patch.object(room, "place_on_gpu", placed), patch.object(room, "_MOST_BLOCKS", most):
            settings = (None, None, 2, RECIPES["softmax"], torch.float16, None, wants_plan)
            x_TH = normal(1, num_tokens, 8).half()
            return room.route_on_gpu(x_TH, weight_EH, *settings)[3] is not None

    assert planned(64, True) and planned(64, False) and not asked
    assert planned(65, True) and asked == [65]
    assert not planned(65, False) and not planned(65, True, most=1) and asked == [65]


def exact_choice() -> None:
    """Neighbouring fp32 numbers are told apart, and only equal ones tie."""
    from moetk.kernels.gpu.choose import choose_on_gpu

    step = torch.tensor([0, 1, 1, 0, 2, -1, -2, -1], dtype=torch.int32)
    for base in (1.0, -1.0, 3e-39, 0.0):
        near_E = (torch.tensor(base).view(torch.int32) + step.clamp(min=0)).view(torch.float32)
        signed_TE = torch.stack([near_E, -near_E, near_E.flip(0)])
        recipe = RECIPES["softmax over chosen"]
        experts_TK, _ = choose_on_gpu(signed_TE, None, 8, recipe, None)
        assert torch.equal(experts_TK, choose_in_torch(signed_TE, None, 8, recipe)[0]), base


def strided_inputs() -> None:
    """Views of every kind are read as what they show."""
    from moetk.kernels.gpu.choose import choose_backward_on_gpu, choose_on_gpu
    from moetk.kernels.gpu.plan import sort_on_gpu

    recipe = RECIPES["softmax"]
    logits_TE, bias_E = normal(0, 12, 9).t(), normal(1, 24)[::2]
    assert not logits_TE.is_contiguous() and not bias_E.is_contiguous()
    got = choose_on_gpu(logits_TE, bias_E, 4, recipe, None)
    want = choose_on_gpu(logits_TE.contiguous(), bias_E.contiguous(), 4, recipe, None)
    assert all(map(torch.equal, got, want))
    dweights_TK = torch.ones(1, 1).expand(9, 4)  # as the gradient of a sum is
    experts_KT = got[0].t().contiguous()
    assert torch.equal(
        choose_backward_on_gpu(dweights_TK, logits_TE, experts_KT.t(), recipe),
        choose_backward_on_gpu(torch.ones(9, 4), logits_TE.contiguous(), got[0], recipe),
    )
    for plan, twin in zip(
        sort_on_gpu(experts_KT.t(), None, 12), sort_in_torch(got[0], None, 12), strict=True
    ):
        assert torch.equal(plan, twin)


def rounded_weights() -> None:
    from moetk.kernels.gpu.choose import choose_on_gpu

    logits_TE = logits(0, 19, 12)[9:]
    _, weights_TK = choose_on_gpu(logits_TE, None, 4, RECIPES["softmax"], torch.float16)
    _, wide_TK = choose_on_gpu(logits_TE, None, 4, RECIPES["softmax"], None)
    assert weights_TK.dtype == torch.float16 and torch.equal(weights_TK, wide_TK.half())


def half_scores() -> None:
    """Each step in float16, as torch rounds it: a tie by rounding is a tie here too."""
    from moetk.kernels.gpu.choose import choose_on_gpu

    logits_TE = logits(3, 40, 12)[9:].half()
    for recipe in (RECIPES["sigmoid"], RECIPES["sqrt of softplus"]._replace(eps=1e-4)):
        experts_TK, weights_TK = choose_on_gpu(logits_TE, None, 4, recipe, None)
        want_TK, want_weights_TK = choose_in_torch(logits_TE, None, 4, recipe)
        assert weights_TK.dtype == torch.float16
        same_T = (experts_TK == want_TK).all(-1)
        assert float(same_T.float().mean()) > 0.9  # exp at the border of a float16 may fall over
        error = (weights_TK - want_weights_TK)[same_T].float().abs().max()
        assert float(error) <= 4 * 2**-10 * float(want_weights_TK.float().max())


def refusals() -> None:
    from moetk.kernels.gpu.choose import choose_on_gpu

    for logits_TE, top_k, recipe, error, message in [
        (torch.zeros(1, 1025), 1, Recipe("softmax"), RouterConfigError, "1025 experts and top_k=1"),
        (torch.zeros(1, 64), 33, Recipe("softmax"), RouterConfigError, "up to 1024 and 32"),
        (torch.zeros(1, 4).double(), 1, Recipe("softmax"), MoeDtypeError, "logits_TE is torch.flo"),
        (
            torch.zeros(1, 4),
            1,
            Recipe("softmax", score_dtype=torch.float64),
            MoeDtypeError,
            "score_dtype is torch.float64; its kernels take float32, bfloat16 and float16",
        ),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            choose_on_gpu(logits_TE, None, top_k, recipe, None)


def sorting(num_tokens: int, top_k: int, num_experts: int) -> None:
    """In one launch, as for few choices, and in three."""
    from moetk.kernels.gpu import plan

    draw = torch.Generator().manual_seed(num_tokens)
    shape = (num_tokens, top_k)
    drawn_TK = torch.randint(-2, num_experts + 2, shape, generator=draw)
    drawn_TK[:1] = -(2**63)  # no id is too low, or (below) too high
    drawn_TK[1:2] = 2**63 - 1
    one_TK = torch.full(shape, num_experts - 1)
    none_TK = torch.full(shape, -1)
    kept_TK = torch.rand(shape, generator=draw) < 0.6
    for experts_TK in (drawn_TK, one_TK, none_TK):
        for kept in (None, kept_TK):
            want = sort_in_torch(experts_TK, kept, num_experts)
            for plan._FEW in (0, 4096):
                got = plan.sort_on_gpu(experts_TK, kept, num_experts)
                for mine, twin in zip(got, want, strict=True):
                    assert mine.dtype == torch.int32 and torch.equal(mine, twin)


def many_blocks() -> None:
    """More blocks than the scan takes at a time."""
    from moetk.kernels.gpu import plan

    plan._SCAN_BLOCKS = 4
    sorting(500, 5, 9)


def summands() -> None:
    from moetk.kernels.gpu.summands import two_summands

    x_MN = normal(0, 37, 5) * torch.logspace(-3, 3, 37)[:, None]
    high_MN = x_MN.half()
    want_M2N = torch.cat([high_MN, (x_MN - high_MN).half()], 1)
    assert torch.equal(two_summands(x_MN, torch.float16), want_M2N)
    assert two_summands(x_MN[:0], torch.float16).shape == (0, 10)


CASES: dict[str, Callable[[], None]] = {
    **{f"choose: {name}": (lambda r=r: choosing(r)) for name, r in RECIPES.items()},
    **{f"route: {name}": (lambda r=r: one_node(r)) for name, r in RECIPES.items()},
    **{f"one kernel: {name}": (lambda r=r: one_kernel(r)) for name, r in RECIPES.items()},
    "route: casts": one_node_that_casts,
    "one kernel: one node": one_kernel_in_one_node,
    "one kernel: who makes the plan": who_makes_the_plan,
    "choose: exact": exact_choice,
    "choose: rounded weights": rounded_weights,
    "choose: float16": half_scores,
    "choose: refusals": refusals,
    "views": strided_inputs,
    **{
        f"sort: T={t} K={k} E={e}": (lambda t=t, k=k, e=e: sorting(t, k, e))
        for t, k, e in [(0, 2, 3), (1, 1, 1), (90, 1, 8), (130, 5, 5), (40, 3, 40), (9, 2, 600)]
    },
    "sort: many blocks": many_blocks,
    "summands": summands,
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return outcomes_of(__file__)


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_its_twin(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "", outcomes[name]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("shape", [(0, 2), (6, 1), (5, 3)])
def test_sort_plan_is_an_op(shape: tuple[int, int], kept: bool) -> None:
    experts_TK = torch.randint(-1, 5, shape, generator=torch.Generator().manual_seed(0))
    kept_TK = experts_TK % 2 == 0 if kept else None
    torch.library.opcheck(torch.ops.moetk.sort_plan.default, (experts_TK, kept_TK, 4))


if __name__ == "__main__":
    from tests.conftest import poisoned

    torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)  # type: ignore[method-assign]
    torch.empty_like = poisoned(torch.empty_like)
    tell(CASES)
