"""The router's ops and the sort plan against their plain twins and fp64, at published sizes.

Letters: T tokens, H hidden, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from moetk.context import RouterContext
from moetk.equivalence.judge import compare_choices, largest_error
from moetk.kernels.choose import choose, choose_in_torch
from moetk.kernels.recipe import Recipe
from moetk.kernels.route import in_one_kernel
from moetk.kernels.router_logits import router_logits
from moetk.kernels.sort_plan import sort_in_torch, sort_plan
from moetk.routers import DeepSeekV3Router, LinearRouter, MixtralRouter, catalogue
from moetk.routers.fused import choose_fused
from moetk.routing import check_routing
from tests.gpu.device import DEVICE, KERNELS, normal
from tests.gpu.judged import assert_bitwise, assert_passes, grown
from tests.gpu.there import SCORES

CTX = RouterContext()
BF16, FP32 = torch.bfloat16, torch.float32
ROUTERS: dict[str, tuple[Callable[[], LinearRouter], torch.dtype]] = {
    "qwen3": (catalogue.qwen3_30b_a3b, BF16),
    "qwen3, fp32": (lambda: catalogue.qwen3_30b_a3b(512), FP32),
    "qwen3, fp32 logits": (lambda: MixtralRouter(2048, 128, 8, gemm_dtype=FP32), BF16),
    "qwen3_next": (catalogue.qwen3_next_80b_a3b, BF16),
    "olmoe": (catalogue.olmoe_1b_7b, BF16),
    "mixtral, fp16": (catalogue.mixtral_8x7b, torch.float16),
    "deepseek_v3": (catalogue.deepseek_v3, BF16),
    "kimi_k2": (catalogue.kimi_k2, BF16),
    "deepseek_v4": (catalogue.deepseek_v4_flash, BF16),
    "gpt_oss": (catalogue.gpt_oss_120b, BF16),
    "granite": (lambda: catalogue.granitemoe(1536, 32, 8), BF16),
    "groups of 24": (lambda: DeepSeekV3Router(512, 120, 6, groups=5, top_groups=2), BF16),
    "groups of 16": (lambda: DeepSeekV3Router(512, 128, 6, groups=8, top_groups=3), BF16),
}
LARGE = 4096 if KERNELS else 64


def made(name: str, tokens: int, seed: int) -> tuple[LinearRouter, Tensor]:
    """A router whose logits have a deviation of two, with biases, and rows for it."""
    make, dtype = ROUTERS[name]
    router = make().to(DEVICE, dtype)
    width = router.weight.shape[1]
    with torch.no_grad():
        router.weight.copy_(normal(seed, *router.weight.shape, std=2 * width**-0.5))
        for n, bias in enumerate(("bias", "e_score_correction_bias")):
            tensor = getattr(router, bias, None)
            if tensor is not None:
                tensor.copy_(normal(seed + 1 + n, *tensor.shape, std=0.05))
    return router, normal(seed + 3, tokens, width, dtype=dtype)


def weighed(logits_TE: Tensor, experts_TK: Tensor, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    """The weights of a choice, written out again from the recipe's words."""
    weights_TK = SCORES[recipe.score](logits_TE.to(dtype)).gather(1, experts_TK)
    if recipe.over_chosen:
        weights_TK = weights_TK.softmax(-1)
    if recipe.renormalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + recipe.eps)
    return weights_TK * recipe.scale


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("tokens", [1, 7, LARGE])
def test_experts_weights_and_their_gradient(name, tokens):
    draws = []
    for seed in range(0, 10 if tokens < 10 else 1):
        router, x_TH = made(name, tokens, 10 * seed)
        recipe, k = router.recipe(), router.top_k
        logits_TE = router.logits(x_TH).detach()
        if recipe.score == "identity":
            logits_TE = router.in_score_dtype(logits_TE)
        score_dtype = recipe.score_dtype or logits_TE.dtype
        bias_E = getattr(router, "e_score_correction_bias", None)

        leaf_TE = logits_TE.clone().requires_grad_()
        experts_TK, weights_TK = choose(leaf_TE, bias_E, k, recipe)
        plain_TK, _ = choose_in_torch(logits_TE, bias_E, k, recipe)
        eager_TE = SCORES[recipe.score](logits_TE.to(score_dtype))
        true_TE = SCORES[recipe.score](logits_TE.to(score_dtype).double())
        error = largest_error(eager_TE, true_TE)
        if bias_E is not None:
            eager_TE, true_TE = eager_TE + bias_E, true_TE + bias_E.double()
        choices = compare_choices(experts_TK, plain_TK, true_TE, eager_TE, error=error)
        assert choices.ok, choices

        dweights_TK = normal(10 * seed + 4, tokens, k)
        ours = grown({"logits": leaf_TE}, {"weights": weights_TK}, [dweights_TK])
        eager, truth = (
            _weighed_and_gradient(logits_TE, experts_TK, recipe, dtype, dweights_TK)
            for dtype in (score_dtype, torch.float64)
        )
        draws.append((ours, eager, truth))
        again_TK, weights_again_TK = choose(logits_TE, bias_E, k, recipe)
        assert torch.equal(again_TK, experts_TK) and torch.equal(weights_again_TK, ours["weights"])
    assert_passes(draws, reduction=router.num_experts)


