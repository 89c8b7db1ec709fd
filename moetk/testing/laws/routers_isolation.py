"""What may not reach a token: other sequences, padding, packed neighbours, a row of NaN."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.errors import NonFiniteRoutingError
from moetk.kernels.selection import gather, top_k, top_tokens
from moetk.routing import ExpertChoice, TokenChoice
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.routers_cases import (
    ScoredRouter,
    broken_subject,
    inputs,
    other_rows,
    packed_with_others,
    padded_with_others,
)
from moetk.testing.laws.routers_compare import hold_same
from moetk.testing.laws.routers_subject import PROBES, RouterSubject, context_of
from moetk.testing.laws.routers_told import by_token, differing
from moetk.testing.strategies.inputs import BAD_VALUES, not_finite


def _unless_per_batch(subject: RouterSubject) -> str | None:
    return "it declares per_batch = True" if subject.per_batch else None


def _exchanged(case: Case, keep_T: Tensor) -> Tensor:
    """x_TH with other tokens in place of all but keep_T."""
    return torch.where(keep_T[:, None], case["x_TH"], case["other_TH"])


class SharesOneQueue(ScoredRouter):
    """Expert choice over the flattened batch: sequences compete for places."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> ExpertChoice:
        _, scores_TE = self.scored(x_TH)
        whole = replace(ctx, batch_shape=None)
        tokens_EC, weights_EC = top_tokens(scores_TE, self.top_k, whole)
        return ExpertChoice(tokens_EC, weights_EC, len(x_TH))


@law(
    "R31",
    "sequences of a batch do not see each other",
    formula="R([x; x'])[: S] = R([x; x''])[: S], bit by bit",
    source="batch invariance; Soft MoE, arXiv 2308.00951, section 2.2: mixed per sequence",
    cases=inputs(
        "gaussian",
        "collapsed",
        "starved",
        "one_hot",
        least_sequences=2,
        least_length=1,
        training=None,
        added=other_rows,
    ),
    broken=broken_subject(SharesOneQueue),
    unless=_unless_per_batch,
)
def sequences_apart(subject: RouterSubject, case: Case) -> None:
    length, training = int(case.settings["length"] or 0), bool(case.settings["training"])
    sequence_T = torch.arange(len(case["x_TH"])) // length
    for keep in (0, int(case.settings["batch"] or 0) - 1):
        keep_T = sequence_T == keep
        other = subject.route(_exchanged(case, keep_T), context_of(case), training=training)
        when = f"only sequence {keep} of the batch stays"
        hold_same(subject.on(case), other, when, keep_T)


class PaddingCompetes(ScoredRouter):
    """Expert choice that never looks at the mask: padding takes places of real tokens."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> ExpertChoice:
        _, scores_TE = self.scored(x_TH)
        unmasked = RouterContext(batch_shape=ctx.batch_shape)
        tokens_EC, weights_EC = top_tokens(scores_TE, self.top_k, unmasked)
        return ExpertChoice(tokens_EC, weights_EC, len(x_TH))


@law(
    "R32",
    "padding does not touch real tokens",
    formula="x = x' where token_mask  =>  R(x) = R(x') where token_mask, bit by bit",
    source="GShard, arXiv 2006.16668; transformers and Megatron-Core mask by attention_mask",
    cases=inputs(
        "gaussian", "collapsed", "starved", least_length=1, training=None, added=padded_with_others
    ),
    broken=broken_subject(PaddingCompetes),
)
def padding_apart(subject: RouterSubject, case: Case) -> None:
    real_T, training = case["token_mask"], bool(case.settings["training"])
    other = subject.route(_exchanged(case, real_T), context_of(case), training=training)
    hold_same(subject.on(case), other, "padding holds other numbers", real_T)


class SmoothsAcrossTheBorder(ScoredRouter):
    """Routes by a token and the one before it, and takes that from the sequence before."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        before_TH = torch.cat([x_TH[:1], x_TH[:-1]])
        if ctx.batch_shape is not None:
            batch, length = ctx.batch_shape
            first_T = torch.arange(len(x_TH)) % max(length, 1) == 0
        else:
            sequence_T = ctx.require("sequence_ids", self)
            first_T = torch.cat([sequence_T[:1] < 0, sequence_T[1:] < sequence_T[:-1]])
        _, scores_TE = self.scored(torch.where(first_T[:, None], x_TH, x_TH + before_TH))
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK))


