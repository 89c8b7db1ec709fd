"""A recorded choice, taken again: obeyed, and weighed by the live router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.errors import ReplayError
from moetk.kernels.selection import gather, largest
from moetk.routing import TokenChoice
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.routers_cases import (
    ScoredRouter,
    broken_subject,
    inputs,
    unless_experts_are_chosen,
)
from moetk.testing.laws.routers_compare import rounding
from moetk.testing.laws.routers_subject import RouterSubject, context_of
from moetk.testing.strategies.inputs import MODERATE


def _preferences(seed: int, batch: int, length: int, width: int) -> Mapping[str, Tensor]:
    """preference: a number for each token, from which the replayed ids are made."""
    generator = torch.Generator().manual_seed(seed + 4)
    return {"preference": torch.randint(1 << 16, (batch * length,), generator=generator)}


def _replayed_ids(subject: RouterSubject, case: Case) -> Tensor:
    """(T, K) distinct ids, other ones for each token."""
    steps_K = torch.arange(subject.top_k)
    return (case["preference"][:, None] + steps_K) % subject.num_experts


def _unless_it_follows(subject: RouterSubject) -> str | None:
    if not subject.chooses_experts:
        return unless_experts_are_chosen(subject)
    x_TH, ctx = subject.probe()
    ids_TK = torch.arange(subject.top_k).expand(len(x_TH), -1) % subject.num_experts
    try:
        subject.route(x_TH, replace(ctx, replay=ids_TK))
    except ReplayError:
        return "it refuses a replay with ReplayError, as it may"
    return None


class IgnoresTheReplay(ScoredRouter):
    """Never looks at ctx.replay: a replayed model routes as it likes, silently."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        experts_TK = largest(scores_TE, self.top_k)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK))


@law(
    "R35",
    "a replay is obeyed or refused",
    formula="ctx.replay = ids  =>  experts_TK = ids, or ReplayError",
    source="rollout routing replay, arXiv 2510.11370: a choice that drifts is another policy",
    cases=inputs(*MODERATE, training=None, added=_preferences),
    broken=broken_subject(IgnoresTheReplay),
    unless=_unless_it_follows,
)
def obeyed(subject: RouterSubject, case: Case) -> None:
    ids_TK = _replayed_ids(subject, case)
    ctx = context_of(case, replay=ids_TK)
    told = subject.route(case["x_TH"], ctx, training=bool(case.settings["training"]))
    assert isinstance(told, TokenChoice)
    hold(
        torch.equal(told.experts_TK, ids_TK),
        f"ctx.replay {ids_TK[:1].tolist()} became {told.experts_TK[:1].tolist()}: pass the choice "
        "through ctx.replayed(experts_TK)",
        replay_TK=ids_TK,
        experts_TK=told.experts_TK,
    )


class WeighsItsOwnChoice(ScoredRouter):
    """Takes the replayed ids, and the weights of what it would have chosen."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        own_TK = largest(scores_TE, self.top_k)
        return self.chosen(ctx.replayed(own_TK), gather(scores_TE, own_TK))


@law(
    "R36",
    "weights are those of the replayed experts",
    formula="replay of columns in reverse => weights in reverse; plain scores stay plain scores",
    source="replay takes the choice; weights and their gradient are the live router's",
    cases=inputs(*MODERATE, added=_preferences),
    broken=broken_subject(WeighsItsOwnChoice),
    unless=_unless_it_follows,
)
def weighed_anew(subject: RouterSubject, case: Case) -> None:
    plain = subject.on(case)
    assert isinstance(plain, TokenChoice)
    turned = subject.route(case["x_TH"], context_of(case, replay=plain.experts_TK.flip(-1)))
    assert isinstance(turned, TokenChoice)
    both_TK = torch.ones_like(plain.experts_TK, dtype=torch.bool)
    for routing, flipped in ((plain, False), (turned, True)):
        if routing.kept_TK is not None:
            both_TK = both_TK & (routing.kept_TK.flip(-1) if flipped else routing.kept_TK)
    off_TK = (turned.weights_TK.flip(-1).double() - plain.weights_TK.double()).abs()
    bad_T = (~(off_TK <= rounding(subject, plain, case)) & both_TK).any(-1)
    hold(
        ~bad_T,
        f"experts {plain.experts_TK[bad_T][:1].tolist()} weigh "
        f"{plain.weights_TK[bad_T][:1].tolist()}; replayed in reverse, "
        f"{turned.weights_TK[bad_T][:1].tolist()}",
        weights_TK=plain.weights_TK,
        turned_TK=turned.weights_TK,
    )
    _hold_plain_scores(subject, case, plain)


def _hold_plain_scores(subject: RouterSubject, case: Case, plain: TokenChoice) -> None:
    """Where a kept weight is the score itself, it is so of any replayed expert. Weights that sum to
    one may be rescaled scores that happened to sum to one before."""
    told = subject.route(case["x_TH"], context_of(case, replay=_replayed_ids(subject, case)))
    assert isinstance(told, TokenChoice)
    rescaled_T = (plain.weights_TK.double().sum(-1) - 1).abs() < 1e-3
    if plain.scores_TE is None or told.scores_TE is None or bool(rescaled_T.any()):
        return
    if bool(_is_score(plain, plain.scores_TE).all()):
        hold(
            _is_score(told, told.scores_TE),
            "weights are the chosen scores, but of replayed experts they are not",
            weights_TK=told.weights_TK,
            scores_TE=told.scores_TE,
        )


def _is_score(routing: TokenChoice, scores_TE: Tensor) -> Tensor:
    """(T, K) bool: the weight is the expert's score, or the choice was dropped."""
    same_TK = routing.weights_TK == gather(scores_TE, routing.experts_TK)
    return same_TK if routing.kept_TK is None else same_TK | ~routing.kept_TK


LAWS: tuple[Law[RouterSubject], ...] = (obeyed, weighed_anew)
