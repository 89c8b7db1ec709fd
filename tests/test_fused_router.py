"""A router's recipe, run by one op, is the router's own forward: values, ids and gradients."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moetk.context import RouterContext
from moetk.equivalence.judge import floor
from moetk.errors import MoeShapeError, RouterConfigError
from moetk.kernels.choose import choose, choose_in_torch
from moetk.kernels.recipe import Recipe
from moetk.kernels.router_logits import router_logits
from moetk.routers import (
    DeepSeekV3Router,
    DeepSeekV4HashRouter,
    DeepSeekV4Router,
    GptOssRouter,
    LinearRouter,
    MixtralRouter,
    SwitchRouter,
)
from moetk.routers.fused import choose_fused, why_not_fused
from moetk.routing import check_routing

H, E, K = 8, 12, 4
CTX = RouterContext()
FP32 = torch.float32
ROUTERS = {
    "mixtral": lambda k, gemm: MixtralRouter(H, E, k, gemm_dtype=gemm),
    "mixtral, bias, model's dtype": lambda k, gemm: MixtralRouter(
        H, E, k, choice_bias=True, gemm_dtype=gemm, score_dtype=None
    ),
    "olmoe": lambda k, gemm: MixtralRouter(H, E, k, renormalise=False, gemm_dtype=gemm),
    "gpt_oss": lambda k, gemm: GptOssRouter(H, E, k, gemm_dtype=gemm),
    "granitemoe": lambda k, gemm: GptOssRouter(
        H, E, k, bias=False, gemm_dtype=gemm, score_dtype=FP32
    ),
    "deepseek_v3": lambda k, gemm: DeepSeekV3Router(H, E, k, scale=2.5, gemm_dtype=gemm),
    "deepseek_v3, groups": lambda k, gemm: DeepSeekV3Router(
        H, E, min(k, 8), groups=3, top_groups=2, scale=2.5, gemm_dtype=gemm, score_dtype=None
    ),
    "deepseek_v3, sum kept": lambda k, gemm: DeepSeekV3Router(
        H, E, k, renormalise=False, gemm_dtype=gemm
    ),
    "deepseek_v4": lambda k, gemm: DeepSeekV4Router(H, E, k, scale=1.5, gemm_dtype=gemm),
}
RECIPES = {name: make(K, None).recipe() for name, make in ROUTERS.items()}
SEEDS = st.integers(0, 2**31 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(router: LinearRouter, seed: int, dtype: torch.dtype, ties: bool) -> LinearRouter:
    with torch.no_grad():
        for index, tensor in enumerate((*router.parameters(), *router.buffers())):
            tensor.copy_(normal(seed + index, *tensor.shape) * 0.6)
            if ties:  # experts 1 and 2, 5 and 6 are equal to the last bit, parameters and bias
                tensor[[2, 6]] = tensor[[1, 5]]
    if dtype == torch.float64:
        router.gemm_dtype = router.score_dtype = dtype
    return router.to(dtype)  # type: ignore[no-any-return]


def gradients(of: Tensor, by: list[Tensor], dweights_TK: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(of, by, dweights_TK.to(of.dtype)))


@pytest.mark.parametrize("name", ROUTERS)
class TestRecipe:
    @given(
        seed=SEEDS,
        num_tokens=st.sampled_from([0, 1, 33]),
        k=st.sampled_from([1, K, E]),
        ties=st.booleans(),
        dtype=st.sampled_from([torch.float64, FP32, torch.bfloat16]),
        gemm=st.sampled_from([None, FP32]),
    )
    @settings(max_examples=25)
    def test_is_the_forward(self, name, seed, num_tokens, k, ties, dtype, gemm):
        router = drawn(ROUTERS[name](k, gemm), seed, dtype, ties)
        x_TH = normal(seed + 7, num_tokens, H).to(dtype).requires_grad_()
        want, got = router(x_TH, CTX), choose_fused(router, x_TH, CTX)
        check_routing(got, num_tokens, E, where=name)
        assert torch.equal(got.experts_TK, want.experts_TK)
        assert torch.equal(got.weights_TK, want.weights_TK)
        assert got.weights_TK.dtype == want.weights_TK.dtype
        assert torch.equal(got.logits_TE, want.logits_TE)
        assert got.logits_TE.dtype == want.logits_TE.dtype
        assert got.scores_TE is None and got.choice_TE is None

        dweights_TK = normal(seed + 8, *got.weights_TK.shape).to(got.weights_TK.dtype)
        by = [x_TH, *router.parameters()]
        twin = _in_float64(router, name, k)
        x64_TH = x_TH.detach().double().requires_grad_()
        # Rounding may choose otherwise: the truth is of the experts that were chosen.
        truth = twin(x64_TH, RouterContext(replay=got.experts_TK))
        for true, eager, ours in zip(
            gradients(truth.weights_TK, [x64_TH, *twin.parameters()], dweights_TK),
            gradients(want.weights_TK, by, dweights_TK),
            gradients(got.weights_TK, by, dweights_TK),
            strict=True,
        ):
            eager_error = float((eager.double() - true).norm())
            wide = torch.promote_types(ours.dtype, FP32)
            noise = floor(wide, E * H) * float(dweights_TK.double().norm()) * 4 * math.sqrt(H)
            bound = max(2 * eager_error, floor(ours.dtype, 1) * float(true.norm()) + noise)
            assert float((ours.double() - true).norm()) <= bound

    @given(seed=SEEDS, score_dtype=st.sampled_from([FP32, torch.float64]))
    @settings(max_examples=15)
    def test_a_nan_row_is_its_own(self, name, seed, score_dtype):
        recipe = RECIPES[name]._replace(score_dtype=score_dtype)
        logits_TE = normal(seed, 9, E)
        clean = choose(logits_TE, None, K, recipe)
        dirty_TE = logits_TE.clone()
        dirty_TE[2], dirty_TE[5, 3], dirty_TE[6, :7] = math.nan, math.nan, -math.inf
        dirty_TE.requires_grad_()
        experts_TK, weights_TK = choose(dirty_TE, None, K, recipe)
        assert int(experts_TK.min()) >= 0 and int(experts_TK.max()) < E
        ordered_TK = experts_TK.sort(-1).values
        assert (ordered_TK[:, 1:] > ordered_TK[:, :-1]).all()
        kept = [0, 1, 3, 4, 7, 8]
        assert torch.equal(experts_TK[kept], clean[0][kept])
        assert torch.equal(weights_TK[kept], clean[1][kept])
        weights_TK.sum().backward()
        assert dirty_TE.grad is not None and dirty_TE.grad[kept].isfinite().all()
        assert weights_TK[2].isnan().all()

    @given(seed=SEEDS, zero=st.booleans(), bias=st.booleans())
    @settings(max_examples=15)
    def test_gradient_is_the_chain_of_torch(self, name, seed, zero, bias):
        recipe = RECIPES[name]._replace(score_dtype=torch.float64)
        logits_TE = normal(seed, 7, E).double() * 3
        logits_TE[:, 4] = logits_TE[:, 3]
        if zero:
            logits_TE[0] = 0
        logits_TE.requires_grad_()
        bias_E = normal(seed + 1, E).double() if bias else None
        experts_TK, weights_TK = choose(logits_TE, bias_E, K, recipe)
        torch_experts_TK, torch_weights_TK = choose_in_torch(logits_TE, bias_E, K, recipe)
        assert torch.equal(experts_TK, torch_experts_TK)
        dweights_TK = normal(seed + 2, 7, K).double()
        (got,) = gradients(weights_TK, [logits_TE], dweights_TK)
        (want,) = gradients(torch_weights_TK, [logits_TE], dweights_TK)
        assert float((got - want).norm()) <= floor(torch.float64, E * K) * float(dweights_TK.norm())

    def test_is_an_op(self, name):
        logits_TE = normal(0, 5, E).requires_grad_()
        for bias_E in (None, normal(1, E)):
            for weight_dtype in (None, torch.bfloat16):
                arguments = (logits_TE, bias_E, K, weight_dtype, *RECIPES[name])
                torch.library.opcheck(torch.ops.moetk.choose.default, arguments)
        experts_TK, _ = choose(logits_TE, None, K, RECIPES[name])
        arguments = (normal(2, 5, K), logits_TE.detach(), experts_TK, *RECIPES[name])
        torch.library.opcheck(torch.ops.moetk.choose_backward.default, arguments)

    @pytest.mark.parametrize("num_tokens", [0, 5])
    def test_compiles_whole(self, name, num_tokens):
        torch.compiler.reset()
        router = drawn(ROUTERS[name](K, FP32), 3, torch.bfloat16, False)
        x_TH = normal(4, num_tokens, H).bfloat16().requires_grad_()

        def weights(x_TH: Tensor) -> Tensor:
            return choose_fused(router, x_TH, CTX, torch.bfloat16).weights_TK

        compiled = torch.compile(weights, backend="aot_eager", fullgraph=True)(x_TH)
        assert torch.equal(compiled, weights(x_TH)) and compiled.dtype == torch.bfloat16
        by = [x_TH, router.weight]
        for got, want in zip(
            gradients(compiled, by, torch.ones_like(compiled)),
            gradients(weights(x_TH), by, torch.ones_like(compiled)),
            strict=True,
        ):
            assert torch.equal(got, want)


def _in_float64(router: LinearRouter, name: str, k: int) -> LinearRouter:
    twin = ROUTERS[name](k, torch.float64)
    twin.score_dtype = torch.float64
    twin.double().load_state_dict(router.state_dict())
    return twin  # type: ignore[no-any-return]


def test_steps_of_several_routers_compose():
    recipe = Recipe("softmax", over_chosen=True, renormalise=True, eps=0.5, scale=3.0)
    logits_TE = normal(0, 6, E).double().requires_grad_()
    dweights_TK = normal(1, 6, K).double()
    weights = (run(logits_TE, None, K, recipe)[1] for run in (choose, choose_in_torch))
    (got,), (want,) = (gradients(weights_TK, [logits_TE], dweights_TK) for weights_TK in weights)
    assert float((got - want).norm()) <= floor(torch.float64, E * K) * float(dweights_TK.norm())


def test_scores_that_underflow_have_a_gradient():
    """sqrt(softplus(-200)) is 0 in fp32, and torch's chain of it is 0 * inf."""
    logits_TE = torch.tensor([[1.0, -200.0, 0.5, -300.0]], requires_grad=True)
    recipe = Recipe("sqrt_softplus", renormalise=True, eps=1e-20)
    _, weights_TK = choose(logits_TE, None, 3, recipe)
    weights_TK[0, 0].backward()
    assert logits_TE.grad is not None and logits_TE.grad.isfinite().all()
    assert logits_TE.grad[0, 0] > 0 and logits_TE.grad[0, 1] == 0


