"""What a routing says of its logits, scores and choice: that they belong together, and to it."""

from __future__ import annotations

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.kernels.selection import gather, top_k
from moetk.routing import TokenChoice
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.routers_cases import (
    EXPERTS_DIFFER,
    ScoredRouter,
    broken_subject,
    inputs,
    unless_experts_are_alike,
    unless_experts_are_chosen,
)
from moetk.testing.laws.routers_compare import coarsest_eps
from moetk.testing.laws.routers_subject import RouterSubject, context_of
from moetk.testing.strategies.inputs import MODERATE

MASKED = 1e3
"""A choice beyond this, or of exactly 0, is one of the values that mask an expert out."""


class LogitsOfOtherExperts(ScoredRouter):
    """Logits in the order of another checkpoint; scores and ids in this one's."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE, scores_TE = self.scored(x_TH)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        told = {"logits_TE": logits_TE.flip(-1), "scores_TE": scores_TE}
        return self.chosen(experts_TK, gather(scores_TE, experts_TK), **told)


def _unless_both(subject: RouterSubject) -> str | None:
    if (reason := unless_experts_are_alike(subject)) is not None:
        return reason
    first = subject.first
    if not isinstance(first, TokenChoice):
        return unless_experts_are_chosen(subject)
    if first.logits_TE is None or first.scores_TE is None:
        return "its routing does not carry both logits_TE and scores_TE"
    return None


@law(
    "R41",
    "scores rise with their logits",
    formula="logits_te > logits_tf  =>  scores_te >= scores_tf; logits are no softmax already",
    source="softmax, sigmoid, sqrt(softplus), relu: all rise; ST-MoE's z-loss reads the logits",
    cases=inputs(*MODERATE, least_length=1),
    broken=broken_subject(LogitsOfOtherExperts),
    unless=_unless_both,
)
def scores_rise(subject: RouterSubject, case: Case) -> None:
    routing = subject.on(case)
    assert isinstance(routing, TokenChoice)
    assert routing.logits_TE is not None and routing.scores_TE is not None
    logits_TE, scores_TE = routing.logits_TE.double(), routing.scores_TE.double()
    bad_T = _falls(logits_TE, scores_TE, 64 * coarsest_eps(routing)).flatten(1).any(-1)
    hold(
        ~bad_T,
        f"logits {logits_TE[bad_T][:1].tolist()} have scores {scores_TE[bad_T][:1].tolist()}; "
        f"{EXPERTS_DIFFER}",
        logits_TE=logits_TE,
        scores_TE=scores_TE,
    )
    shares = bool((logits_TE >= 0).all()) and bool(((logits_TE.sum(-1) - 1).abs() < 1e-6).all())
    hold(
        not (shares and torch.equal(logits_TE, scores_TE)) or subject.num_experts == 1,
        "logits_TE are the scores, and sum to 1: return what came before the softmax",
        logits_TE=logits_TE,
    )


def _falls(by_RN: Tensor, told_RN: Tensor, slack: float) -> Tensor:
    """(R, N, N) bool: where by[r, i] > by[r, j] and told[r, i] < told[r, j], beyond rounding."""
    above = by_RN[:, :, None] - by_RN[:, None, :] > slack * _size(by_RN)
    below = told_RN[:, :, None] - told_RN[:, None, :] < -slack * _size(told_RN)
    return above & below


def _size(x_RN: Tensor) -> Tensor:
    """(R, 1, 1): the largest of each row, what is not finite left out."""
    finite_RN = x_RN.masked_fill(~x_RN.isfinite(), 0)
    return finite_RN.abs().amax(-1)[:, None, None]


class ChoosesTheWorst(ScoredRouter):
    """topk of the negated scores, as where distances were meant; says so in choice_TE."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        experts_TK = top_k(-scores_TE, self.top_k, ctx)
        told = {"scores_TE": scores_TE, "choice_TE": -scores_TE}
        return self.chosen(experts_TK, gather(scores_TE, experts_TK), **told)


