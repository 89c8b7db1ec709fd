"""What a capacity promises: how many are served, who comes first, and what a drop means.

Notation: C = ceil(factor S K / E) places of each expert in each sequence of S tokens; wanted_bec,
kept_bec: choices of sequence b at expert e in column c.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from moetk.dispatch import Capacity, Local
from moetk.routing import TokenChoice
from moetk.testing.law import Case, hold, law
from moetk.testing.laws.dispatchers_queue import Queue, queue, served_by
from moetk.testing.laws.dispatchers_subject import (
    DispatcherUnderTest,
    cases_of,
    kept,
    needs_capacity,
    needs_order,
    sequence_of,
)
from moetk.testing.strategies.routings import routing_of


def _wanted(subject: DispatcherUnderTest, case: Case) -> Tensor:
    """(T, K) bool: what may take a place: used, not dropped by the router, not padding."""
    wanted_TK, mask_T = case["experts_TK"] >= 0, case.get("token_mask_T")
    for there in (case.get("kept_TK"), None if mask_T is None else mask_T[:, None]):
        wanted_TK = wanted_TK if there is None else wanted_TK & there
    return wanted_TK


def _counts(subject: DispatcherUnderTest, case: Case, chosen_TK: Tensor) -> Tensor:
    """(B, E) int64: the choices in `chosen_TK`, by sequence and expert."""
    batch = int(case.settings["batch"] or 0)
    queue_TK = sequence_of(case)[:, None] * subject.num_experts + case["experts_TK"]
    flat = torch.bincount(queue_TK[chosen_TK], minlength=batch * subject.num_experts)
    return flat.view(batch, subject.num_experts)


def _places(subject: DispatcherUnderTest, case: Case) -> int:
    """ceil(factor S K / E), in whole millionths: 1.1 * 50 in binary is more than 55."""
    length, k = int(case.settings["length"] or 0), case["experts_TK"].shape[1]
    millionths = round(float(case.settings["factor"] or 0) * 1_000_000)
    return -(-millionths * length * k // (1_000_000 * subject.num_experts))


# D13


class _OnePlaceMore(Queue):
    """Compares ranks with <= where < is meant."""

    def places(self, length: int, k: int, num_experts: int) -> int:
        return super().places(length, k, num_experts) + 1


@law(
    "D13",
    "no expert serves more than its capacity",
    formula="sum over columns of kept_bec <= C = ceil(factor S K / E)",
    source="arXiv 2006.16668, section 2.2; arXiv 2101.03961, equation 3",
    cases=cases_of(padding=True),
    broken=served_by(_OnePlaceMore),
    unless=needs_capacity,
)
def within_capacity(subject: DispatcherUnderTest, case: Case) -> None:
    kept_BE, places = _counts(subject, case, kept(subject, case)), _places(subject, case)
    hold(
        kept_BE <= places,
        f"experts serve {kept_BE.tolist()} choices a sequence and have {places} places",
        kept_BE=kept_BE,
    )


# D14


class _RoundsDown(Queue):
    """Cuts the capacity to a whole number instead of raising it."""

    def places(self, length: int, k: int, num_experts: int) -> int:
        return int(self.factor * length * k / num_experts)


@law(
    "D14",
    "nobody is turned away while there is room",
    formula="sum over columns of kept_bec >= min(C, sum over columns of wanted_bec)",
    source="arXiv 2006.16668, algorithm 1; MegaBlocks truncates C where GShard rounds up",
    cases=cases_of(padding=True),
    broken=served_by(_RoundsDown),
    unless=needs_capacity,
)
def uses_its_room(subject: DispatcherUnderTest, case: Case) -> None:
    kept_BE, places = _counts(subject, case, kept(subject, case)), _places(subject, case)
    wanted_BE = _counts(subject, case, _wanted(subject, case))
    hold(
        kept_BE >= wanted_BE.clamp(max=places),
        f"experts serve {kept_BE.tolist()} of {wanted_BE.tolist()} wanted and have {places} places",
        kept_BE=kept_BE,
        wanted_BE=wanted_BE,
    )


# D15


class _RoundsByTheFactor(Queue):
    """Rounds up below a factor of 1, and down from there."""

    def places(self, length: int, k: int, num_experts: int) -> int:
        exact = self.factor * length * k / num_experts
        return math.ceil(exact) if self.factor < 1 else int(exact)


@law(
    "D15",
    "more capacity never drops more",
    formula="factor <= factor': kept_be <= kept'_be for every sequence and expert",
    source="arXiv 2101.03961, section 2.2: the factor buys fewer drops",
    cases=cases_of(padding=True),
    broken=served_by(_RoundsByTheFactor),
    unless=needs_capacity,
)
def monotone(subject: DispatcherUnderTest, case: Case) -> None:
    factors = (0.25, 0.9, 1.0, 1.25, 2.0)
    served = [_counts(subject, case, kept(subject, case, factor)) for factor in factors]
    for lower, higher, less_BE, more_BE in zip(
        factors, factors[1:], served, served[1:], strict=False
    ):
        hold(
            less_BE <= more_BE,
            f"factor {lower} serves {less_BE.tolist()}, factor {higher} only {more_BE.tolist()}",
        )


# D16


class _SplitsOneBuffer(Queue):
    """Divides a buffer of S * K rows evenly among the experts, however large the factor."""

    def places(self, length: int, k: int, num_experts: int) -> int:
        return min(super().places(length, k, num_experts), -(-length * k // num_experts))


@law(
    "D16",
    "ample capacity drops nothing",
    formula="factor = E, so C = S K: kept = wanted",
    source="arXiv 2211.15841: dropless is the limit of a growing capacity",
    cases=cases_of(padding=True),
    broken=served_by(_SplitsOneBuffer),
    unless=needs_capacity,
)
def ample(subject: DispatcherUnderTest, case: Case) -> None:
    kept_TK = kept(subject, case, float(subject.num_experts))
    wanted_TK = _wanted(subject, case)
    hold(torch.equal(kept_TK, wanted_TK), "choices are dropped, or padding kept", kept_TK=kept_TK)


# D17


class _TokenByToken(Queue):
    """Serves all choices of a token before the next token's first one."""

    def serve(self, routing: TokenChoice, groups: list[list[int]], places: int) -> Tensor:
        return queue(routing, groups, places, arrivals="tokens")