def test_a_routing_that_nobody_weighs_has_no_gradient():
    logits_TE = normal(0, 5, E).requires_grad_()
    experts_TK, weights_TK = choose(logits_TE, None, K, RECIPES["mixtral"])
    assert not experts_TK.requires_grad and weights_TK.requires_grad
    (weights_TK * 0).sum().backward()
    assert torch.equal(logits_TE.grad, torch.zeros(5, E))


@pytest.mark.parametrize(
    ("recipe", "k", "message"),
    [
        (
            Recipe("tanh"),  # type: ignore[arg-type]
            K,
            "Recipe: score='tanh' is none of 'softmax', 'sigmoid', 'sqrt_softplus', 'identity'.",
        ),
        (Recipe("softmax"), 13, "Recipe: top_k=13 of 12 experts; need 1 <= top_k <= 12."),
        (Recipe("softmax"), 0, "Recipe: top_k=0 of 12 experts; need 1 <= top_k <= 12."),
        (
            Recipe("sigmoid", groups=5, top_groups=2),
            K,
            "Recipe: groups=5 does not divide num_experts=12.",
        ),
        (
            Recipe("sigmoid", groups=12, top_groups=4),
            K,
            "Recipe: top_groups=4 of groups=12 hold 4 experts, 1 a group; need two a group, and "
            "top_k=4 in all.",
        ),
        (
            Recipe("sigmoid", groups=4, top_groups=1),
            K,
            "Recipe: top_groups=1 of groups=4 hold 3 experts, 3 a group; need two a group, and "
            "top_k=4 in all.",
        ),
    ],
)
def test_a_recipe_that_cannot_work(recipe, k, message):
    with pytest.raises(RouterConfigError, match=re.escape(message)):
        choose(normal(0, 3, E), None, k, recipe)


