"""Importance and load against float64 twins of their definitions, stage by stage."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetk.losses import ImportanceLoss, LoadLoss, smooth_load, squared_variation
from moetk.routing import TokenChoice
from tests.losses.parts import ANY, route
from tests.rounding import within_rounding


def variation(x_E: Tensor) -> Tensor:
    return x_E.var(correction=0) / x_E.mean() ** 2


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), T=st.integers(1, 6), E=st.integers(2, 6), data=st.data())
def test_smooth_load_is_shazeers_probability(seed, T, E, data):
    K = data.draw(st.integers(1, E - 1))
    routing = route(T, E, K, seed)
    clean_TE, noisy_TE, std_TE = routing.logits_TE, routing.choice_TE.detach(), std_of(routing)
    truth_TE, noisy, std = (t.detach().double() for t in (clean_TE, noisy_TE, std_TE))
    truth_TE.requires_grad_()
    rows = []
    for t in range(T):
        others = [torch.cat([noisy[t, :e], noisy[t, e + 1 :]]) for e in range(E)]
        bars = torch.stack([other.sort(descending=True).values[K - 1] for other in others])
        rows.append(torch.distributions.Normal(0.0, 1.0).cdf((truth_TE[t] - bars) / std[t]))
    want_TE = torch.stack(rows)
    got_TE = smooth_load(clean_TE, noisy_TE, std_TE, K)
    # A probability: what is rounded is a number up to 1, and its slope is up to 1 / (2.5 std).
    within_rounding(got_TE, want_TE.detach(), terms=4, size=math.sqrt(T * E))
    upstream_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(seed))
    [grad] = torch.autograd.grad(got_TE, clean_TE, upstream_TE)
    [want] = torch.autograd.grad(want_TE, truth_TE, upstream_TE.double())
    steepest_TE = upstream_TE / std_TE / math.sqrt(2 * math.pi)
    within_rounding(grad, want, terms=8, size=steepest_TE.norm())


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), E=st.integers(1, 64))
def test_squared_variation_is_variance_over_squared_mean(seed, E):
    x_E = torch.rand(E, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    truth_E = x_E.detach().double().requires_grad_()
    got, want = squared_variation(x_E), variation(truth_E)
    # E[x^2] / mean^2 - 1: what cancels is 1 + the result.
    within_rounding(got, want.detach(), terms=E, size=1 + want.detach())
    [grad] = torch.autograd.grad(got, x_E)
    [want_grad] = torch.autograd.grad(want, truth_E)
    # 2 / (E mean) x (x / mean - 1 - variation)
    mean = truth_E.detach().mean()
    addends_E = truth_E.detach() / mean + 1 + want.detach()
    within_rounding(grad, want_grad, terms=E, size=2 / (E * mean) * addends_E.norm())


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), T=st.integers(1, 6), E=st.integers(2, 6), data=st.data())
def test_losses_are_the_variation_of_summed_loads_and_weights(seed, T, E, data):
    K = data.draw(st.integers(1, E - 1))
    routing = route(T, E, K, seed)
    load_TE = smooth_load(routing.logits_TE, routing.choice_TE, std_of(routing), K)
    same_bits(LoadLoss(0.1)(routing, ANY), 0.1 * squared_variation(load_TE.sum(0)), routing)

    ids_N, weights_N = routing.experts_TK.flatten(), routing.weights_TK.flatten()
    importance_E = torch.zeros(E).scatter_add(0, ids_N, weights_N)
    same_bits(ImportanceLoss(0.1)(routing, ANY), 0.1 * squared_variation(importance_E), routing)


def std_of(routing: TokenChoice) -> Tensor:
    return routing.extras["std_TE"]


def same_bits(value: Tensor, expected: Tensor, routing: TokenChoice) -> None:
    assert torch.equal(value, expected)
    [grad] = torch.autograd.grad(value, routing.logits_TE, retain_graph=True)
    [want] = torch.autograd.grad(expected, routing.logits_TE, retain_graph=True)
    assert torch.equal(grad, want)


def test_squared_variation_has_a_gradient_where_a_standard_deviation_has_none():
    for x_E in (torch.zeros(3), torch.ones(3)):
        x_E.requires_grad_()
        value = squared_variation(x_E)
        value.backward()
        assert value == 0 and torch.equal(x_E.grad, torch.zeros(3))
