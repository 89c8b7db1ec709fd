"""Local dispatch: rows stay, nothing is lost uncounted, and capacity serves in a stated order."""

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moetk.context import RouterContext
from moetk.dispatch import (
    Capacity,
    Dispatcher,
    Local,
    by_weight,
    dropped,
    first_come,
)
from moetk.errors import RouterConfigError, UnsupportedRoutingError
from moetk.routing import ExpertChoice, SoftChoice, TokenChoice, check_routing

E, H = 4, 6
SEEDS = st.integers(0, 2**31 - 1)


def routing_of(seed: int, num_tokens: int, k: int = 2, unused: bool = False) -> TokenChoice:
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(num_tokens, E, generator=generator, dtype=torch.float64)
    weights_TK, experts_TK = scores_TE.topk(k)
    if unused:
        off_TK = torch.rand(num_tokens, k, generator=generator) < 0.3
        experts_TK, weights_TK = (
            experts_TK.masked_fill(off_TK, -1),
            weights_TK.masked_fill(off_TK, 0),
        )
    return TokenChoice(experts_TK, weights_TK.requires_grad_(), E)


def rows(seed: int, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, H, generator=generator, dtype=torch.float64)


def identity_bank(x_RH: Tensor, routing: TokenChoice) -> Tensor:
    """Experts that return their input: what is left is what dispatch and combine do."""
    return x_RH * routing.weights_TK.sum(-1, keepdim=True)


