"""Is a vector of E whole numbers a count of choices, be it a wrong one?

Letters: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.equivalence.sides.routed import computed_choices
from moetk.kernels.counting import mask_of, used_choices
from moetk.routing import TokenChoice


def loads(routing: TokenChoice, ctx: RouterContext) -> tuple[Tensor, ...]:
    """(E,) int64 each: the ways in which code is known to count these choices."""
    return tuple(
        ids_N.bincount(minlength=routing.num_experts) for ids_N in _counted_ids(routing, ctx)
    )


def is_load(counts_E: Tensor, known: Sequence[Tensor]) -> bool:
    """Whether the numbers are those of a known count, once or several times, in whatever order."""
    ordered_E, total = counts_E.sort().values, int(counts_E.sum())
    for load_E in known:
        times = total // max(int(load_E.sum()), 1)
        if times > 0 and torch.equal(ordered_E, times * load_E.sort().values):
            return True
    return False


def repeats(ids_TK: Tensor) -> Tensor:
    """(T, K) bool: choices whose expert the token has named in an earlier column."""
    same_TKK = ids_TK[:, :, None] == ids_TK[:, None, :]
    return same_TKK.tril(-1).any(-1) & (ids_TK >= 0)


def _counted_ids(routing: TokenChoice, ctx: RouterContext) -> Iterator[Tensor]:
    ids_TK, kept_TK = routing.experts_TK, computed_choices(routing) >= 0
    masks = [mask_of(ctx, len(ids_TK), name) for name in ("token_mask", "label_mask")]
    every_T = torch.ones_like(ids_TK[:, 0], dtype=torch.bool)
    for counted_T in (every_T, *(mask_T for mask_T in masks if mask_T is not None)):
        counted_TK = used_choices(ids_TK, counted_T)
        yield ids_TK[counted_TK]
        yield ids_TK[counted_TK & kept_TK]
        yield ids_TK[counted_TK & ~repeats(ids_TK)]
        yield ids_TK[:, :1][counted_TK[:, :1]]
        # A slot of -1 as the first expert or, from behind, as the last.
        yield ids_TK[counted_T].flatten().clamp(min=0)
        yield ids_TK[counted_T].flatten() % routing.num_experts
