"""Laws of every loss about its tokens: their order, masks and labels, rows of NaN.

Letters: T tokens = B sequences of S, E experts, K choices a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from moetk.context import RouterContext
from moetk.losses import router_z
from moetk.routing import TokenChoice
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.losses_subject import (
    LossSubject,
    Written,
    flat_gradient,
)
from moetk.testing.strategies.losses import (
    FIELDS,
    PATTERNS,
    changed,
    routings,
    take_rows,
)

# What these choose is the same in any order and company of tokens.
ROWS = tuple(name for name in PATTERNS if name != "one ulp")


def tokens(*masks: str) -> Callable[[LossSubject], SearchStrategy[Case]]:
    return lambda subject: routings(
        subject.num_experts, subject.top_k, patterns=ROWS, masks=masks, unused=True
    )


def _fields(routing: TokenChoice) -> tuple[Tensor, Tensor]:
    assert routing.scores_TE is not None and routing.logits_TE is not None
    return routing.scores_TE.float(), routing.logits_TE.float()


def _running_share(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    scores_TE, _ = _fields(routing)
    one_hot_TE = torch.zeros_like(scores_TE).scatter(1, routing.experts_TK.clamp(min=0), 1)
    shares_TE = one_hot_TE.cumsum(0) / one_hot_TE.cumsum(0).sum(-1, keepdim=True).clamp(min=1)
    return routing.num_experts * (shares_TE * scores_TE).sum() / max(len(scores_TE), 1)


def in_order(subject: LossSubject) -> str | None:
    if getattr(subject.loss, "ordered", False):
        return "it declares ordered: who stands beside whom is a part of what it reads"
    return None


@law(
    "L12",
    "tokens have no order",
    formula="L(Q r) = L(r), Q a permutation of the tokens, at sequence scope within each sequence",
    source="Megatron-LM's running mean of counts: the gradient depends on who came first",
    cases=tokens("absent", "scattered"),
    broken=lambda: LossSubject(Written(_running_share)),
    unless=in_order,
)
def token_order(subject: LossSubject, case: Case) -> None:
    batch, length = shape_of(case)
    g = torch.Generator().manual_seed(pick_of(case))
    if subject.scope == "sequence":
        order_BS = torch.rand(batch, length, generator=g).argsort(-1)
        rows = (order_BS + length * torch.arange(batch)[:, None]).flatten()
    else:
        rows = torch.randperm(batch * length, generator=g)
    value, grad = flat_gradient(subject, case)
    got, got_grad = flat_gradient(subject, take_rows(case, rows, batch))
    subject.hold_near(got, value, "with the tokens in another order", case)
    subject.hold_near(got_grad, grad[rows], "the gradient in another order", case, len(grad))


def shape_of(case: Case) -> tuple[int, int]:
    return int(case.settings["batch"] or 0), int(case.settings["length"] or 0)


def pick_of(case: Case) -> int:
    return int(case.settings["pick"] or 0)


def _mean_over_padding(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    _, logits_TE = _fields(routing)
    values_T = logits_TE.logsumexp(-1).square()
    counted_T = ctx.token_mask if ctx.label_mask is None else ctx.label_mask
    if counted_T is not None:
        values_T = torch.where(counted_T, values_T, 0)
    return values_T.sum() / max(len(values_T), 1)


def _columns(subject: LossSubject, *, labels: bool = False) -> SearchStrategy[Case]:
    # At sequence scope the rest must be sequences of one length again.
    kinds = ("columns",) if subject.scope == "sequence" else ("scattered", "padding")
    return routings(
        subject.num_experts,
        subject.top_k,
        patterns=ROWS,
        masks=("all", "scattered") if labels else kinds,
        labels=kinds if labels else ("absent",),
        unused=True,
    )


def _equals_removing(subject: LossSubject, case: Case, name: str) -> None:
    mask_T = case[name]
    rest = changed(take_rows(case, mask_T, shape_of(case)[0]), "token_mask", "label_mask")
    value, grad = flat_gradient(subject, case)
    want, want_grad = flat_gradient(subject, rest)
    subject.hold_near(value, want, f"{name} over {len(mask_T)} tokens, against the rest", case)
    hold(not grad[~mask_T].any(), f"tokens outside {name} get a gradient", grad=grad)
    counted = int(mask_T.sum())
    subject.hold_near(grad[mask_T], want_grad, "the gradient of the rest", case, counted)


@law(
    "L13",
    "masking is removing",
    formula="L(r, token_mask = m) = L(rows m of r); dL = 0 outside m",
    source="transformers, load_balancing_loss_func: f and P must both leave padding out",
    cases=_columns,
    broken=lambda: LossSubject(Written(_mean_over_padding, reads=("logits_TE",))),
    unless=in_order,
)
def masking(subject: LossSubject, case: Case) -> None:
    _equals_removing(subject, case, "token_mask")


def _labels_ignored(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    return router_z(_fields(routing)[1], ctx.token_mask)


@law(
    "L14",
    "labels decide where there are labels",
    formula="L(r, label_mask = m, any token_mask) = L(rows m of r); dL = 0 outside m",
    source="attached losses enter with the weight of the micro-batch's label tokens",
    cases=lambda subject: _columns(subject, labels=True),
    broken=lambda: LossSubject(Written(_labels_ignored, reads=("logits_TE",))),
    unless=in_order,
)
def labels(subject: LossSubject, case: Case) -> None:
    _equals_removing(subject, case, "label_mask")


def _divides_by_none(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    values_T = _fields(routing)[1].logsumexp(-1).square()
    counted_T = ctx.token_mask if ctx.label_mask is None else ctx.label_mask
    if counted_T is None:
        return values_T.sum() / max(len(values_T), 1)
    return torch.where(counted_T, values_T, 0).sum() / counted_T.sum()


@law(
    "L15",
    "nothing counted, nothing lost",
    formula="L = 0 and dL = 0 where T = 0 or no token is counted",
    source="a micro-batch of padding alone: a mean over no token is NaN and ends the run",
    cases=lambda subject: routings(
        subject.num_experts, subject.top_k, masks=("none",), labels=("absent", "none")
    ),
    broken=lambda: LossSubject(Written(_divides_by_none, reads=("logits_TE",))),
)
def nothing_counted(subject: LossSubject, case: Case) -> None:
    none = changed(case, "token_mask", "label_mask") if len(case["logits_TE"]) == 0 else case
    for one in (case, none):
        value, grad = flat_gradient(subject, one)
        hold(value == 0, f"{float(value)!r} over no token")
        hold(grad == 0, "no token is counted, and yet there is a gradient", grad=grad)


def _times_the_mask(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    values_T = _fields(routing)[1].logsumexp(-1).square()
    counted_T = ctx.token_mask if ctx.label_mask is None else ctx.label_mask
    if counted_T is None:
        return values_T.sum() / max(len(values_T), 1)
    return (values_T * counted_T).sum() / counted_T.sum().clamp(min=1)


@law(
    "L16",
    "NaN stays in its uncounted row",
    formula="with NaN in rows outside m: L and the gradient of rows m are, to the bit, as without",
    source="0 * NaN is NaN: a mask chooses, it does not multiply",
    cases=tokens("scattered", "padding"),
    broken=lambda: LossSubject(Written(_times_the_mask, reads=("logits_TE",))),
)
def nan_rows(subject: LossSubject, case: Case) -> None:
    mask_T = case["token_mask"]
    kind = (math.nan, math.inf, -math.inf)[pick_of(case) % 3]
    dirty = {name: case[name].masked_fill(~mask_T[:, None], kind) for name in FIELDS}
    value, grad = flat_gradient(subject, case)
    got, got_grad = flat_gradient(subject, changed(case, **dirty))
    hold(torch.equal(got, value), f"{float(got)!r}, not {float(value)!r}, by {kind} in padding")
    hold(torch.equal(got_grad[mask_T], grad[mask_T]), f"the gradient sees {kind} in padding")


LAWS: tuple[Law[LossSubject], ...] = (
    token_order,
    masking,
    labels,
    nothing_counted,
    nan_rows,
)
