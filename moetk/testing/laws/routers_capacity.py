"""Who is dropped where experts are full, and what an expert that takes tokens takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.kernels.selection import expert_capacity, gather, largest, top_k, within_capacity
from moetk.routing import ExpertChoice, TokenChoice
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.routers_cases import (
    ScoredRouter,
    broken_subject,
    inputs,
    padded_with_others,
    unless_experts_are_chosen,
    unless_tokens_are_chosen,
)
from moetk.testing.laws.routers_compare import choice_of, coarsest_eps
from moetk.testing.laws.routers_subject import RouterSubject, context_of
from moetk.testing.laws.routers_told import by_token

CROWDS = ("gaussian", "collapsed", "starved", "zeros")


def _unless_it_drops(subject: RouterSubject) -> str | None:
    if not subject.chooses_experts:
        return unless_experts_are_chosen(subject)
    if subject.per_batch:
        return "it declares per_batch = True: the room is the batch's"
    return None if subject.drops else "its routing carries no kept_TK: it drops nothing"


def _rooms(routing: TokenChoice, case: Case) -> tuple[Tensor, Tensor]:
    """(B, E) int64 each: the choices that each expert kept of each sequence, and lost."""
    batch = int(case.settings["batch"] or 0)
    assert routing.kept_TK is not None
    ids_TK, real_T = routing.experts_TK, context_of(case).token_mask
    assert real_T is not None
    wanted_TK = (ids_TK >= 0) & real_T[:, None]
    sequence_T1 = torch.arange(len(ids_TK))[:, None] // max(len(ids_TK) // max(batch, 1), 1)
    bins_TK = sequence_T1 * routing.num_experts + ids_TK.clamp(min=0)
    counts = torch.zeros(2, batch * routing.num_experts, dtype=torch.int64)
    for row, chosen_TK in enumerate((wanted_TK & routing.kept_TK, wanted_TK & ~routing.kept_TK)):
        counts[row].scatter_add_(0, bins_TK.flatten(), chosen_TK.long().flatten())
    kept, lost = counts.view(2, batch, routing.num_experts)
    return kept, lost


class CapacityRouter(ScoredRouter):
    """Softmax, and room for `capacity_factor` even shares of each expert."""

    capacity_factor = 1.0

    def kept(self, experts_TK: Tensor, ctx: RouterContext) -> Tensor:
        return within_capacity(experts_TK, self.num_experts, self.capacity_factor, ctx)

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        scores_TE = self.logits(x_TH).softmax(-1)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        kept_TK = self.kept(experts_TK, ctx)
        weights_TK = gather(scores_TE, experts_TK) * kept_TK
        return self.chosen(experts_TK, weights_TK, scores_TE=scores_TE, kept_TK=kept_TK)


class CountsPadding(CapacityRouter):
    """Padding stands in the queue and takes places that nobody uses."""

    def kept(self, experts_TK: Tensor, ctx: RouterContext) -> Tensor:
        unmasked = RouterContext(batch_shape=ctx.batch_shape)
        return within_capacity(experts_TK, self.num_experts, self.capacity_factor, unmasked)


@law(
    "R21",
    "who drops is full",
    formula="lost[b, e] > 0  =>  kept[b, e] = max over e of kept[b, e]",
    source="GShard, arXiv 2006.16668, algorithm 1: second choices queue behind the first",
    cases=inputs(*CROWDS, least_length=1, added=padded_with_others),
    broken=broken_subject(CountsPadding),
    unless=_unless_it_drops,
)
def drops_when_full(subject: RouterSubject, case: Case) -> None:
    routing = subject.on(case)
    assert isinstance(routing, TokenChoice)
    kept_BE, lost_BE = _rooms(routing, case)
    bad_BE = (lost_BE > 0) & (kept_BE < kept_BE.amax(1, keepdim=True))
    hold(
        ~bad_BE,
        f"an expert that dropped {lost_BE[bad_BE][:1].tolist()} kept {kept_BE[bad_BE][:1].tolist()}"
        f", while another kept {kept_BE.amax(1).tolist()} of the same sequence",
        kept_BE=kept_BE,
        lost_BE=lost_BE,
        experts_TK=routing.experts_TK,
    )


class StartsSecondQueueAnew(CapacityRouter):
    """Places of second choices count from 0 again, without the first choices before them."""

    def kept(self, experts_TK: Tensor, ctx: RouterContext) -> Tensor:
        columns = [
            within_capacity(column_T1, self.num_experts, self.capacity_factor * self.top_k, ctx)
            for column_T1 in experts_TK.split(1, dim=-1)
        ]
        return torch.cat(columns, -1)


def _unless_capacity_factor(subject: RouterSubject) -> str | None:
    if (reason := _unless_it_drops(subject)) is not None:
        return reason
    if isinstance(getattr(subject.original, "capacity_factor", None), (int, float)):
        return None
    return "it declares no capacity_factor"


@law(
    "R22",
    "no expert takes more than its capacity",
    formula="kept[b, e] <= max(ceil(capacity_factor * S * K / E), min_capacity)",
    source="Switch, arXiv 2101.03961, equation 3; GShard, arXiv 2006.16668, section 2.2",
    cases=inputs(*CROWDS, least_length=1),
    broken=broken_subject(StartsSecondQueueAnew),
    unless=_unless_capacity_factor,
)
def within_room(subject: RouterSubject, case: Case) -> None:
    routing = subject.on(case)
    assert isinstance(routing, TokenChoice)
    factor = float(getattr(subject.original, "capacity_factor"))  # noqa: B009
    least = int(getattr(subject.original, "min_capacity", 0))
    length = int(case.settings["length"] or 0)
    room = max(expert_capacity(length, subject.top_k, subject.num_experts, factor), least)
    kept_BE, _ = _rooms(routing, case)
    hold(
        kept_BE <= room,
        f"an expert keeps {int(kept_BE.max())} of a sequence of {length}; its capacity is {room} "
        f"(capacity_factor={factor})",
        kept_BE=kept_BE,
        experts_TK=routing.experts_TK,
    )


class CountsPlacesFromOne(CapacityRouter):
    """cumsum counts from 1, and its result is compared with < C: one place is never used."""

    def kept(self, experts_TK: Tensor, ctx: RouterContext) -> Tensor:
        batch, length = ctx.batch_shape or (1, len(experts_TK))
        room = expert_capacity(length, self.top_k, self.num_experts, self.capacity_factor)
        taken_BSE = torch.nn.functional.one_hot(experts_TK[:, 0], self.num_experts)
        place_BSE = taken_BSE.view(batch, length, -1).cumsum(1).flatten(0, 1)
        return place_BSE.gather(1, experts_TK) < room


@law(
    "R23",
    "ample room drops nothing, and changes no choice",
    formula="capacity_factor = E  =>  all kept; experts_TK does not depend on the factor",
    source="GShard, arXiv 2006.16668: C >= the largest queue is dropless; a drop keeps its id",
    cases=inputs(*CROWDS, least_length=1),
    broken=broken_subject(CountsPlacesFromOne, 4, 4, 1),
    unless=_unless_capacity_factor,
)
def ample_room(subject: RouterSubject, case: Case) -> None:
    tight = subject.on(case)
    assert isinstance(tight, TokenChoice)
    router = subject.fresh()
    router.capacity_factor = float(subject.num_experts)  # type: ignore[attr-defined]
    with torch.no_grad():
        ample = router(case["x_TH"].to(subject.dtype), context_of(case))
    assert isinstance(ample, TokenChoice)
    wanted_TK = ample.experts_TK >= 0
    dropped = 0 if ample.kept_TK is None else int((wanted_TK & ~ample.kept_TK).sum())
    hold(
        dropped == 0,
        f"{dropped} of {int(wanted_TK.sum())} choices are dropped where each expert has room for "
        f"all (capacity_factor={subject.num_experts})",
        experts_TK=ample.experts_TK,
    )
    hold(
        torch.equal(tight.experts_TK, ample.experts_TK),
        "a dropped choice has another id than with room for it; losses count what was wanted",
        tight_TK=tight.experts_TK,
        ample_TK=ample.experts_TK,
    )


class TakesFromTheBatch(ScoredRouter):
    """Each expert takes its best tokens of the whole batch: one sequence may get none."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> ExpertChoice:
        scores_TE = self.logits(x_TH).softmax(-1)
        room = math.ceil(self.top_k * len(x_TH) / self.num_experts)
        tokens_EC = largest(scores_TE.T, room)
        return ExpertChoice(tokens_EC, scores_TE.T.gather(1, tokens_EC), len(x_TH))