class TestLogits:
    @given(seed=SEEDS, num_tokens=st.sampled_from([0, 1, 40]), bias=st.booleans())
    @settings(max_examples=20)
    def test_in_fp32_of_bf16(self, seed, num_tokens, bias):
        x_TH = normal(seed, num_tokens, H).bfloat16().requires_grad_()
        weight_EH = normal(seed + 1, E, H).bfloat16().requires_grad_()
        bias_E = normal(seed + 2, E).bfloat16().requires_grad_() if bias else None
        logits_TE = router_logits(x_TH, weight_EH, bias_E, FP32)
        plain_TE = F.linear(x_TH.float(), weight_EH.float(), bias_E.float() if bias else None)
        assert logits_TE.dtype == FP32
        size = float(x_TH.double().norm() * weight_EH.double().norm()) + 1
        assert float((logits_TE - plain_TE).detach().norm()) <= floor(FP32, H) * size
        by = [t for t in (x_TH, weight_EH, bias_E) if t is not None]
        dlogits_TE = normal(seed + 3, num_tokens, E)
        for got, want in zip(
            gradients(logits_TE, by, dlogits_TE), gradients(plain_TE, by, dlogits_TE), strict=True
        ):
            assert got.dtype == torch.bfloat16
            # Both round one fp32 number; at a border they may fall to either side.
            assert float((got.float() - want.float()).norm()) <= 2**-8 * float(want.norm())

    @pytest.mark.parametrize("wants", [(True, False), (False, True), (True, True)])
    def test_is_an_op(self, wants):
        x_TH = normal(0, 5, H).bfloat16().requires_grad_(wants[0])
        weight_EH = normal(1, E, H).bfloat16().requires_grad_(wants[1])
        torch.library.opcheck(torch.ops.moetk.router_logits.default, (x_TH, weight_EH))
        arguments = (normal(2, 5, E), x_TH.detach(), weight_EH.detach(), *wants)
        torch.library.opcheck(torch.ops.moetk.router_logits_backward.default, arguments)

    @pytest.mark.parametrize(
        ("x", "weight", "gemm"),
        [
            (torch.bfloat16, FP32, FP32),
            (torch.float16, torch.float16, FP32),
            (torch.bfloat16, torch.bfloat16, None),
            (FP32, torch.bfloat16, torch.float64),
        ],
    )
    def test_other_dtypes_are_cast(self, x, weight, gemm):
        x_TH, weight_EH, bias_E = normal(0, 5, H).to(x), normal(1, E, H).to(weight), normal(2, E)
        dtype = gemm or x
        want_TE = F.linear(x_TH.to(dtype), weight_EH.to(dtype), bias_E.to(dtype))
        assert torch.equal(router_logits(x_TH, weight_EH, bias_E, gemm), want_TE)

    def test_keeps_x_and_the_weight_alone(self):
        saved: list[Tensor] = []
        x_TH = normal(0, 64, H).bfloat16().requires_grad_()
        weight_EH = nn.Parameter(normal(1, E, H).bfloat16())
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            router_logits(x_TH, weight_EH, None, FP32)
        assert {t.data_ptr() for t in saved} == {x_TH.data_ptr(), weight_EH.data_ptr()}

    @pytest.mark.parametrize("shape", [(5, H + 1), (2, 5, H)])
    def test_refuses_another_width(self, shape):
        with pytest.raises(MoeShapeError, match=re.escape(f"x_TH is {shape}, expected (T, H={H})")):
            router_logits(torch.zeros(shape), torch.zeros(E, H))