def shuffled(seed: int, n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def counts(experts: Tensor) -> Tensor:
    return torch.bincount(experts[experts >= 0], minlength=E)


CAPACITIES = st.sampled_from(
    [None, *(Capacity(f, o) for f in (0.25, 1.0, 9.0) for o in (first_come, by_weight))]
)


class TestLaws:
    def test_local_is_a_dispatcher(self):
        dispatcher: Dispatcher = Local()
        x_TH, routing = rows(0, 3), routing_of(0, 3)
        x_RH, local, handle = dispatcher.dispatch(x_TH, routing)
        assert x_RH is x_TH and local is routing
        assert dispatcher.combine(x_RH, handle) is x_TH

    @given(SEEDS, st.integers(0, 12), CAPACITIES, st.booleans())
    def test_kept_and_dropped_is_what_was_wanted(self, seed, num_tokens, capacity, unused):  # I1
        routing = routing_of(seed, num_tokens, unused=unused)
        _, local, _ = Local(capacity).dispatch(rows(seed, num_tokens), routing)
        check_routing(local, num_tokens, E, where="local")
        assert torch.equal(local.experts_TK, routing.experts_TK)  # losses count what was wanted
        kept_TK = torch.ones_like(local.experts_TK, dtype=torch.bool)
        kept_TK = kept_TK if local.kept_TK is None else local.kept_TK
        kept_E, wanted_E = counts(local.experts_TK[kept_TK]), counts(routing.experts_TK)
        assert int(kept_E.sum() + dropped(local)) == int(wanted_E.sum())
        if capacity is not None:
            places = math.ceil(capacity.factor * num_tokens * 2 / E)
            assert torch.equal(kept_E.clamp(max=places), kept_E)
        else:
            assert torch.equal(kept_E, wanted_E)

    @given(SEEDS, st.integers(0, 12), CAPACITIES)
    def test_every_row_comes_home_with_its_kept_weight(self, seed, num_tokens, capacity):  # I2 I3
        x_TH, routing = rows(seed, num_tokens), routing_of(seed, num_tokens)
        local_dispatch = Local(capacity)
        x_RH, local, handle = local_dispatch.dispatch(x_TH, routing)
        y_TH = local_dispatch.combine(identity_bank(x_RH, local), handle)
        kept_TK = 1 if local.kept_TK is None else local.kept_TK
        assert torch.equal(y_TH, x_TH * (routing.weights_TK * kept_TK).sum(-1, keepdim=True))

    @given(SEEDS, st.integers(0, 12))
    def test_dispatch_and_combine_are_transposes(self, seed, num_tokens):  # I4
        x_TH, y_RH = rows(seed, num_tokens).requires_grad_(), rows(seed + 1, num_tokens)
        local = Local()
        x_RH, _, handle = local.dispatch(x_TH, routing_of(seed, num_tokens))
        assert torch.equal((x_RH * y_RH).sum(), (x_TH * local.combine(y_RH, handle)).sum())

    @given(SEEDS, st.sampled_from([0.5, 1.0]))
    def test_gradients_reach_kept_choices_alone(self, seed, factor):  # I5
        x_TH, routing = rows(seed, 10).requires_grad_(), routing_of(seed, 10)
        local_dispatch = Local(Capacity(factor))
        x_RH, local, handle = local_dispatch.dispatch(x_TH, routing)
        y_TH = local_dispatch.combine(identity_bank(x_RH, local), handle)
        upstream_TH = rows(seed + 1, 10)
        gradients = torch.autograd.grad(y_TH, (x_TH, routing.weights_TK), upstream_TH)
        kept_weight_T1 = local.weights_TK.sum(-1, keepdim=True)
        torch.testing.assert_close(gradients[0], upstream_TH * kept_weight_T1)
        per_token_T1 = (upstream_TH * x_TH).sum(-1, keepdim=True)
        torch.testing.assert_close(gradients[1], per_token_T1 * local.kept_TK)

    @given(SEEDS)
    def test_by_weight_does_not_depend_on_the_order_of_tokens(self, seed):  # I6
        routing, order_T = routing_of(seed, 9), shuffled(seed, 9)
        moved = TokenChoice(routing.experts_TK[order_T], routing.weights_TK[order_T], E)
        capacity = Capacity(0.5, by_weight)
        kept_TK = capacity(routing, RouterContext()).kept_TK
        assert torch.equal(capacity(moved, RouterContext()).kept_TK, kept_TK[order_T])

    @given(SEEDS)
    def test_renaming_experts_keeps_the_same_choices(self, seed):  # I6
        routing, names_E = routing_of(seed, 9), shuffled(seed, E)
        renamed = replace(routing, experts_TK=names_E[routing.experts_TK])
        capacity = Capacity(0.5)
        assert torch.equal(
            capacity(renamed, RouterContext()).kept_TK, capacity(routing, RouterContext()).kept_TK
        )


class TestCapacity:
    def test_first_come_depends_on_the_order_and_by_weight_on_the_weight(self):
        experts_TK = torch.zeros(4, 1, dtype=torch.int64)
        weights_TK = torch.tensor([[0.1], [0.4], [0.2], [0.3]])
        routing = TokenChoice(experts_TK, weights_TK, 2)
        for order, kept in ((first_come, [1, 1, 0, 0]), (by_weight, [0, 1, 0, 1])):
            limited = Capacity(1.0, order)(routing, RouterContext())
            assert limited.kept_TK[:, 0].int().tolist() == kept
            assert torch.equal(limited.weights_TK, weights_TK * limited.kept_TK)

    def test_sequences_do_not_compete(self):
        routing = TokenChoice(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), 2)
        x_TH, ctx = rows(0, 4), RouterContext(batch_shape=(2, 2))
        _, apart, _ = Local(Capacity(1.0)).dispatch(x_TH, routing, ctx)
        _, together, _ = Local(Capacity(1.0)).dispatch(x_TH, routing)
        assert apart.kept_TK[:, 0].tolist() == [True, False, True, False]
        assert together.kept_TK[:, 0].tolist() == [True, True, False, False]

    def test_what_the_router_dropped_stays_dropped_and_takes_no_place(self):
        routing = TokenChoice(
            torch.zeros(4, 1, dtype=torch.int64),
            torch.tensor([[0.0], [1.0], [1.0], [1.0]]),
            2,
            kept_TK=torch.tensor([[False], [True], [True], [True]]),
        )
        limited = Capacity(1.0)(routing, RouterContext())
        assert limited.kept_TK[:, 0].tolist() == [False, True, True, False]
        assert int(dropped(limited)) == 2

    def test_the_callers_routing_is_left_as_it_was(self):
        routing = routing_of(0, 8)
        before = routing.weights_TK.detach().clone()
        assert Capacity(0.25)(routing, RouterContext()) is not routing
        assert routing.kept_TK is None and torch.equal(routing.weights_TK, before)

    def test_a_dropped_nan_weight_becomes_zero(self):
        routing = TokenChoice(
            torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[1.0], [math.nan]]), 2
        )
        limited = Capacity(1.0)(routing, RouterContext())
        assert limited.weights_TK.tolist() == [[1.0], [0.0]]

    def test_only_token_choice_can_overflow(self):
        kinds = [
            ExpertChoice(torch.zeros(E, 2, dtype=torch.int64), torch.ones(E, 2), 4),
            SoftChoice(torch.ones(1, 4, E), torch.ones(1, 4, E), E),
        ]
        for routing in kinds:
            message = re.escape(
                f"Capacity(factor=1.5) limits what tokens choose, but this routing is a "
                f"{type(routing).__name__}"
            )
            with pytest.raises(UnsupportedRoutingError, match=message):
                Local(Capacity(1.5)).dispatch(rows(0, 4), routing)
            assert Local().dispatch(rows(0, 4), routing)[1] is routing
            assert int(dropped(routing)) == 0

    def test_a_useless_factor_raises_when_it_is_given(self):
        with pytest.raises(RouterConfigError, match="capacity_factor=0"):
            Capacity(0)


class TestDropped:
    def test_padding_and_unused_slots_were_not_wanted(self):
        experts_TK = torch.tensor([[0, 1], [0, -1], [0, 1]])
        kept_TK = torch.tensor([[True, False], [False, False], [False, False]])
        routing = TokenChoice(experts_TK, kept_TK.float(), 2, kept_TK=kept_TK)
        assert int(dropped(routing)) == 4
        padded = RouterContext(token_mask=torch.tensor([True, True, False]))
        assert int(dropped(routing, padded)) == 2

    def test_nothing_wanted_is_nothing_dropped(self):
        routing = TokenChoice(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), 2)
        assert int(dropped(routing)) == 0
        assert dropped(routing).dtype == torch.int64
