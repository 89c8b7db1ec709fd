"""The one count under losses, controllers, metrics and dispatch, and the masks that all accept."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moetk import controllers, dispatch, losses, metrics, routers
from moetk.context import RouterContext
from moetk.errors import MoeDtypeError, MoeShapeError
from moetk.kernels.counting import count_choices, used_choices
from moetk.routing import TokenChoice

ROUTING = TokenChoice(
    torch.tensor([[0, 1], [2, -1], [0, 2]]),
    torch.ones(3, 2),
    3,
    torch.zeros(3, 3),
    torch.full((3, 3), 1 / 3),
    torch.zeros(3, 3),
    kept_TK=torch.tensor([[True, False], [True, False], [False, True]]),
    extras={"std_TE": torch.ones(3, 3)},
)
MASKED = {
    "bias": lambda ctx: controllers.BiasUpdate(1e-3).observe(ROUTING, ctx),
    "load balancing": lambda ctx: losses.LoadBalancingLoss(1.0)(ROUTING, ctx),
    "z": lambda ctx: losses.RouterZLoss(1.0)(ROUTING, ctx),
    "importance": lambda ctx: losses.ImportanceLoss(1.0)(ROUTING, ctx),
    "load": lambda ctx: losses.LoadLoss(1.0)(ROUTING, ctx),
    "tokens per expert": lambda ctx: metrics.tokens_per_expert(ROUTING, ctx),
    "drop fraction": lambda ctx: metrics.drop_fraction(ROUTING, ctx),
    "logit rms": lambda ctx: metrics.logit_rms(ROUTING, ctx),
    "dropped": lambda ctx: dispatch.dropped(ROUTING, ctx),
    "capacity": lambda ctx: dispatch.Capacity(1.0)(ROUTING, ctx),
    "expert choice": lambda ctx: routers.ExpertChoiceRouter(3, 3, 1)(torch.ones(3, 3), ctx),
    "soft": lambda ctx: routers.SoftMoERouter(3, 3)(torch.ones(3, 3), ctx),
}


@given(
    seed=st.integers(0, 2**31 - 1),
    B=st.integers(0, 3),
    S=st.integers(0, 4),
    E=st.integers(1, 5),
    K=st.integers(1, 3),
    masked=st.booleans(),
)
def test_against_plain_python(seed, B, S, E, K, masked):
    g = torch.Generator().manual_seed(seed)
    T = B * S
    experts_TK = torch.randint(-1, E, (T, K), generator=g)
    counted_T = torch.rand(T, generator=g) < 0.6 if masked else None
    mask = counted_T.tolist() if masked else [True] * T

    def count(tokens):
        made = [e for t in tokens if mask[t] for e in experts_TK[t].tolist()]
        return [made.count(e) for e in range(E)]

    got = count_choices(experts_TK, E, counted_T)
    assert got.tolist() == [count(range(T))] and got.dtype == torch.int64
    by_row = count_choices(experts_TK, E, counted_T, B)
    assert by_row.tolist() == [count(range(b * S, b * S + S)) for b in range(B)]
    sequence_T = torch.randint(0, max(T, 1), (T,), generator=g)
    ids = sequence_T.tolist()
    packed = count_choices(experts_TK, E, counted_T, sequence_T)
    assert packed.tolist() == [count([u for u in range(T) if ids[u] == i]) for i in ids]
    used = [[mask[t] and e >= 0 for e in experts_TK[t].tolist()] for t in range(T)]
    assert used_choices(experts_TK, counted_T).tolist() == used


def test_counts_stay_exact_where_fp32_would_round():
    many = 2**24 + 1
    experts_TK = torch.zeros(1, 1, dtype=torch.int64).expand(many, 1)
    assert int(count_choices(experts_TK, 1)) == many
    assert torch.tensor(many).float().long() != many


@pytest.mark.parametrize("name", MASKED)
def test_whatever_reads_the_mask_refuses_one_of_another_shape_or_type(name):
    use = MASKED[name]
    for mask in (torch.ones(1), torch.ones(1, 3), torch.ones(4)):
        shape = str(tuple(mask.shape)).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(MoeShapeError, match=rf"ctx.token_mask is {shape}, expected \(T=3,\)"):
            use(RouterContext(batch_shape=(1, 3), token_mask=mask.bool()))
    with pytest.raises(MoeDtypeError, match=r"ctx.token_mask is torch.int64; a mask is torch.bool"):
        use(RouterContext(batch_shape=(1, 3), token_mask=torch.ones(3, dtype=torch.int64)))
    use(RouterContext(batch_shape=(1, 3), token_mask=torch.ones(3, dtype=torch.bool)))


def test_functions_refuse_what_would_be_stretched():
    one = torch.ones(1, dtype=torch.bool)
    experts_TK, scores_TE = ROUTING.experts_TK, ROUTING.scores_TE
    for use in (
        lambda: count_choices(experts_TK, 3, one),
        lambda: losses.load_balancing(experts_TK, scores_TE, counted_T=one),
        lambda: losses.router_z(scores_TE, one),
    ):
        with pytest.raises(MoeShapeError, match=r"counted_T is \(1,\), expected \(T=3,\)"):
            use()
    with pytest.raises(MoeShapeError, match=r"sequences is \(1,\), expected \(T=3,\)"):
        losses.load_balancing(experts_TK, scores_TE, sequences=torch.zeros(1, dtype=torch.int64))
    for runs in (0, 2, 4):
        with pytest.raises(MoeShapeError, match=rf"sequences={runs}, but T=3 tokens are no {runs}"):
            losses.load_balancing(experts_TK, scores_TE, sequences=runs)
