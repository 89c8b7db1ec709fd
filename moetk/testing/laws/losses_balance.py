"""Laws of balance losses, c * E * sum_e f_e P_e / K ("switch") or without / K ("hf").

f_e: the share of tokens that chose e, of all their choices or of their first. P_e: the mean of
their scores. Letters: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from moetk.context import RouterContext
from moetk.losses import LoadBalancingLoss, load_balancing
from moetk.routing import TokenChoice
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.losses_subject import LossSubject, Written, flat_gradient, gradients
from moetk.testing.strategies.losses import (
    build_case,
    changed,
    context_of,
    routing_through_softmax,
    routings,
)


def _no_balance(subject: LossSubject) -> str | None:
    if subject.num_experts == subject.top_k:
        return "every expert takes every token"
    if subject.like in ("switch", "hf"):
        return None
    return (
        f"at E={subject.num_experts}, K={subject.top_k} it does not go from balance to collapse "
        'as E sum f P does; say like="switch" or like="hf" if it is meant to'
    )


def _no_value(subject: LossSubject) -> str | None:
    if subject.coefficient is None:
        return "it has no number `coefficient` to compare its value with"
    return _no_balance(subject)


def _scores(routing: TokenChoice) -> Tensor:
    assert routing.scores_TE is not None
    return routing.scores_TE.float()


def _without_k(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    return routing.experts_TK.shape[1] * LoadBalancingLoss(1.0)(routing, ctx)


@law(
    "L21",
    "one in balance",
    formula="f and P uniform: L = c (switch), c K (hf)",
    source="arXiv 2101.03961, equation 4; transformers' load_balancing_loss_func leaves / K out",
    cases=lambda subject: st.integers(1, 4).map(lambda times: _repeated(subject.balanced(), times)),
    broken=lambda: LossSubject(Written(_without_k, coefficient=1.0, normalisation="switch")),
    unless=_no_value,
)
def in_balance(subject: LossSubject, case: Case) -> None:
    kind = f'a "{subject.like}" loss with coefficient {subject.coefficient:g}'
    if subject.setting is None:
        kind += " (check_loss's coefficient= says another)"
    subject.hold_near(subject(case), subject.in_balance, f"{kind}, in balance", case)


def _repeated(case: Case, times: int) -> Case:
    tensors = {name: torch.cat([tensor] * times) for name, tensor in case.tensors.items()}
    return Case(tensors, {**case.settings, "length": len(tensors["logits_TE"])})


@st.composite
def _half_uniform(draw: st.DrawFn, subject: LossSubject) -> Case:
    """Scores uniform with any choice, or counts uniform with tokens of any sharpness."""
    num_experts, top_k = subject.num_experts, subject.top_k
    if draw(st.booleans()):
        # Not sigmoids: as many write it, P is a mean of scores whose sum is taken to be one.
        drawn = draw(
            routings(num_experts, top_k, patterns=("equal",), scores=("softmax",), batches=(1,))
        )
        return drawn if len(drawn["logits_TE"]) else subject.balanced()
    return draw(_uniform_counts(subject))


def _uniform_counts(subject: LossSubject) -> SearchStrategy[Case]:
    """T = E: every expert is j-th choice of as many tokens, each of them as sharp as it likes."""

    def build(drawn: Case) -> Case:
        g = torch.Generator().manual_seed(int(drawn.settings["pick"] or 0))
        sharp_T1 = 0.2 + 3 * torch.rand(subject.num_experts, 1, generator=g, dtype=torch.float64)
        return build_case(sharp_T1 * drawn["logits_TE"].double(), subject.top_k)

    return routings(
        subject.num_experts,
        subject.top_k,
        patterns=("rotated",),
        scores=("softmax",),
        noisy=False,
        batches=(1,),
        lengths=(subject.num_experts,),
    ).map(build)


def _of_the_kept(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    """P of the chosen alone, rescaled to one: in balance nobody sees it."""
    chosen_TE = torch.zeros_like(_scores(routing)).scatter(1, routing.experts_TK.clamp(min=0), 1)
    return load_balancing(routing.experts_TK, _scores(routing) * chosen_TE)


@law(
    "L22",
    "uniform scores or uniform counts suffice",
    formula="f uniform or P uniform: L is what it is in balance",
    source="sum_e f_e P_e with either factor constant; P of all experts, never of the chosen",
    cases=lambda subject: _half_uniform(subject),
    broken=lambda: LossSubject(Written(_of_the_kept), told="switch"),
    unless=_no_balance,
)
def half_uniform(subject: LossSubject, case: Case) -> None:
    subject.hold_near(subject(case), subject.in_balance, "with one of f and P uniform", case)


def _smoothed(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    """One is added to every count, so that no share is zero."""
    return load_balancing(routing.experts_TK, _scores(routing), reduce=lambda counts: counts + 1)


@law(
    "L23",
    "a collapse costs E / K",
    formula="a share s of all score on the K experts that all tokens chose: L = (1 - s + s E / K) "
    "of what it is in balance",
    source="arXiv 2101.03961, equation 4, at its ends: 1 in balance, E at K = 1 in full collapse",
    cases=lambda subject: st.tuples(
        st.integers(0, subject.num_experts - 1), st.sampled_from([1.0, 0.75, 0.5, 0.125])
    ).map(lambda drawn: subject.collapsed(*drawn)),
    broken=lambda: LossSubject(Written(_smoothed), told="switch"),
    unless=_no_balance,
)
def collapse(subject: LossSubject, case: Case) -> None:
    share = float(case.settings["share"] or 0)
    want = subject.in_balance * (1 - share + share * subject.num_experts / subject.top_k)
    subject.hold_near(subject(case), want, f"with {share:.3g} of the score collapsed", case)


def _of_the_others(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    """The mask the wrong way round: True where an expert was not chosen."""
    chosen_TE = torch.zeros_like(_scores(routing)).scatter(1, routing.experts_TK.clamp(min=0), 1)
    spare = routing.num_experts - routing.experts_TK.shape[1]
    shares_E = (1 - chosen_TE).mean(0) / max(spare, 1)
    return routing.num_experts * (shares_E * _scores(routing).mean(0)).sum()


@law(
    "L24",
    "agreement costs",
    formula="f and P in the same order of experts: L >= its value in balance",
    source="Chebyshev's sum inequality; without that order L may be less: E = 2, p = .51, .51, "
    ".51, 0 gives 0.88",
    cases=lambda subject: routings(
        subject.num_experts,
        subject.top_k,
        patterns=("sorted",),
        scores=("softmax",),
        noisy=False,
        batches=(1,),
        lengths=(1, 2, 3, 5, 8),
    ),
    broken=lambda: LossSubject(Written(_of_the_others), told="switch"),
    unless=_no_balance,
)
def agreement(subject: LossSubject, case: Case) -> None:
    value = subject(case).double()
    at_least = subject.in_balance
    hold(
        value >= at_least or subject.near(value, at_least, reduction=case["logits_TE"].numel()),
        f"{float(value):.8g}, below {float(at_least):.8g} in balance, though all tokens agree",
    )


def _agreed(subject: LossSubject) -> SearchStrategy[Case]:
    return routings(
        subject.num_experts,
        subject.top_k,
        patterns=("spaced", "sorted", "gaussian"),
        scores=("softmax",),
        noisy=False,
        batches=(1,),
        lengths=(1, 2, 3, 5, 8),
    )


def _soft_counts(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    """Straight-through counts: the right value, and a gradient through f as well."""
    probs_TE = _scores(routing)
    chosen_TE = torch.zeros_like(probs_TE).scatter(1, routing.experts_TK, 1)
    chosen_TE = chosen_TE + probs_TE - probs_TE.detach()
    scale = routing.num_experts / routing.experts_TK.shape[1]
    return scale * (chosen_TE.mean(0) * probs_TE.mean(0)).sum()


@law(
    "L25",
    "counts are constants",
    formula="dL/dl_tj = (c E / T) p_tj (f_j - sum_e f_e p_te), f of all choices or of the first",
    source="arXiv 2101.03961, equations 4-6, differentiated with f held fixed",
    cases=_agreed,
    broken=lambda: LossSubject(Written(_soft_counts), told="switch"),
    unless=_no_balance,
)
def gradient(subject: LossSubject, case: Case) -> None:
    routing = routing_through_softmax(case)
    value = subject.loss(routing, context_of(case))
    got_TE = gradients(value, routing)["logits_TE"]
    probs_TE = case["logits_TE"].double().softmax(-1)
    num_tokens, num_experts = probs_TE.shape
    wanted = []
    for ids in (case["experts_TK"], case["experts_TK"][:, :1]):
        shares_E = torch.bincount(ids.flatten(), minlength=num_experts).double() / ids.numel()
        pull_TE = shares_E - (probs_TE @ shares_E)[:, None]
        wanted.append(subject.in_balance * num_experts / num_tokens * probs_TE * pull_TE)
    terms = case["logits_TE"].numel()
    hold(
        any(subject.near(got_TE, want, reduction=terms, counted=num_tokens) for want in wanted),
        "the gradient of the logits is not that of E sum f P with f held fixed",
        got=got_TE,
        want=wanted[0],
    )


def _denominator_fixed(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    """exp(l) over a sum that is taken for a constant: every logit is pushed down."""
    assert routing.logits_TE is not None
    logits_TE = routing.logits_TE.float()
    probs_TE = (logits_TE - logits_TE.logsumexp(-1, keepdim=True).detach()).exp()
    counts_E = torch.bincount(routing.experts_TK.flatten(), minlength=routing.num_experts)
    shares_E = counts_E / counts_E.sum().clamp(min=1)
    return routing.num_experts * (shares_E * probs_TE.mean(0)).sum()


@law(
    "L26",
    "balanced counts push nobody",
    formula="f uniform: dL/dl = 0, whatever the scores",
    source="the gradient above, with f_j = f for all j: sum_e p_te = 1",
    cases=_uniform_counts,
    broken=lambda: LossSubject(Written(_denominator_fixed, reads=("logits_TE",)), told="switch"),
    unless=_no_balance,
)
def no_push(subject: LossSubject, case: Case) -> None:
    routing = routing_through_softmax(case)
    got_TE = gradients(subject.loss(routing, context_of(case)), routing)["logits_TE"]
    tokens = len(got_TE)
    what = "the gradient of the logits at uniform counts"
    subject.hold_near(got_TE, torch.zeros_like(got_TE), what, case, tokens)


def _taught_by_the_kept(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    """The right value, and no gradient for a token that lost a choice."""
    kept_TK, scores_TE = routing.kept_TK, _scores(routing)
    if kept_TK is not None:
        scores_TE = torch.where(kept_TK.all(-1, keepdim=True), scores_TE, scores_TE.detach())
    return LoadBalancingLoss(1.0)(replace(routing, scores_TE=scores_TE), ctx)


@law(
    "L27",
    "what was dropped was wanted",
    formula="L(r with choices dropped for capacity) = L(r), gradient too",
    source="arXiv 2101.03961, appendix: f before capacity; after it, an overfull expert looks full",
    cases=lambda subject: routings(
        subject.num_experts,
        subject.top_k,
        patterns=("spaced", "one-hot", "starved"),
        batches=(1, 2, 3),
        lengths=(1, 2, 3, 5, 8),
    ),
    broken=lambda: LossSubject(Written(_taught_by_the_kept)),
    unless=_no_balance,
)
def dropped(subject: LossSubject, case: Case) -> None:
    g = torch.Generator().manual_seed(int(case.settings["pick"] or 0))
    kept_TK = torch.rand(case["experts_TK"].shape, generator=g) < 0.5
    weights_TK = case["weights_TK"] * kept_TK
    after = changed(case, kept_TK=kept_TK, weights_TK=weights_TK)
    value, grad = flat_gradient(subject, case)
    got, got_grad = flat_gradient(subject, after)
    subject.hold_near(got, value, "after a capacity", case)
    subject.hold_near(got_grad, grad, "the gradient after a capacity", case, len(grad))


LAWS: tuple[Law[LossSubject], ...] = (
    in_balance,
    half_uniform,
    collapse,
    agreement,
    gradient,
    no_push,
    dropped,
)
