"""Losses against plain float64 twins: values, gradients, masks, scopes, the field's known bugs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moetk.context import RouterContext
from moetk.errors import (
    MissingContextError,
    MissingFieldError,
    MoeShapeError,
    RouterConfigError,
    UnsupportedRoutingError,
)
from moetk.losses import (
    DeepSeekSequenceLoss,
    GShardLoss,
    ImportanceLoss,
    LoadBalancingLoss,
    LoadLoss,
    RouterZLoss,
    hf_load_balancing,
    load_balancing,
    router_z,
    smooth_load,
    squared_variation,
)
from moetk.routing import ExpertChoice, TokenChoice

ANY = RouterContext()
LOSSES = [
    LoadBalancingLoss(0.5),
    LoadBalancingLoss(0.5, scope="sequence"),
    LoadBalancingLoss(0.5, scope="global_batch", reduce=lambda counts: counts),
    DeepSeekSequenceLoss(0.5),
    GShardLoss(0.5),
    RouterZLoss(0.5),
    ImportanceLoss(0.5),
    LoadLoss(0.5),
]


def route(T: int, E: int, K: int, seed: int = 0, sigmoid: bool = False) -> TokenChoice:
    """A noisy top-k routing with every field a loss may read; its leaf is extras["leaf"]."""
    g = torch.Generator().manual_seed(seed)
    leaf_TE = torch.randn(T, E, generator=g).requires_grad_()
    scores_TE = leaf_TE.sigmoid() if sigmoid else leaf_TE.softmax(-1)
    std_TE = torch.rand(T, E, generator=g) + 0.1
    choice_TE = leaf_TE + std_TE * torch.randn(T, E, generator=g)
    experts_TK = choice_TE.topk(K, -1).indices
    return TokenChoice(
        experts_TK,
        scores_TE.gather(-1, experts_TK),
        E,
        leaf_TE,
        scores_TE,
        choice_TE,
        extras={"std_TE": std_TE, "leaf": leaf_TE},
    )


def ids(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows)


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
        z_TE = routing.logits_TE.detach().double().requires_grad_()
        want = 0.5 * twin(routing, groups, counted, z_TE.sigmoid() if sigmoid else z_TE.softmax(-1))
        assert got.dtype == torch.float32 and got.shape == ()
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        [grad] = torch.autograd.grad(got, routing.logits_TE, retain_graph=True)
        want_grad = torch.autograd.grad(want, z_TE)[0] if want.requires_grad else 0 * z_TE
        torch.testing.assert_close(grad.double(), want_grad, rtol=1e-4, atol=1e-6)


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


def test_labels_decide_over_padding_and_padding_over_all():
    routing = route(6, 4, 2)
    tokens = torch.tensor([True, True, True, True, False, False])
    labels = torch.tensor([True, True, False, True, False, False])

    def of(rows):
        return load_balancing(routing.experts_TK[rows], routing.scores_TE[rows])

    loss = LoadBalancingLoss(1.0)
    torch.testing.assert_close(loss(routing, RouterContext(token_mask=tokens)), of(tokens))
    both = RouterContext(token_mask=tokens, label_mask=labels)
    torch.testing.assert_close(loss(routing, both), of(labels))
    torch.testing.assert_close(loss(routing, ANY), of(slice(None)))
    torch.testing.assert_close(RouterZLoss(1.0)(routing, both), router_z(routing.logits_TE[labels]))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_no_tokens_and_no_counted_tokens_give_zero_with_a_graph(loss):
    for T, ctx in [
        (0, RouterContext(batch_shape=(0, 3))),
        (0, RouterContext(batch_shape=(2, 0), token_mask=torch.zeros(0, dtype=torch.bool))),
        (6, RouterContext(batch_shape=(2, 3), label_mask=torch.zeros(6, dtype=torch.bool))),
    ]:
        routing = route(T, 4, 2)
        value = loss(routing, ctx)
        assert value == 0 and value.dtype == torch.float32 and value.shape == ()
        value.backward()
        assert torch.equal(routing.logits_TE.grad, torch.zeros(T, 4))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_every_loss_is_finite_at_k_equal_e_and_scales_with_its_coefficient(loss):
    routing = route(6, 3, 3)
    ctx = RouterContext(batch_shape=(2, 3))
    value = loss(routing, ctx)
    [grad] = torch.autograd.grad(value, routing.logits_TE)
    assert value.isfinite() and grad.isfinite().all()
    if isinstance(loss, LoadLoss):
        assert value == 0 and not grad.any()  # every expert takes everything, whatever the noise
    if isinstance(loss, LoadBalancingLoss):
        torch.testing.assert_close(value, torch.tensor(0.5))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_nan_in_an_uncounted_row_stays_there(loss):
    clean, dirty = route(6, 4, 2), route(6, 4, 2)
    mask = torch.tensor([True, True, False, True, True, True])
    with torch.no_grad():
        for tensor in (dirty.logits_TE, dirty.scores_TE, dirty.choice_TE, dirty.weights_TK):
            tensor[2] = math.nan
    ctx = RouterContext(batch_shape=(2, 3), label_mask=mask)
    assert torch.equal(loss(clean, ctx), loss(dirty, ctx))
    field = loss.reads[0] if loss.reads else "weights_TK"
    wanted = torch.autograd.grad(loss(clean, ctx), getattr(clean, field))[0]
    got = torch.autograd.grad(loss(dirty, ctx), getattr(dirty, field))[0]
    assert torch.equal(got[mask], wanted[mask])


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_losses_trace_whole(loss):
    routing = route(8, 4, 2)
    ctx = RouterContext(batch_shape=(2, 4), label_mask=torch.arange(8) % 3 > 0)
    traced = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(routing, ctx), loss(routing, ctx))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), parts=st.sampled_from([1, 2, 4]))
def test_sequence_scope_and_z_are_exact_under_accumulation(seed, parts):
    """Weighed by their counted tokens, the micro-batches' losses are the whole batch's loss."""
    B, S, E = 4, 5, 4
    whole = route(B * S, E, 2, seed)
    mask = torch.rand(B * S, generator=torch.Generator().manual_seed(seed)) < 0.4
    for loss in (
        LoadBalancingLoss(1.0, scope="sequence"),
        DeepSeekSequenceLoss(1.0),
        RouterZLoss(1.0),
    ):
        want = loss(whole, RouterContext(batch_shape=(B, S), label_mask=mask))
        got = torch.zeros(())
        for rows in torch.arange(B * S).chunk(parts):
            part = TokenChoice(
                whole.experts_TK[rows],
                whole.weights_TK[rows],
                E,
                whole.logits_TE[rows],
                whole.scores_TE[rows],
            )
            ctx = RouterContext(batch_shape=(B // parts, S), label_mask=mask[rows])
            got = got + loss(part, ctx) * mask[rows].sum() / mask.sum().clamp(min=1)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got, whole.logits_TE, retain_graph=True)[0],
            torch.autograd.grad(want, whole.logits_TE, retain_graph=True)[0],
        )


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


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), T=st.integers(1, 8), E=st.integers(1, 6))
def test_z_loss_value_and_gradient(seed, T, E):
    z_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    value = router_z(z_TE)
    lse_T = z_TE.detach().double().exp().sum(-1).log()
    torch.testing.assert_close(value.double(), lse_T.square().mean(), rtol=1e-5, atol=1e-6)
    want = 2 * lse_T[:, None] * z_TE.detach().double().softmax(-1) / T
    [grad] = torch.autograd.grad(value, z_TE)
    torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-6)
    assert router_z(z_TE.bfloat16()).dtype == torch.float32


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), T=st.integers(1, 6), E=st.integers(2, 6), data=st.data())
def test_load_and_importance_equal_shazeers_definitions(seed, T, E, data):
    K = data.draw(st.integers(1, E - 1))
    routing = route(T, E, K, seed)
    clean, noisy, std = (
        t.detach().double()
        for t in (routing.logits_TE, routing.choice_TE, routing.extras["std_TE"])
    )
    clean.requires_grad_()
    normal = torch.distributions.Normal(0.0, 1.0)
    rows = []
    for t in range(T):
        others = [torch.cat([noisy[t, :e], noisy[t, e + 1 :]]) for e in range(E)]
        bars = torch.stack([other.sort(descending=True).values[K - 1] for other in others])
        rows.append(normal.cdf((clean[t] - bars) / std[t]))
    want_TE = torch.stack(rows)
    got_TE = smooth_load(routing.logits_TE, routing.choice_TE.detach(), routing.extras["std_TE"], K)
    torch.testing.assert_close(got_TE.double(), want_TE, rtol=1e-4, atol=1e-6)

    def cv(x):
        return x.var(correction=0) / x.mean() ** 2

    torch.testing.assert_close(
        LoadLoss(0.1)(routing, ANY).double(), 0.1 * cv(want_TE.sum(0)), rtol=1e-4, atol=1e-6
    )
    [grad] = torch.autograd.grad(squared_variation(got_TE.sum(0)), routing.logits_TE)
    [want_grad] = torch.autograd.grad(cv(want_TE.sum(0)), clean)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-3, atol=1e-5)

    summed = torch.zeros(E).index_add(0, routing.experts_TK.flatten(), routing.weights_TK.flatten())
    torch.testing.assert_close(ImportanceLoss(0.1)(routing, ANY), 0.1 * cv(summed))


def test_squared_variation_has_a_gradient_where_a_standard_deviation_has_none():
    for x_E in (torch.zeros(3), torch.ones(3)):
        x_E.requires_grad_()
        value = squared_variation(x_E)
        value.backward()
        assert value == 0 and torch.equal(x_E.grad, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("E", "K", "L", "T"), [(4, 1, 2, 12), (8, 2, 3, 101), (64, 8, 2, 300)])
def test_hf_load_balancing_is_hfs_bit_for_bit(E, K, L, T, dtype):
    g = torch.Generator().manual_seed(E)
    layers = [torch.randn(T, E, generator=g).to(dtype).requires_grad_() for _ in range(L)]
    routings = [TokenChoice(z.topk(K).indices, torch.ones(T, K), E, z) for z in layers]
    mask = torch.rand(T, generator=g) < 0.7
    for padding in (None, mask, mask.long()[None], torch.ones(1, T)):
        want = load_balancing_loss_func(tuple(layers), E, K, padding)
        got = hf_load_balancing(routings, padding)
        assert got.dtype == want.dtype and torch.equal(got, want)
        for a, b in zip(
            torch.autograd.grad(got, layers), torch.autograd.grad(want, layers), strict=True
        ):
            assert torch.equal(a, b)
    want = load_balancing_loss_func(tuple(layers), E, 1)
    assert torch.equal(hf_load_balancing(routings, top_k=1), want)


def test_hf_pools_layers_before_the_product():
    """Two layers collapsed on different experts: pooled 2, their mean 4."""
    layers = [torch.eye(4)[[e] * 6] * 100 for e in (0, 1)]
    routings = [
        TokenChoice(z.topk(1).indices, torch.ones(6, 1), 4, z, z.softmax(-1)) for z in layers
    ]
    assert hf_load_balancing(routings) == 2
    assert sum(LoadBalancingLoss(0.5)(routing, ANY) for routing in routings) == 4


def test_errors_say_what_to_do():
    with pytest.raises(
        RouterConfigError, match=r"RouterZLoss: coefficient=nan; need a finite number >= 0"
    ):
        RouterZLoss(math.nan)
    with pytest.raises(RouterConfigError, match=r"coefficient=-1"):
        LoadBalancingLoss(-1)
    for loss in (DeepSeekSequenceLoss, GShardLoss, ImportanceLoss, LoadBalancingLoss, LoadLoss):
        for wrong in ("0.1", None, True, torch.tensor(0.1)):
            with pytest.raises(RouterConfigError, match=rf"{loss.__name__}: coefficient=.*finite"):
                loss(wrong)
    with pytest.raises(RouterConfigError, match=r"scope='batch'; it is one of micro_batch, seq"):
        LoadBalancingLoss(1, scope="batch")
    with pytest.raises(RouterConfigError, match=r"normalisation='mcore'; it is one of switch, hf"):
        LoadBalancingLoss(1, normalisation="mcore")
    with pytest.raises(RouterConfigError, match=r"reduce=moetk.parallel.sum_over_ranks"):
        LoadBalancingLoss(1, scope="global_batch")
    with pytest.raises(RouterConfigError, match=r"reduce is given, but scope=\"sequence\""):
        LoadBalancingLoss(1, scope="sequence", reduce=lambda counts: counts)

    bare = TokenChoice(ids([[0], [1]]), torch.ones(2, 1), 2)
    full = TokenChoice(ids([[0], [1]]), torch.ones(2, 1), 2, scores_TE=torch.ones(2, 2))
    columns = ExpertChoice(ids([[0], [1]]), torch.ones(2, 1), 2, scores_TE=torch.ones(2, 2))
    for loss, field in [
        (LoadBalancingLoss(1), "scores_TE"),
        (DeepSeekSequenceLoss(1), "scores_TE"),
        (GShardLoss(1), "scores_TE"),
        (RouterZLoss(1), "logits_TE"),
        (LoadLoss(1), "logits_TE"),
    ]:
        with pytest.raises(MissingFieldError, match=rf"{type(loss).__name__} reads {field}"):
            loss(bare, ANY)
    for loss in (LoadBalancingLoss(1), DeepSeekSequenceLoss(1), GShardLoss(1), ImportanceLoss(1)):
        with pytest.raises(UnsupportedRoutingError, match=rf"{type(loss).__name__} counts.*Expert"):
            loss(columns, ANY)
    with pytest.raises(MissingContextError, match=r"LoadBalancingLoss needs ctx.batch_shape"):
        LoadBalancingLoss(1, scope="sequence")(full, ANY)
    with pytest.raises(MoeShapeError, match=r"batch_shape is \(2, 3\), but there are T=2"):
        LoadBalancingLoss(1, scope="sequence")(full, RouterContext(batch_shape=(2, 3)))
    with pytest.raises(MoeShapeError, match=r"sequence_ids is \(3,\), expected \(T=2,\)"):
        ctx = RouterContext(sequence_ids=torch.zeros(3, dtype=torch.int64))
        LoadBalancingLoss(1, scope="sequence")(full, ctx)
    with pytest.raises(MoeShapeError, match=r"ctx.label_mask is \(1, 2\), expected \(T=2,\)"):
        LoadBalancingLoss(1)(full, RouterContext(label_mask=torch.ones(1, 2, dtype=torch.bool)))

    with pytest.raises(MissingFieldError, match=r"hf_load_balancing got no routings"):
        hf_load_balancing([])
    with pytest.raises(MissingFieldError, match=r"hf_load_balancing reads logits_TE"):
        hf_load_balancing([bare])
    logits = TokenChoice(ids([[0], [1]]), torch.ones(2, 1), 2, torch.zeros(2, 2))
    with pytest.raises(MoeShapeError, match=r"attention_mask is \(1, 3\).*T=2"):
        hf_load_balancing([logits], torch.ones(1, 3))
