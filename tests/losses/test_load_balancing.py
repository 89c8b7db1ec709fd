"""Load balancing against its definition: scopes, masks, ranks; what GShard and DeepSeek count."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetk.context import RouterContext
from moetk.losses import (
    DeepSeekSequenceLoss,
    GShardLoss,
    ImportanceLoss,
    LoadBalancingLoss,
    RouterZLoss,
    hf_load_balancing,
    load_balancing,
)
from moetk.routing import TokenChoice
from tests.losses.parts import ANY, ids, route
from tests.rounding import within_rounding


def twin(routing: TokenChoice, groups: Tensor, counted: Tensor, scores_TE: Tensor) -> Tensor:
    """Load balancing word by word, in float64: one token and one group at a time."""
    E, K = routing.num_experts, routing.experts_TK.shape[1]
    total, value = 0, torch.zeros((), dtype=torch.float64)
    for group in groups.unique().tolist():
        rows = [t for t in range(len(groups)) if groups[t] == group and counted[t]]
        if not rows:
            continue
        f = [
            sum(int((routing.experts_TK[t] == e).sum()) for t in rows) / len(rows) for e in range(E)
        ]
        p = scores_TE / scores_TE.sum(-1, keepdim=True)
        P = p[rows].mean(0)
        value = value + len(rows) * E * sum(f[e] / K * P[e] for e in range(E))
        total += len(rows)
    return value / max(total, 1)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    B=st.integers(1, 3),
    S=st.integers(1, 6),
    E=st.integers(1, 6),
    data=st.data(),
)
def test_load_balancing_equals_its_definition_in_value_and_gradient(seed, B, S, E, data):
    K = data.draw(st.integers(1, E))
    sigmoid = data.draw(st.booleans())
    routing = route(B * S, E, K, seed, sigmoid)
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(B * S, generator=g) < 0.6 if data.draw(st.booleans()) else None
    rows = torch.arange(B * S) // S
    scattered = torch.randint(0, B * S, (B * S,), generator=g)
    cases = {
        "micro_batch": (torch.zeros_like(rows), None),
        "sequence": (rows, None),
        "packed": (scattered, scattered),
    }
    for name, (groups, sequence_ids) in cases.items():
        scope = "micro_batch" if name == "micro_batch" else "sequence"
        ctx = RouterContext(batch_shape=(B, S), sequence_ids=sequence_ids, token_mask=mask)
        got = LoadBalancingLoss(0.5, scope=scope)(routing, ctx)
        counted = torch.ones(B * S, dtype=torch.bool) if mask is None else mask
        truth_TE = routing.scores_TE.detach().double().requires_grad_()
        want = 0.5 * twin(routing, groups, counted, truth_TE)
        assert got.dtype == torch.float32 and got.shape == ()
        within_rounding(got, want.detach(), terms=B * S * E)
        [grad] = torch.autograd.grad(got, routing.scores_TE, retain_graph=True)
        want_grad = torch.autograd.grad(want, truth_TE)[0] if want.requires_grad else 0 * truth_TE
        # (share_e - load_t) E / (N mass_t), two numbers in [0, 1] that may cancel
        mass_T = truth_TE.detach().sum(-1)[counted]
        size = 0.5 * E / max(len(mass_T), 1) * (2 * E / mass_T.square()).sum().sqrt()
        within_rounding(grad, want_grad, terms=E + K, size=size)


def test_uniform_is_the_coefficient_and_hf_leaves_out_the_division_by_k():
    E, K = 8, 4
    experts_TK = ids([[0, 1, 2, 3], [4, 5, 6, 7]])
    routing = TokenChoice(
        experts_TK, torch.ones(2, K), E, torch.zeros(2, E), torch.full((2, E), 1 / E)
    )
    assert LoadBalancingLoss(0.25)(routing, ANY) == 0.25
    assert LoadBalancingLoss(0.25, normalisation="hf")(routing, ANY) == 0.25 * K
    assert hf_load_balancing([routing]) == K
    assert RouterZLoss(1.0)(routing, ANY).item() == pytest.approx(math.log(E) ** 2)
    assert ImportanceLoss(1.0)(routing, ANY) == 0


def test_collapse_is_e_over_k_and_the_loss_may_fall_below_one():
    scores_TE = torch.zeros(5, 4)
    scores_TE[:, :2] = 0.5
    assert load_balancing(ids([[0, 1]] * 5), scores_TE) == 4 / 2
    # 90% of the tokens barely prefer expert 0, 10% strongly expert 1.
    scores_TE = torch.tensor([[0.51, 0.49]] * 9 + [[0.01, 0.99]])
    value = load_balancing(ids([[0]] * 9 + [[1]]), scores_TE)
    assert value.item() == pytest.approx(0.936)


def test_unnormalised_scores_count_as_their_share():
    """Sigmoid scores do not sum to one: twice the scores must not be twice the loss."""
    routing = route(7, 5, 2, sigmoid=True)
    value = load_balancing(routing.experts_TK, routing.scores_TE)
    torch.testing.assert_close(load_balancing(routing.experts_TK, 2 * routing.scores_TE), value)
    zero_TE = torch.zeros(3, 4, requires_grad=True)  # ReLU scores may all be zero
    value = load_balancing(ids([[0], [1], [2]]), zero_TE)
    value.backward()
    assert value == 0 and zero_TE.grad.isfinite().all()


def test_what_was_dropped_is_counted_and_what_was_not_chosen_is_not():
    scores_TE = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    all_on_0 = ids([[0], [0], [0], [0]])
    kept = torch.tensor([[True], [False], [False], [False]])
    dropped = TokenChoice(all_on_0, kept.float(), 3, scores_TE=scores_TE, kept_TK=kept)
    whole = TokenChoice(all_on_0, torch.ones(4, 1), 3, scores_TE=scores_TE)
    loss = LoadBalancingLoss(1.0)
    assert torch.equal(loss(dropped, ANY), loss(whole, ANY))
    with_gaps = load_balancing(ids([[0, -1], [1, -1], [2, 0], [-1, -1]]), scores_TE)
    share_E = torch.tensor([2.0, 1.0, 1.0]) / 4
    p_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    torch.testing.assert_close(with_gaps, 3 * (share_E * p_TE.mean(0)).sum())


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), ranks=st.integers(1, 4))
def test_global_scope_over_ranks_is_the_loss_of_the_concatenated_batch(seed, ranks):
    S, E = 6, 5
    whole = route(ranks * S, E, 2, seed)
    mask = torch.rand(ranks * S, generator=torch.Generator().manual_seed(seed)) < 0.5
    rows_of_ranks = torch.arange(ranks * S).chunk(ranks)

    def counts_of(rows):
        chosen = whole.experts_TK[rows][mask[rows]]
        return torch.bincount(chosen.flatten(), minlength=E).float()[None]

    total = sum(counts_of(rows) for rows in rows_of_ranks)
    want = LoadBalancingLoss(1.0)(whole, RouterContext(label_mask=mask))
    got = torch.zeros(())
    for rows in rows_of_ranks:

        def reduce(counts, rows=rows):
            assert torch.equal(counts, counts_of(rows))
            return total

        part = TokenChoice(
            whole.experts_TK[rows], whole.weights_TK[rows], E, scores_TE=whole.scores_TE[rows]
        )
        loss = LoadBalancingLoss(1.0, scope="global_batch", reduce=reduce)
        local = loss(part, RouterContext(label_mask=mask[rows]))
        got = got + local * mask[rows].sum() / mask.sum().clamp(min=1)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, whole.logits_TE, retain_graph=True)[0],
        torch.autograd.grad(want, whole.logits_TE)[0],
    )


def test_deepseek_counts_what_the_scores_alone_choose():
    scores_TE = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1]])
    biased = TokenChoice(ids([[1], [2]]), torch.ones(2, 1), 3, scores_TE=scores_TE)
    unbiased = TokenChoice(ids([[0], [0]]), torch.ones(2, 1), 3, scores_TE=scores_TE)
    ctx = RouterContext(batch_shape=(1, 2))
    by_sequence = LoadBalancingLoss(1.0, scope="sequence")
    assert torch.equal(DeepSeekSequenceLoss(1.0)(biased, ctx), by_sequence(unbiased, ctx))
    assert DeepSeekSequenceLoss(1.0)(biased, ctx) > by_sequence(biased, ctx)


def test_gshard_counts_first_choices():
    routing = route(9, 4, 2)
    got = GShardLoss(2.0)(routing, ANY)
    first = torch.bincount(routing.experts_TK[:, 0], minlength=4) / 9
    torch.testing.assert_close(got, 2 * 4 * (first * routing.scores_TE.mean(0)).sum())
