"""What raises an expert's chance: its own bias, and being in a better group."""

from __future__ import annotations

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.kernels.selection import gather, in_best_groups, top_k
from moetk.routing import TokenChoice
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.routers_cases import (
    ScoredRouter,
    broken_subject,
    inputs,
    unless_experts_are_chosen,
)
from moetk.testing.laws.routers_choice import unless_groups
from moetk.testing.laws.routers_compare import coarsest_eps, near_ties
from moetk.testing.laws.routers_subject import CHOICE_BIAS, RouterSubject, context_of
from moetk.testing.laws.routers_symmetry import unless_choice_bias
from moetk.testing.strategies.inputs import MODERATE


class SubtractsTheBias(ScoredRouter):
    """Scores minus the bias: the controller that raises it drives tokens away."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, choice_bias=True)

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        choice_TE = scores_TE - self.get_buffer(CHOICE_BIAS)
        experts_TK = top_k(choice_TE, self.top_k, ctx)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK), choice_TE=choice_TE)


def _unless_bias_chooses(subject: RouterSubject) -> str | None:
    if (reason := unless_choice_bias(subject)) is not None:
        return reason
    return None if subject.choice_reads_x else "its choice does not read x: no score, no bias"


@law(
    "R44",
    "a higher choice bias wins its expert tokens",
    formula="b_e rises  =>  no token leaves expert e; b_e = 10000  =>  all tokens choose it",
    source="Loss-free balancing, arXiv 2408.15664, algorithm 1: b_e rises where e has too few",
    cases=inputs(*MODERATE, least_length=1),
    broken=broken_subject(SubtractsTheBias),
    unless=_unless_bias_chooses,
)
def bias_attracts(subject: RouterSubject, case: Case) -> None:
    plain = subject.on(case)
    assert isinstance(plain, TokenChoice)
    expert = int(case.settings["seed"] or 0) % subject.num_experts
    before_T = (plain.experts_TK == expert).any(-1)
    for rise in (0.1, 1.0, 1e4):
        bias_E = subject.bias
        bias_E[expert] += rise
        with torch.no_grad():
            raised = subject.with_bias(bias_E)(case["x_TH"].to(subject.dtype), context_of(case))
        assert isinstance(raised, TokenChoice)
        after_T = (raised.experts_TK == expert).any(-1)
        wanted_T = (
            torch.ones_like(before_T)
            if rise == 1e4
            else before_T & ~near_ties(plain) & ~near_ties(raised)
        )
        hold(
            after_T | ~wanted_T,
            f"{int(after_T.sum())} tokens choose expert {expert} with {CHOICE_BIAS}[{expert}] "
            f"raised by {rise}, {int(before_T.sum())} of {len(before_T)} did before",
            experts_TK=plain.experts_TK,
            raised_TK=raised.experts_TK,
        )


class KeepsTheWorstGroups(ScoredRouter):
    """The mask of the groups is turned round: what should be masked out is kept."""

    groups, top_groups = 4, 2

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        masked_TE = in_best_groups(scores_TE, self.groups, self.top_groups).isfinite()
        choice_TE = scores_TE.masked_fill(masked_TE, -float("inf"))
        experts_TK = top_k(choice_TE, self.top_k, ctx)
        told = {"scores_TE": scores_TE, "choice_TE": choice_TE}
        return self.chosen(experts_TK, gather(scores_TE, experts_TK), **told)


def _biased(subject: RouterSubject, routing: TokenChoice) -> Tensor:
    """(T, E) float64: what chooses before groups are masked, if scores and this bias do."""
    assert routing.scores_TE is not None
    scores_TE = routing.scores_TE.double()
    return scores_TE + subject.bias.double() if subject.has_choice_bias else scores_TE


def _unless_groups_score(subject: RouterSubject) -> str | None:
    if (reason := unless_groups(subject)) is not None:
        return reason
    first = subject.first
    if not isinstance(first, TokenChoice):
        return unless_experts_are_chosen(subject)
    if first.scores_TE is None or first.choice_TE is None:
        return "its routing does not carry both scores_TE and choice_TE"
    choice_TE, biased_TE = first.choice_TE.double(), _biased(subject, first)
    live_TE = choice_TE.isfinite() & (choice_TE != 0)
    off_TE = (choice_TE - biased_TE).abs() > 64 * coarsest_eps(first) * (1 + biased_TE.abs())
    if bool((off_TE & live_TE).any()):
        return f"its choice is not the scores and {CHOICE_BIAS}, so that no group has a known rank"
    return None


@law(
    "R45",
    "the best groups are kept",
    formula="sorted(group g) > sorted(group h), elementwise  =>  h is used only where g is",
    source="DeepSeek-V3, section 2.1.2: by two best scores; DeepSeek-V2, arXiv 2405.04434: by one",
    cases=inputs("gaussian", "ascending", least_length=1),
    broken=broken_subject(KeepsTheWorstGroups, 4, 8, 2),
    unless=_unless_groups_score,
)
def best_groups(subject: RouterSubject, case: Case) -> None:
    routing, found = subject.on(case), subject.groups
    assert isinstance(routing, TokenChoice) and found is not None
    num_tokens, num_groups = len(routing.experts_TK), found[0]
    size = subject.num_experts // num_groups
    # The last column is for unused slots.
    used_TG = torch.zeros(num_tokens, num_groups + 1, dtype=torch.bool)
    used_TG.scatter_(1, (routing.experts_TK // size) % (num_groups + 1), True)
    used_TG = used_TG[:, :-1]
    best_TGM = _biased(subject, routing).view(num_tokens, num_groups, size).sort(-1).values
    slack = 64 * coarsest_eps(routing) * (1 + best_TGM.abs().amax())
    better_TGG = (best_TGM[:, :, None] > best_TGM[:, None, :] + slack).all(-1)
    bad_T = (better_TGG & ~used_TG[:, :, None] & used_TG[:, None, :]).flatten(1).any(-1)
    hold(
        ~bad_T,
        f"experts {routing.experts_TK[bad_T][:1].tolist()} are chosen, and none of a group whose "
        f"scores are all better: {best_TGM[bad_T][:1].tolist()}",
        experts_TK=routing.experts_TK,
        scores_TE=_biased(subject, routing),
    )


LAWS: tuple[Law[RouterSubject], ...] = (bias_attracts, best_groups)
