"""Laws of every loss about its tokens: their order, masks, sequences, micro-batches and ranks.

Letters: T tokens = B sequences of S, E experts, K choices a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from moetk.context import RouterContext
from moetk.losses import DeepSeekSequenceLoss, LoadBalancingLoss, load_balancing, router_z
from moetk.routing import TokenChoice
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.losses_subject import (
    LossSubject,
    Written,
    flat_gradient,
    with_setting,
)
from moetk.testing.strategies.losses import (
    FIELDS,
    PATTERNS,
    changed,
    routings,
    take_rows,
)

# The choice of these is the same in any order and company of tokens.
_ROWS = tuple(name for name in PATTERNS if name != "one ulp")


def _tokens(*masks: str) -> Callable[[LossSubject], SearchStrategy[Case]]:
    return lambda subject: routings(
        subject.num_experts, subject.top_k, patterns=_ROWS, masks=masks, unused=True
    )


def _fields(routing: TokenChoice) -> tuple[Tensor, Tensor]:
    assert routing.scores_TE is not None and routing.logits_TE is not None
    return routing.scores_TE.float(), routing.logits_TE.float()


def _running_share(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    scores_TE, _ = _fields(routing)
    one_hot_TE = torch.zeros_like(scores_TE).scatter(1, routing.experts_TK.clamp(min=0), 1)
    shares_TE = one_hot_TE.cumsum(0) / one_hot_TE.cumsum(0).sum(-1, keepdim=True).clamp(min=1)
    return routing.num_experts * (shares_TE * scores_TE).sum() / max(len(scores_TE), 1)


def _ordered(subject: LossSubject) -> str | None:
    return "it declares ordered" if getattr(subject.loss, "ordered", False) else None


@law(
    "L12",
    "tokens have no order",
    formula="L(Q r) = L(r), Q a permutation of the tokens, at sequence scope within each sequence",
    source="Megatron-LM's running mean of counts: the gradient depends on who came first",
    cases=_tokens("absent", "scattered"),
    broken=lambda: LossSubject(Written(_running_share)),
    unless=_ordered,
)
def token_order(subject: LossSubject, case: Case) -> None:
    batch, length = _shape(case)
    g = torch.Generator().manual_seed(_pick(case))
    if subject.scope == "sequence":
        order_BS = torch.rand(batch, length, generator=g).argsort(-1)
        rows = (order_BS + length * torch.arange(batch)[:, None]).flatten()
    else:
        rows = torch.randperm(batch * length, generator=g)
    value, grad = flat_gradient(subject, case)
    got, got_grad = flat_gradient(subject, take_rows(case, rows, batch))
    subject.hold_near(got, value, "with the tokens in another order", case)
    subject.hold_near(got_grad, grad[rows], "the gradient in another order", case, len(grad))


def _shape(case: Case) -> tuple[int, int]:
    return int(case.settings["batch"] or 0), int(case.settings["length"] or 0)


def _pick(case: Case) -> int:
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
        patterns=_ROWS,
        masks=("all", "scattered") if labels else kinds,
        labels=kinds if labels else ("absent",),
        unused=True,
    )


def _equals_removing(subject: LossSubject, case: Case, name: str) -> None:
    mask_T = case[name]
    rest = changed(take_rows(case, mask_T, _shape(case)[0]), "token_mask", "label_mask")
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
    cases=_tokens("scattered", "padding"),
    broken=lambda: LossSubject(Written(_times_the_mask, reads=("logits_TE",))),
)
def nan_rows(subject: LossSubject, case: Case) -> None:
    mask_T = case["token_mask"]
    kind = (math.nan, math.inf, -math.inf)[_pick(case) % 3]
    dirty = {name: case[name].masked_fill(~mask_T[:, None], kind) for name in FIELDS}
    value, grad = flat_gradient(subject, case)
    got, got_grad = flat_gradient(subject, changed(case, **dirty))
    hold(torch.equal(got, value), f"{float(got)!r}, not {float(value)!r}, by {kind} in padding")
    hold(torch.equal(got_grad[mask_T], grad[mask_T]), f"the gradient sees {kind} in padding")


def _mean_of_sequences(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    scores_TE, _ = _fields(routing)
    counted_T = ctx.token_mask if ctx.label_mask is None else ctx.label_mask
    if ctx.batch_shape is None or counted_T is None or 0 in ctx.batch_shape:
        return DeepSeekSequenceLoss(1.0)(routing, ctx)
    batch = ctx.batch_shape[0]
    fields = (routing.experts_TK, scores_TE, counted_T)
    parts = zip(*(field.chunk(batch) for field in fields), strict=True)
    losses = [load_balancing(ids, scores, counted_T=mask) for ids, scores, mask in parts]
    return torch.stack(losses).mean()


def _of_the_whole(subject: LossSubject) -> str | None:
    if subject.scope in ("token", "sequence"):
        return None
    return f"its scope is {subject.scope}: a product of means over all its tokens does not split"


@law(
    "L17",
    "micro-batches add up",
    formula="sum_i n_i L(r_i) / sum_i n_i = L(r), n_i the counted tokens of micro-batch i",
    source="arXiv 2501.11873, section 2: true of losses per token and per sequence",
    cases=lambda subject: routings(
        subject.num_experts, subject.top_k, patterns=_ROWS, masks=("scattered", "padding")
    ),
    # short sequences weigh as much as long ones
    broken=lambda: LossSubject(Written(_mean_of_sequences, scope="sequence")),
    unless=_of_the_whole,
)
def micro_batches(subject: LossSubject, case: Case) -> None:
    batch, length = _shape(case)
    value, grad = flat_gradient(subject, case)
    counted_T = case["token_mask"]
    weight = counted_T.sum().clamp(min=1)
    got, got_grad = torch.zeros_like(value), torch.zeros_like(grad)
    for rows in torch.arange(batch * length).split(max(length, 1)):
        part, part_grad = flat_gradient(subject, take_rows(case, rows, 1))
        share = counted_T[rows].sum() / weight
        got = got + share * part
        got_grad[rows] = share * part_grad
    subject.hold_near(got, value, f"{batch} micro-batches, weighed by their tokens", case)
    subject.hold_near(got_grad, grad, "the micro-batches' gradient", case, int(weight))


def _pooled(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    return LoadBalancingLoss(1.0)(routing, ctx)


def _not_by_sequence(subject: LossSubject) -> str | None:
    if subject.scope == "sequence":
        return None
    return f'its scope is {subject.scope}; declare scope = "sequence" if it is meant to be'


@law(
    "L18",
    "a sequence is balanced on its own",
    formula="dL / d(sequence b) does not change with the other sequences' content",
    source="arXiv 2412.19437, equations 17-20",
    cases=lambda subject: routings(
        subject.num_experts, subject.top_k, patterns=_ROWS, batches=(2, 3), masks=("scattered",)
    ),
    # the shares are of the whole batch
    broken=lambda: LossSubject(Written(_pooled, scope="sequence")),
    unless=_not_by_sequence,
)
def own_sequence(subject: LossSubject, case: Case) -> None:
    batch, length = _shape(case)
    same = torch.arange(batch * length) < length
    turned = {  # the others' experts are other ones: those of the next name
        name: torch.where(same[:, None], case[name], case[name].roll(1, -1))
        for name in FIELDS
        if name.endswith("_TE")
    }
    next_TK = (case["experts_TK"] + 1) % subject.num_experts
    turned["experts_TK"] = torch.where(same[:, None], case["experts_TK"], next_TK)
    _, grad = flat_gradient(subject, case)
    _, got = flat_gradient(subject, changed(case, **turned))
    counted = int(case["token_mask"].sum())
    what = "the first sequence's gradient, after others changed"
    subject.hold_near(got[same], grad[same], what, case, counted)


def _rows_only(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    shape = ctx.batch_shape or (1, len(routing.experts_TK))
    by_rows = replace(ctx, batch_shape=shape, sequence_ids=None)
    return LoadBalancingLoss(1.0, scope="sequence")(routing, by_rows)


def _no_packing(subject: LossSubject) -> str | None:
    if subject.scope == "sequence" and not subject.takes_sequence_ids:
        return "it raises MissingContextError for a packed batch, as it may"
    return _not_by_sequence(subject)


@law(
    "L19",
    "a packed batch is its sequences",
    formula="L(r, sequence_ids, tokens in any order) = L(r, batch_shape)",
    source="packed batches have no (B, S): taken for one sequence, they are balanced together",
    cases=_tokens("scattered", "absent"),
    broken=lambda: LossSubject(Written(_rows_only, scope="sequence")),
    unless=_no_packing,
)
def packed(subject: LossSubject, case: Case) -> None:
    batch, length = _shape(case)
    g = torch.Generator().manual_seed(_pick(case))
    rows = torch.randperm(batch * length, generator=g)
    ids_T = torch.randperm(batch, generator=g).repeat_interleave(length)
    mixed = take_rows(changed(case, sequence_ids=ids_T), rows, batch)
    value, grad = flat_gradient(subject, case)
    got, got_grad = flat_gradient(subject, mixed)
    subject.hold_near(got, value, "packed, with sequence_ids", case)
    subject.hold_near(got_grad, grad[rows], "the packed gradient", case, len(grad))


class _SharesSummed:
    """Each rank's shares are summed over the ranks, not its counts."""

    reads = ("scores_TE",)
    scope = "global_batch"

    def __init__(self) -> None:
        self.reduce: Callable[[Tensor], Tensor] = torch.clone

    def __call__(self, routing: TokenChoice, ctx: RouterContext) -> Tensor:
        scores_TE, _ = _fields(routing)
        counted_T = ctx.token_mask

        def share(counts_RE: Tensor) -> Tensor:
            return self.reduce(counts_RE / counts_RE.sum().clamp(min=1))

        return load_balancing(routing.experts_TK, scores_TE, counted_T=counted_T, reduce=share)


