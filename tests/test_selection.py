"""The pure functions under every router, against twins in plain Python and against their laws."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moetk.context import RouterContext
from moetk.errors import (
    MoeShapeError,
    ReplayError,
    RouterConfigError,
)
from moetk.routers import (
    best_one,
    best_two,
    expert_capacity,
    gather,
    in_best_groups,
    in_order,
    largest,
    normalise,
    random_table,
    softmax_over,
    top_k,
    top_k_as_summed,
    top_tokens,
    within_capacity,
)

CTX = RouterContext()
SEEDS = st.integers(0, 2**31 - 1)


def rows(seed: int, num_rows: int, columns: int, levels: int = 0) -> Tensor:
    """Normal values; with `levels`, only that many different ones, so that rows tie."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(levels, (num_rows, columns), generator=generator).float()
    return torch.randn(num_rows, columns, generator=generator)


def first_largest(row: list[float], k: int) -> list[int]:
    """NaN above all, then the larger value, then the lower id."""
    return sorted(range(len(row)), key=lambda i: (not math.isnan(row[i]), -row[i], i))[:k]


class TestLargest:
    @given(SEEDS, st.integers(0, 6), st.integers(1, 9), st.integers(0, 3), st.data())
    def test_takes_the_lower_id_of_equal_values(self, seed, num_rows, columns, levels, data):
        x_RN = rows(seed, num_rows, columns, levels)
        special = data.draw(st.sampled_from([None, math.nan, math.inf, -math.inf]))
        if special is not None:
            x_RN[rows(seed + 1, num_rows, columns) > 0] = special
        k = data.draw(st.integers(0, columns))
        assert largest(x_RN, k).tolist() == [first_largest(row, k) for row in x_RN.tolist()]

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
    def test_a_row_of_one_value_gives_the_first_ids(self, value):
        assert largest(torch.full((2, 6), value), 4).tolist() == [[0, 1, 2, 3]] * 2

    @given(SEEDS, st.integers(1, 8))
    def test_compiled_picks_what_eager_picks(self, seed, k):
        # Compiled and accelerator code sorts, the CPU looks for ties: one rule, two ways.
        x_RN = rows(seed, 16, 8, levels=4)
        by_sort = torch.sort(x_RN, dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(largest(x_RN, k), by_sort)

    def test_traces_into_one_graph(self):
        whole = torch.compile(largest, fullgraph=True, backend="eager")
        x_RN = rows(0, 32, 8, levels=3)
        assert torch.equal(whole(x_RN, 3), largest(x_RN, 3))

    def test_bfloat16_ties_are_broken_alike(self):
        x_RN = rows(1, 512, 64).bfloat16()
        expected = [first_largest(row, 8) for row in x_RN.tolist()]
        assert largest(x_RN, 8).tolist() == expected

    def test_stock_is_torch_topk(self):
        x_RN = rows(2, 256, 16, levels=3)
        assert torch.equal(largest(x_RN, 4, "stock"), x_RN.topk(4).indices)
        assert not torch.equal(largest(x_RN, 4, "stock"), largest(x_RN, 4))

    def test_errors_name_k_and_the_rule(self):
        with pytest.raises(RouterConfigError, match=re.escape("k=9, but there are 8 to choose")):
            largest(torch.zeros(2, 8), 9)
        with pytest.raises(RouterConfigError, match="tie='high' is not a rule"):
            largest(torch.zeros(2, 8), 2, "high")  # type: ignore[arg-type]


class TestTopK:
    def test_follows_a_replay(self):
        replay_TK = torch.tensor([[3, -1], [0, 2]])
        ctx = RouterContext(replay=replay_TK)
        for tie in ("low", "stock"):
            assert torch.equal(top_k(rows(0, 2, 4), 2, ctx, tie), replay_TK)
            picked_TK, order_TK = top_k_as_summed(rows(0, 2, 4), 2, ctx, tie)
            assert torch.equal(in_order(picked_TK, order_TK), replay_TK)

    def test_a_replay_of_other_tokens_raises(self):
        ctx = RouterContext(replay=torch.zeros(3, 2, dtype=torch.int64), where="model.layers.1.mlp")
        message = "The replay in model.layers.1.mlp holds 3 tokens, this call has 2"
        for choose in (top_k, top_k_as_summed):
            with pytest.raises(ReplayError, match=message):
                choose(rows(0, 2, 4), 2, ctx, "stock")

    def test_a_replay_of_another_width_is_followed(self):
        replay_TK = torch.tensor([[3, 1, 0]])
        picked_TK, order_TK = top_k_as_summed(
            rows(0, 1, 4), 2, RouterContext(replay=replay_TK), "stock"
        )
        assert torch.equal(in_order(picked_TK, order_TK), replay_TK)

    @given(SEEDS, st.integers(1, 8), st.integers(0, 4))
    def test_as_summed_keeps_the_stock_order_and_how_to_leave_it(self, seed, k, levels):
        choice_TE = rows(seed, 7, 8, levels)
        picked_TK, order_TK = top_k_as_summed(choice_TE, k, CTX, "stock")
        assert torch.equal(picked_TK, choice_TE.topk(k, sorted=False).indices)
        chosen_TK = choice_TE.gather(1, in_order(picked_TK, order_TK))
        assert torch.equal(chosen_TK, choice_TE.topk(k).values)
        replay_TK = in_order(picked_TK, order_TK)
        again_TK, order_again_TK = top_k_as_summed(
            choice_TE, k, RouterContext(replay=replay_TK), "stock"
        )
        assert torch.equal(again_TK, picked_TK) and torch.equal(order_again_TK, order_TK)

    def test_as_summed_with_low_ties_is_top_k(self):
        choice_TE = rows(3, 5, 8, levels=2)
        picked_TK, order_TK = top_k_as_summed(choice_TE, 3, CTX)
        assert order_TK is None and torch.equal(picked_TK, top_k(choice_TE, 3, CTX))


class TestWeights:
    @given(SEEDS, st.integers(0, 6), st.booleans())
    def test_values_and_gradients_are_the_plain_ones(self, seed, num_tokens, with_unused):
        scores_TE = rows(seed, num_tokens, 5).double().requires_grad_()
        experts_TK = largest(rows(seed + 1, num_tokens, 5), 3)
        if with_unused:
            experts_TK = experts_TK.masked_fill(rows(seed + 2, num_tokens, 3) > 0.3, -1)
        upstream_TK = rows(seed + 3, num_tokens, 3).double()

        for weigh, plain in (
            (gather, lambda chosen: chosen),
            (
                softmax_over,
                lambda chosen: [math.exp(s) / sum(map(math.exp, chosen)) for s in chosen],
            ),
            (
                lambda s, i: normalise(gather(s.exp(), i)),
                lambda c: [math.exp(s) / sum(map(math.exp, c)) for s in c],
            ),
        ):
            weights_TK = weigh(scores_TE, experts_TK)
            for token, ids in enumerate(experts_TK.tolist()):
                used = [e for e in ids if e >= 0]
                expected = iter(plain([float(scores_TE[token, e]) for e in used]))
                for column, e in enumerate(ids):
                    want = next(expected) if e >= 0 else 0.0
                    assert float(weights_TK[token, column]) == pytest.approx(want, abs=1e-12)
            (gradient_TE,) = torch.autograd.grad(weights_TK, scores_TE, upstream_TK)
            assert gradient_TE.isfinite().all()
            untouched_TE = torch.ones_like(scores_TE, dtype=torch.bool)
            for token, ids in enumerate(experts_TK.tolist()):
                untouched_TE[token, [e for e in ids if e >= 0]] = False
            assert (gradient_TE[untouched_TE] == 0).all()

    def test_gradients_pass_gradcheck_with_unused_slots_and_duplicates(self):
        scores_TE = rows(0, 3, 4).double().requires_grad_()
        experts_TK = torch.tensor([[0, 3], [2, -1], [1, 1]])
        for weigh in (gather, softmax_over, lambda s, i: normalise(gather(s.exp(), i), 1e-3)):
            assert torch.autograd.gradcheck(lambda s, w=weigh: w(s, experts_TK), (scores_TE,))

    def test_a_row_of_unused_slots_weighs_nothing_and_passes_no_gradient(self):
        scores_TE = rows(0, 2, 4).sigmoid().requires_grad_()
        experts_TK = torch.tensor([[-1, -1], [0, 1]])
        for weigh in (softmax_over, lambda s, i: normalise(gather(s, i))):
            weights_TK = weigh(scores_TE, experts_TK)
            assert weights_TK[0].tolist() == [0, 0]
            (gradient_TE,) = torch.autograd.grad((weights_TK**2).sum(), scores_TE)
            assert gradient_TE[0].tolist() == [0] * 4 and gradient_TE[1].abs().sum() > 0

    def test_unused_slots_are_masked_in_a_graph_too(self):
        experts_TK = torch.tensor([[0, 3], [2, -1]])
        for weigh in (gather, softmax_over):
            whole = torch.compile(weigh, fullgraph=True, backend="eager")
            assert torch.equal(whole(rows(0, 2, 4), experts_TK), weigh(rows(0, 2, 4), experts_TK))

    def test_eps_is_added_to_the_sum(self):
        weights_TK = torch.tensor([[1.0, 3.0]])
        assert normalise(weights_TK, eps=4.0).tolist() == [[0.125, 0.375]]


class TestGroups:
    @given(SEEDS, st.integers(0, 5), st.sampled_from([(8, 4, 2), (6, 2, 1), (6, 3, 3), (9, 3, 2)]))
    def test_only_the_best_groups_are_left(self, seed, num_tokens, shape):
        num_experts, groups, top_groups = shape
        choice_TE = rows(seed, num_tokens, num_experts)
        size = num_experts // groups
        for worth, plain in ((best_two, lambda g: sum(sorted(g)[-2:])), (best_one, max)):
            limited_TE = in_best_groups(choice_TE, groups, top_groups, worth=worth)
            for row, limited in zip(choice_TE.tolist(), limited_TE.tolist(), strict=True):
                values = [plain(row[g * size : (g + 1) * size]) for g in range(groups)]
                best = first_largest(values, top_groups)
                assert limited == [s if e // size in best else -math.inf for e, s in enumerate(row)]

    def test_negative_choice_scores_stay_inside(self):
        # A mask of zeros would beat them: with a bias, choice scores may all be negative.
        choice_TE = -torch.arange(1.0, 9.0)[None]
        assert top_k(in_best_groups(choice_TE, 4, 1), 2, CTX).tolist() == [[0, 1]]

    def test_max_and_top_two_judge_differently(self):
        choice_TE = torch.tensor([[9.0, 0.0, 6.0, 6.0]])
        assert in_best_groups(choice_TE, 2, 1).isinf().tolist() == [[True, True, False, False]]
        by_max_TE = in_best_groups(choice_TE, 2, 1, worth=best_one)
        assert by_max_TE.isinf().tolist() == [[False, False, True, True]]

    def test_equal_groups_fall_to_the_lower(self):
        assert in_best_groups(torch.zeros(1, 8), 4, 2).isinf().tolist() == [
            [False] * 4 + [True] * 4
        ]

    def test_groups_must_divide(self):
        with pytest.raises(RouterConfigError, match="groups=3 does not divide num_experts=8"):
            in_best_groups(torch.zeros(1, 8), 3, 1)


def first_come_first_served(
    experts: list[list[int]],
    capacity: int,
    length: int,
    mask: list[bool],
    priority: list[float],
) -> list[list[bool]]:
    kept = [[False] * len(row) for row in experts]
    taken: dict[tuple[int, int], int] = {}
    tokens = sorted(range(len(experts)), key=lambda t: (-priority[t], t))
    for column in range(len(experts[0]) if experts else 0):
        for token in tokens:
            place = (token // length, experts[token][column])
            if place[1] < 0 or not mask[token]:
                continue
            if taken.get(place, 0) < capacity:
                taken[place] = taken.get(place, 0) + 1
                kept[token][column] = True
    return kept


class TestCapacity:
    @given(
        SEEDS,
        st.sampled_from([(1, 9), (3, 5), (2, 1), (2, 0)]),
        st.integers(1, 3),
        st.sampled_from([0.25, 0.5, 1.0, 1.25, 3.0]),
        st.booleans(),
        st.booleans(),
    )
    def test_serves_first_choices_then_first_comers(self, seed, shape, k, factor, masked, by_score):
        batch, length = shape
        num_tokens, num_experts = batch * length, 4
        experts_TK = largest(rows(seed, num_tokens, num_experts), k)
        experts_TK = experts_TK.masked_fill(rows(seed + 1, num_tokens, k) > 1, -1)
        mask_T = rows(seed + 2, num_tokens, 1)[:, 0] < 0.5 if masked else None
        priority_T = rows(seed + 3, num_tokens, 1, levels=3)[:, 0] if by_score else None
        ctx = RouterContext(batch_shape=shape, token_mask=mask_T)

        kept_TK = within_capacity(experts_TK, num_experts, factor, ctx, priority_T)

        capacity = math.ceil(factor * length * k / num_experts)
        assert capacity == expert_capacity(length, k, num_experts, factor)
        assert kept_TK.dtype == torch.bool and kept_TK.shape == experts_TK.shape
        assert kept_TK.tolist() == first_come_first_served(
            experts_TK.tolist(),
            capacity,
            length,
            [True] * num_tokens if mask_T is None else mask_T.tolist(),
            [0.0] * num_tokens if priority_T is None else priority_T.tolist(),
        )

    def test_position_order_holds_for_many_tokens(self):
        # topk over an integer mask, a common form, picks tokens from the middle at this size.
        kept_TK = within_capacity(torch.zeros(4096, 1, dtype=torch.int64), 2, 0.25, CTX)
        assert kept_TK[:512].all() and not kept_TK[512:].any()

    def test_with_priority_no_dropped_token_outranks_a_kept_one(self):
        experts_TK = largest(rows(5, 64, 4), 2)
        priority_T = rows(6, 64, 1)[:, 0]
        kept_TK = within_capacity(experts_TK, 4, 0.5, CTX, priority_T)
        for column in range(2):
            for expert in range(4):
                here_T = experts_TK[:, column] == expert
                kept = priority_T[here_T & kept_TK[:, column]]
                lost = priority_T[here_T & ~kept_TK[:, column]]
                assert not len(kept) or not len(lost) or kept.min() >= lost.max()

    def test_room_for_all_keeps_all(self):
        experts_TK = largest(rows(7, 32, 4), 2)
        assert within_capacity(experts_TK, 4, 4.0, CTX).all()

    def test_capacity_is_the_ceiling_of_the_decimal(self):
        assert math.ceil(1.1 * 50) == 56  # what binary rounding would give
        assert expert_capacity(50, 1, 1, 1.1) == 55
        assert expert_capacity(100, 2, 8, 1.25) == 32
        assert expert_capacity(1, 1, 64, 0.01) == 1
        assert expert_capacity(0, 1, 8, 1.25) == 0

    @pytest.mark.parametrize("factor", [0, -1.0, math.inf, math.nan, "1.25", None, True])
    def test_a_useless_factor_raises(self, factor):
        with pytest.raises(RouterConfigError, match=r"capacity_factor=.*need a finite number"):
            expert_capacity(8, 1, 2, factor)

    def test_a_batch_shape_of_other_tokens_raises(self):
        ctx = RouterContext(batch_shape=(2, 3))
        message = re.escape("ctx.batch_shape=(2, 3) is 6 tokens, but there are T=5")
        with pytest.raises(MoeShapeError, match=message):
            within_capacity(torch.zeros(5, 1, dtype=torch.int64), 2, 1.0, ctx)
        with pytest.raises(MoeShapeError, match=message):
            top_tokens(torch.zeros(5, 2), 1, ctx)


class TestTopTokens:
    @given(SEEDS, st.sampled_from([(1, 8), (3, 4), (2, 3), (2, 0), (0, 4)]), st.integers(1, 4))
    def test_each_expert_takes_the_best_of_each_sequence(self, seed, shape, k):
        batch, length = shape
        scores_TE = rows(seed, batch * length, 4, levels=5).requires_grad_()
        tokens_EC, weights_EC = top_tokens(scores_TE, k, RouterContext(batch_shape=shape))
        capacity = min(length, math.ceil(k * length / 4))
        expected = [
            [
                s * length + position
                for s in range(batch)
                for position in first_largest(
                    scores_TE[s * length : (s + 1) * length, expert].tolist(), capacity
                )
            ]
            for expert in range(4)
        ]
        assert tokens_EC.tolist() == expected
        expert_E1 = torch.arange(4)[:, None]
        assert torch.equal(weights_EC, scores_TE[tokens_EC, expert_E1])
        (gradient_TE,) = torch.autograd.grad(weights_EC.sum(), scores_TE)
        taken_TE = torch.zeros_like(gradient_TE)
        taken_TE[tokens_EC, expert_E1] = 1
        assert torch.equal(gradient_TE, taken_TE)

    @given(SEEDS)
    def test_padding_is_never_taken(self, seed):
        scores_TE = rows(seed, 12, 3).sigmoid()
        mask_T = rows(seed + 1, 12, 1)[:, 0] > 0.5
        ctx = RouterContext(batch_shape=(2, 6), token_mask=mask_T)
        tokens_EC, weights_EC = top_tokens(scores_TE, 2, ctx)
        used_EC = tokens_EC >= 0
        assert mask_T[tokens_EC[used_EC]].all()
        assert (weights_EC[~used_EC] == 0).all() and (weights_EC[used_EC] > 0).all()
        places = [min(4, int(mask_T[:6].sum())), min(4, int(mask_T[6:].sum()))]
        assert used_EC.sum(1).tolist() == [sum(places)] * 3

    def test_a_replay_raises(self):
        ctx = RouterContext(replay=torch.zeros(4, 2, dtype=torch.int64))
        with pytest.raises(ReplayError, match=re.escape("ctx.replay (4, 2) names experts")):
            top_tokens(torch.zeros(4, 2), 1, ctx)


class TestTable:
    def test_rows_name_different_experts_and_the_seed_decides(self):
        table = random_table(50, 8, 3, seed=1)
        assert table.shape == (50, 3) and table.dtype == torch.int64
        assert all(len(set(row)) == 3 for row in table.tolist())
        assert set(table.flatten().tolist()) == set(range(8))
        assert torch.equal(table, random_table(50, 8, 3, seed=1))
        assert not torch.equal(table, random_table(50, 8, 3, seed=2))

    def test_sizes_are_checked(self):
        with pytest.raises(RouterConfigError, match="random_table: top_k=3 but num_experts=2"):
            random_table(50, 2, 3)
        for wrong in (0, 50.0, "50"):
            with pytest.raises(RouterConfigError, match=f"random_table: vocab_size={wrong!r}"):
                random_table(wrong, 2, 1)
