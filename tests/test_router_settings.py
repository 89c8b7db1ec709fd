"""What routers are built with: defaults, limits at their borders, and what a message tells."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from moetk.context import RouterContext
from moetk.errors import MoeShapeError, RouterConfigError
from moetk.routers import (
    DeepSeekV3Router,
    DeepSeekV4HashRouter,
    DeepSeekV4Router,
    ExpertChoiceRouter,
    GptOssRouter,
    LinearRouter,
    MixtralRouter,
    NoisyTopKRouter,
    SoftMoERouter,
    SwitchRouter,
    jitter,
    largest,
    normal_like,
    random_table,
    top_k_as_summed,
)

H, E, K = 12, 8, 3
FP32 = torch.float32
DEFAULTS: dict[type, dict[str, Any]] = {
    LinearRouter: {"gemm_dtype": None, "score_dtype": FP32, "tie": "low"},
    ExpertChoiceRouter: {"gemm_dtype": None, "score_dtype": FP32, "tie": "low"},
    NoisyTopKRouter: {"gemm_dtype": None, "score_dtype": FP32, "tie": "low"},
    MixtralRouter: {"renormalise": True, "gemm_dtype": None, "score_dtype": FP32, "tie": "low"},
    GptOssRouter: {"gemm_dtype": None, "score_dtype": None, "tie": "low"},
    SwitchRouter: {"capacity_factor": 1.25, "jitter": 0.01, "gemm_dtype": FP32, "tie": "low"},
    DeepSeekV3Router: {
        "groups": 1, "top_groups": 1, "scale": 1.0, "renormalise": True, "eps": 1e-20,
        "gemm_dtype": FP32, "score_dtype": FP32, "tie": "low",
    },
    DeepSeekV4Router: {
        "scale": 1.0, "eps": 1e-20, "gemm_dtype": None, "score_dtype": None, "tie": "low",
    },
    DeepSeekV4HashRouter: {"scale": 1.0, "eps": 1e-20, "gemm_dtype": None, "score_dtype": None},
}  # fmt: skip


def raises(message: str) -> Any:
    return pytest.raises(RouterConfigError, match=re.escape(message))


@pytest.mark.parametrize("method", DEFAULTS)
def test_defaults_are_stated_once_for_the_class_and_once_for_new_routers(method):
    """A stock gate that takes a router's class has no settings of its own: it reads the class's."""
    new = method(H, E, K, **({"vocab_size": 5} if method is DeepSeekV4HashRouter else {}))
    for name, value in DEFAULTS[method].items():
        assert getattr(method, name) == value, name
        assert getattr(new, name) == value, name
        assert inspect.signature(method).parameters[name].default == value, name
    assert method.duplicates is (method is DeepSeekV4HashRouter)


def test_sizes_at_their_borders():
    for method in (MixtralRouter, DeepSeekV3Router, GptOssRouter, SwitchRouter):
        assert method(1, 1, 1).top_k == 1
        assert method(H, E, E).top_k == E
        with raises(f"{method.__name__}: top_k=9 but num_experts=8; need 1 <= top_k <= 8."):
            method(H, E, E + 1)
        with raises(f"{method.__name__}: top_k=0; need a whole number from 1 on."):
            method(H, E, 0)
        with raises(f"{method.__name__}: tie='high' is not a rule; use tie='low' or tie='stock'."):
            method(H, E, K, tie="high")
    with raises("SoftMoERouter: slots=0; need a whole number from 1 on."):
        SoftMoERouter(H, E, 0)
    assert SwitchRouter(H, E).top_k == 1 and SoftMoERouter(H, E).slots == 1


def test_a_new_matrix_has_logits_of_unit_size():
    torch.manual_seed(0)
    weight_EH = LinearRouter(400, 50, 1).weight
    assert weight_EH.shape == (50, 400)
    assert float(weight_EH.std()) == pytest.approx(400**-0.5, rel=0.05)


def test_what_a_router_owns():
    assert set(MixtralRouter(H, E, K).state_dict()) == {"weight"}
    assert set(MixtralRouter(H, E, K, choice_bias=True).state_dict()) == {
        "weight",
        "e_score_correction_bias",
    }
    biased = GptOssRouter(H, E, K)
    assert set(biased.state_dict()) == {"weight", "bias"} and not biased.bias.any()
    assert set(GptOssRouter(H, E, K, bias=False).state_dict()) == {"weight"}
    steered = DeepSeekV3Router(H, E, K)
    assert set(steered.state_dict()) == {"weight", "e_score_correction_bias"}
    assert not steered.e_score_correction_bias.any()
    assert repr(steered) == f"DeepSeekV3Router(hidden_size={H}, num_experts={E}, top_k={K})"
    soft = SoftMoERouter(H, E, 2)
    assert soft.phi_PH.shape == (E * 2, H) and soft.phi_PH.std() > 0 and soft.scale == 1


def test_groups_at_their_borders():
    DeepSeekV3Router(H, 8, 4, groups=4, top_groups=2)  # as many experts as the groups hold
    DeepSeekV3Router(H, 8, 2, groups=4, top_groups=1)  # two experts a group, the fewest
    DeepSeekV3Router(H, 8, 8, groups=8, top_groups=8)  # no limit, so no group is judged
    with raises("DeepSeekV3Router: groups=3 does not divide num_experts=8."):
        DeepSeekV3Router(H, 8, 2, groups=3, top_groups=1)
    with raises("DeepSeekV3Router: top_groups=5; need 1 <= top_groups <= groups=4."):
        DeepSeekV3Router(H, 8, 2, groups=4, top_groups=5)
    with raises(
        "DeepSeekV3Router: groups=8 leaves one expert a group, but a group is judged by its two "
        "best; use groups <= 4."
    ):
        DeepSeekV3Router(H, 8, 2, groups=8, top_groups=2)
    with raises(
        "DeepSeekV3Router: top_k=5 but top_groups=2 groups hold 4 experts; raise top_groups or "
        "lower top_k."
    ):
        DeepSeekV3Router(H, 8, 5, groups=4, top_groups=2)
    with raises("top_k=7 but top_groups=2 groups hold 6 experts"):
        DeepSeekV3Router(H, 9, 7, groups=3, top_groups=2)


def test_numbers_at_their_borders():
    for method, more in (
        (DeepSeekV3Router, {}),
        (DeepSeekV4Router, {}),
        (DeepSeekV4HashRouter, {"vocab_size": 5}),
    ):
        who = method.__name__
        assert method(H, E, K, eps=0, scale=-1.0, **more).eps == 0
        with raises(f"{who}: eps=-1e-20; need a finite number >= 0."):
            method(H, E, K, eps=-1e-20, **more)
        with raises(f"{who}: scale=inf; need a finite number."):
            method(H, E, K, scale=float("inf"), **more)
    assert SwitchRouter(H, E, jitter=0).jitter == 0
    for wide in (-0.01, 1, 2.0):
        with raises(f"SwitchRouter: jitter={wide!r}; need a finite number >= 0 and < 1."):
            SwitchRouter(H, E, jitter=wide)


@pytest.mark.parametrize("method", [MixtralRouter, DeepSeekV4Router, GptOssRouter])
@pytest.mark.parametrize("shape", [(5, H + 1), (5, H - 1), (1, 5, H), (H,)])
def test_an_input_of_another_shape_raises(method, shape):
    message = f"{method.__name__}: x_TH is {shape}, expected (T, H={H}): flatten the batch"
    with pytest.raises(MoeShapeError, match=re.escape(message)):
        method(H, E, K).logits(torch.zeros(shape))


def test_choosing_at_its_borders():
    x_RN = torch.arange(6.0).view(2, 3)
    assert largest(x_RN, 0).shape == (2, 0) and largest(x_RN, 3).tolist() == [[2, 1, 0]] * 2
    for k in (-1, 4):
        with raises(f"k={k}, but there are 3 to choose from; need 0 <= k <= 3."):
            largest(x_RN, k)
    for tie in ("high", "wide"):  # before and behind the two that there are, in any order
        for choose in (largest, lambda x, k, t: top_k_as_summed(x, k, RouterContext(), t)):
            with raises(f"tie={tie!r} is not a rule; use tie='low' or tie='stock'."):
                choose(x_RN, 2, tie)
    assert sorted(random_table(1, 3, 3)[0].tolist()) == [0, 1, 2]
    assert torch.equal(random_table(9, 4, 2), random_table(9, 4, 2, seed=0))
    with raises("random_table: top_k=4 but num_experts=3; need 1 <= top_k <= 3."):
        random_table(1, 3, 4)
    with raises("random_table: top_k=5 but num_experts=3; need 1 <= top_k <= 3."):
        random_table(1, 3, 5)


def test_the_same_noise_is_drawn_by_every_version():
    """A run that is resumed elsewhere goes on with the noise that it would have had."""
    x_TH, ctx = torch.ones(4, 3), RouterContext(seed=7)
    for draw, seed in (
        (0, 1297462809),
        (1, 2046153427),
    ):  # 32 bits of SHA-256 of "7/0" and of "7/1"
        normal_TH = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        uniform_TH = torch.rand(4, 3, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(normal_like(x_TH, ctx, draw), normal_TH)
        torch.testing.assert_close(jitter(x_TH, 0.25, ctx, draw), 0.75 + 0.5 * uniform_TH)
    assert torch.equal(normal_like(x_TH, ctx), normal_like(x_TH, ctx, 0))
    assert torch.equal(jitter(x_TH, 0.25, ctx), jitter(x_TH, 0.25, ctx, 0))
