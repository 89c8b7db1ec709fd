"""The fewest tokens on which two implementations still differ in the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from moetk.equivalence.comparison import compare
from moetk.equivalence.report import Question, Report
from moetk.errors import MoetkError

RUNS = 64  # of compare, at most: a reader waits for them


def ask(question: Question) -> Report:
    """Compare again."""
    return compare(
        question.a,
        question.b,
        question.x,
        ctx=question.ctx,
        routing=question.routing,
        seed=question.seed,
    )


def narrowed(report: Report) -> Report:
    """The report of the fewest tokens, or whole sequences where x is (B, S, H), whose first stage
    that differs is the same; the report itself where no smaller input shows it."""
    first = report.first
    assert first is not None
    smallest = report

    def still(units: Sequence[int]) -> bool:
        nonlocal smallest
        try:
            found = ask(part(report.question, units))
        except MoetkError:  # not every part runs on fewer tokens: a stored trace does not
            return False
        if found.first is None or found.first.stage != first.stage:
            return False
        smallest = found
        return True

    fewest(range(len(report.question.x)), still)
    return smallest


def part(question: Question, units: Sequence[int]) -> Question:
    """The question about some of its tokens, or sequences where x is (B, S, H)."""
    x = question.x
    chosen = torch.tensor(units, dtype=torch.int64, device=x.device)
    num_tokens = x.shape[:-1].numel()
    tokens = torch.arange(num_tokens, device=x.device).view(x.shape[:-1])[chosen].flatten()

    def pick(value: Any) -> Any:
        a_token_each = isinstance(value, Tensor) and value.ndim and len(value) == num_tokens
        return value[tokens.to(value.device)] if a_token_each else value

    ctx = tree_map(pick, question.ctx)
    if ctx is not None and ctx.batch_shape is not None:
        shape = (len(units), x.shape[1]) if x.ndim == 3 else None
        ctx = replace(ctx, batch_shape=shape)
    return replace(question, x=x[chosen], ctx=ctx, routing=tree_map(pick, question.routing))


def fewest(units: Sequence[int], fails: Callable[[Sequence[int]], bool]) -> list[int]:
    """A subset that still fails and that no chunk can be dropped from, by delta debugging (Zeller
    and Hildebrandt, TSE 28(2), 2002), within RUNS tries. `units` itself is known to fail."""
    left, pieces, runs = list(units), 2, 0
    while len(left) > 1 and runs < RUNS:
        size = -(-len(left) // pieces)
        chunks = [left[start : start + size] for start in range(0, len(left), size)]
        others = [[u for u in left if u not in chunk] for chunk in chunks] if pieces > 2 else []
        for index, tried in enumerate([*chunks, *others]):
            runs += 1
            if runs <= RUNS and fails(tried):
                left, pieces = tried, 2 if index < len(chunks) else max(pieces - 1, 2)
                break
        else:
            if pieces >= len(left):
                break
            pieces = min(2 * pieces, len(left))
    return left