class Louder(MixtralRouter):
    """Settings of its own, and the forward of its parent."""

    renormalise = False


class Clipped(MixtralRouter):
    def logits(self, x_TH: Tensor) -> Tensor:
        return super().logits(x_TH).clamp(-1, 1)


class Own(MixtralRouter):
    def forward(self, x_TH: Tensor, ctx: RouterContext):
        return super().forward(x_TH.detach(), ctx)


class Told(Own):
    """A recipe beside another forward than that of its class."""

    def recipe(self) -> Recipe:
        return Recipe("softmax")


class Shell:
    """As moetk puts before transformers' gates: its forward is no router's."""

    def forward(self, x_TH: Tensor) -> Tensor:
        raise AssertionError


class Gate(Shell, MixtralRouter):
    pass


class TestWhyNot:
    def on_cuda(self, make, ctx=CTX) -> str | None:
        with FakeTensorMode(), torch.device("cuda"):  # a device in name alone
            return why_not_fused(make(), ctx)

    @pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)
    def test_catalogue_runs(self, make):
        assert self.on_cuda(lambda: make(K, None)) is None

    @pytest.mark.parametrize("cls", [Louder, Gate])
    def test_a_parents_forward_runs(self, cls):
        assert self.on_cuda(lambda: cls(H, E, K)) is None

    @pytest.mark.parametrize("cls", [Own, Told, Clipped, SwitchRouter, LinearRouter])
    def test_another_forward_has_no_recipe(self, cls):
        assert self.on_cuda(lambda: cls(H, E, 1)) == f"{cls.__name__} has no recipe of its forward"

    def test_a_table_has_no_recipe(self):
        why = self.on_cuda(lambda: DeepSeekV4HashRouter(H, E, K, vocab_size=20))
        assert why == "DeepSeekV4HashRouter has no recipe of its forward"

    def test_replay(self):
        ctx = RouterContext(replay=torch.zeros(3, K, dtype=torch.int64))
        assert self.on_cuda(lambda: MixtralRouter(H, E, K), ctx) == "a choice is replayed"

    def test_device(self):
        assert why_not_fused(MixtralRouter(H, E, K), CTX) == "device cpu, needs cuda"

    @pytest.mark.parametrize(("experts", "k"), [(1025, 1), (64, 33)])
    def test_size(self, experts, k):
        why = self.on_cuda(lambda: MixtralRouter(H, experts, k))
        assert why == f"num_experts={experts}, top_k={k}; needs at most 1024 and 32"

    @pytest.mark.parametrize("name", ["gemm_dtype", "score_dtype"])
    def test_dtypes(self, name):
        why = self.on_cuda(lambda: MixtralRouter(H, E, K, **{name: torch.float64}))
        assert why == f"{name} torch.float64, needs float32, bfloat16 or float16"

    def test_weight(self):
        def make() -> MixtralRouter:
            router = MixtralRouter(H, E, K)
            router.weight = nn.Parameter(router.weight.detach().double())
            return router

        why = self.on_cuda(make)
        assert why == "weight torch.float64, needs float32, bfloat16 or float16"

    def test_autocast(self):
        torch.set_autocast_enabled("cuda", True)
        try:
            why = self.on_cuda(lambda: MixtralRouter(H, E, K))
        finally:
            torch.set_autocast_enabled("cuda", False)
        assert why == "autocast changes the dtypes that the router declares"