def _weighed_and_gradient(
    logits_TE: Tensor,
    experts_TK: Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
    dweights_TK: Tensor,
) -> dict[str, Tensor]:
    """In fp64 the logits are rounded to the score dtype first: that is declared, not an error."""
    if dtype == torch.float64:
        logits_TE = logits_TE.to(recipe.score_dtype or logits_TE.dtype).double()
    leaf_TE = logits_TE.clone().requires_grad_()
    weights_TK = weighed(leaf_TE, experts_TK, recipe, dtype)
    return grown({"logits": leaf_TE}, {"weights": weights_TK}, [dweights_TK])


@pytest.mark.parametrize("name", ROUTERS)
def test_a_whole_router(name):
    """From rows to weights, and back to rows and parameters."""
    router, x_TH = made(name, LARGE, 0)
    x_TH.requires_grad_()
    leaves = {"x": x_TH, **dict(router.named_parameters())}
    dweights_TK = normal(5, LARGE, router.top_k)
    routing = choose_fused(router, x_TH, CTX)
    check_routing(routing, LARGE, router.num_experts, where=name, values=True)
    ours = grown(leaves, {"weights": routing.weights_TK}, [dweights_TK])
    again = choose_fused(router, x_TH, CTX)
    assert torch.equal(again.experts_TK, routing.experts_TK)
    narrow = (x_TH, router.weight, router.gemm_dtype or x_TH.dtype, router.recipe())
    assert (again.known is not None) == (KERNELS and in_one_kernel(*narrow))
    assert again.known is None or again.known.holds_for(again.experts_TK, None, router.num_experts)
    for known in (again.known, None):  # the router's, and anew
        plan = sort_plan(again.experts_TK, None, router.num_experts, known)
        assert known is None or plan is known.plan
        found = (plan.choice_N, plan.source_N, plan.slot_TK, plan.offsets_E)
        twins = sort_in_torch(again.experts_TK.cpu(), None, router.num_experts)
        for mine, twin in zip(found, twins, strict=True):
            assert mine.dtype == twin.dtype and torch.equal(mine.cpu(), twin)
    assert_bitwise(grown(leaves, {"weights": again.weights_TK}, [dweights_TK]), ours)

    ctx = RouterContext(replay=routing.experts_TK)  # rounding may choose otherwise
    eager = grown(leaves, {"weights": router(x_TH, ctx).weights_TK}, [dweights_TK])
    twin, _ = made(name, 0, 0)
    twin = twin.double()
    twin.gemm_dtype = twin.score_dtype = torch.float64
    x64_TH = x_TH.detach().double().requires_grad_()
    raised = {"x": x64_TH, **dict(twin.named_parameters())}
    truth = grown(raised, {"weights": twin(x64_TH, ctx).weights_TK}, [dweights_TK])
    assert_passes([(ours, eager, truth)], reduction=max(LARGE, x_TH.shape[1]))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("tokens", [1, 7, 256, 2113, LARGE])
