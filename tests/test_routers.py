"""Laws of the catalogue: what every router of a kind keeps, and what each method promises."""

import inspect
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.errors import (
    MoeShapeError,
    RouterConfigError,
)
from moetk.routers import (
    DeepSeekV3Router,
    DeepSeekV4HashRouter,
    DeepSeekV4Router,
    ExpertChoiceRouter,
    GptOssRouter,
    MixtralRouter,
    NoisyTopKRouter,
    SoftMoERouter,
    SwitchRouter,
    catalogue,
)
from moetk.routing import TokenChoice, check_routing
from tests.rounding import within_rounding

H, E, K, VOCAB = 12, 8, 3, 30
SEEDS = st.integers(0, 2**31 - 1)

TOKEN_CHOICE = {
    "mixtral": lambda k=K: MixtralRouter(H, E, k),
    "olmoe": lambda k=K: MixtralRouter(H, E, k, renormalise=False),
    "mixtral with bias": lambda k=K: MixtralRouter(H, E, k, choice_bias=True),
    "deepseek_v3": lambda k=K: DeepSeekV3Router(H, E, k, scale=2.5),
    "deepseek_v4": lambda k=K: DeepSeekV4Router(H, E, k, scale=1.5),
    "deepseek_v4 hash": lambda k=K: DeepSeekV4HashRouter(H, E, k, vocab_size=VOCAB, scale=1.5),
    "gpt_oss": lambda k=K: GptOssRouter(H, E, k),
    "noisy_top_k": lambda k=K: seeded(NoisyTopKRouter(H, E, k), 5),
    "switch": lambda k=K: SwitchRouter(H, E, k),
}
SUMS = {
    "mixtral": 1,
    "mixtral with bias": 1,
    "deepseek_v3": 2.5,
    "deepseek_v4": 1.5,
    "deepseek_v4 hash": 1.5,
    "gpt_oss": 1,
    "noisy_top_k": 1,
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(router: nn.Module, seed: int) -> nn.Module:
    with torch.no_grad():
        for index, tensor in enumerate((*router.parameters(), *router.buffers())):
            if tensor.is_floating_point():
                tensor.copy_(normal(seed + index, *tensor.shape) * 0.3)
    return router


def context(num_tokens: int, **fields: object) -> RouterContext:
    token_ids_T = torch.arange(num_tokens) * 7 % VOCAB
    return RouterContext(token_ids=token_ids_T, seed=11, **fields)  # type: ignore[arg-type]


def take(routing: TokenChoice, rows_T: Tensor) -> tuple[Tensor, Tensor]:
    return routing.experts_TK[rows_T], routing.weights_TK[rows_T]


def in_float64(router: nn.Module) -> nn.Module:
    router.double().gemm_dtype = router.score_dtype = torch.float64
    return router


def largest_logit(routing: TokenChoice) -> float:
    """exp turns an absolute error of a logit, eps x its size, into a relative one of a weight."""
    return max(1.0, float(routing.logits_TE.detach().abs().max()))


def sensitivity(routing: TokenChoice) -> float:
    return float(routing.weights_TK.detach().norm()) * largest_logit(routing)


class TestEveryTokenChoice:
    @pytest.mark.parametrize("name", TOKEN_CHOICE)
    @pytest.mark.parametrize("num_tokens", [0, 1, 33])
    @pytest.mark.parametrize("k", [1, K, E])
    def test_returns_a_valid_routing(self, name, num_tokens, k):
        router = seeded(TOKEN_CHOICE[name](k), 0)
        x_TH = normal(1, num_tokens, H).requires_grad_()
        for training in (True, False):
            routing = router.train(training)(x_TH, context(num_tokens))
            check_routing(routing, num_tokens, E, where=name)
            if name in SUMS:
                total_T = routing.weights_TK.sum(-1)
                within_rounding(total_T, torch.full_like(total_T, SUMS[name]).double(), terms=k + 2)
            routing.weights_TK.sum().backward()
        assert x_TH.grad is not None and router.weight.grad is not None

    @pytest.mark.parametrize("name", sorted(set(TOKEN_CHOICE) - {"deepseek_v4 hash"}))
    def test_columns_descend_in_the_choice(self, name):
        routing = seeded(TOKEN_CHOICE[name](), 0).eval()(normal(1, 33, H), context(33))
        seen_TE = next(
            t for t in (routing.choice_TE, routing.scores_TE, routing.logits_TE) if t is not None
        )
        chosen_TK = seen_TE.gather(1, routing.experts_TK)
        assert (chosen_TK[:, :-1] >= chosen_TK[:, 1:]).all()

    @pytest.mark.parametrize("name", sorted(set(TOKEN_CHOICE) - {"switch", "deepseek_v4 hash"}))
    @given(seed=SEEDS)
    def test_tokens_are_routed_one_by_one(self, name, seed):
        router = in_float64(seeded(TOKEN_CHOICE[name](), seed).eval())
        x_TH = normal(seed + 50, 9, H).double()
        order_T = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        experts_TK, weights_TK = take(router(x_TH, RouterContext()), order_T)
        moved = router(x_TH[order_T], RouterContext())
        assert torch.equal(moved.experts_TK, experts_TK)
        within_rounding(moved.weights_TK, weights_TK, terms=H, size=sensitivity(moved))

    @pytest.mark.parametrize("name", sorted(set(TOKEN_CHOICE) - {"switch", "deepseek_v4 hash"}))
    @given(seed=SEEDS)
    def test_renaming_the_experts_renames_the_choice(self, name, seed):
        router = in_float64(seeded(TOKEN_CHOICE[name](), seed).eval())
        x_TH = normal(seed + 50, 9, H).double()
        before = router(x_TH, RouterContext())
        order_E = torch.randperm(E, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for tensor in (*router.parameters(), *router.buffers()):
                tensor.copy_(tensor[order_E])
        after = router(x_TH, RouterContext())
        assert torch.equal(order_E[after.experts_TK], before.experts_TK)
        within_rounding(after.weights_TK, before.weights_TK, terms=H + E, size=sensitivity(after))

    @pytest.mark.parametrize("name", TOKEN_CHOICE)
    def test_a_replay_is_followed_and_weighed_anew(self, name):
        router = seeded(TOKEN_CHOICE[name](), 0).eval()
        x_TH = normal(1, 10, H)
        replay_TK = torch.stack(
            [torch.randperm(E, generator=torch.Generator().manual_seed(s))[:K] for s in range(10)]
        )
        replay_TK[0] = -1
        replay_TK[1, 2] = -1
        x_TH.requires_grad_()
        routing = router(x_TH, context(10, replay=replay_TK))
        assert torch.equal(routing.experts_TK, replay_TK)
        check_routing(routing, 10, E, where=name)
        assert routing.weights_TK[0].tolist() == [0] * K and float(routing.weights_TK[1, 2]) == 0
        (gradient_TH,) = torch.autograd.grad((routing.weights_TK**2).sum(), x_TH)
        assert gradient_TH.isfinite().all() and gradient_TH[0].abs().sum() == 0
        assert gradient_TH[2:].abs().sum() > 0

    @pytest.mark.parametrize("name", TOKEN_CHOICE)
    def test_replaying_ones_own_choice_is_the_identity(self, name):
        router = seeded(TOKEN_CHOICE[name](), 0).train()
        x_TH = normal(1, 10, H)
        first = router(x_TH, context(10))
        again = router(x_TH, context(10, replay=first.experts_TK))
        assert torch.equal(first.experts_TK, again.experts_TK)
        assert torch.equal(first.weights_TK, again.weights_TK)

    @pytest.mark.parametrize("name", sorted(set(TOKEN_CHOICE) - {"switch"}))
    def test_a_nan_row_stays_alone(self, name):
        router = seeded(TOKEN_CHOICE[name](), 0).eval()
        x_TH = normal(1, 10, H)
        clean = router(x_TH, context(10))
        x_TH[4] = math.nan
        routing = router(x_TH, context(10))
        others_T = torch.arange(10) != 4
        for ours, theirs in zip(take(routing, others_T), take(clean, others_T), strict=True):
            assert torch.equal(ours, theirs)
        assert routing.weights_TK[4].isnan().all()
        assert int(routing.experts_TK.min()) >= 0 and int(routing.experts_TK.max()) < E
        assert len(set(routing.experts_TK[4].tolist())) == K

    @pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt_oss", "noisy_top_k", "switch"])
    def test_of_equal_experts_the_lower_ids_are_chosen(self, name):
        router = TOKEN_CHOICE[name]().eval()
        assert router(torch.zeros(2, H), context(2)).experts_TK.tolist() == [[0, 1, 2]] * 2

    @pytest.mark.parametrize("name", TOKEN_CHOICE)
    def test_a_float64_twin_agrees_in_values_and_gradients(self, name):
        twin, router = TOKEN_CHOICE[name](), seeded(TOKEN_CHOICE[name](), 0)
        twin.load_state_dict(router.state_dict())
        in_float64(twin)
        router.eval(), twin.eval()
        x_TH = normal(1, 40, H).requires_grad_()
        x64_TH = x_TH.detach().double().requires_grad_()
        upstream_TK = normal(2, 40, K)
        routing, truth = router(x_TH, context(40)), twin(x64_TH, context(40))
        assert torch.equal(routing.experts_TK, truth.experts_TK)
        assert truth.weights_TK.dtype == torch.float64
        within_rounding(
            routing.weights_TK, truth.weights_TK.detach(), terms=H + E, size=sensitivity(truth)
        )
        (routing.weights_TK * upstream_TK).sum().backward()
        (truth.weights_TK * upstream_TK.double()).sum().backward()
        for ours, theirs in ((x_TH, x64_TH), (router.weight, twin.weight)):
            terms = H + E + 40  # a logit's sum, a token's experts, an expert's tokens
            size = theirs.grad.norm() * largest_logit(truth)
            within_rounding(ours.grad, theirs.grad, terms=terms, size=size)


@pytest.mark.parametrize("name", [*TOKEN_CHOICE, "expert choice", "soft"])
def test_traces_into_one_graph(name):
    others = {"expert choice": ExpertChoiceRouter(H, E, 1), "soft": SoftMoERouter(H, E)}
    router = others[name] if name in others else TOKEN_CHOICE[name]()
    router.eval()  # drawing noise from a generator breaks the graph
    torch.compiler.reset()  # each router is a program of its own, not a recompilation
    ctx, x_TH = context(10, batch_shape=(2, 5)), normal(1, 10, H)
    whole = torch.compile(lambda x: router(x, ctx), fullgraph=True, backend="eager")
    for ours, theirs in zip(
        vars(whole(x_TH)).values(), vars(router(x_TH, ctx)).values(), strict=True
    ):
        assert not isinstance(ours, Tensor) or torch.equal(ours, theirs)


class TestLinear:
    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ((H, E, 9), "MixtralRouter: top_k=9 but num_experts=8; need 1 <= top_k <= 8."),
            ((H, E, 0), "MixtralRouter: top_k=0; need a whole number from 1 on."),
            ((H, E, True), "MixtralRouter: top_k=True; need a whole number from 1 on."),
            ((H, 8.0, 2), "MixtralRouter: num_experts=8.0; need a whole number from 1 on."),
            ((0, E, 2), "MixtralRouter: hidden_size=0; need a whole number from 1 on."),
        ],
    )
    def test_sizes_are_checked(self, sizes, message):
        with pytest.raises(RouterConfigError, match=re.escape(message)):
            MixtralRouter(*sizes)

    def test_the_tie_rule_is_checked(self):
        with pytest.raises(RouterConfigError, match="MixtralRouter: tie='first' is not a rule"):
            MixtralRouter(H, E, K, tie="first")  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["gemm_dtype", "score_dtype"])
    @pytest.mark.parametrize("value", ["float32", torch.int64, float])
    def test_dtypes_are_checked(self, name, value):
        message = f"MixtralRouter: {name}={value!r}; need a floating torch.dtype"
        with pytest.raises(RouterConfigError, match=re.escape(message)):
            MixtralRouter(H, E, K, **{name: value})

    @pytest.mark.parametrize("shape", [(6, 13), (2, 3, H), (H,)])
    def test_another_shape_of_x_raises(self, shape):
        message = f"MixtralRouter: x_TH is {shape}, expected (T, H=12)"
        with pytest.raises(MoeShapeError, match=re.escape(message)):
            MixtralRouter(H, E, K)(normal(0, *shape), RouterContext())

    def test_dtypes_are_the_declared_ones(self):
        x_TH = normal(0, 5, H).bfloat16()
        for gemm, score, logits_dtype, weights_dtype in (
            (None, torch.float32, torch.bfloat16, torch.float32),
            (None, None, torch.bfloat16, torch.bfloat16),
            (torch.float32, None, torch.float32, torch.float32),
            (torch.float64, torch.float32, torch.float64, torch.float32),
        ):
            router = MixtralRouter(H, E, K, gemm_dtype=gemm, score_dtype=score)
            routing = router(x_TH, RouterContext())
            assert routing.logits_TE.dtype == logits_dtype
            assert routing.scores_TE.dtype == routing.weights_TK.dtype == weights_dtype


@pytest.mark.parametrize(
    "published",
    [
        f
        for _, f in inspect.getmembers(catalogue, inspect.isfunction)
        if f.__module__ == catalogue.__name__
    ],
    ids=lambda f: f.__name__,
)
def test_published_settings_route(published):
    router = published(hidden_size=H).eval()
    routing = router(normal(0, 6, H), RouterContext())
    defaults = inspect.signature(published).parameters
    check_routing(routing, 6, defaults["num_experts"].default, where=published.__name__)
    assert routing.experts_TK.shape == (6, defaults["top_k"].default)
    assert published(H, tie="stock").tie == "stock"
