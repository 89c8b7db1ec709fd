"""What a router may return: each rule from both sides, with the message of the side that fails."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moetk.errors import (
    DuplicateExpertError,
    ExpertIndexError,
    MoeDtypeError,
    MoeShapeError,
    NonFiniteRoutingError,
    RoutingWeightError,
)
from moetk.routing import (
    ExpertChoice,
    SoftChoice,
    TokenChoice,
    check_routing,
)

T, E, K, C, B, S, P = 6, 4, 2, 3, 2, 3, 8
NAN, INF = float("nan"), float("inf")


def token_choice(**changes: Any) -> TokenChoice:
    """Token t names experts t and t + 1, modulo E."""
    experts_TK = (torch.arange(T)[:, None] + torch.arange(K)) % E
    return replace(TokenChoice(experts_TK, torch.full((T, K), 0.5), E), **changes)


def expert_choice(**changes: Any) -> ExpertChoice:
    tokens_EC = (torch.arange(E)[:, None] + torch.arange(C)) % T
    return replace(ExpertChoice(tokens_EC, torch.full((E, C), 0.5), T), **changes)


def soft_choice(**changes: Any) -> SoftChoice:
    return replace(SoftChoice(torch.ones(B, S, P), torch.ones(B, S, P), E), **changes)


def put(tensor: Tensor, places: dict[tuple[int, int], float]) -> Tensor:
    changed = tensor.clone()
    for place, value in places.items():
        changed[place] = value
    return changed


def ids(places: dict[tuple[int, int], float]) -> Tensor:
    return put(token_choice().experts_TK, places)


def weights(places: dict[tuple[int, int], float]) -> Tensor:
    return put(token_choice().weights_TK, places)


def tokens(places: dict[tuple[int, int], float]) -> Tensor:
    return put(expert_choice().tokens_EC, places)


def shares(places: dict[tuple[int, int], float]) -> Tensor:
    return put(expert_choice().weights_EC, places)


def whole(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def check(routing: Any, **options: Any) -> None:
    check_routing(routing, T, E, where="R", **options)


kept_TK = torch.ones(T, K, dtype=torch.bool)
dropped_TK = put(kept_TK, {(4, 1): False})

GOOD = {
    "plain": token_choice(),
    "every field": token_choice(
        logits_TE=torch.zeros(T, E),
        scores_TE=torch.zeros(T, E),
        choice_TE=torch.full((T, E), -INF),
        kept_TK=kept_TK,
    ),
    "lowest and highest id": token_choice(
        experts_TK=ids({(0, 0): -1, (1, 1): E - 1}), weights_TK=weights({(0, 0): 0})
    ),
    "two unused slots": token_choice(
        experts_TK=ids({(3, 0): -1, (3, 1): -1}), weights_TK=weights({(3, 0): 0, (3, 1): 0})
    ),
    "a dropped choice": token_choice(kept_TK=dropped_TK, weights_TK=weights({(4, 1): 0})),
    "a kept weight of zero and a negative one": token_choice(
        kept_TK=kept_TK, weights_TK=weights({(0, 0): 0, (1, 0): -1})
    ),
    "weights whose sum is too large for their dtype": token_choice(
        weights_TK=torch.full((T, K), 60000.0, dtype=torch.float16)
    ),
    "one column": token_choice(experts_TK=whole(T, 1), weights_TK=torch.ones(T, 1)),
    "no column": token_choice(experts_TK=whole(T, 0), weights_TK=torch.ones(T, 0)),
    "experts choose": expert_choice(),
    "an empty place": expert_choice(
        tokens_EC=tokens({(3, 2): -1, (0, 0): T - 1}), weights_EC=shares({(3, 2): 0})
    ),
    "experts choose nothing": expert_choice(tokens_EC=whole(E, 0), weights_EC=torch.ones(E, 0)),
    "soft": soft_choice(),
    "soft with one slot an expert": soft_choice(
        dispatch_BSP=torch.ones(B, S, E), combine_BSP=torch.ones(B, S, E)
    ),
}

both = "both are (E, C)."
SHAPE, DTYPE, INDEX, WEIGHT = MoeShapeError, MoeDtypeError, ExpertIndexError, RoutingWeightError
BAD: list[tuple[Any, type[Exception], str]] = [
    (
        token_choice(experts_TK=whole(T + 1, K)),
        SHAPE,
        "R: experts_TK is (7, 2), expected (T=6, K): one row a token.",
    ),
    (token_choice(experts_TK=whole(T - 1, K)), SHAPE, "R: experts_TK is (5, 2), expected"),
    (token_choice(experts_TK=whole(T)), SHAPE, "R: experts_TK is (6,), expected"),
    (token_choice(experts_TK=whole(T, K, 1)), SHAPE, "R: experts_TK is (6, 2, 1), expected"),
    (
        token_choice(weights_TK=torch.ones(T, K + 1)),
        SHAPE,
        "R: weights_TK is (6, 3), experts_TK (6, 2).",
    ),
    (token_choice(weights_TK=torch.ones(T, 1)), SHAPE, "R: weights_TK is (6, 1), experts_TK"),
    (
        token_choice(num_experts=E + 1),
        SHAPE,
        "R: num_experts=5 in the routing, but the bank has 4 experts.",
    ),
    (token_choice(num_experts=E - 1), SHAPE, "R: num_experts=3 in the routing"),
    *(
        (token_choice(**{name: torch.ones(*shape)}), SHAPE, f"R: {name} is {shape}, expected (T=6")
        for name in ("logits_TE", "scores_TE", "choice_TE")
        for shape in ((T, E + 1), (T, E - 1), (T + 1, E), (T - 1, E))
    ),
    (
        token_choice(kept_TK=torch.ones(T, K)),
        SHAPE,
        "R: kept_TK is torch.float32 (6, 2), expected torch.bool (6, 2).",
    ),
    (
        token_choice(kept_TK=torch.ones(T, 1, dtype=torch.bool)),
        SHAPE,
        "R: kept_TK is torch.bool (6, 1), expected torch.bool (6, 2).",
    ),
    (token_choice(kept_TK=torch.ones(T, 3, dtype=torch.bool)), SHAPE, "R: kept_TK is torch.bool"),
    (
        token_choice(experts_TK=whole(T, K).int()),
        DTYPE,
        "R: experts_TK is torch.int32; ids are torch.int64.",
    ),
    (
        token_choice(weights_TK=whole(T, K)),
        DTYPE,
        "R: weights_TK is torch.int64; weights are floating.",
    ),
    (
        token_choice(experts_TK=ids({(4, 1): -2})),
        INDEX,
        "R: experts_TK has id -2 at token 4, column 1, but there are 4 experts "
        "(0..3; -1 = unused).",
    ),
    (
        token_choice(experts_TK=ids({(5, 0): E, (5, 1): E + 3})),
        INDEX,
        "R: experts_TK has id 4 at token 5, column 0, but there are 4 experts",
    ),
    (
        token_choice(weights_TK=weights({(2, 1): NAN, (3, 0): INF})),
        NonFiniteRoutingError,
        "R: weights_TK has 2 values that are not finite, the first (nan) at token 2, column 1:",
    ),
    (
        token_choice(experts_TK=ids({(3, 1): -1, (5, 0): -1}), weights_TK=weights({(3, 1): 0})),
        WEIGHT,
        "R: experts_TK is -1 at token 5, column 0, with weight 0.5; an unused slot has weight 0.",
    ),
    (
        token_choice(experts_TK=ids({(3, 1): -1}), weights_TK=weights({(3, 1): -0.25})),
        WEIGHT,
        "R: experts_TK is -1 at token 3, column 1, with weight -0.25; an unused",
    ),
    (
        token_choice(kept_TK=dropped_TK),
        WEIGHT,
        "R: kept_TK drops token 4, column 1, whose weight is 0.5; a dropped choice has weight 0.",
    ),
    (
        token_choice(kept_TK=dropped_TK, weights_TK=weights({(4, 1): -2})),
        WEIGHT,
        "R: kept_TK drops token 4, column 1, whose weight is -2;",
    ),
    (
        token_choice(experts_TK=ids({(2, 0): 3, (2, 1): 3})),
        DuplicateExpertError,
        "R: token 2 names an expert twice, [3, 3].",
    ),
    (
        token_choice(experts_TK=ids({(5, 0): 0, (5, 1): 0})),
        DuplicateExpertError,
        "R: token 5 names an expert twice, [0, 0].",
    ),
    (
        expert_choice(tokens_EC=whole(E)),
        SHAPE,
        f"R: tokens_EC is (4,) and weights_EC (4, 3); {both}",
    ),
    (
        expert_choice(tokens_EC=whole(E, C, 1), weights_EC=torch.ones(E, C, 1)),
        SHAPE,
        f"R: tokens_EC is (4, 3, 1) and weights_EC (4, 3, 1); {both}",
    ),
    (
        expert_choice(tokens_EC=whole(E), weights_EC=torch.ones(E)),
        SHAPE,
        f"R: tokens_EC is (4,) and weights_EC (4,); {both}",
    ),
    (expert_choice(weights_EC=torch.ones(E, 4)), SHAPE, "R: tokens_EC is (4, 3) and weights_EC"),
    (expert_choice(weights_EC=torch.ones(E, 2)), SHAPE, "R: tokens_EC is (4, 3) and weights_EC"),
    (expert_choice(num_tokens=T + 1), SHAPE, "R: num_tokens=7, but x_TH has 6."),
    (expert_choice(num_tokens=T - 1), SHAPE, "R: num_tokens=5, but x_TH has 6."),
    (
        expert_choice(tokens_EC=whole(E + 1, C), weights_EC=torch.ones(E + 1, C)),
        SHAPE,
        "R: num_experts=5 in the routing, but the bank has 4 experts.",
    ),
    (
        expert_choice(tokens_EC=whole(E, C).int()),
        DTYPE,
        "R: tokens_EC is torch.int32; ids are torch.int64.",
    ),
    (
        expert_choice(weights_EC=whole(E, C)),
        DTYPE,
        "R: weights_EC is torch.int64; weights are floating.",
    ),
    (
        expert_choice(tokens_EC=tokens({(3, 1): T})),
        INDEX,
        "R: tokens_EC has token 6 for expert 3, place 1, but there are 6 tokens "
        "(0..5; -1 = empty).",
    ),
    (
        expert_choice(tokens_EC=tokens({(2, 0): -2})),
        INDEX,
        "R: tokens_EC has token -2 for expert 2, place 0, but",
    ),
    *(
        (
            expert_choice(weights_EC=shares({(3, 2): value})),
            NonFiniteRoutingError,
            "R: weights_EC is not finite at expert 3, place 2.",
        )
        for value in (NAN, INF, -INF)
    ),
    *(
        (
            expert_choice(
                tokens_EC=tokens({(1, 0): -1, (3, 2): -1}),
                weights_EC=shares({(1, 0): 0, (3, 2): value}),
            ),
            WEIGHT,
            f"R: tokens_EC is -1 at expert 3, place 2, with weight {value}; an empty place has",
        )
        for value in (0.5, -0.5)
    ),
    (
        soft_choice(dispatch_BSP=torch.ones(T, P), combine_BSP=torch.ones(T, P)),
        SHAPE,
        "R: dispatch_BSP is (6, 8) and combine_BSP (6, 8); both are (B, S, P).",
    ),
    (
        soft_choice(
            dispatch_BSP=torch.ones(1, B, S, P),
            combine_BSP=torch.ones(1, B, S, P),
        ),
        SHAPE,
        "R: dispatch_BSP is (1, 2, 3, 8) and combine_BSP (1, 2, 3, 8);",
    ),
    *(
        (
            soft_choice(combine_BSP=torch.ones(B, S, slots)),
            SHAPE,
            f"R: dispatch_BSP is (2, 3, 8) and combine_BSP (2, 3, {slots});",
        )
        for slots in (P - 4, P + 4)
    ),
    *(
        (
            soft_choice(
                dispatch_BSP=torch.ones(B, length, P), combine_BSP=torch.ones(B, length, P)
            ),
            SHAPE,
            f"R: dispatch_BSP is (2, {length}, 8), which is not T=6 tokens.",
        )
        for length in (S - 1, S + 1)
    ),
    (
        soft_choice(num_experts=E + 1),
        SHAPE,
        "R: num_experts=5 in the routing, but the bank has 4 experts.",
    ),
    (
        soft_choice(dispatch_BSP=torch.ones(B, S, 9), combine_BSP=torch.ones(B, S, 9)),
        SHAPE,
        "R: P=9 slots do not divide over 4 experts.",
    ),
    (
        (torch.zeros(T, K), torch.zeros(T, K)),
        DTYPE,
        "R returned tuple; a router returns a TokenChoice, an ExpertChoice or a SoftChoice.",
    ),
]


@pytest.mark.parametrize("routing", GOOD.values(), ids=GOOD)
def test_a_good_routing_passes(routing):
    check(routing)
    check_routing(routing, T, 0, where="R")  # 0 = the bank's number of experts is not known


@pytest.mark.parametrize(("routing", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_a_bad_routing_raises(routing, error, message):
    with pytest.raises(error, match=re.escape(message)):
        check(routing)


def test_nothing_routed_is_a_good_routing():
    none = TokenChoice(whole(0, K), torch.ones(0, K), E, torch.ones(0, E), kept_TK=kept_TK[:0])
    check_routing(none, 0, E, where="R")
    check_routing(ExpertChoice(whole(E, 0), torch.ones(E, 0), 0), 0, E, where="R")


def test_many_experts_are_counted_by_value():
    """Python keeps one object for each small integer, and none for 300."""
    routing = token_choice(num_experts=int("300"), logits_TE=torch.zeros(T, 300))
    check_routing(routing, T, int("300"), where="R")
    many = TokenChoice(whole(300, 1), torch.ones(300, 1), E)
    check_routing(many, int("300"), E, where="R")
    chosen = ExpertChoice(whole(E, 1), torch.ones(E, 1), int("300"))
    check_routing(chosen, int("300"), E, where="R")
    soft = SoftChoice(torch.ones(3, 100, P), torch.ones(3, 100, P), E)
    check_routing(soft, int("300"), E, where="R")


def test_the_first_of_several_wrong_ids_is_named():
    wrong = token_choice(experts_TK=ids({(1, 1): 9, (4, 0): -7}))
    with pytest.raises(ExpertIndexError, match="id 9 at token 1, column 1"):
        check(wrong)


def test_duplicates_are_for_routers_that_declare_them():
    twice = token_choice(experts_TK=ids({(2, 0): 3, (2, 1): 3}))
    check(twice, duplicates=True)
    # Three columns: the two equal ones need not be neighbours.
    apart = TokenChoice(torch.tensor([[0, 1, 2], [3, 1, 3]]), torch.ones(2, 3), E)
    with pytest.raises(DuplicateExpertError, match=re.escape("token 1 names an expert twice")):
        check_routing(apart, 2, E, where="R")


def test_values_are_looked_at_where_that_is_asked():
    wrong = [
        token_choice(experts_TK=ids({(0, 0): 99})),
        token_choice(weights_TK=weights({(0, 0): NAN})),
        expert_choice(tokens_EC=tokens({(0, 0): 99})),
    ]
    for routing in wrong:
        check(routing, values=False)
        with pytest.raises((ExpertIndexError, NonFiniteRoutingError)):
            check(routing, values=True)
    on_meta = TokenChoice(whole(T, K).to("meta"), torch.ones(T, K, device="meta"), E)
    check(on_meta)
    check(on_meta, values=True)  # there are none to look at


def test_of_a_trusted_routing_only_the_weights_are_looked_at():
    check(token_choice(experts_TK=ids({(0, 0): 99})), trusted=True)
    nan = token_choice(weights_TK=weights({(0, 1): NAN}))
    with pytest.raises(NonFiniteRoutingError, match=r"1 values .* \(nan\) at token 0, column 1"):
        check(nan, trusted=True)
    check(nan, trusted=True, values=False)
    with pytest.raises(ExpertIndexError):  # moetk's own selection of token choice alone is trusted
        check(expert_choice(tokens_EC=tokens({(0, 0): 99})), trusted=True)


def test_a_soft_choice_is_compared_with_the_batch():
    check(soft_choice(), batch_shape=(B, S))
    for wrong in ((S, B), (1, T)):
        message = re.escape(f"R: dispatch_BSP is (2, 3, 8), the batch is {wrong}.")
        with pytest.raises(MoeShapeError, match=message):
            check(soft_choice(), batch_shape=wrong)
