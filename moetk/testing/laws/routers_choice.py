"""Which experts are chosen: the best, best first, within the groups, and whoever is asked."""

from __future__ import annotations

from collections.abc import Mapping

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
from moetk.testing.laws.routers_compare import choice_of, coarsest_eps
from moetk.testing.laws.routers_subject import CHOICE_BIAS, RouterSubject, context_of


def _unless_scores_choose(subject: RouterSubject) -> str | None:
    if not subject.chooses_experts:
        return unless_experts_are_chosen(subject)
    if not subject.choice_reads_x:
        return "its choice does not read x, so that no score decides"
    first = subject.first
    assert isinstance(first, TokenChoice)
    if choice_of(first) is None:
        return "its routing carries no choice_TE, scores_TE or logits_TE to judge the choice by"
    if first.choice_TE is None and subject.has_choice_bias:
        return f"it has an {CHOICE_BIAS} and leaves choice_TE out: return it to be judged"
    return None


def _chosen_and_scores(subject: RouterSubject, case: Case) -> tuple[TokenChoice, Tensor]:
    routing = subject.on(case)
    assert isinstance(routing, TokenChoice)
    choice_TE = choice_of(routing)
    assert choice_TE is not None
    return routing, choice_TE


def _slack(routing: TokenChoice, choice_TE: Tensor) -> Tensor:
    """(T, 1): what one rounding of exp and one of a quotient may turn round."""
    finite_TE = choice_TE.masked_fill(~choice_TE.isfinite(), 0)
    return 4 * coarsest_eps(routing) * finite_TE.abs().amax(-1, keepdim=True)


_HINT = "; where something else than scores_TE chose (groups, a bias), return it as choice_TE"


class SortsById(ScoredRouter):
    """The K best in the order of their ids, as a mask that is read off left to right gives them."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        experts_TK = ctx.replayed(top_k(scores_TE, self.top_k, ctx).sort(-1).values)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK), scores_TE=scores_TE)


@law(
    "R13",
    "columns are in descending choice score",
    formula="choice[experts_tk] >= choice[experts_t(k+1)]",
    source="moetk.routing: first choices are served before second ones, GShard, arXiv 2006.16668",
    cases=inputs(),
    broken=broken_subject(SortsById),
    unless=_unless_scores_choose,
)
def descending(subject: RouterSubject, case: Case) -> None:
    routing, choice_TE = _chosen_and_scores(subject, case)
    chosen_TK = choice_TE.gather(1, routing.experts_TK.clamp(min=0))
    both_TK = (routing.experts_TK[:, 1:] >= 0) & (routing.experts_TK[:, :-1] >= 0)
    rises_TK = chosen_TK[:, 1:] > chosen_TK[:, :-1] + _slack(routing, choice_TE)
    bad_T = (rises_TK & both_TK).any(-1)
    hold(
        ~bad_T,
        f"experts {routing.experts_TK[bad_T][:1].tolist()} have choice scores "
        f"{chosen_TK[bad_T][:1].tolist()}" + (_HINT if routing.choice_TE is None else ""),
        experts_TK=routing.experts_TK,
        choice_TE=choice_TE,
    )


class SoftmaxOverTokens(ScoredRouter):
    """A softmax along the wrong axis chooses; the scores that it returns are right."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.logits(x_TH)
        scores_TE = logits_TE.softmax(-1)
        experts_TK = top_k(logits_TE.softmax(0), self.top_k, ctx)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK), scores_TE=scores_TE)


@law(
    "R14",
    "the best are chosen",
    formula="min over chosen of choice >= max over not chosen of choice",
    source="Shazeer et al., arXiv 1701.06538, equation 5 (KeepTopK)",
    cases=inputs(),
    broken=broken_subject(SoftmaxOverTokens),
    unless=_unless_scores_choose,
)
def best_chosen(subject: RouterSubject, case: Case) -> None:
    routing, choice_TE = _chosen_and_scores(subject, case)
    used_TK = routing.experts_TK >= 0
    spare = choice_TE.shape[1]
    ids_TK = routing.experts_TK.masked_fill(~used_TK, spare)
    chosen_TE = torch.zeros(len(ids_TK), spare + 1, dtype=torch.bool).scatter_(1, ids_TK, True)
    chosen_TE = chosen_TE[:, :-1]
    lowest_T = choice_TE.masked_fill(~chosen_TE, float("inf")).amin(-1)
    missed_T = choice_TE.masked_fill(chosen_TE, -float("inf")).amax(-1)
    bad_T = (missed_T > lowest_T + _slack(routing, choice_TE)[:, 0]) & chosen_TE.any(-1)
    hold(
        ~bad_T,
        f"experts {routing.experts_TK[bad_T][:1].tolist()} are chosen from "
        f"{choice_TE[bad_T][:1].tolist()}" + (_HINT if routing.choice_TE is None else ""),
        experts_TK=routing.experts_TK,
        choice_TE=choice_TE,
    )


class MasksWithZero(ScoredRouter):
    """Groups out of reach are multiplied by 0: where scores plus bias are negative, 0 wins."""

    groups, top_groups = 4, 2

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, choice_bias=True)

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        biased_TE = self.with_choice_bias(scores_TE)
        within_TE = in_best_groups(biased_TE, self.groups, self.top_groups).isfinite()
        choice_TE = biased_TE * within_TE
        experts_TK = top_k(choice_TE, self.top_k, ctx)
        weights_TK = gather(scores_TE, experts_TK)
        return self.chosen(experts_TK, weights_TK, scores_TE=scores_TE, choice_TE=choice_TE)


