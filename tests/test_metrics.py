"""Metrics against plain Python, on token choice and expert choice, and where there is nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetk import metrics
from moetk.context import RouterContext
from moetk.errors import MissingFieldError, MoeShapeError, UnsupportedRoutingError
from moetk.routing import ExpertChoice, SoftChoice, TokenChoice


def ids(rows):
    return torch.tensor(rows, dtype=torch.int64)


def tokens(rows, E, kept=None, **fields) -> TokenChoice:
    experts_TK = ids(rows)
    kept_TK = None if kept is None else torch.tensor(kept)
    return TokenChoice(experts_TK, torch.zeros(experts_TK.shape), E, kept_TK=kept_TK, **fields)


def experts(rows, T) -> ExpertChoice:
    tokens_EC = ids(rows)
    return ExpertChoice(tokens_EC, torch.zeros(tokens_EC.shape), T)


def masked(*values) -> RouterContext:
    return RouterContext(token_mask=torch.tensor(values, dtype=torch.bool))


@settings(max_examples=40)
@given(
    rows=st.integers(1, 4).flatmap(
        lambda K: st.lists(st.lists(st.integers(-1, 4), min_size=K, max_size=K), min_size=1)
    ),
    data=st.data(),
)
def test_counts_against_plain_python_for_both_kinds(rows, data):
    mask = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    kept = torch.rand(len(rows), len(rows[0]), generator=torch.Generator().manual_seed(0)) < 0.5
    want = [sum(row.count(e) for row, on in zip(rows, mask, strict=True) if on) for e in range(5)]
    got = metrics.tokens_per_expert(tokens(rows, 5, kept.tolist()), masked(*mask))
    assert got.tolist() == want and got.dtype == torch.int64

    pairs = [[t for t, row in enumerate(rows) if e in row] for e in range(5)]
    C = max(len(column) for column in pairs) + 1
    columns = [column + [-1] * (C - len(column)) for column in pairs]
    want = [sum(mask[t] for t in column) for column in pairs]
    got = metrics.tokens_per_expert(experts(columns, len(rows)), masked(*mask))
    assert got.tolist() == want


@settings(max_examples=40)
@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_functions_of_counts_against_plain_python(counts):
    E, total = len(counts), sum(counts)
    mean = total / E
    counts_E = torch.tensor(counts)
    assert metrics.dead_experts(counts_E).item() == counts.count(0)
    if total == 0:
        assert metrics.max_violation(counts_E) == 0 and metrics.min_violation(counts_E) == 0
        assert metrics.coefficient_of_variation(counts_E) == 0
        assert metrics.load_entropy(counts_E) == 1
        return
    std = math.sqrt(sum((c - mean) ** 2 for c in counts) / E)
    entropy = -sum(c / total * math.log(c / total) for c in counts if c)
    for got, want in [
        (metrics.max_violation(counts_E), max(counts) / mean - 1),
        (metrics.min_violation(counts_E), 1 - min(counts) / mean),
        (metrics.coefficient_of_variation(counts_E), std / mean),
        (metrics.load_entropy(counts_E), math.exp(entropy) / E),
    ]:
        assert got.item() == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_even_and_collapsed_loads():
    assert metrics.max_violation(torch.tensor([3, 3, 3, 3])) == 0
    assert metrics.load_entropy(torch.tensor([3, 3, 3, 3])).item() == pytest.approx(1)
    assert metrics.max_violation(torch.tensor([8, 0, 0, 0])) == 3
    assert metrics.load_entropy(torch.tensor([8, 0, 0, 0])).item() == pytest.approx(0.25)
    # Special experts come last in the counts and are sliced away.
    assert metrics.max_violation(torch.tensor([3, 3, 90])[:2]) == 0


def test_load_adds_up_to_the_global_violation():
    """Each batch collapses on another expert: batch MaxVio 1, global MaxVio 0."""
    load = metrics.Load(2)
    for e in (0, 1):
        routing = tokens([[e], [e]], 2)
        assert metrics.max_violation(metrics.tokens_per_expert(routing)) == 1
        load.add(routing)
    assert metrics.max_violation(load.counts_E) == 0
    load.add(tokens([[0], [1]], 2), masked(True, False))
    assert load.counts_E.tolist() == [3, 2]
    load.reset()
    assert load.counts_E.tolist() == [0, 0]


def test_drops_are_over_what_unmasked_tokens_wanted():
    routing = tokens([[0, 1], [0, -1], [0, 2]], 3, [[True, False], [False, True], [False, False]])
    assert metrics.drop_fraction(routing).item() == pytest.approx(4 / 5)
    assert metrics.drop_fraction(routing, masked(1, 0, 0)).item() == pytest.approx(1 / 2)
    assert metrics.drop_fraction(routing, masked(0, 0, 0)) == 0
    assert metrics.drop_fraction(tokens([[0], [1]], 2)) == 0
    assert metrics.drop_fraction(experts([[0, 1], [1, -1]], 4)) == 0
    assert metrics.drop_fraction(SoftChoice(torch.ones(1, 2, 2), torch.ones(1, 2, 2), 2)) == 0
    nothing = TokenChoice(ids([]).view(0, 2), torch.zeros(0, 2), 3)
    assert metrics.drop_fraction(nothing) == 0
    assert metrics.unserved_fraction(routing).item() == pytest.approx(2 / 3)
    assert metrics.unserved_fraction(routing, masked(1, 1, 0)).item() == pytest.approx(1 / 2)


def test_expert_choice_may_leave_tokens_unserved():
    routing = experts([[0, 1], [1, -1]], 4)
    assert metrics.unserved_fraction(routing) == 0.5
    assert metrics.unserved_fraction(routing, masked(1, 1, 1, 0)).item() == pytest.approx(1 / 3)
    assert metrics.chosen_mask(routing).tolist() == [
        [True, False],
        [True, True],
        [False] * 2,
        [False] * 2,
    ]


def test_saturation_is_the_share_of_late_choices_made_early():
    early, late = tokens([[0, 1], [2, 3]], 4), tokens([[1, 0], [3, 1]], 4)
    assert metrics.saturation(early, late) == 0.75  # column order does not matter
    assert metrics.saturation(early, late, masked(0, 1)) == 0.5
    assert metrics.saturation(late, late) == 1


def test_co_activation_is_a_share_of_the_row():
    routing = tokens([[0, 1], [0, 2], [0, -1]], 4)
    want = torch.tensor([[1, 1 / 3, 1 / 3, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(metrics.co_activation(routing), want)
    assert metrics.co_activation(routing, masked(1, 0, 0))[0].tolist() == [1, 1, 0, 0]


def test_logit_sizes_ignore_padding():
    logits_TE = torch.tensor([[3.0, -4.0], [0.0, 0.0], [math.nan, 9.0]])
    routing = tokens([[0], [0], [0]], 2, logits_TE=logits_TE)
    ctx = masked(1, 1, 0)
    assert metrics.logit_rms(routing, ctx) == 2.5
    assert metrics.logit_max(routing, ctx) == 4
    first = tokens([[0]], 2, logits_TE=logits_TE[:1].bfloat16())
    assert metrics.logit_rms(first).item() == pytest.approx(math.sqrt(12.5))
    assert metrics.logit_max(first) == 4


def test_no_tokens_is_no_nan():
    for routing in (
        TokenChoice(ids([]).view(0, 2), torch.zeros(0, 2), 3, logits_TE=torch.zeros(0, 3)),
        ExpertChoice(ids([]).view(3, 0), torch.zeros(3, 0), 0, logits_TE=torch.zeros(0, 3)),
    ):
        counts_E = metrics.tokens_per_expert(routing, masked())
        assert counts_E.tolist() == [0, 0, 0]
        assert metrics.unserved_fraction(routing) == 0
        assert metrics.saturation(routing, routing) == 1
        assert not metrics.co_activation(routing).any()
        assert metrics.logit_rms(routing) == 0 and metrics.logit_max(routing) == 0
    assert metrics.tokens_per_expert(experts([[-1], [-1]], 0), masked()).tolist() == [0, 0]


def test_errors_say_what_to_do():
    soft = SoftChoice(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), 2)
    routing = tokens([[0], [1]], 2)
    for use in (metrics.tokens_per_expert, metrics.chosen_mask, metrics.unserved_fraction):
        with pytest.raises(UnsupportedRoutingError, match=r"SoftChoice uses every expert"):
            use(soft)
    with pytest.raises(MoeShapeError, match=r"ctx.token_mask is \(3,\), expected \(T=2,\)"):
        metrics.tokens_per_expert(routing, masked(1, 1, 1))
    with pytest.raises(MoeShapeError, match=r"\(T, E\) = \(2, 2\) with \(2, 3\)"):
        metrics.saturation(routing, tokens([[0], [1]], 3))
    for use, name in ((metrics.logit_rms, "logit_rms"), (metrics.logit_max, "logit_max")):
        with pytest.raises(MissingFieldError, match=rf"{name} reads logits_TE"):
            use(routing)