@law(
    "D17",
    "first choices come before second ones",
    formula="kept_bec > 0 only if kept_bec' = wanted_bec' for every column c' < c",
    source="arXiv 2006.16668, algorithm 1; MaxText serves token by token",
    cases=cases_of(padding=True),
    broken=served_by(_TokenByToken),
    unless=needs_capacity,
)
def columns_in_order(subject: DispatcherUnderTest, case: Case) -> None:
    kept_TK, wanted_TK = kept(subject, case), _wanted(subject, case)
    turned_away_BE = torch.zeros_like(_counts(subject, case, kept_TK), dtype=torch.bool)
    for column in range(kept_TK.shape[1]):
        here = torch.zeros_like(kept_TK)
        here[:, column] = True
        kept_BE = _counts(subject, case, kept_TK & here)
        hold(
            (kept_BE == 0) | ~turned_away_BE,
            f"choices of column {column} are kept where an earlier column was turned away",
            kept_TK=kept_TK,
        )
        turned_away_BE |= _counts(subject, case, wanted_TK & here) > kept_BE


# D18


class _LastComeFirst(Queue):
    """Picks by topk over a 0/1 mask, which serves equals in any order: here from the end."""

    def groups(self, num_tokens: int, batch: int, length: int) -> list[list[int]]:
        return [tokens[::-1] for tokens in super().groups(num_tokens, batch, length)]


@law(
    "D18",
    "within a column, those with the higher priority come first",
    formula="of one (b, e, c): kept is a prefix by falling priority_T, then by token",
    source="arXiv 2101.03961 (by position); arXiv 2106.05974 (batch priority)",
    cases=cases_of(padding=True),
    broken=lambda: replace(served_by(_LastComeFirst)(), dispatcher=Local(Capacity(1.0))),
    unless=needs_order,
)
def tokens_in_order(subject: DispatcherUnderTest, case: Case) -> None:
    assert subject.order is not None
    routing = routing_of(case, subject.num_experts)
    kept_TK, wanted_TK = kept(subject, case), _wanted(subject, case)
    priority_T, order_T = subject.order(routing), torch.arange(len(kept_TK))
    if priority_T is not None:
        order_T = priority_T.argsort(descending=True, stable=True)
    queue_TK = sequence_of(case)[:, None] * subject.num_experts + routing.experts_TK
    for column in range(kept_TK.shape[1]):
        refused: set[int] = set()
        for token in order_T.tolist():
            if not bool(wanted_TK[token, column]):
                continue
            place = int(queue_TK[token, column])
            hold(
                not (bool(kept_TK[token, column]) and place in refused),
                f"token {token} is served in column {column}, one before it was not",
                kept_TK=kept_TK,
            )
            if not bool(kept_TK[token, column]):
                refused.add(place)


LAWS = (
    within_capacity,
    uses_its_room,
    monotone,
    ample,
    columns_in_order,
    tokens_in_order,
)