def test_what_is_chosen_is_chosen_by_the_logits_that_are_returned(name, tokens):
    """Which are as near to the true ones as torch's product is, within twice its error."""
    router, x_TH = made(name, tokens, 3)
    recipe, k = router.recipe(), router.top_k
    routing = choose_fused(router, x_TH, CTX)
    bias_E = getattr(router, "bias", None)
    true_TE = F.linear(*(t if t is None else t.double() for t in (x_TH, router.weight, bias_E)))
    theirs_TE = router_logits(x_TH, router.weight, bias_E, router.gemm_dtype)
    ours, theirs = (
        float((z.double() - true_TE).abs().max()) for z in (routing.logits_TE, theirs_TE)
    )
    assert ours <= 2 * theirs + torch.finfo(FP32).tiny, (ours, theirs)
    choice_bias_E = getattr(router, "e_score_correction_bias", None)
    experts_TK, weights_TK = choose(routing.logits_TE, choice_bias_E, k, recipe)
    assert torch.equal(routing.experts_TK, experts_TK)
    rounding = torch.finfo(weights_TK.dtype).eps
    torch.testing.assert_close(routing.weights_TK, weights_TK, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "deepseek_v4", "gpt_oss"])
def test_ties_go_to_the_lower_id_and_nan_stays_in_its_row(name):
    router = ROUTERS[name][0]()
    recipe, k, E = router.recipe()._replace(score_dtype=FP32), router.top_k, router.num_experts
    logits_TE = (normal(0, 999, E) * 4).round() / 2
    experts_TK, weights_TK = choose(logits_TE, None, k, recipe)
    assert torch.equal(experts_TK, choose_in_torch(logits_TE, None, k, recipe)[0])

    dirty_TE = logits_TE.clone()
    dirty_TE[5], dirty_TE[7, 3], dirty_TE[9], dirty_TE[11, ::2] = (
        torch.nan,
        torch.nan,
        torch.inf,
        -torch.inf,
    )
    found_TK, found_weights_TK = choose(dirty_TE, None, k, recipe)
    ordered_TK = found_TK.sort(-1).values
    assert (ordered_TK[:, 1:] > ordered_TK[:, :-1]).all()
    assert int(ordered_TK.min()) >= 0 and int(ordered_TK.max()) < E
    clean = torch.ones(999, dtype=torch.bool, device=DEVICE)
    clean[[5, 7, 9, 11]] = False
    assert torch.equal(found_TK[clean], experts_TK[clean])
    assert torch.equal(found_weights_TK[clean], weights_TK[clean])
    assert found_weights_TK[5].isnan().all()


@pytest.mark.parametrize(("E", "k"), [(8, 2), (64, 8), (128, 8), (256, 8), (512, 10)])
def test_only_a_border_tie_chooses_otherwise_than_topk(E, k):
    logits_TE = normal(0, LARGE, E).mul(2).round().div(2).bfloat16()
    experts_TK, _ = choose(logits_TE, None, k, Recipe("softmax", score_dtype=FP32))
    scores_TE = logits_TE.softmax(-1, dtype=FP32)
    best = scores_TE.topk(k + 1)
    tied_T = best.values[:, -1] == best.values[:, -2]
    stock_TK = scores_TE.topk(k).indices.sort(-1).values
    other_T = (stock_TK != experts_TK.sort(-1).values).any(-1)
    assert tied_T.any() and not tied_T.all()
    assert not (other_T & ~tied_T).any()