def _unless_packed(subject: RouterSubject) -> str | None:
    if subject.per_batch:
        return "it declares per_batch = True"
    x_TH, ctx = subject.probe()
    packed = replace(ctx, batch_shape=None)
    try:
        subject.route(x_TH, packed)
    except Exception as error:
        return f"it does not take a packed batch ({type(error).__name__})"
    if subject.mixes and not _sees_packing(subject):
        return (
            "tokens compete, and where sequences of a packed batch end changes nothing: it is one "
            "sequence"
        )
    return None


def _sees_packing(subject: RouterSubject) -> bool:
    """Measured: a packed batch is routed differently where it is two sequences, not one."""
    for pattern, seed in PROBES:
        x_TH, ctx = subject.probe(pattern, seed)
        ctx, token_T = replace(ctx, batch_shape=None), torch.arange(len(x_TH))
        second_T = (token_T >= len(x_TH) // 2).long()
        parted = replace(ctx, positions=token_T - second_T * (len(x_TH) // 2))
        one = by_token(subject.route(x_TH, ctx))
        for ids_T in (second_T, 1 - second_T):
            two = by_token(subject.route(x_TH, replace(parted, sequence_ids=ids_T)))
            if bool(differing(one, two).any()):
                return True
    return False


@law(
    "R33",
    "packed sequences do not leak",
    formula="R(x; sequence_ids)[ids = i] does not depend on x[ids != i], bit by bit",
    source="packing without cross-contamination, arXiv 2107.02027, section 3.2",
    cases=inputs(
        "gaussian", "collapsed", "starved", least_length=2, training=None, added=packed_with_others
    ),
    broken=broken_subject(SmoothsAcrossTheBorder),
    unless=_unless_packed,
)
def packed_apart(subject: RouterSubject, case: Case) -> None:
    ctx, training = context_of(case, batch_shape=None), bool(case.settings["training"])
    plain = subject.route(case["x_TH"], ctx, training=training)
    for keep in case["sequence_ids"].unique().tolist():
        keep_T = case["sequence_ids"] == keep
        other = subject.route(_exchanged(case, keep_T), ctx, training=training)
        hold_same(plain, other, f"only packed sequence {keep} stays", keep_T)


class SubtractsTheMaximum(ScoredRouter):
    """Steadies its softmax by the largest logit of all tokens: right, until one is NaN."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.logits(x_TH)
        largest = logits_TE.max() if len(x_TH) else 0.0
        scores_TE = (logits_TE - largest).softmax(-1)
        experts_TK = top_k(logits_TE, self.top_k, ctx)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK))


@law(
    "R34",
    "a row that is not finite stays in its row",
    formula="x' = x but for row t in {NaN, inf, -inf}  =>  R(x')[s] = R(x)[s] for s != t",
    source="one overflowing token must not silence a batch; ids stay in range for any bank",
    cases=inputs("gaussian", "collapsed", least_length=1),
    broken=broken_subject(SubtractsTheMaximum),
    unless=_unless_per_batch,
)
def nan_stays(subject: RouterSubject, case: Case) -> None:
    length, seed = int(case.settings["length"] or 0), int(case.settings["seed"] or 0)
    row = seed % len(case["x_TH"])
    token_T = torch.arange(len(case["x_TH"]))
    # Where tokens compete, a bad one may win or lose a place: then its sequence is left out.
    apart_T = (token_T // length != row // length) if subject.mixes else (token_T != row)
    whole = subject.on(case)
    for value in BAD_VALUES:
        bad_TH = not_finite(case["x_TH"], row, value, whole=bool(seed % 2))
        try:
            told = subject.route(bad_TH, context_of(case))
        except NonFiniteRoutingError:
            return  # refusing a bad row is as good as containing it
        hold_same(whole, told, f"row {row} holds {value}", apart_T)
        if isinstance(told, TokenChoice):
            ids_TK = by_token(told)["chosen"]
            hold(
                (ids_TK >= -1) & (ids_TK < told.num_experts),
                f"row {row} of {value} goes to {ids_TK[row].tolist()}",
                experts_TK=ids_TK,
            )


LAWS: tuple[Law[RouterSubject], ...] = (
    sequences_apart,
    padding_apart,
    packed_apart,
    nan_stays,
)
