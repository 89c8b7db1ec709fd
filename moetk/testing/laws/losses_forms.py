"""Laws of the z-loss, mean_t (log sum_e exp l_te)^2, and of losses of variation over experts.

Letters: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from moetk.context import RouterContext
from moetk.equivalence.judge import floor
from moetk.losses import squared_variation
from moetk.routing import TokenChoice
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.losses_subject import OPERATIONS, LossSubject, Written, gradients
from moetk.testing.strategies.losses import (
    changed,
    context_of,
    routing_of,
    routings,
    take_rows,
)


def _no_z(subject: LossSubject) -> str | None:
    if subject.like == "z":
        return None
    return 'it is not the z-loss of flat logits; say like="z" if it is meant to be'


def _z_cases(subject: LossSubject) -> SearchStrategy[Case]:
    return routings(subject.num_experts, subject.top_k, lengths=(1, 2, 3, 5, 8), batches=(1, 2))


def _z(lse_T: Tensor) -> Tensor:
    return lse_T.square().sum() / max(len(lse_T), 1)


def _logits(routing: TokenChoice) -> Tensor:
    assert routing.logits_TE is not None
    return routing.logits_TE.float()


def _unsquared(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    return _logits(routing).logsumexp(-1).abs().mean()


def _factor(subject: LossSubject) -> Tensor:
    """The coefficient, or, without one, what makes the value at one token of zeros right."""
    if subject.coefficient is not None:
        return torch.tensor(subject.coefficient, dtype=torch.float64)
    one = torch.ones(subject.num_experts, subject.num_experts, dtype=torch.float64)
    flat = changed(subject.balanced(), logits_TE=one.float())
    return subject(flat).double() / _z(one.logsumexp(-1))


@law(
    "L28",
    "the mean of squared log-sums",
    formula="L = c / T sum_t (log sum_e exp l_te)^2; c (ln E)^2 at zero logits",
    source="arXiv 2202.08906, equation 5",
    cases=_z_cases,
    broken=lambda: LossSubject(Written(_unsquared, reads=("logits_TE",)), told="z"),
    unless=_no_z,
)
def z_value(subject: LossSubject, case: Case) -> None:
    want = _factor(subject) * _z(case["logits_TE"].double().logsumexp(-1))
    subject.hold_near(subject(case), want, "the value", case)


def _half_detached(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    lse_T = _logits(routing).logsumexp(-1)
    return (lse_T * lse_T.detach()).mean()


@law(
    "L29",
    "its gradient",
    formula="dL/dl_te = (2 c / T) lse_t p_te, p = softmax(l)",
    source="arXiv 2202.08906, equation 5, differentiated",
    cases=_z_cases,
    broken=lambda: LossSubject(Written(_half_detached, reads=("logits_TE",)), told="z"),
    unless=_no_z,
)
def z_gradient(subject: LossSubject, case: Case) -> None:
    routing = routing_of(case)
    value = subject.loss(routing, context_of(case))
    got_TE = gradients(value, routing)["logits_TE"]
    logits_TE = case["logits_TE"].double()
    tokens = len(logits_TE)
    lse_T1 = logits_TE.logsumexp(-1, keepdim=True)
    want_TE = 2 * _factor(subject) / tokens * lse_T1 * logits_TE.softmax(-1)
    largest = float(logits_TE.abs().amax()) if logits_TE.numel() else 0.0
    what = "the gradient of the logits"
    subject.hold_near(got_TE.double(), want_TE, what, case, tokens, exponent=largest)


def _of_the_best(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    """Shifted for safety by the largest logit, which is never added back."""
    logits_TE = _logits(routing)
    return _z((logits_TE - logits_TE.amax(-1, keepdim=True)).logsumexp(-1))


@law(
    "L30",
    "zero where the log-sum is",
    formula="l - lse(l): L = 0 and dL = 0; l - lse(l) + a: L = c a^2",
    source="lse(l + a) = lse(l) + a: it holds the size of logits, to which a softmax is blind",
    cases=_z_cases,
    broken=lambda: LossSubject(Written(_of_the_best, reads=("logits_TE",)), told="z"),
    unless=_no_z,
)
def z_shift(subject: LossSubject, case: Case) -> None:
    logits_TE = case["logits_TE"].double()
    for shift in (0.0, -2.0):
        shifted_TE = logits_TE - logits_TE.logsumexp(-1, keepdim=True) + shift
        moved = changed(case, logits_TE=shifted_TE.float())
        value, factor = subject(moved).double(), _factor(subject)
        # A log-sum is no better than the largest logit is rounded, however small it is itself.
        terms = OPERATIONS + moved["logits_TE"].numel()
        rounded = 2 * floor(torch.float32, terms) * (1 + shifted_TE.abs().max())
        bound = factor.abs() * (2 * abs(shift) + rounded) * rounded
        hold(
            (value - factor * shift**2).abs() <= bound,
            f"{float(value):.8g} at log-sums of {shift:g}, not {float(factor) * shift**2:.8g}",
        )


def _no_variation(subject: LossSubject) -> str | None:
    if subject.num_experts == subject.top_k:
        return "every expert takes every token"
    if subject.like == "variation":
        return None
    return (
        "it is not zero where experts are equal and more where they are not; say "
        'like="variation" if it is meant to be'
    )


def _importance(routing: TokenChoice) -> Tensor:
    ids = routing.experts_TK
    weights_TK = torch.where(ids < 0, 0, routing.weights_TK.float())
    sums_E = weights_TK.new_zeros(routing.num_experts)
    return sums_E.scatter_add(0, ids.clamp(min=0).flatten(), weights_TK.flatten())


def _of_the_used(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    """A variation over the experts that got something: a dead expert is none."""
    importance_E = _importance(routing)
    return squared_variation(importance_E[importance_E > 0])


@law(
    "L31",
    "zero in balance alone",
    formula="sums of all experts equal: L = 0; all tokens on K < E experts: L > 0",
    source="arXiv 1701.06538, equations 6-7",
    cases=lambda subject: routings(
        subject.num_experts,
        subject.top_k,
        patterns=("rotated",),
        scores=("softmax",),
        batches=(1, 2),
        lengths=(subject.num_experts,),
    ),
    broken=lambda: LossSubject(Written(_of_the_used, reads=()), told="variation"),
    unless=_no_variation,
)
def variation_zero(subject: LossSubject, case: Case) -> None:
    value = subject(case)
    subject.hold_near(value, torch.zeros_like(value), "with every expert's sum equal", case)
    first = int(case.settings["pick"] or 0) % subject.num_experts
    worst = subject(subject.collapsed(first))
    hold(
        worst > 0 and not subject.near(worst, torch.zeros_like(worst)),
        f"{float(worst):.4g} with every token on {subject.top_k} of {subject.num_experts} experts",
    )


def _variance(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    importance_E = _importance(routing)
    return (importance_E - importance_E.mean()).square().mean()


@law(
    "L32",
    "a share, not an amount",
    formula="L of the same tokens n times over = L",
    source="arXiv 1701.06538, equation 7: the variance is divided by the squared mean",
    cases=lambda subject: routings(
        subject.num_experts,
        subject.top_k,
        patterns=("spaced", "one-hot", "starved"),
        batches=(1, 2),
        lengths=(1, 2, 3, 5),
    ),
    broken=lambda: LossSubject(Written(_variance, reads=()), told="variation"),
    unless=_no_variation,
)
def variation_scale(subject: LossSubject, case: Case) -> None:
    times = 2 + int(case.settings["pick"] or 0) % 3
    more = take_rows(case, torch.arange(len(case["logits_TE"])).repeat(times), 1)
    subject.hold_near(subject(more), subject(case), f"with every token {times} times", more)


LAWS: tuple[Law[LossSubject], ...] = (
    z_value,
    z_gradient,
    z_shift,
    variation_zero,
    variation_scale,
)
