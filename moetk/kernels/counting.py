"""Counting choices: one way to count for losses, controllers, metrics and dispatch.

Letters: T tokens, E experts, K choices a token, R runs of tokens that share one count.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.errors import MoeDtypeError, MoeShapeError

Sequences: TypeAlias = int | Tensor
"""B = B sequences of equal length; or (T,) int64 in [0, T), which sequence each token is of."""


def mask_of(ctx: RouterContext, num_tokens: int, name: str = "token_mask") -> Tensor | None:
    """ctx.token_mask, or another mask of the context: (T,) bool, None where there is none.

    Raises as `check_mask`.
    """
    mask_T: Tensor | None = getattr(ctx, name)
    if mask_T is not None:
        check_mask(f"ctx.{name}", mask_T, num_tokens)
    return mask_T


def check_mask(name: str, mask_T: Tensor, num_tokens: int) -> None:
    """Raise MoeShapeError unless the mask is (T,), where one of (1,) would be stretched over all
    tokens, and MoeDtypeError unless it is bool."""
    check_length(name, mask_T, num_tokens)
    if mask_T.dtype != torch.bool:
        raise MoeDtypeError(f"{name} is {mask_T.dtype}; a mask is torch.bool: pass mask.bool().")


def check_length(name: str, tensor_T: Tensor, num_tokens: int) -> None:
    """Raise MoeShapeError unless the tensor is (T,)."""
    if tuple(tensor_T.shape) != (num_tokens,):
        raise MoeShapeError(
            f"{name} is {tuple(tensor_T.shape)}, expected (T={num_tokens},): flatten it in the "
            "order of x_TH."
        )


def used_choices(experts_TK: Tensor, counted_T: Tensor | None = None) -> Tensor:
    """(T, K) bool: the choices that counted tokens made. Slots of -1 are none; dropped ones are.

    counted_T: bool, None = all. Raises as `check_mask`.
    """
    used_TK = experts_TK >= 0
    if counted_T is None:
        return used_TK
    check_mask("counted_T", counted_T, experts_TK.shape[0])
    return used_TK & counted_T[:, None]


def count_choices(
    experts_TK: Tensor,
    num_experts: int,
    counted_T: Tensor | None = None,
    sequences: Sequences = 1,
) -> Tensor:
    """(R, E) int64: how many `used_choices` name each expert, by sequence.

    R is the number of sequences; or T where `sequences` is a tensor, and then row t holds the
    counts of token t's own sequence (their number is on the device, so it cannot be a shape).
    Dropped choices keep their id and count: who counts must see what was wanted, not what had room.

    Raises as `check_mask`, and MoeShapeError when a tensor of sequences is not (T,) or T tokens are
    not `sequences` runs of equal length.
    """
    num_tokens, top_k = experts_TK.shape
    ones_TK = used_choices(experts_TK, counted_T).long()
    bins_TK = experts_TK.clamp(min=0)
    if isinstance(sequences, Tensor):
        check_length("sequences", sequences, num_tokens)
        bins_TK = bins_TK + sequences[:, None] * num_experts
        sums = ones_TK.new_zeros(num_tokens * num_experts)
        sums = sums.scatter_add(0, bins_TK.flatten(), ones_TK.flatten())
        return sums.view(num_tokens, num_experts)[sequences]
    length = num_tokens // max(sequences, 1)
    if sequences * length != num_tokens:
        raise MoeShapeError(
            f"sequences={sequences}, but T={num_tokens} tokens are no {sequences} runs of one "
            "length; pass which sequence each token is of, (T,) int64."
        )
    shape = (sequences, length * top_k)
    sums_RE = ones_TK.new_zeros(sequences, num_experts)
    return sums_RE.scatter_add(1, bins_TK.reshape(shape), ones_TK.reshape(shape))