@pytest.mark.parametrize(
    ("tokens", "H", "E"),
    [(0, 256, 8), (1, 256, 8), (7, 2048, 128), (300, 256, 6), (LARGE, 7168, 256)],
)
@pytest.mark.parametrize("cancels", [False, True], ids=["", "cancels"])
def test_fp32_logits_of_bf16(tokens, H, E, cancels):
    """cancels: as under a softmax, the gradient sums to zero over the experts (here over the tokens
    too), and rows and weights have much in common: eight bits of the gradient are not enough."""
    common, spread = (4.0, 0.1) if cancels else (0.0, 1.0)
    leaves = {
        "x": (common + normal(0, tokens, H, std=spread)).to(BF16),
        "weight": ((common + normal(1, E, H, std=spread)) * H**-0.5).to(BF16),
    }
    dlogits_TE = normal(2, tokens, E)
    if cancels and tokens > 1:
        dlogits_TE -= dlogits_TE.mean(0)
        dlogits_TE -= dlogits_TE.mean(1, keepdim=True)

    def run(logits: Callable[..., Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        held = {
            name: leaf.to(dtype or leaf.dtype, copy=True).requires_grad_()
            for name, leaf in leaves.items()
        }
        return grown(held, {"logits": logits(*held.values())}, [dlogits_TE])

    ours = run(lambda x, w: router_logits(x, w, None, FP32))
    assert ours["logits"].dtype == FP32
    eager = run(lambda x, w: F.linear(x.float(), w.float()))
    truth = run(F.linear, torch.float64)
    if cancels:  # a device that truncates as it adds leans to one side where nothing cancels
        del truth["logits"], ours["logits"]
    assert_passes([(ours, eager, truth)], reduction=max(H, tokens, E))


KINDS: dict[str, Callable[[int, int, int], Tensor]] = {
    "uniform": lambda T, K, E: torch.randint(E, (T, K)),
    "one": lambda T, K, E: torch.full((T, K), E - 1),
    "none": lambda T, K, E: torch.full((T, K), -1),
    "skewed": lambda T, K, E: (torch.rand(T, K) ** 4 * E).long(),
    "wild": lambda T, K, E: torch.randint(-3, E + 3, (T, K)),
}


@pytest.mark.parametrize(
    ("tokens", "k", "E"),
    [
        (0, 2, 8),
        (1, 1, 8),
        (7, 8, 128),
        (257, 8, 128),
        (512, 8, 128),
        (16384, 8, 128),
        (16384, 8, 256),
        (5000, 10, 512),
        (3000, 32, 1024),
        (600, 3, 3000),
        (40000, 9, 5),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_is_its_twins_bit_for_bit(tokens, k, E, kind):
    torch.manual_seed(0)
    experts_TK = KINDS[kind](tokens, k, E)
    for kept_TK in (None, torch.rand(tokens, k) < 0.5):
        there = (experts_TK.to(DEVICE), None if kept_TK is None else kept_TK.to(DEVICE))
        plan = sort_plan(*there, E)
        found = (plan.choice_N, plan.source_N, plan.slot_TK, plan.offsets_E)
        for mine, twins in zip(found, sort_in_torch(experts_TK, kept_TK, E), strict=True):
            assert mine.dtype == twins.dtype and torch.equal(mine.cpu(), twins)


def test_the_operators_are_operators():
    router, x_TH = made("qwen3", 5, 0)
    recipe = router.recipe()
    logits_TE = router.logits(x_TH).detach()
    experts_TK, weights_TK = choose(logits_TE, None, 8, recipe)
    ops = torch.ops.moetk
    opcheck(ops.choose.default, (logits_TE.clone().requires_grad_(), None, 8, BF16, *recipe))
    opcheck(ops.choose_backward.default, (weights_TK, logits_TE, experts_TK, *recipe))
    x_TH = x_TH.requires_grad_()
    opcheck(ops.router_logits.default, (x_TH, router.weight))
    opcheck(ops.route.default, (x_TH, router.weight, None, None, 8, BF16, None, *recipe))
    plain = (x_TH.detach(), router.weight.detach(), True, True)
    opcheck(ops.router_logits_backward.default, (logits_TE.float(), *plain))
    opcheck(ops.sort_plan.default, (torch.randint(-1, 9, (6, 2), device=DEVICE), None, 8))
