"""Which choice each row of an expert's product belongs to.

Letters: T tokens, K choices a token, N rows of one product, C choices that name its expert.
A choice is known by its flat number, token * K + slot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def choices_of_rows(
    left_NA: Tensor, choices_C: Tensor, num_choices: int, inputs: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """(N,) int64: the choice of each row, -1 = a row that no choice asked for; None where it
    cannot be told.

    choices_C: ascending. num_choices: K. inputs: choices -> the rows that their experts should
    read. A row is found by its place (rows lie by token, or slot by slot) where the inputs agree
    there, else by its value.
    """
    by_slot_C = choices_C[(choices_C % max(num_choices, 1)).argsort(stable=True)]
    if len(left_NA) == len(choices_C):
        for order_C in (choices_C, by_slot_C):
            if _same(left_NA, inputs(order_C)):
                return order_C
    return _by_value(left_NA, choices_C, num_choices, inputs(choices_C))


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _by_value(
    left_NA: Tensor, choices_C: Tensor, num_choices: int, input_CA: Tensor
) -> Tensor | None:
    rows = len(left_NA)
    _, group = torch.cat([left_NA, input_CA]).unique(dim=0, return_inverse=True)
    open_choices: dict[int, list[int]] = {}
    for value, choice in zip(group[rows:].tolist(), choices_C.tolist(), strict=True):
        open_choices.setdefault(value, []).append(choice)
    found, unknown = [], False
    for value in group[:rows].tolist():
        waiting = open_choices.get(value, [])
        if len({choice // num_choices for choice in waiting}) > 1:
            return None  # two tokens alike: either may be meant
        found.append(waiting.pop(0) if waiting else -1)
        unknown |= found[-1] < 0
    if unknown and any(open_choices.values()):
        return None
    return torch.tensor(found, dtype=torch.int64, device=left_NA.device)
