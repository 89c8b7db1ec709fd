"""Causes in how choices are counted. Letters: T tokens, E experts, K choices a token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moetk.equivalence.cause import Evidence, cause
from moetk.equivalence.causes.values import used, value
from moetk.equivalence.sides.loads import repeats


def _count(ids_TK: Tensor, e: Evidence, share_TK: Tensor | None = None) -> Tensor:
    counts_E = torch.zeros(len(e.wanted), dtype=torch.float64, device=ids_TK.device)
    one_TK = torch.ones_like(ids_TK) if share_TK is None else share_TK
    one_TK = one_TK.masked_fill(ids_TK < 0, 0).double()
    return counts_E.scatter_add(0, ids_TK.clamp(min=0).flatten(), one_TK.flatten())


@cause(
    "counted twice",
    "counts",
    fix="Activation checkpointing runs the forward again: count in backward, or outside what is "
    "run twice.",
)
def _twice(e: Evidence) -> Iterator[Tensor]:
    yield 2 * e.wanted


@cause(
    "counted several times",
    "counts",
    fix="Every count is multiplied by the same whole number: replicas of the same tokens were "
    "summed over ranks, or counters were not reset.",
)
def _several(e: Evidence) -> Iterator[Tensor]:
    if e.found.shape == e.wanted.shape and int(e.wanted.sum()):
        times = (e.found.double().sum() / e.wanted.double().sum()).round()
        if 2 < float(times) < torch.inf:
            yield times * e.wanted


@cause(
    "dropped choices counted",
    "counts",
    fix="Only choices that found a place are counted here.",
)
def _dropped_counted(e: Evidence) -> Iterator[Tensor]:
    ids_TK, used_TK = value(e, "indices"), used(e)
    if ids_TK is not None and used_TK is not None and not torch.equal(used_TK, ids_TK >= 0):
        yield _count(ids_TK, e)


@cause(
    "dropped choices not counted",
    "counts",
    fix="What was wanted is counted here, before capacity drops any of it.",
)
def _dropped_not_counted(e: Evidence) -> Iterator[Tensor]:
    ids_TK, used_TK = value(e, "indices"), used(e)
    if ids_TK is not None and used_TK is not None and not torch.equal(used_TK, ids_TK >= 0):
        yield _count(ids_TK, e, used_TK.long())


@cause(
    "duplicate ids counted once",
    "counts",
    fix="A token that names one expert twice counts twice: count choices, not a (T, E) mask.",
)
def _duplicates_once(e: Evidence) -> Iterator[Tensor]:
    ids_TK = value(e, "indices")
    if ids_TK is not None and bool(repeats(ids_TK).any()):
        yield _count(ids_TK, e, ~repeats(ids_TK))


@cause(
    "padding counted",
    "counts",
    fix="Count the tokens of ctx.token_mask only.",
)
def _padding(e: Evidence) -> Iterator[Tensor]:
    ids_TK = value(e, "indices")
    if ids_TK is not None and e.ctx.token_mask is not None:
        yield _count(ids_TK, e)


@cause(
    "padding not counted",
    "counts",
    fix="All tokens are counted here, padding too.",
)
def _no_padding(e: Evidence) -> Iterator[Tensor]:
    ids_TK = value(e, "indices")
    if ids_TK is not None and e.ctx.token_mask is not None:
        real_T1 = e.ctx.token_mask[:, None].long()
        yield _count(ids_TK, e, real_T1.expand_as(ids_TK))


@cause(
    "counts normalised",
    "counts",
    fix="One of the two gives shares or means in place of counts.",
)
def _normalised(e: Evidence) -> Iterator[Tensor]:
    counts_E, ids_TK = e.wanted.to(e.found.dtype), value(e, "indices")
    if not counts_E.is_floating_point():
        return
    yield counts_E / counts_E.sum()
    yield counts_E / counts_E.mean()
    if ids_TK is not None:
        yield counts_E / len(ids_TK)


@cause(
    "weights summed instead of choices counted",
    "counts",
    fix="This is the experts' importance, the sum of their weights, not their load.",
)
def _importance(e: Evidence) -> Iterator[Tensor]:
    ids_TK, weights_TK = value(e, "indices"), value(e, "weights")
    if ids_TK is not None and weights_TK is not None:
        yield _count(ids_TK, e, weights_TK).to(e.found.dtype)


@cause(
    "first choices counted alone",
    "counts",
    fix="All K columns are counted, not the first one.",
)
def _first_alone(e: Evidence) -> Iterator[Tensor]:
    ids_TK = value(e, "indices")
    if ids_TK is not None and ids_TK.shape[1] > 1:
        yield _count(ids_TK[:, :1], e)


@cause(
    "unused slots counted",
    "counts",
    fix="A slot of -1 is no choice: leave it out before counting, where it would become the first "
    "expert or, counted from behind, the last.",
)
def _unused(e: Evidence) -> Iterator[Tensor]:
    ids_TK = value(e, "indices")
    if ids_TK is not None and bool((ids_TK < 0).any()):
        yield _count(ids_TK.clamp(min=0), e)
        yield _count(ids_TK % len(e.wanted), e)


COUNTS = (
    _twice,
    _several,
    _dropped_counted,
    _dropped_not_counted,
    _duplicates_once,
    _padding,
    _no_padding,
    _normalised,
    _importance,
    _first_alone,
    _unused,
)
