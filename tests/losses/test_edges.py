"""Losses where there is almost nothing to count, and settings as a file would spell them."""

import pytest
import torch

from moetk.context import RouterContext
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
    squared_variation,
)
from moetk.routing import TokenChoice
from tests.losses.parts import ANY, ids, route


def test_one_token_and_one_choice():
    """The smallest counts: a mean over 1 and a share of 1 are no special case."""
    scores_TE = torch.tensor([[0.25, 0.75]])
    assert float(load_balancing(ids([[1]]), scores_TE)) == 1.5
    assert float(load_balancing(ids([[0]]), scores_TE)) == 0.5
    logits_TE = torch.tensor([[0.0, 0.0]])
    routing = TokenChoice(ids([[1]]), torch.ones(1, 1), 2, logits_TE, scores_TE)
    ctx = RouterContext(batch_shape=(1, 1), label_mask=torch.ones(1, dtype=torch.bool))
    for loss in (
        LoadBalancingLoss(1.0),
        LoadBalancingLoss(1.0, scope="sequence"),
        DeepSeekSequenceLoss(1.0),
        GShardLoss(1.0),
    ):
        assert float(loss(routing, ctx)) == 1.5
    want = torch.tensor(2.0).log().square()
    assert torch.equal(router_z(logits_TE), want)
    assert torch.equal(RouterZLoss(1.0)(routing, ctx), want)
    assert float(hf_load_balancing([routing])) == 1.0  # equal logits: half, on one of two experts


def test_one_counted_token_among_many():
    routing = route(5, 4, 2, seed=3)
    one = torch.tensor([False, False, True, False, False])
    alone = TokenChoice(
        routing.experts_TK[2:3], routing.weights_TK[2:3], 4,
        routing.logits_TE[2:3], routing.scores_TE[2:3],
    )  # fmt: skip
    for loss in (LoadBalancingLoss(1.0), GShardLoss(1.0), RouterZLoss(1.0), ImportanceLoss(1.0)):
        got = loss(routing, RouterContext(label_mask=one))
        torch.testing.assert_close(got, loss(alone, ANY))


@pytest.mark.parametrize("name", ["switch", "hf"])
def test_a_setting_read_from_a_file_means_the_same(name):
    """Equal in letters; as an object another string than the one in the code."""
    routing, ctx = route(6, 4, 2), RouterContext(batch_shape=(2, 3))
    read = "".join(list(name))
    assert torch.equal(
        LoadBalancingLoss(1.0, normalisation=read)(routing, ctx),
        LoadBalancingLoss(1.0, normalisation=name)(routing, ctx),
    )
    scope = "".join(list("sequence"))
    by_sequence = LoadBalancingLoss(1.0, scope=scope)(routing, ctx)
    assert torch.equal(by_sequence, LoadBalancingLoss(1.0, scope="sequence")(routing, ctx))
    everywhere = "".join(list("global_batch"))
    loss = LoadBalancingLoss(1.0, scope=everywhere, reduce=torch.clone)
    assert torch.equal(loss(routing, ctx), LoadBalancingLoss(1.0)(routing, ctx))


def test_what_losses_read_is_what_attach_keeps():
    assert [loss(1.0).reads for loss in (LoadBalancingLoss, DeepSeekSequenceLoss, GShardLoss)] == [
        ("scores_TE",)
    ] * 3
    assert RouterZLoss(1.0).reads == ("logits_TE",) and ImportanceLoss(1.0).reads == ()
    assert LoadLoss(1.0).reads == ("logits_TE", "choice_TE", "extras")


def test_losses_are_values():
    """Frozen, and equal where their settings are: one object may serve every layer."""
    assert LoadBalancingLoss(0.5) == LoadBalancingLoss(0.5) != LoadBalancingLoss(0.25)
    every = (LoadBalancingLoss, DeepSeekSequenceLoss, GShardLoss, RouterZLoss)
    for loss in (*every, ImportanceLoss, LoadLoss):
        assert loss(0).coefficient == 0
        with pytest.raises(AttributeError):
            loss(1.0).coefficient = 2.0
    with pytest.raises(TypeError):
        LoadBalancingLoss(1.0, "sequence")


def test_variation_of_nothing_and_of_one():
    x_E = torch.zeros(4, requires_grad=True)
    squared_variation(x_E).backward()
    assert squared_variation(x_E) == 0 and not x_E.grad.any()
    assert float(squared_variation(torch.tensor([0.0, 0.0, 0.0, 4.0]))) == 3.0
    assert float(squared_variation(torch.tensor([-1.0, 3.0]))) == 4.0
