"""What each method of the catalogue promises beyond the laws that all of them keep."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from moetk.context import RouterContext
from moetk.errors import MissingContextError, MoeShapeError, ReplayError, RouterConfigError
from moetk.routers import (
    DeepSeekV3Router,
    DeepSeekV4HashRouter,
    DeepSeekV4Router,
    ExpertChoiceRouter,
    MixtralRouter,
    NoisyTopKRouter,
    SoftMoERouter,
    SwitchRouter,
    expert_capacity,
)
from moetk.routing import check_routing

H, E, K, VOCAB = 12, 8, 3, 30
SEEDS = st.integers(0, 2**31 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(router: nn.Module, seed: int) -> nn.Module:
    with torch.no_grad():
        for index, tensor in enumerate((*router.parameters(), *router.buffers())):
            if tensor.is_floating_point():
                tensor.copy_(normal(seed + index, *tensor.shape) * 0.3)
    return router


class TestChoiceBias:
    @pytest.mark.parametrize(
        "router",
        [
            MixtralRouter(H, E, K, choice_bias=True),
            DeepSeekV3Router(H, E, K),
            DeepSeekV4Router(H, E, K),
        ],
        ids=lambda router: type(router).__name__,
    )
    def test_chooses_and_never_weighs(self, router):
        seeded(router, 0)
        bias_E = router.e_score_correction_bias.requires_grad_()
        x_TH = normal(1, 20, H)
        routing = router(x_TH, RouterContext())
        assert torch.autograd.grad(routing.weights_TK.sum(), bias_E, allow_unused=True) == (None,)

        with torch.no_grad():
            bias_E.copy_(torch.arange(E) * 10.0)  # decides alone
        steered = router(x_TH, RouterContext())
        assert steered.experts_TK.tolist() == [[7, 6, 5]] * 20
        with torch.no_grad():
            bias_E.zero_()
        replayed = router(x_TH, RouterContext(replay=steered.experts_TK))
        assert torch.equal(replayed.weights_TK, steered.weights_TK)

    def test_is_a_buffer_that_only_routers_with_a_choice_bias_have(self):
        assert "e_score_correction_bias" in dict(DeepSeekV3Router(H, E, K).named_buffers())
        assert "e_score_correction_bias" not in MixtralRouter(H, E, K).state_dict()


class TestDeepSeekV3:
    @given(SEEDS)
    def test_a_token_stays_within_its_best_groups(self, seed):
        router = seeded(DeepSeekV3Router(H, E, 3, groups=4, top_groups=2, scale=2.5), seed)
        routing = router(normal(seed + 9, 11, H), RouterContext())
        groups_TK = routing.experts_TK // 2
        assert all(len(set(row)) <= 2 for row in groups_TK.tolist())
        assert (routing.choice_TE.isinf().sum(-1) == 4).all()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"groups": 3}, "groups=3 does not divide num_experts=8"),
            ({"groups": 0}, "groups=0; need a whole number from 1 on"),
            ({"groups": 2.0}, "groups=2.0; need a whole number from 1 on"),
            ({"top_groups": "1"}, "top_groups='1'; need a whole number from 1 on"),
            ({"scale": "x"}, "scale='x'; need a finite number"),
            ({"scale": math.nan}, "scale=nan; need a finite number"),
            ({"eps": -1e-9}, "eps=-1e-09; need a finite number >= 0"),
            ({"groups": 4, "top_groups": 5}, "top_groups=5; need 1 <= top_groups <= groups=4"),
            ({"groups": 8, "top_groups": 4}, "groups=8 leaves one expert a group"),
            ({"groups": 4, "top_groups": 1}, "top_k=3 but top_groups=1 groups hold 2 experts"),
        ],
    )
    def test_settings_that_cannot_work_raise(self, settings, message):
        with pytest.raises(RouterConfigError, match=re.escape(f"DeepSeekV3Router: {message}")):
            DeepSeekV3Router(H, E, K, **settings)


class TestHash:
    def test_the_table_decides_and_both_of_two_equal_ids_count(self):
        router = DeepSeekV4HashRouter(H, E, 2, vocab_size=VOCAB)
        router.tid2eid[5] = torch.tensor([3, 3])
        ctx = RouterContext(token_ids=torch.tensor([5, 0]))
        routing = router(normal(0, 2, H), ctx)
        assert routing.experts_TK[0].tolist() == [3, 3]
        assert routing.weights_TK[0].tolist() == [0.5, 0.5]
        check_routing(routing, 2, E, where="hash", duplicates=router.duplicates)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"scale": "1.5"}, "DeepSeekV4HashRouter: scale='1.5'; need a finite number"),
            ({"eps": math.inf}, "DeepSeekV4HashRouter: eps=inf; need a finite number >= 0"),
            ({"vocab_size": 30.0}, "vocab_size=30.0; need a whole number from 1 on"),
        ],
    )
    def test_settings_are_checked(self, settings, message):
        with pytest.raises(RouterConfigError, match=re.escape(message)):
            DeepSeekV4HashRouter(H, E, 2, **{"vocab_size": VOCAB, **settings})

    def test_needs_token_ids(self):
        router = DeepSeekV4HashRouter(H, E, 2, vocab_size=VOCAB)
        message = "DeepSeekV4HashRouter in model.layers.0.mlp needs ctx.token_ids, which is None"
        with pytest.raises(MissingContextError, match=re.escape(message)):
            router(normal(0, 2, H), RouterContext(where="model.layers.0.mlp"))


class TestSwitch:
    @given(
        SEEDS, st.sampled_from([0.3, 0.5, 1.0, 1.25]), st.sampled_from([(2, 16), (4, 7), (1, 5)])
    )
    def test_what_an_expert_takes_of_a_sequence_is_counted_exactly(self, seed, factor, shape):
        batch, length = shape
        router = seeded(SwitchRouter(H, E, capacity_factor=factor, jitter=0.0), seed)
        x_TH = normal(seed + 9, batch * length, H).requires_grad_()
        routing = router(x_TH, RouterContext(batch_shape=shape))
        check_routing(routing, batch * length, E, where="switch")
        capacity = expert_capacity(length, 1, E, factor)
        for ids, kept in zip(
            routing.experts_TK.view(shape), routing.kept_TK.view(shape), strict=True
        ):
            wanted_E = torch.bincount(ids, minlength=E)
            taken_E = torch.bincount(ids[kept], minlength=E)
            assert torch.equal(taken_E, wanted_E.clamp(max=capacity))
            for expert in range(E):  # the first come
                assert kept[ids == expert][: int(taken_E[expert])].all()
        (gradient_TH,) = torch.autograd.grad(routing.weights_TK.sum(), x_TH)
        assert (gradient_TH[~routing.kept_TK[:, 0]] == 0).all()

    def test_padding_takes_no_place(self):
        router = SwitchRouter(H, 2, capacity_factor=1.0).eval()
        mask_T = torch.tensor([False, False, True, True])
        ctx = RouterContext(batch_shape=(1, 4), token_mask=mask_T)
        routing = router(torch.zeros(4, H), ctx)
        assert routing.kept_TK[:, 0].tolist() == [False, False, True, True]

    def test_jitter_is_the_routers_own_and_for_training_only(self):
        router = seeded(SwitchRouter(H, E, jitter=0.5), 0)
        x_TH = normal(1, 6, H)
        before = x_TH.clone()
        noisy = router.train()(x_TH, RouterContext(seed=3)).logits_TE
        clean = router.eval()(x_TH, RouterContext()).logits_TE
        assert torch.equal(x_TH, before) and not torch.allclose(noisy, clean)
        with pytest.raises(MissingContextError, match=r"needs ctx\.seed"):
            router.train()(x_TH, RouterContext())
        SwitchRouter(H, E, jitter=0.0).train()(x_TH, RouterContext())

    def test_settings_are_checked(self):
        with pytest.raises(RouterConfigError, match="capacity_factor=0"):
            SwitchRouter(H, E, capacity_factor=0)
        with pytest.raises(
            RouterConfigError, match="jitter=1.5; need a finite number >= 0 and < 1"
        ):
            SwitchRouter(H, E, jitter=1.5)
        with pytest.raises(RouterConfigError, match="SwitchRouter: jitter='0.1'"):
            SwitchRouter(H, E, jitter="0.1")


class TestNoisyTopK:
    def test_the_noise_has_the_learned_width(self):
        router = seeded(NoisyTopKRouter(H, E, K), 0).train()
        routing = router(normal(1, 4000, H), RouterContext(seed=0))
        noise_TE = (routing.choice_TE - routing.logits_TE) / routing.extras["std_TE"]
        assert float(noise_TE.mean()) == pytest.approx(0, abs=0.02)
        assert float(noise_TE.std()) == pytest.approx(1, abs=0.02)
        std_TE = F.softplus(normal(1, 4000, H) @ router.noise_weight.T)
        torch.testing.assert_close(routing.extras["std_TE"], std_TE)

    def test_both_matrices_learn_and_evaluation_is_quiet(self):
        router = NoisyTopKRouter(H, E, K)
        assert not router.weight.any() and not router.noise_weight.any()
        routing = router(normal(1, 9, H), RouterContext(seed=0))
        (routing.weights_TK**2).sum().backward()
        assert router.weight.grad.any() and router.noise_weight.grad.any()
        quiet = router.eval()(normal(1, 9, H), RouterContext())
        assert torch.equal(quiet.choice_TE, quiet.logits_TE)
        with pytest.raises(MissingContextError, match=r"needs ctx\.seed"):
            router.train()(normal(1, 9, H), RouterContext())


class TestExpertChoice:
    @given(SEEDS, st.sampled_from([(1, 16), (3, 8), (2, 5), (2, 0)]), st.integers(1, 3))
    def test_every_expert_takes_exactly_its_share(self, seed, shape, k):
        batch, length = shape
        router = seeded(ExpertChoiceRouter(H, E, k), seed)
        x_TH = normal(seed + 9, batch * length, H).requires_grad_()
        routing = router(x_TH, RouterContext(batch_shape=shape))
        check_routing(routing, batch * length, E, where="expert choice")
        share = min(length, math.ceil(k * length / E))
        assert routing.tokens_EC.shape == (E, batch * share)
        for tokens in routing.tokens_EC.tolist():
            assert len(set(tokens)) == len(tokens)
            for sequence in range(batch):
                assert sum(t // max(length, 1) == sequence for t in tokens) == share
        assert torch.equal(routing.weights_EC, routing.scores_TE.T.gather(1, routing.tokens_EC))
        routing.weights_EC.sum().backward()
        assert x_TH.grad is not None

    def test_is_not_causal(self):
        router, ctx = seeded(ExpertChoiceRouter(H, 2, 1), 0), RouterContext(batch_shape=(1, 4))
        toward_first_H = (router.weight[0] - router.weight[1]).detach()
        x_TH = torch.tensor([[3.0], [2.0], [1.0], [0.0]]) * toward_first_H
        assert router(x_TH, ctx).tokens_EC[0].tolist() == [0, 1]
        x_TH[3] = 9 * toward_first_H  # the last token changes, and an earlier one is pushed out
        assert router(x_TH, ctx).tokens_EC[0].tolist() == [3, 0]

    def test_a_replay_raises(self):
        ctx = RouterContext(replay=torch.zeros(4, 1, dtype=torch.int64))
        with pytest.raises(ReplayError, match="tokens for experts"):
            ExpertChoiceRouter(H, E, 1)(normal(0, 4, H), ctx)


class TestSoftMoE:
    @given(SEEDS)
    def test_is_the_paper_algorithm_in_each_sequence(self, seed):
        router = seeded(SoftMoERouter(H, 4, 2), seed)
        x_TH = normal(seed + 9, 10, H)
        routing = router(x_TH, RouterContext(batch_shape=(2, 5)))
        check_routing(routing, 10, 4, where="soft", batch_shape=(2, 5))
        phi_HP = router.phi_PH.detach().double().T
        phi_HP = router.scale.double() * phi_HP / phi_HP.norm(dim=0)
        for sequence in range(2):
            x_SH = x_TH[5 * sequence : 5 * sequence + 5].double()
            logits_SP = (x_SH / x_SH.norm(dim=1, keepdim=True)) @ phi_HP
            dispatch_SP = logits_SP.exp() / logits_SP.exp().sum(0)
            combine_SP = logits_SP.exp() / logits_SP.exp().sum(1, keepdim=True)
            torch.testing.assert_close(routing.dispatch_BSP[sequence].double(), dispatch_SP)
            torch.testing.assert_close(routing.combine_BSP[sequence].double(), combine_SP)

    def test_padding_enters_no_slot_and_a_sequence_of_it_is_no_nan(self):
        router = SoftMoERouter(H, 4)
        mask_T = torch.tensor([True, True, False, False, False, False])
        x_TH = normal(0, 6, H).requires_grad_()
        ctx = RouterContext(batch_shape=(2, 3), token_mask=mask_T)
        routing = router(x_TH, ctx)
        assert (routing.dispatch_BSP.view(6, 4)[~mask_T] == 0).all()
        torch.testing.assert_close(routing.dispatch_BSP[0].sum(0), torch.ones(4))
        (routing.dispatch_BSP**2).sum().backward()
        assert x_TH.grad.isfinite().all() and (x_TH.grad[~mask_T] == 0).all()

    @pytest.mark.parametrize(
        ("given_dtype", "dtype"),
        [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
        ids=str,
    )
    def test_mixes_in_float32_or_wider(self, given_dtype, dtype):
        router = SoftMoERouter(H, 4).to(given_dtype)
        routing = router(normal(0, 6, H).to(given_dtype), RouterContext(batch_shape=(2, 3)))
        assert routing.dispatch_BSP.dtype == routing.combine_BSP.dtype == dtype

    def test_every_slot_reaches_every_token(self):
        router, x_TH = SoftMoERouter(H, 4), normal(0, 6, H).requires_grad_()
        routing = router(x_TH, RouterContext(batch_shape=(1, 6)))
        (gradient_TH,) = torch.autograd.grad(routing.dispatch_BSP[0, 0, 0], x_TH)
        assert (gradient_TH.abs().sum(1) > 0).all()

    def test_errors(self):
        router, x_TH = SoftMoERouter(H, 4), normal(0, 6, H)
        with pytest.raises(MissingContextError, match=r"SoftMoERouter needs ctx\.batch_shape"):
            router(x_TH, RouterContext())
        with pytest.raises(ReplayError, match="SoftMoERouter chooses nothing"):
            router(x_TH, RouterContext(replay=torch.zeros(6, 1, dtype=torch.int64)))
        with pytest.raises(MoeShapeError, match=re.escape("x_TH is (6, 13), expected (T, H=12)")):
            router(normal(0, 6, 13), RouterContext(batch_shape=(2, 3)))
        with pytest.raises(RouterConfigError, match="SoftMoERouter: slots=0; need a whole number"):
            SoftMoERouter(H, 4, 0)
        with pytest.raises(RouterConfigError, match="SoftMoERouter: hidden_size='12'"):
            SoftMoERouter("12", 4)
