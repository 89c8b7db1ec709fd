"""Reductions over two gloo ranks, and the losses and controllers that rest on them."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moetk.context import RouterContext
from moetk.controllers import BiasUpdate
from moetk.errors import MoeShapeError, TopologyError
from moetk.losses import LoadBalancingLoss
from moetk.parallel import SumOverRanks, gather_over_ranks, sum_over_ranks
from moetk.routing import TokenChoice
from tests.parallel.ranks import run_on_ranks

E, K = 4, 2


def route(rows: slice) -> TokenChoice:
    """The rows of one batch of 10 tokens, with its leaf in logits_TE."""
    g = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(10, E, generator=g)[rows].clone().requires_grad_()
    experts_TK = logits_TE.topk(K, -1).indices
    scores_TE = logits_TE.softmax(-1)
    return TokenChoice(experts_TK, scores_TE.gather(-1, experts_TK), E, logits_TE, scores_TE)


def test_alone_they_change_nothing():
    x = torch.arange(3.0, requires_grad=True)
    for reduced in (sum_over_ranks(x), gather_over_ranks(x), SumOverRanks()(x)):
        assert torch.equal(reduced, x) and not reduced.requires_grad
    for bad in (torch.tensor(1.0), torch.zeros([1] * 8)):
        with pytest.raises(MoeShapeError, match=r"gather_over_ranks got \("):
            gather_over_ranks(bad)


def test_two_ranks():
    run_on_ranks(two_ranks)


def two_ranks(rank: int) -> None:
    sums(rank)
    gathers(rank)
    groups(rank)
    for cut in (3, 5, 10):  # at 10 the second rank has no token
        global_loss_is_the_loss_of_the_whole_batch(rank, cut)
        both_ranks_move_the_same_bias(rank, cut)


def sums(rank: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        x = torch.tensor([[1, 2], [3, 4]], dtype=dtype) * (rank + 1)
        before = x.clone()
        for layout in (x, x.T):  # a tensor that is not contiguous too
            total = sum_over_ranks(layout)
            assert torch.equal(total, layout // (rank + 1) * 3) and total.dtype == dtype
        assert torch.equal(x, before)
    leaf = torch.ones(2, requires_grad=True)
    assert not sum_over_ranks(leaf).requires_grad
    assert sum_over_ranks(torch.zeros(0)).shape == (0,)


def gathers(rank: int) -> None:
    for lengths in ((2, 3), (0, 2), (3, 0), (0, 0)):
        start = sum(lengths[:rank])
        x = torch.arange(start, start + lengths[rank])[:, None].expand(-1, 2)
        every = gather_over_ranks(x)
        assert torch.equal(every, torch.arange(sum(lengths))[:, None].expand(-1, 2))
        assert every.dtype == torch.int64
    # All ranks raise, so that none waits for another.
    with pytest.raises(TopologyError, match=r"rank 0 \(1, 2\) torch.float32, rank 1 \(1, 3\)"):
        gather_over_ranks(torch.zeros(1, 2 + rank))
    with pytest.raises(TopologyError, match=r"rank 0 \(1,\) torch.float32, rank 1 \(1, 1\)"):
        gather_over_ranks(torch.zeros([1] * (1 + rank)))
    # Bytes of another type would be read as numbers of one's own; the widths may even be equal.
    for other in (torch.float64, torch.int32, torch.bfloat16):
        with pytest.raises(TopologyError, match=rf"rank 0 .*torch.float32, rank 1 \(2,\) {other}"):
            gather_over_ranks(torch.ones(2, dtype=(torch.float32, other)[rank]))


def groups(rank: int) -> None:
    both = SumOverRanks(dist.new_group([0, 1]))
    alone = [dist.new_group([r]) for r in range(2)]
    x = torch.tensor([rank + 1.0])
    assert both(x) == 3 and both.gather(x).tolist() == [1, 2]
    assert SumOverRanks(alone[rank])(x) == rank + 1
    with pytest.raises(TopologyError, match=rf"Rank {rank} is not in the group"):
        SumOverRanks(alone[1 - rank])(x)


def global_loss_is_the_loss_of_the_whole_batch(rank: int, cut: int) -> None:
    rows = slice(0, cut) if rank == 0 else slice(cut, 10)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    whole, mine = route(slice(0, 10)), route(rows)
    want = LoadBalancingLoss(1.0)(whole, RouterContext(label_mask=mask))
    want.backward()

    loss = LoadBalancingLoss(1.0, scope="global_batch", reduce=sum_over_ranks)
    share = mask[rows].sum() / mask.sum()
    local = loss(mine, RouterContext(label_mask=mask[rows])) * share
    local.backward()
    torch.testing.assert_close(sum_over_ranks(local), want.detach())
    torch.testing.assert_close(gather_over_ranks(mine.logits_TE.grad), whole.logits_TE.grad)


def both_ranks_move_the_same_bias(rank: int, cut: int) -> None:
    def moved(observed):
        router = nn.Module()
        router.register_buffer("e_score_correction_bias", torch.zeros(E))
        controller = BiasUpdate(1e-3)
        controller.bind(router)
        controller.step(observed)
        return router.e_score_correction_bias

    rows = slice(0, cut) if rank == 0 else slice(cut, 10)
    observe = BiasUpdate(1e-3).observe
    want = moved(observe(route(slice(0, 10)), RouterContext()))
    got = moved(sum_over_ranks(observe(route(rows), RouterContext())))
    assert torch.equal(got, want) and want.any()
