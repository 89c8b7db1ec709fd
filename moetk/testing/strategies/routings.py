"""Routings of rows, as a router may return them, for banks and dispatchers.

Letters: T tokens, H hidden, E experts, K choices a token, C places of an expert, B sequences,
S positions, P slots.
Drawn are sizes, the name of a pattern and a seed; the tensors are built from the seed, so that
hypothesis shrinks towards few tokens and the plainest pattern.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from moetk.routing import ExpertChoice, SoftChoice, TokenChoice
from moetk.testing.law import Case

TOKENS = (1, 2, 5, 9, 0)
"""How many tokens are drawn; none at all is an ordinary batch."""

CROWDS = (33, 129, 257)
"""Tokens beyond a block of 32 and of 128, with one left over, and beyond a byte: what is lost there
is lost in no smaller batch."""

MANY = (9, 12)
"""Choices a token beyond eight, and beyond most banks' experts: the first are named again."""

DISTINCT = ("random", "tied", "hot")
"""random: K different experts a token. tied: the same with equal weights, 1/K each. hot: all tokens
name the same K experts, so that every other one is empty."""

REPEATED = ("duplicates", "starved")
"""duplicates: ids drawn with repetition, as hash tables have them. starved: every choice of every
token names one expert."""

ABSENT = ("unused", "dropped", "mixed", "nothing")
"""unused: two slots of five are -1. dropped: kept_TK drops half of the choices, weight 0. mixed:
duplicates, unused slots and drops together. nothing: all slots are -1."""

PATTERNS = (*DISTINCT, *REPEATED, *ABSENT)

ROWS = ("gaussian", "large", "tiny", "equal", "zero")
"""gaussian: standard normal. large: 8 times that, beyond the clamps of activations. tiny: a
thousandth. equal: one row again and again. zero: all zeros."""

LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
"""How the elements lie in memory: see `laid_out`."""


def seeds() -> SearchStrategy[int]:
    return st.integers(0, 2**31 - 1)


def choices_of(num_experts: int, more: tuple[int, ...] = ()) -> SearchStrategy[int]:
    """K: 1, 2, 3 and E itself, where that is at most 8; and `more`, whatever E is."""
    few = {min(k, num_experts, 8) for k in (1, 2, 3, num_experts)}
    return st.sampled_from(sorted({*few, *more}))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape: tuple[int, ...], source: torch.Generator, dtype: torch.dtype) -> Tensor:
    # Drawn in float64, so that one seed is the same tensor, rounded, in every dtype.
    return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)