def _unless_choice_and_scores(subject: RouterSubject) -> str | None:
    if (reason := unless_experts_are_alike(subject)) is not None:
        return reason
    first = subject.first
    if not isinstance(first, TokenChoice):
        return unless_experts_are_chosen(subject)
    if first.choice_TE is None or first.scores_TE is None:
        return "its routing does not carry both choice_TE and scores_TE"
    return None if subject.choice_reads_x else "its choice does not read x"


@law(
    "R42",
    "the choice follows the scores",
    formula="s_te > s_tf => c_te - b_e >= c_tf - b_f for all t, or s_te > s_ue => c_te >= c_ue",
    source="DeepSeek-V3, arXiv 2412.19437, equation 16: what chooses is the score and a bias",
    cases=inputs("gaussian", "ascending", least_length=5),
    broken=broken_subject(ChoosesTheWorst),
    unless=_unless_choice_and_scores,
)
def choice_follows(subject: RouterSubject, case: Case) -> None:
    routing = subject.on(case)
    assert isinstance(routing, TokenChoice)
    assert routing.choice_TE is not None and routing.scores_TE is not None
    choice_TE, scores_TE = routing.choice_TE.double(), routing.scores_TE.double()
    live_TE = choice_TE.isfinite() & (choice_TE != 0) & (choice_TE.abs() < MASKED)
    # NaN is neither above nor below: what is masked out is compared with nothing.
    choice_TE = choice_TE.masked_fill(~live_TE, float("nan"))
    slack = 64 * coarsest_eps(routing)
    bias_E = subject.bias.double() if subject.has_choice_bias else torch.zeros(())
    in_token = _falls(scores_TE, choice_TE - bias_E, slack)
    # A bias of another name, or an expert with a rule of its own: the same for all tokens.
    in_expert = _falls(scores_TE.T, choice_TE.T, slack)
    bad_T = in_token.flatten(1).any(-1)
    hold(
        not (bool(bad_T.any()) and bool(in_expert.any())),
        f"scores {scores_TE[bad_T][:1].tolist()} have choice scores "
        f"{choice_TE[bad_T][:1].tolist()}: the choice falls where the scores rise",
        scores_TE=scores_TE,
        choice_TE=routing.choice_TE,
    )


class ReturnsWithoutGraph(ScoredRouter):
    """Detaches its logits and scores, as a log would: the losses that read them move nothing."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE, scores_TE = self.scored(x_TH)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        told = {"logits_TE": logits_TE.detach(), "scores_TE": scores_TE.detach()}
        return self.chosen(experts_TK, gather(scores_TE, experts_TK), **told)


def _unless_losses_read(subject: RouterSubject) -> str | None:
    first = subject.first
    if not isinstance(first, TokenChoice):
        return unless_experts_are_chosen(subject)
    if first.logits_TE is None and first.scores_TE is None:
        return "its routing carries neither logits_TE nor scores_TE"
    if not subject.trained(subject.copy_at(True)):
        return "it has no parameters that require a gradient"
    return None


@law(
    "R43",
    "what losses read has a graph",
    formula="weights depend on w  =>  logits_TE and scores_TE, where returned, do so in training",
    source="Switch, arXiv 2101.03961, equation 4: the loss's gradient goes through the scores",
    cases=inputs("gaussian", least_length=1, training=True),
    broken=broken_subject(ReturnsWithoutGraph),
    unless=_unless_losses_read,
)
def graphs_stay(subject: RouterSubject, case: Case) -> None:
    routing = subject.copy_at(True)(case["x_TH"].to(subject.dtype), context_of(case))
    assert isinstance(routing, TokenChoice)
    if not routing.weights_TK.requires_grad:
        return
    for name in ("logits_TE", "scores_TE"):
        tensor = getattr(routing, name)
        hold(
            tensor is None or tensor.requires_grad,
            f"{name} has no graph to the parameters, the weights have: a loss that reads it moves "
            "nothing. Return it with its graph, or leave it out",
        )


LAWS: tuple[Law[RouterSubject], ...] = (scores_rise, choice_follows, graphs_stay)
