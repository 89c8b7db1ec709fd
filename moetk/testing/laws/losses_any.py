"""Laws of every loss: what it returns, what its gradient is, what it leaves alone.

Letters: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from moetk.context import RouterContext
from moetk.equivalence.judge import floor
from moetk.losses import LoadBalancingLoss
from moetk.routing import TokenChoice, keep_fields
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.losses_subject import (
    OPERATIONS,
    LossSubject,
    Written,
    field_of,
    flat_gradient,
    gradients,
    with_setting,
)
from moetk.testing.strategies.losses import (
    FIELDS,
    changed,
    context_of,
    relabel,
    routing_of,
    routing_through_softmax,
    routings,
    take_rows,
)


def _any(subject: LossSubject) -> SearchStrategy[Case]:
    masks = ("absent", "padding", "scattered", "none")
    return routings(subject.num_experts, subject.top_k, masks=masks, labels=masks, unused=True)


def _some(subject: LossSubject) -> SearchStrategy[Case]:
    """Tokens that have a margin, so that no rounding decides a choice."""
    return routings(
        subject.num_experts,
        subject.top_k,
        patterns=("spaced",),
        batches=(1, 2, 3),
        lengths=(1, 2, 3, 5, 8),
    )


def _entropy(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    probs_TE = routing.logits_TE.float().softmax(-1)  # type: ignore[union-attr]
    return (probs_TE * probs_TE.log()).sum() / max(len(probs_TE), 1)


@law(
    "L1",
    "a finite scalar in fp32",
    formula="L is a finite number; its dtype is fp32, or fp64 where the routing is fp64",
    source="arXiv 2101.03961, section 2.4 (selective precision); x log x is 0 at 0, not NaN",
    cases=lambda subject: (
        _any(subject) | routings(subject.num_experts, subject.top_k, patterns=("huge",))
    ),
    # 0 * log 0, where a softmax has underflowed
    broken=lambda: LossSubject(Written(_entropy, reads=("logits_TE",))),
)
def scalar(subject: LossSubject, case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        value = subject.loss(routing_of(case, dtype), context_of(case))
        hold(isinstance(value, Tensor), f"returned {type(value).__name__}, not a tensor")
        hold(value.ndim == 0, f"returned {tuple(value.shape)}, not a scalar")
        hold(
            value.dtype in (torch.float32, dtype),
            f"returned {value.dtype} for a routing in {dtype}; a loss is torch.float32",
        )
        hold(value.isfinite(), f"returned {value.item()}", value=value.detach())


def _std_over_mean(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    weights_TK = routing.weights_TK.float()
    importance_E = weights_TK.new_zeros(routing.num_experts).scatter_add(
        0, routing.experts_TK.clamp(min=0).flatten(), weights_TK.flatten()
    )
    return (importance_E.var(unbiased=False).sqrt() / importance_E.mean().clamp(min=1e-9)).square()


@law(
    "L2",
    "a finite gradient",
    formula="dL/dx is finite for every field x",
    source="Var / Mean^2, not (std / mean)^2, whose gradient is NaN in balance: vmoe routing.py",
    cases=lambda subject: st.just(subject.balanced()) | _any(subject),
    broken=lambda: LossSubject(Written(_std_over_mean, reads=())),
)
def finite_gradient(subject: LossSubject, case: Case) -> None:
    routing = routing_of(case)
    for name, grad in gradients(subject.loss(routing, context_of(case)), routing).items():
        hold(grad.isfinite(), f"the gradient of {name} has NaN or infinity", grad=grad)


class _Weighted:
    """A Switch loss that is weighed in itself, and again where the losses are summed up."""

    reads = ("scores_TE",)

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def __call__(self, routing: TokenChoice, ctx: RouterContext) -> Tensor:
        return self.coefficient * LoadBalancingLoss(self.coefficient)(routing, ctx)


def _no_coefficient(subject: LossSubject) -> str | None:
    return "it has no number `coefficient`" if subject.setting is None else None


@law(
    "L3",
    "the coefficient is a factor, once",
    formula="L(2 c) = 2 L(c), gradient too; L(0) = 0",
    source="arXiv 2101.03961, equation 4: alpha N sum f P",
    cases=_any,
    broken=lambda: LossSubject(_Weighted(0.5)),
    unless=_no_coefficient,
)
def coefficient(subject: LossSubject, case: Case) -> None:
    assert subject.setting is not None
    value, grad = flat_gradient(subject, case)
    for factor in (2.0, 0.0):
        loss = with_setting(subject.loss, "coefficient", factor * subject.setting)
        got, got_grad = flat_gradient(subject.with_loss(loss), case)
        what = f"at {factor:g} times the coefficient"
        subject.hold_near(got, factor * value, f"the value {what}", case)
        subject.hold_near(got_grad, factor * grad, f"the gradient {what}", case, len(grad))


def _dropping_at_random(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    thinned_T = torch.rand(len(routing.experts_TK)) < 0.9
    return LoadBalancingLoss(1.0)(routing, RouterContext(label_mask=thinned_T))


@law(
    "L4",
    "the same routing, the same loss",
    formula="L(r) = L(r), to the bit, whatever was called before",
    source="activation checkpointing calls a loss again, and its gradient must be of the value",
    cases=_any,
    broken=lambda: LossSubject(Written(_dropping_at_random)),
)
def repeatable(subject: LossSubject, case: Case) -> None:
    first, second = flat_gradient(subject, case), flat_gradient(subject, case)
    hold(torch.equal(first[0], second[0]), f"{float(first[0])!r}, then {float(second[0])!r}")
    hold(torch.equal(first[1], second[1]), "the second call has another gradient")


def _shifts_in_place(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    assert routing.logits_TE is not None
    logits_TE = routing.logits_TE.detach()
    logits_TE.sub_(logits_TE.amax(-1, keepdim=True))
    return routing.logits_TE.float().logsumexp(-1).square().sum()


@law(
    "L5",
    "the routing and the context stay as they are",
    formula="every tensor of r and ctx, and the state of torch's random numbers, is, to the bit, "
    "what it was before the call",
    source="transformers, nllb_moe Top2Router: noise added in place reaches later losses",
    cases=_any,
    broken=lambda: LossSubject(Written(_shifts_in_place, reads=("logits_TE",))),
)
def leaves_alone(subject: LossSubject, case: Case) -> None:
    copies = Case({name: tensor.clone() for name, tensor in case.tensors.items()}, case.settings)
    routing, drawn = routing_of(copies), torch.get_rng_state()
    subject.loss(routing, context_of(copies))
    hold(
        torch.equal(torch.get_rng_state(), drawn),
        "it draws random numbers: what is drawn after it, dropout say, is another",
    )
    after = {**copies.tensors, **{name: field_of(routing, name) for name in FIELDS}}
    for name, tensor in case.tensors.items():
        hold(
            torch.equal(after[name].detach(), tensor),
            f"{name} was changed in place",
            now=after[name],
        )


def _summed_in_bf16(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    logits_TE = routing.logits_TE
    assert logits_TE is not None
    return logits_TE.logsumexp(-1).square().mean().float() if len(logits_TE) else logits_TE.sum()


@law(
    "L6",
    "computed in fp32 whatever the routing's dtype",
    formula="L(r in bf16 or fp16) = L(the same values in fp32) within the floor of its sums",
    source="arXiv 2101.03961, section 2.4; arXiv 2202.08906, section 3.4 (rounding in the router)",
    cases=lambda subject: st.tuples(
        _some(subject), st.sampled_from([torch.bfloat16, torch.float16])
    ).map(lambda drawn: changed(drawn[0], **{n: drawn[0][n].to(drawn[1]) for n in FIELDS})),
    broken=lambda: LossSubject(Written(_summed_in_bf16, reads=("logits_TE",))),
)
def low_precision(subject: LossSubject, case: Case) -> None:
    got = subject.loss(routing_of(case), context_of(case))
    want = subject.loss(routing_of(case, torch.float32), context_of(case))
    subject.hold_near(got, want, f"the value in {case['logits_TE'].dtype}", case)


def _whichever_is_there(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    assert routing.logits_TE is not None
    scores_TE = routing.scores_TE
    if scores_TE is None:
        scores_TE = routing.logits_TE.softmax(-1)
    return scores_TE.float().square().sum()


def _says_nothing(subject: LossSubject) -> str | None:
    if getattr(subject.loss, "reads", None) is None:
        return "it does not say what it `reads`, so every field is kept for it"
    return None


@law(
    "L7",
    "it reads what it says, and nothing else",
    formula="L(r without the fields outside `reads`) = L(r), to the bit",
    source="a layer frees the (T, E) fields that no attached loss says it reads",
    cases=_any,
    # with softmax scores nobody would notice
    broken=lambda: LossSubject(Written(_whichever_is_there, reads=("logits_TE",))),
    unless=_says_nothing,
)
def reads(subject: LossSubject, case: Case) -> None:
    whole = routing_of(case)
    left = keep_fields(whole, frozenset(subject.loss.reads))
    got, want = subject.loss(left, context_of(case)), subject.loss(whole, context_of(case))
    told = f"{got.item()!r} without the other fields, {want.item()!r} with"
    hold(torch.equal(got, want), told)


def _total_detached(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    assert routing.scores_TE is not None
    scores_TE = routing.scores_TE.float()
    probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True).detach()
    return probs_TE.square().sum(-1).mean()


@law(
    "L8",
    "the gradient is the slope",
    formula="<dL/dx, v> = lim (L(x + h v) - L(x - h v)) / 2h, the choice held fixed",
    source="central differences at h and 2h, extrapolated; counts and choices are constants",
    cases=_some,
    # the sum in the denominator is taken for a constant
    broken=lambda: LossSubject(Written(_total_detached)),
)
def slope(subject: LossSubject, case: Case) -> None:
    routing, ctx = routing_of(case, torch.float64), context_of(case)
    value = subject.loss(routing, ctx)
    found = gradients(value, routing)
    g = torch.Generator().manual_seed(int(case.settings["pick"] or 0))
    # Relative, and at most 1: scores stay positive, and "spaced" choices stay chosen.
    ways = {
        name: (2 * torch.rand(leaf.shape, generator=g) - 1)
        * field_of(routing, name).detach().clamp(-1, 1)
        for name, leaf in found.items()
    }

    def at(h: float) -> Tensor:
        moved = {name: case[name].double() + h * way for name, way in ways.items()}
        return subject.loss(routing_of(changed(case, **moved)), ctx).detach().double()

    h = 2.0**-7
    near, far = ((at(step) - at(-step)) / (2 * step) for step in (h, 2 * h))
    extrapolated, truncated = (4 * near - far) / 3, float((near - far).abs())
    got = torch.stack([(found[name] * way).sum() for name, way in ways.items()]).sum()
    terms = OPERATIONS + case["logits_TE"].numel()
    rounded = 2 * floor(value.dtype, terms) * max(subject.scale, abs(value.item())) / h
    hold(
        (got - extrapolated).abs() <= truncated + rounded,
        f"the gradient says {float(got):.6g}, the values {float(extrapolated):.6g}",
        **{f"grad_of_{name}": grad for name, grad in found.items()},
    )


def _counts_alone(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    assert routing.scores_TE is not None
    return LoadBalancingLoss(1.0)(replace(routing, scores_TE=routing.scores_TE.detach()), ctx)


def _nothing_to_teach(subject: LossSubject) -> str | None:
    if subject.num_experts == subject.top_k:
        return "every expert takes every token, so there is nothing to teach"
    if subject.coefficient == 0:
        return "its coefficient is 0"
    return None


@law(
    "L9",
    "the router learns from it",
    formula="dL/dlogits is not zero for 33 ordinary tokens, or else for the first of them",
    source="arXiv 2101.03961, below equation 6: P is differentiable where f is not",
    cases=lambda subject: routings(
        subject.num_experts, subject.top_k, patterns=("spaced",), batches=(1,), lengths=(33,)
    ),
    broken=lambda: LossSubject(Written(_counts_alone)),
    unless=_nothing_to_teach,
)
def teaches(subject: LossSubject, case: Case) -> None:
    # Many tokens may be in balance by chance; one that chooses K < E experts is not.
    for one in (case, take_rows(case, torch.arange(1), 1)):
        routing = routing_through_softmax(one)
        value = subject.loss(routing, context_of(one))
        if gradients(value, routing)["logits_TE"].any():
            return
    hold(False, f"the loss is {value.item():.4g}, and no gradient reaches the logits")


def _one_expert_less(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    scores_TE = routing.scores_TE
    assert scores_TE is not None
    shifted_TK = routing.experts_TK + 1  # class 0 is for skipped tokens: the last expert falls off
    counts_E = torch.bincount(shifted_TK.flatten(), minlength=routing.num_experts)
    counts_E = counts_E[: routing.num_experts].float()
    return (scores_TE.float() @ counts_E).sum() / max(len(scores_TE), 1)


def _experts_differ(subject: LossSubject) -> str | None:
    if getattr(subject.loss, "experts_differ", False):
        return "it declares experts_differ"
    return None


def _relabelled(subject: LossSubject, case: Case) -> None:
    g = torch.Generator().manual_seed(int(case.settings["pick"] or 0))
    order_E = torch.randperm(subject.num_experts, generator=g)
    (value, grad), (got, got_grad) = (
        flat_gradient(subject, one, used_only=True) for one in (case, relabel(case, order_E))
    )
    subject.hold_near(got, value, f"with the experts in the order {order_E.tolist()}", case)
    size_T, got_T = grad.norm(dim=-1), got_grad.norm(dim=-1)
    subject.hold_near(got_T, size_T, "its gradient, token by token", case, len(grad))


relabelling: Law[LossSubject] = law(
    "L10",
    "experts have no names",
    formula="L of a routing whose experts are permuted = L",
    source="transformers' one_hot with E + 1 classes for `skip`: an expert gets lost at the end",
    cases=_some,
    broken=lambda: LossSubject(Written(_one_expert_less)),
    unless=_experts_differ,
)(_relabelled)


def _unused_is_expert_0(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    clamped = replace(routing, experts_TK=routing.experts_TK.clamp(min=0))
    return LoadBalancingLoss(1.0)(clamped, ctx)


unused_slots: Law[LossSubject] = law(
    "L11",
    "an unused slot is no expert's",
    formula="with some slots at -1, L of a routing whose experts are permuted = L",
    source="transformers, ZAYA's skipped tokens: expert 0 with weight 0, which a count still sees",
    cases=lambda subject: routings(
        subject.num_experts, subject.top_k, patterns=("spaced",), unused=True
    ),
    broken=lambda: LossSubject(Written(_unused_is_expert_0)),
    unless=_experts_differ,
)(_relabelled)


LAWS: tuple[Law[LossSubject], ...] = (
    scalar,
    finite_gradient,
    coefficient,
    repeatable,
    leaves_alone,
    low_precision,
    reads,
    slope,
    teaches,
    relabelling,
    unused_slots,
)