def rows(
    num_tokens: int,
    hidden_size: int,
    pattern: str,
    source: torch.Generator,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """(T, H) after one of the patterns in ROWS."""
    x_TH = normal((num_tokens, hidden_size), source, dtype)
    scale = {"large": 8.0, "tiny": 1e-3, "zero": 0.0}.get(pattern, 1.0)
    return x_TH[:1].repeat(num_tokens, 1) if pattern == "equal" else x_TH * scale


def laid_out(x_TH: Tensor, layout: str) -> Tensor:
    """The same values, in another layout. transposed: columns are contiguous. sliced: every second
    row and the middle columns of a larger tensor of NaN. expanded: the first row, stretched over
    all, stride 0 (the values of other rows are lost)."""
    if layout == "transposed":
        return x_TH.T.contiguous().T
    if layout == "sliced":
        num_tokens, width = x_TH.shape
        larger = x_TH.new_full((2 * num_tokens, width + 3), float("nan"))
        larger[::2, 2 : 2 + width] = x_TH
        return larger[::2, 2 : 2 + width]
    if layout == "expanded":
        return x_TH[:1].expand_as(x_TH) if len(x_TH) else x_TH
    return x_TH


def token_choice(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    pattern: str,
    source: torch.Generator,
    dtype: torch.dtype = torch.float64,
) -> TokenChoice:
    """experts_TK and weights_TK after one of PATTERNS. Weights are normal, of both signs: a bank or
    dispatcher has no business with what they sum to. Where one expert is named twice, as all are
    where K > E, they are positive, so that the two do not cancel and rounding stays small beside
    what is left."""
    shape = (num_tokens, top_k)

    def chance(share: float) -> Tensor:
        return torch.rand(shape, generator=source) < share

    order_TE = torch.rand(num_tokens, num_experts, generator=source).argsort(-1)
    experts_TK = order_TE[:, torch.arange(top_k) % num_experts]
    if pattern in ("duplicates", "mixed"):
        experts_TK = torch.randint(num_experts, shape, generator=source)
    elif pattern == "hot":
        experts_TK = experts_TK[:1].repeat(num_tokens, 1)
    elif pattern == "starved":
        experts_TK = experts_TK[:1, :1].repeat(num_tokens, top_k)
    weights_TK = normal(shape, source, dtype)
    if pattern in (*REPEATED, "mixed") or top_k > num_experts:
        weights_TK = weights_TK.abs()
    if pattern == "tied":
        weights_TK = torch.full_like(weights_TK, 1 / top_k)

    if pattern in ("unused", "mixed"):
        experts_TK = experts_TK.masked_fill(chance(0.4), -1)
    elif pattern == "nothing":
        experts_TK = torch.full_like(experts_TK, -1)
    kept_TK = None
    if pattern in ("dropped", "mixed"):
        kept_TK = chance(0.5)
        weights_TK = weights_TK.masked_fill(~kept_TK, 0)
    weights_TK = weights_TK.masked_fill(experts_TK < 0, 0)
    return TokenChoice(experts_TK, weights_TK, num_experts, kept_TK=kept_TK)


def expert_choice(
    num_tokens: int,
    num_experts: int,
    capacity: int,
    source: torch.Generator,
    dtype: torch.dtype = torch.float64,
) -> ExpertChoice:
    """Each expert takes `capacity` different tokens; three places of ten are empty."""
    order_ET = torch.rand(num_experts, num_tokens, generator=source).argsort(-1)
    tokens_EC = order_ET[:, :capacity]
    empty_EC = torch.rand(tokens_EC.shape, generator=source) < 0.3
    weights_EC = normal(tuple(tokens_EC.shape), source, dtype).masked_fill(empty_EC, 0)
    return ExpertChoice(tokens_EC.masked_fill(empty_EC, -1), weights_EC, num_tokens)


def soft_choice(
    batch: int,
    length: int,
    num_experts: int,
    slots: int,
    source: torch.Generator,
    dtype: torch.dtype = torch.float64,
) -> SoftChoice:
    """Softmax of normal logits: over a sequence's tokens to dispatch, over slots to combine."""
    shape = (batch, length, num_experts * slots)
    dispatch_BSP = normal(shape, source, torch.float64).softmax(1).to(dtype)
    combine_BSP = normal(shape, source, torch.float64).softmax(2).to(dtype)
    return SoftChoice(dispatch_BSP, combine_BSP, num_experts)


@st.composite
def token_choices(
    draw: DrawFn,
    num_experts: int,
    patterns: tuple[str, ...] = PATTERNS,
    tokens: tuple[int, ...] = TOKENS,
    dtype: torch.dtype = torch.float64,
) -> TokenChoice:
    """A TokenChoice of 0 to 9 tokens over `num_experts`, K from 1 to E."""
    num_tokens, top_k = draw(st.sampled_from(tokens)), draw(choices_of(num_experts))
    pattern, source = draw(st.sampled_from(patterns)), generator(draw(seeds()))
    return token_choice(num_tokens, num_experts, top_k, pattern, source, dtype)


@st.composite
def expert_choices(
    draw: DrawFn,
    num_experts: int,
    tokens: tuple[int, ...] = TOKENS,
    dtype: torch.dtype = torch.float64,
) -> ExpertChoice:
    """An ExpertChoice: from no place an expert to one for every token."""
    num_tokens = draw(st.sampled_from(tokens))
    capacity = draw(st.integers(0, num_tokens))
    return expert_choice(num_tokens, num_experts, capacity, generator(draw(seeds())), dtype)


@st.composite
def soft_choices(draw: DrawFn, num_experts: int, dtype: torch.dtype = torch.float64) -> SoftChoice:
    """A SoftChoice of 1 to 3 sequences of 0 to 4 tokens, 1 or 2 slots an expert."""
    batch, length = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 4, 0)))
    slots, source = draw(st.integers(1, 2)), generator(draw(seeds()))
    return soft_choice(batch, length, num_experts, slots, source, dtype)


@st.composite
def routed_rows(
    draw: DrawFn,
    hidden_size: int,
    num_experts: int,
    patterns: tuple[str, ...] = PATTERNS,
    tokens: tuple[int, ...] = TOKENS,
    row_patterns: tuple[str, ...] = ROWS,
    dtype: torch.dtype = torch.float64,
    more_choices: tuple[int, ...] = (),
) -> Case:
    """x_TH, its TokenChoice (experts_TK, weights_TK, perhaps kept_TK) and a cotangent g_TH.

    more_choices: K that are drawn beside the usual ones.
    """
    num_tokens = draw(st.sampled_from(tokens))
    top_k = draw(choices_of(num_experts, more_choices))
    pattern, row_pattern = draw(st.sampled_from(patterns)), draw(st.sampled_from(row_patterns))
    seed = draw(seeds())
    source = generator(seed)
    routing = token_choice(num_tokens, num_experts, top_k, pattern, source, dtype)
    tensors = {
        "x_TH": rows(num_tokens, hidden_size, row_pattern, source, dtype),
        "g_TH": normal((num_tokens, hidden_size), source, dtype),
        "experts_TK": routing.experts_TK,
        "weights_TK": routing.weights_TK,
    }
    if routing.kept_TK is not None:
        tensors["kept_TK"] = routing.kept_TK
    return Case(tensors, {"pattern": pattern, "rows": row_pattern, "seed": seed})


def taken(routing: TokenChoice, rows_R: Tensor) -> TokenChoice:
    """The routing of some of its rows, or of all in another order. rows_R: int64."""
    kept_TK = routing.kept_TK
    return replace(
        routing,
        experts_TK=routing.experts_TK[rows_R],
        weights_TK=routing.weights_TK[rows_R],
        kept_TK=None if kept_TK is None else kept_TK[rows_R],
    )


def routing_of(case: Case, num_experts: int) -> TokenChoice:
    """The TokenChoice of a case that `routed_rows` drew."""
    return TokenChoice(
        case["experts_TK"], case["weights_TK"], num_experts, kept_TK=case.get("kept_TK")
    )


def seed_of(case: Case) -> int:
    return cast(int, case.settings["seed"])