def _biased(seed: int, batch: int, length: int, width: int) -> Mapping[str, Tensor]:
    """offset: what the choice bias is moved by, on both sides of zero."""
    return {"offset": torch.tensor([-0.5, -3.0, 0.0, 1.0][seed % 4], dtype=torch.float64)}


def unless_groups(subject: RouterSubject) -> str | None:
    found = subject.groups
    if found is None:
        return "it declares no groups and top_groups (or n_group and topk_group)"
    if not subject.chooses_experts:
        return unless_experts_are_chosen(subject)
    return None if found[1] < found[0] else "it may use all of its groups"


@law(
    "R15",
    "choices stay within top_groups groups",
    formula="|{experts_tk // (E / groups)}| <= top_groups, for scores and biases of any sign",
    source="DeepSeek-V3, arXiv 2412.19437, section 2.1.2; a mask of 0 is not minus infinity",
    cases=inputs("gaussian", "zeros", "collapsed", "tied_pairs", added=_biased),
    broken=broken_subject(MasksWithZero, 4, 8, 3),
    unless=unless_groups,
)
def within_groups(subject: RouterSubject, case: Case) -> None:
    found = subject.groups
    assert found is not None
    router = subject.copy_at(False)
    if subject.has_choice_bias:
        router = subject.with_bias(subject.bias + case["offset"])
    with torch.no_grad():
        routing = router(case["x_TH"].to(subject.dtype), context_of(case))
    assert isinstance(routing, TokenChoice)
    size = subject.num_experts // found[0]
    for experts_K in routing.experts_TK.tolist():
        used = {expert // size for expert in experts_K if expert >= 0}
        hold(
            len(used) <= found[1],
            f"experts {experts_K} lie in groups {sorted(used)}, but top_groups={found[1]}",
            experts_TK=routing.experts_TK,
        )


class ChoosesInHalfPrecision(ScoredRouter):
    """Scores are rounded to bfloat16 before the choice: what differs becomes a tie."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE, scores_TE = self.scored(x_TH)
        choice_TE = scores_TE.bfloat16()
        experts_TK = top_k(choice_TE, self.top_k, ctx)
        weights_TK = gather(scores_TE, experts_TK)
        return self.chosen(experts_TK, weights_TK, logits_TE=logits_TE, scores_TE=scores_TE)


def _unless_logits_scale(subject: RouterSubject) -> str | None:
    if (reason := _unless_scores_choose(subject)) is not None:
        return reason
    first = subject.first
    assert isinstance(first, TokenChoice)
    if first.logits_TE is None:
        return "its routing carries no logits_TE"
    if first.choice_TE is not None and not _rises_with(first.choice_TE, first.logits_TE):
        return "its choice is not the order of its logits (a bias or groups)"
    if bool((first.experts_TK < 0).any()):
        return "how many it chooses depends on the scores"
    x_TH, ctx = subject.probe()
    twice = subject.route(2 * x_TH, ctx)
    assert isinstance(twice, TokenChoice) and twice.logits_TE is not None
    if not torch.equal(twice.logits_TE, 2 * first.logits_TE):
        return "its logits are not linear in x"
    return None


def _rises_with(choice_TE: Tensor, logits_TE: Tensor) -> bool:
    order_TE = logits_TE.argsort(-1)
    return bool((choice_TE.gather(1, order_TE).diff(dim=-1) >= 0).all())


@law(
    "R16",
    "a temperature changes no choice",
    formula="the experts of 2 x are the experts of x, where logits are linear in x",
    source="top-k of an increasing function; in low precision, distinct scores become ties",
    cases=inputs("gaussian", "collapsed"),
    broken=broken_subject(ChoosesInHalfPrecision, 4, 64, 8),
    unless=_unless_logits_scale,
)
def temperature(subject: RouterSubject, case: Case) -> None:
    plain = subject.on(case)
    scaled = subject.route(2 * case["x_TH"], context_of(case))
    assert isinstance(plain, TokenChoice) and isinstance(scaled, TokenChoice)
    clear_T = _clear(plain, subject) & _clear(scaled, subject)
    moved_T = (plain.experts_TK.sort(-1).values != scaled.experts_TK.sort(-1).values).any(-1)
    hold(
        ~(moved_T & clear_T),
        f"experts {plain.experts_TK[moved_T][:1].tolist()} of x became "
        f"{scaled.experts_TK[moved_T][:1].tolist()} of 2 x",
        experts_TK=plain.experts_TK,
        scaled_TK=scaled.experts_TK,
    )


def _clear(routing: TokenChoice, subject: RouterSubject) -> Tensor:
    """(T,) bool: the border lies where logits, in the router's dtype, do not tie, and no score of
    that dtype has run out of range."""
    assert routing.logits_TE is not None
    ordered_TE = routing.logits_TE.double().sort(-1, descending=True).values
    k, eps = routing.experts_TK.shape[1], coarsest_eps(routing)
    span_T = ordered_TE[:, 0] - ordered_TE[:, -1]
    in_range_T = span_T.maximum(ordered_TE.abs().amax(-1)) < 8
    if k == ordered_TE.shape[1]:
        return in_range_T
    gap_T = ordered_TE[:, k - 1] - ordered_TE[:, k]
    # A sigmoid of 8 has a slope of 3e-4: the gap has to be seen through that.
    return in_range_T & (gap_T > 64 * eps * 1e4)


LAWS: tuple[Law[RouterSubject], ...] = (descending, best_chosen, within_groups, temperature)