@law(
    "R24",
    "an expert takes equally many of each sequence",
    formula="|{c: tokens_ec in sequence b}| = C / B for all e, b; all tokens_ec distinct",
    source="expert choice, arXiv 2202.09368, section 3.1: perfect load balance by construction",
    cases=inputs(),
    broken=broken_subject(TakesFromTheBatch),
    unless=lambda s: "it declares per_batch = True" if s.per_batch else unless_tokens_are_chosen(s),
)
def equal_load(subject: RouterSubject, case: Case) -> None:
    routing = subject.on(case)
    assert isinstance(routing, ExpertChoice)
    batch, length = int(case.settings["batch"] or 0), int(case.settings["length"] or 0)
    share = routing.tokens_EC.shape[1] // max(batch, 1)
    for expert, tokens in enumerate(routing.tokens_EC.tolist()):
        taken = [token for token in tokens if token >= 0]
        hold(
            len(set(taken)) == len(taken),
            f"expert {expert} takes a token twice: {tokens}",
            tokens_EC=routing.tokens_EC,
        )
        loads = [sum(token // length == b for token in taken) for b in range(batch)]
        hold(
            loads == [share] * batch,
            f"expert {expert} takes {loads} tokens of the {batch} sequences, its share is {share}",
            tokens_EC=routing.tokens_EC,
        )


class ReadsAcross(ScoredRouter):
    """(T, E) scores are reshaped, not transposed, to (E, T): rows of them are no expert's."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> ExpertChoice:
        scores_TE = self.logits(x_TH).softmax(-1)
        batch, length = ctx.batch_shape or (1, len(x_TH))
        room = min(length, math.ceil(self.top_k * length / self.num_experts))
        picked = [
            largest(one_SE.reshape(self.num_experts, length), room) + length * index
            for index, one_SE in enumerate(scores_TE.view(batch, length, self.num_experts))
        ]
        tokens_EC = torch.cat(picked, -1)
        weights_EC = scores_TE.T.gather(1, tokens_EC)
        return ExpertChoice(tokens_EC, weights_EC, len(x_TH), scores_TE=scores_TE)


def _unless_experts_score(subject: RouterSubject) -> str | None:
    if not isinstance(subject.first, ExpertChoice):
        return unless_tokens_are_chosen(subject)
    if choice_of(subject.first) is None:
        return "its routing carries no scores_TE or logits_TE to judge the choice by"
    return None


@law(
    "R25",
    "an expert takes its best tokens",
    formula="min over taken of scores[t, e] >= max over the rest of the sequence, for each e",
    source="expert choice, arXiv 2202.09368, equation 2",
    cases=inputs("gaussian", "zeros", "one_hot", "collapsed", "ascending"),
    broken=broken_subject(ReadsAcross),
    unless=_unless_experts_score,
)
def best_taken(subject: RouterSubject, case: Case) -> None:
    routing = subject.on(case)
    assert isinstance(routing, ExpertChoice)
    scores_TE = choice_of(routing)
    assert scores_TE is not None
    shape = (int(case.settings["batch"] or 0), int(case.settings["length"] or 0), -1)
    if subject.per_batch:
        shape = (1, shape[0] * shape[1], -1)
    if not scores_TE.numel():
        return
    scores_BSE = scores_TE.view(shape)
    taken_BSE = by_token(routing)["chosen"].view(shape) > 0
    lowest_BE = scores_BSE.masked_fill(~taken_BSE, float("inf")).amin(1)
    missed_BE = scores_BSE.masked_fill(taken_BSE, -float("inf")).amax(1)
    slack = 4 * coarsest_eps(routing) * float(scores_BSE.abs().max())
    bad_BE = (missed_BE > lowest_BE + slack) & taken_BSE.any(1)
    hold(
        ~bad_BE,
        f"expert {int(bad_BE.any(0).int().argmax())} leaves tokens of score "
        f"{missed_BE[bad_BE][:1].tolist()} and takes one of {lowest_BE[bad_BE][:1].tolist()}",
        tokens_EC=routing.tokens_EC,
        scores_TE=scores_TE,
    )


LAWS: tuple[Law[RouterSubject], ...] = (
    drops_when_full,
    within_room,
    ample_room,
    equal_load,
    best_taken,
)
