"""Laws of a loss's scope: micro-batches, sequences, packed batches and ranks.

Letters: T tokens = B sequences of S, E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.losses import DeepSeekSequenceLoss, LoadBalancingLoss, load_balancing
from moetk.routing import TokenChoice
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.losses_subject import (
    LossSubject,
    Written,
    flat_gradient,
    with_setting,
)
from moetk.testing.laws.losses_tokens import ROWS, in_order, pick_of, shape_of, tokens
from moetk.testing.strategies.losses import FIELDS, changed, routings, take_rows


def _scores(routing: TokenChoice) -> Tensor:
    assert routing.scores_TE is not None
    return routing.scores_TE.float()


def _mean_of_sequences(routing: TokenChoice, ctx: RouterContext) -> Tensor:
    scores_TE = _scores(routing)
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
        return in_order(subject)
    return f"its scope is {subject.scope}: a product of means over all its tokens does not split"


@law(
    "L17",
    "micro-batches add up",
    formula="sum_i n_i L(r_i) / sum_i n_i = L(r), n_i the counted tokens of micro-batch i",
    source="arXiv 2501.11873, section 2: true of losses per token and per sequence",
    cases=lambda subject: routings(
        subject.num_experts, subject.top_k, patterns=ROWS, masks=("scattered", "padding")
    ),
    # short sequences weigh as much as long ones
    broken=lambda: LossSubject(Written(_mean_of_sequences, scope="sequence")),
    unless=_of_the_whole,
)
def micro_batches(subject: LossSubject, case: Case) -> None:
    batch, length = shape_of(case)
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
        subject.num_experts, subject.top_k, patterns=ROWS, batches=(2, 3), masks=("scattered",)
    ),
    # the shares are of the whole batch
    broken=lambda: LossSubject(Written(_pooled, scope="sequence")),
    unless=_not_by_sequence,
)
def own_sequence(subject: LossSubject, case: Case) -> None:
    batch, length = shape_of(case)
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
    return _not_by_sequence(subject) or in_order(subject)


@law(
    "L19",
    "a packed batch is its sequences",
    formula="L(r, sequence_ids, tokens in any order) = L(r, batch_shape)",
    source="packed batches have no (B, S): taken for one sequence, they are balanced together",
    cases=tokens("scattered", "absent"),
    broken=lambda: LossSubject(Written(_rows_only, scope="sequence")),
    unless=_no_packing,
)
def packed(subject: LossSubject, case: Case) -> None:
    batch, length = shape_of(case)
    g = torch.Generator().manual_seed(pick_of(case))
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
        scores_TE = _scores(routing)
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
        patterns=ROWS,
        masks=("scattered", "padding"),
        batches=(2, 3, 1),
    ),
    broken=lambda: LossSubject(_SharesSummed()),
    unless=_not_global,
)
def ranks(subject: LossSubject, case: Case) -> None:
    """The ranks run one after the other: once to hear what each of them sums, once to answer."""
    batch, length = shape_of(case)
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
    return subject.with_loss(with_setting(subject.loss, "reduce", reduce))


LAWS: tuple[Law[LossSubject], ...] = (micro_batches, own_sequence, packed, ranks)
