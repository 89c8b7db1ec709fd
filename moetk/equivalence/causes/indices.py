"""Causes in the selection itself, and in the ids that leave it. Letters: T tokens, E experts, K
choices a token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moetk.equivalence.cause import Evidence, cause
from moetk.equivalence.causes.values import scores_of, value
from moetk.kernels.selection import largest


def _choice(e: Evidence) -> Tensor | None:
    choice_TE = value(e, "choice")
    return scores_of(e) if choice_TE is None else choice_TE


@cause(
    "the smallest are chosen",
    "indices",
    fix="The selection is sorted the wrong way round: take the largest.",
)
def _smallest(e: Evidence) -> Iterator[Tensor]:
    choice_TE = _choice(e)
    if choice_TE is not None:
        yield largest(-choice_TE, e.wanted.shape[1])
        # Of a limited choice -inf is the smallest, and which of them is anybody's guess.
        yield largest(-choice_TE.masked_fill(choice_TE == -torch.inf, torch.inf), e.wanted.shape[1])


@cause(
    "another number of choices",
    "indices",
    fix="The two choose different numbers of experts a token: compare top_k.",
)
def _another_k(e: Evidence) -> Iterator[Tensor]:
    choice_TE, ids_TK = _choice(e), e.found
    if choice_TE is None or ids_TK.ndim != 2 or ids_TK.shape[1] > choice_TE.shape[1]:
        return
    if ids_TK.shape[1] != e.wanted.shape[1]:
        yield largest(choice_TE, ids_TK.shape[1])


@cause(
    "the best is left out",
    "indices",
    fix="Ranks 2 to K + 1 are chosen: look for a slice that begins at 1.",
)
def _without_best(e: Evidence) -> Iterator[Tensor]:
    choice_TE, top_k = _choice(e), e.wanted.shape[1]
    if choice_TE is not None and top_k < choice_TE.shape[1]:
        yield largest(choice_TE, top_k + 1)[:, 1:]


@cause(
    "ids shifted by one",
    "indices",
    fix="Ids run from 0 to E - 1; here they are one off (counted from 1, or a dummy expert before "
    "or behind).",
)
def _shifted(e: Evidence) -> Iterator[Tensor]:
    scores_TE = scores_of(e)
    for step in (1, -1):
        yield e.wanted + step
        if scores_TE is not None:
            yield (e.wanted + step) % scores_TE.shape[1]


@cause(
    "last choice repeats the first",
    "indices",
    fix="One id fills two slots of a token: the ids of the columns are not distinct.",
)
def _repeated(e: Evidence) -> Iterator[Tensor]:
    yield torch.cat([e.wanted[:, :-1], e.wanted[:, :1]], -1)


INDICES = (_smallest, _another_k, _without_best, _shifted, _repeated)
