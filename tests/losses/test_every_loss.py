"""What every loss keeps: masks, no tokens, K = E, NaN rows, one graph, accumulation, messages."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
)
from moetk.routing import ExpertChoice, TokenChoice
from tests.losses.parts import ANY, ids, route

LOSSES = [
    LoadBalancingLoss(0.5),
    LoadBalancingLoss(0.5, scope="sequence"),
    LoadBalancingLoss(0.5, scope="global_batch", reduce=torch.clone),
    DeepSeekSequenceLoss(0.5),
    GShardLoss(0.5),
    RouterZLoss(0.5),
    ImportanceLoss(0.5),
    LoadLoss(0.5),
]


def named(loss):
    return f"{type(loss).__name__}-{getattr(loss, 'scope', '')}"


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


@pytest.mark.parametrize("loss", LOSSES, ids=named)
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


@pytest.mark.parametrize("loss", LOSSES, ids=named)
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


@pytest.mark.parametrize("loss", LOSSES, ids=named)
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


@pytest.mark.parametrize("loss", LOSSES, ids=named)
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