def _not_global(subject: LossSubject) -> str | None:
    if subject.scope != "global_batch":
        return f'its scope is {subject.scope}; declare scope = "global_batch" if it is meant to be'
    if not callable(getattr(subject.loss, "reduce", None)):
        return "it has no callable `reduce` through which ranks could be played"
    return None


@law(
    "L20",
    "ranks add up",
    formula="sum_i n_i L_i / sum_i n_i = L(all ranks' tokens), where `reduce` sums over ranks i",
    source="arXiv 2501.11873, equation 4: counts are summed before the product, P stays local",
    cases=lambda subject: routings(
        subject.num_experts,
        subject.top_k,
        patterns=_ROWS,
        masks=("scattered", "padding"),
        batches=(2, 3, 1),
    ),
    broken=lambda: LossSubject(_SharesSummed()),
    unless=_not_global,
)
def ranks(subject: LossSubject, case: Case) -> None:
    """The ranks run one after the other: once to hear what each of them sums, once to answer."""
    batch, length = _shape(case)
    parts = [
        take_rows(case, rows, 1) for rows in torch.arange(batch * length).split(max(length, 1))
    ]
    heard: list[list[Tensor]] = []
    for part in parts:
        said: list[Tensor] = []

        def hear(tensor: Tensor, said: list[Tensor] = said) -> Tensor:
            said.append(tensor.detach())
            return tensor.clone()

        _with_reduce(subject, hear)(part)
        heard.append(said)
    hold(all(said for said in heard), "it never calls its `reduce`")

    counted_T = case["token_mask"]
    weight = counted_T.sum().clamp(min=1)
    got, got_grad = torch.zeros((), dtype=torch.float32), []
    for rank, part in enumerate(parts):
        sums = iter([torch.stack(column).sum(0) for column in zip(*heard, strict=True)])
        answer = _with_reduce(subject, lambda _, sums=sums: next(sums))  # type: ignore[misc]
        value, grad = flat_gradient(answer, part)
        share = counted_T[rank * length : (rank + 1) * length].sum() / weight
        got = got + share * value
        got_grad.append(share * grad)
    want, want_grad = flat_gradient(_with_reduce(subject, torch.clone), case)
    subject.hold_near(got, want, f"{batch} ranks, weighed by their tokens", case)
    if got_grad:
        subject.hold_near(torch.cat(got_grad), want_grad, "their gradient", case, int(weight))


def _with_reduce(subject: LossSubject, reduce: Callable[[Tensor], Tensor]) -> LossSubject:
    loss = with_setting(subject.loss, "reduce", reduce)
    return LossSubject(loss, subject.num_experts, subject.top_k, subject.told)


LAWS: tuple[Law[LossSubject], ...] = (
    token_order,
    masking,
    labels,
    nothing_counted,
    nan_rows,
    micro_batches,
    own_sequence,
    packed,
    ranks,
)
