"""Edges of routers, controllers and the functions they are made of, where a neighbouring condition
would pass every ordinary case."""

from __future__ import annotations

import inspect

import pytest
import torch

from moetk import routers
from moetk.context import RouterContext
from moetk.controllers import BiasUpdate
from moetk.errors import MoeShapeError, RouterConfigError
from moetk.kernels.selection import in_best_groups, normalise
from moetk.losses import hf_load_balancing
from moetk.losses.variation import squared_variation
from moetk.routers import (
    DeepSeekV3Router,
    DeepSeekV4HashRouter,
    ExpertChoiceRouter,
    LinearRouter,
    SoftMoERouter,
)
from moetk.routing import TokenChoice

LINEAR = [
    one for one in vars(routers).values() if inspect.isclass(one) and issubclass(one, LinearRouter)
]


@pytest.mark.parametrize("router", LINEAR, ids=lambda one: one.__name__)
def test_sizes_may_be_named(router: type[LinearRouter]) -> None:
    signature = inspect.signature(router)
    sizes = {"hidden_size": 4, "num_experts": 6, "top_k": 2, "vocab_size": 9}
    made = router(**{name: sizes[name] for name in signature.parameters if name in sizes})
    assert tuple(made.weight.shape) == (6, 4)


def test_a_table_is_drawn_from_seed_0() -> None:
    made = [DeepSeekV4HashRouter(4, 6, 2, vocab_size=50, **more) for more in ({}, {"seed": 0})]
    assert torch.equal(made[0].tid2eid, made[1].tid2eid)


def test_more_best_groups_than_groups_are_all_of_them() -> None:
    choice_TE = torch.randn(3, 6)
    assert in_best_groups(choice_TE, 3, 4) is choice_TE


def test_the_message_names_a_whole_number_of_groups() -> None:
    with pytest.raises(RouterConfigError, match=r"groups <= 4\.$"):
        DeepSeekV3Router(4, 8, 2, groups=8, top_groups=2)


def test_weights_that_sum_to_less_than_nothing_are_divided_by_it() -> None:
    weights_TK = torch.tensor([[-1.0, -3.0], [0.0, 0.0]])
    assert torch.equal(normalise(weights_TK), torch.tensor([[0.25, 0.75], [0.0, 0.0]]))


def test_variation_around_a_negative_mean() -> None:
    assert float(squared_variation(torch.tensor([-1.0, -3.0]))) == 0.25


@pytest.mark.parametrize("length", [5, 7])
def test_a_mask_of_another_length_is_refused(length: int) -> None:
    routing = TokenChoice(
        torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), 4, logits_TE=torch.zeros(6, 4)
    )
    with pytest.raises(MoeShapeError, match=rf"attention_mask is \({length},\)"):
        hf_load_balancing([routing], attention_mask=torch.ones(length))


@pytest.mark.parametrize("length", [5, 7])
def test_counts_of_another_number_of_experts_are_refused(length: int) -> None:
    router, controller = DeepSeekV3Router(4, 6, 2), BiasUpdate(0.1)
    controller.bind(router)
    with pytest.raises(MoeShapeError, match=rf"counts \({length},\)"):
        controller.step(torch.ones(length))
    assert not router.e_score_correction_bias.any()


def test_an_empty_place_is_minus_one() -> None:
    ctx = RouterContext(batch_shape=(1, 4), token_mask=torch.tensor([True, False, False, False]))
    routing = ExpertChoiceRouter(3, 2, 1)(torch.randn(4, 3), ctx)
    tokens_EC = routing.tokens_EC
    assert (tokens_EC < 0).any() and set(tokens_EC[tokens_EC < 0].tolist()) == {-1}


def test_one_token_without_a_batch_is_no_matrix() -> None:
    with pytest.raises(MoeShapeError, match=r"x_TH is \(3,\)"):
        SoftMoERouter(3, 2, 1)(torch.randn(3), RouterContext(batch_shape=(1, 1)))
