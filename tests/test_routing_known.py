"""What a router's kernel knows of the plan is used for the plan of that choice alone; and the op of
that kernel is an op."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

from moetk.context import RouterContext
from moetk.errors import MoeShapeError
from moetk.kernels import sort_plan as room
from moetk.kernels.recipe import Recipe
from moetk.kernels.route import in_one_kernel, route
from moetk.kernels.sort_plan import SortPlan, known_of, sort_in_torch
from moetk.routers import MixtralRouter
from moetk.routers.fused import why_not_fused
from moetk.routing import TokenChoice

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def ids() -> Tensor:
    return torch.tensor([[0, 2], [1, 0]])


def plan() -> SortPlan:
    return SortPlan(*sort_in_torch(ids(), None, 3))


def test_the_choice_that_was_planned_is_not_sorted_again() -> None:
    experts_TK = ids()
    known = known_of(experts_TK, plan())
    assert known is not None and known.holds_for(experts_TK, None, 3)


@pytest.mark.parametrize("change", ["written to", "dropped", "another bank's", "elsewhere"])
def test_another_choice_is_sorted_anew(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts_TK = ids()
    known = known_of(experts_TK, plan())
    assert known is not None
    kept_TK = torch.ones(2, 2, dtype=torch.bool) if change == "dropped" else None
    if change == "written to":
        experts_TK.add_(0)
    if change == "elsewhere":  # another stream, or a capture that did not make the choice
        monkeypatch.setattr(room, "_where", lambda tensor: (7, True))
    assert not known.holds_for(experts_TK, kept_TK, 4 if "bank" in change else 3)


def test_what_cannot_be_checked_is_not_known() -> None:
    with torch.inference_mode():
        assert known_of(ids(), plan()) is None
    assert known_of(ids(), None) is None


def test_another_routing_made_of_this_one_knows_nothing() -> None:
    routing = TokenChoice(ids(), torch.rand(2, 2), 3)
    assert routing.known is None
    object.__setattr__(routing, "known", known_of(routing.experts_TK, plan()))
    assert routing.known is not None
    assert replace(routing, num_experts=3).known is None
    assert _pytree.tree_map(lambda leaf: leaf, routing).known is None


SOFTMAX = Recipe("softmax", renormalise=True, score_dtype=FP32)
GROUPS = Recipe("sigmoid", groups=4, top_groups=2, renormalise=True, eps=1e-20, scale=2.5)
ODD = Recipe("sigmoid", groups=3, top_groups=2)


@pytest.mark.parametrize(
    ("dtypes", "experts", "recipe", "fits"),
    [
        ((BF16, BF16, BF16), 128, SOFTMAX, True),
        ((FP16, FP16, FP32), 6, SOFTMAX, True),
        ((BF16, BF16, BF16), 128, GROUPS, True),
        ((BF16, BF16, BF16), 120, ODD, False),  # 3 groups of 40 take 4 of 64 columns
        ((BF16, BF16, FP16), 6, SOFTMAX, False),
        ((FP32, FP32, FP32), 6, SOFTMAX, False),
        ((BF16, FP32, FP32), 6, SOFTMAX, False),
        ((BF16, BF16, BF16), 129, SOFTMAX, False),
    ],
)
def test_whom_the_kernel_takes(
    dtypes: tuple[torch.dtype, ...], experts: int, recipe: Recipe, fits: bool
) -> None:
    x_TH, weight_EH = torch.zeros(2, 8, dtype=dtypes[0]), torch.zeros(experts, 8, dtype=dtypes[1])
    assert in_one_kernel(x_TH, weight_EH, dtypes[2], recipe) == fits


def test_the_kernel_takes_no_subclass_of_a_tensor() -> None:
    class Sharded(torch.Tensor):
        pass

    weight_EH = torch.zeros(4, 8, dtype=BF16)
    x_TH = torch.zeros(2, 8, dtype=BF16)
    assert in_one_kernel(x_TH, torch.nn.Parameter(weight_EH), BF16, SOFTMAX)
    assert not in_one_kernel(x_TH, weight_EH.as_subclass(Sharded), BF16, SOFTMAX)


@pytest.mark.parametrize("which", ["bias_E", "choice_bias_E"])
@pytest.mark.parametrize("shape", [(1,), (3,), (4, 1)])
def test_a_bias_of_another_shape_is_named(which: str, shape: tuple[int, ...]) -> None:
    biases = {"bias_E": None, "choice_bias_E": None, which: torch.zeros(shape)}
    with pytest.raises(MoeShapeError, match=rf"{which} is \({shape[0]},.*expected \(E=4,\)"):
        route(torch.zeros(2, 8), torch.zeros(4, 8), *biases.values(), 2, SOFTMAX)


def test_symbolic_sizes_are_traced() -> None:
    def routed(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
        return route(x_TH, weight_EH, None, None, 2, SOFTMAX).weights_TK

    given = torch.randn(5, 8), torch.randn(4, 8)
    traced = make_fx(routed, tracing_mode="symbolic")(*given)
    torch.testing.assert_close(traced(*given), routed(*given))


@pytest.mark.filterwarnings("error")  # of caches that the compiler looks through
def test_the_compiler_sees_no_cache_and_breaks_no_graph() -> None:
    router, weight_EH = MixtralRouter(8, 16, 4), torch.randn(16, 8, dtype=BF16)

    def routed(x_TH: Tensor) -> Tensor:
        assert why_not_fused(router, RouterContext()) is not None  # the CPU
        assert in_one_kernel(x_TH, weight_EH, BF16, SOFTMAX)
        return route(x_TH, weight_EH, None, None, 4, SOFTMAX).weights_TK

    x_TH = torch.randn(5, 8, dtype=BF16)
    compiled = torch.compile(routed, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x_TH), routed(x_TH))


RECIPES = {
    "softmax": SOFTMAX,
    "logits": Recipe("identity", over_chosen=True, score_dtype=FP32),
    "groups": GROUPS,
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
    leaves = [tensor.to(BF16).requires_grad_() for tensor in (x_TH, weight_EH)]
    leaves.append(bias_E.requires_grad_())  # fp32: rounded to the product's dtype first
    given = (*leaves, choice_bias_E) if biases else (*leaves[:2], None, None)
    leaves = leaves if biases else leaves[:2]
    settings = (4, dtype, BF16)
    weights_TK, experts_TK, logits_TE = operator(*given, *settings, *recipe)
    want = route(*given, 4, recipe, dtype, BF16)
    assert torch.equal(experts_TK, want.experts_TK) and not experts_TK.requires_grad
    torch.testing.assert_close(weights_TK, want.weights_TK, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(logits_TE, want.logits_TE, rtol=2e-2, atol=1e-3)
    true = [want.weights_TK, want.logits_TE]
    arriving = [torch.randn(*t.shape, generator=generator).to(t.dtype) for t in true]
    for some in (slice(0, 1), slice(1, 2), slice(0, 2)):
        mine = torch.autograd.grad(
            [weights_TK, logits_TE][some], leaves, arriving[some], retain_graph=True
        )
        theirs = torch.autograd.grad(true[some], leaves, arriving[some], retain_graph=True)
        for left, right in zip(mine, theirs, strict=True):
            torch.testing.assert_close(left, right, rtol=3e-2, atol=3e-2)
    torch.library.opcheck(operator, (*given, *settings, *recipe))
