"""Which choice each row of the experts' products belongs to.

Letters: T tokens, K choices a token, N rows of one product, C choices that name its expert.
A choice is known by its flat number, token * K + slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Order = Literal["token", "slot"]
Part = tuple[Tensor, Tensor]  # the rows of one expert, (N, A), and its choices, (C,) ascending


def choices_of_rows(
    parts: Sequence[Part],
    num_choices: int,
    inputs: Callable[[Tensor], Tensor],
    declared: Order | None = None,
    told: list[Tensor] | None = None,
    tokens_TA: Tensor | None = None,
) -> list[Tensor] | None:
    """For each part (N,) int64: the choice of each row, -1 = a row that no choice asked for. None
    where it cannot be told.

    num_choices: K. inputs: choices -> the rows that their experts should read. Rows lie by token or
    slot by slot where the inputs agree with that in all parts, else each is found by its value.
    declared: which order it is where tokens have equal inputs and both agree; None = not known.
    told: the choices of each part's rows as the code itself sorted them; None = not known.
    tokens_TA: the input of every token. Where an expert has as many rows as choices, and among them
    a token that did not choose it, rows lie in whichever order agrees with more of the inputs: the
    fault is what the experts read. None = rows with other values cannot be told.
    """
    if told is not None and _agree(parts, told, inputs):
        return told
    by_token = [choices_C for _, choices_C in parts]
    by_slot = [c[(c % max(num_choices, 1)).argsort(stable=True)] for c in by_token]
    fitting: dict[Order, list[Tensor]] = {}
    if _agree(parts, by_token, inputs):
        fitting["token"] = by_token
    if _agree(parts, by_slot, inputs):
        fitting["slot"] = by_slot
    if declared in fitting:
        return fitting[declared]
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if fitting:
        same = all(torch.equal(a, b) for a, b in zip(by_token, by_slot, strict=True))
        return by_token if same else None
    found = [_by_value(left, choices, num_choices, inputs(choices)) for left, choices in parts]
    if all(one is not None for one in found):
        return [one for one in found if one is not None]
    if tokens_TA is None or not _of_other_tokens(parts, inputs, tokens_TA):
        return None
    orders = (by_slot, by_token) if declared == "slot" else (by_token, by_slot)
    return max(orders, key=lambda order: _agreeing(parts, order, inputs))  # the first of equals


def _agree(
    parts: Sequence[Part], orders: Sequence[Tensor], inputs: Callable[[Tensor], Tensor]
) -> bool:
    return all(
        len(left_NA) == len(order_C) and _same(left_NA, inputs(order_C))
        for (left_NA, _), order_C in zip(parts, orders, strict=True)
    )


def _of_other_tokens(
    parts: Sequence[Part], inputs: Callable[[Tensor], Tensor], tokens_TA: Tensor
) -> bool:
    """As many rows as choices in each part, every row a token, and some a token that did not choose
    that expert."""
    strange = False
    for left_NA, choices_C in parts:
        if len(left_NA) != len(choices_C) or not _within(left_NA, tokens_TA):
            return False
        strange = strange or not _within(left_NA, inputs(choices_C))
    return strange


def _within(rows_NA: Tensor, among_MA: Tensor) -> bool:
    """Every row is one of the others."""
    _, group = torch.cat([rows_NA, among_MA]).unique(dim=0, return_inverse=True)
    return set(group[: len(rows_NA)].tolist()) <= set(group[len(rows_NA) :].tolist())


def _agreeing(
    parts: Sequence[Part], orders: Sequence[Tensor], inputs: Callable[[Tensor], Tensor]
) -> int:
    pairs = zip(parts, orders, strict=True)
    return sum(int((left == inputs(order)).all(-1).sum()) for (left, _), order in pairs)


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _by_value(
    left_NA: Tensor, choices_C: Tensor, num_choices: int, input_CA: Tensor
) -> Tensor | None:
    rows = len(left_NA)
    _, group = torch.cat([left_NA, input_CA]).unique(dim=0, return_inverse=True)
    waiting: dict[int, list[int]] = {}
    for value, choice in zip(group[rows:].tolist(), choices_C.tolist(), strict=True):
        waiting.setdefault(value, []).append(choice)
    if any(len({choice // num_choices for choice in alike}) > 1 for alike in waiting.values()):
        return None  # two tokens with equal inputs: either may be meant
    found = [waiting[value].pop(0) if waiting.get(value) else -1 for value in group[:rows].tolist()]
    if -1 in found and any(waiting.values()):
        return None
    return torch.tensor(found, dtype=torch.int64, device=left_NA.device)
