"""Causes that any stage may have: a narrow dtype, rows that moved; and what only describes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moetk.equivalence.cause import Cause, Evidence, cause
from moetk.equivalence.causes.values import (
    is_rounding,
    multiple_of_all,
    multiple_of_rows,
    rearranged,
)

ROUTING = ("logits", "scores", "choice", "weights")
INNER = ("up", "activation", "expert_output")
BY_TOKEN = (*ROUTING, *INNER, "combined", "output")
NARROW = (torch.bfloat16, torch.float16)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rounded(dtype: torch.dtype) -> Cause:
    name = name_of(dtype)
    return Cause(
        f"rounded to {name}",
        BY_TOKEN,
        f"The values are right, and rounded to {name} at the end: remove the cast.",
        lambda e: is_rounding(e.found, e.wanted, e.wanted, dtype),
    )


@cause(
    "tokens in another order",
    *BY_TOKEN,
    fix="Each row is right, on another token: look at a view, transpose or sort of the tokens that "
    "is not undone.",
)
def _token_order(e: Evidence) -> Iterator[Tensor]:
    moved = rearranged(e.wanted, e.found, 0)
    if moved is not None and len(moved) > 1:
        yield moved


@cause(
    "negated",
    *BY_TOKEN,
    fix="The sign is turned round.",
)
def _negated(e: Evidence) -> Iterator[Tensor]:
    yield -e.wanted


@cause(
    "missing: all zero",
    *BY_TOKEN,
    "counts",
    fix="Nothing was written here: look for a buffer that was never filled, or a mask that is "
    "never true.",
)
def _zero(e: Evidence) -> Iterator[Tensor]:
    yield torch.zeros_like(e.wanted)


_scaled = cause(
    "scaled by a constant",
    *BY_TOKEN,
    fix="All values are off by one factor: look for a scale, a mean for a sum, or a factor that "
    "only one of the two applies.",
    general=True,
)(multiple_of_all)

_scaled_by_token = cause(
    "scaled by a factor for each token",
    *BY_TOKEN,
    fix="Within a token the proportions are right: look at how rows are normalised.",
    general=True,
)(multiple_of_rows)


ANY_STAGE = (
    *(_rounded(dtype) for dtype in NARROW),
    _token_order,
    _negated,
    _zero,
    _scaled,
    _scaled_by_token,
)
