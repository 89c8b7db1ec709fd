"""Which tokens a loss averages over, and which experts they asked for.

Letters: T tokens, E experts, K choices a token, R equal runs of tokens that share one count.
"""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.errors import MoeShapeError, UnsupportedRoutingError
from moetk.routing import Routing, TokenChoice
from moetk.settings import check_number

Sequences: TypeAlias = int | Tensor
"""B = B sequences of equal length; or (T,) int64 in [0, T), which sequence each token is of."""


def counted_tokens(ctx: RouterContext, num_tokens: int) -> Tensor | None:
    """(T,) bool: the tokens that carry a label, else those that are no padding; None = all.

    Raises MoeShapeError when the mask is not (T,).
    """
    name = "token_mask" if ctx.label_mask is None else "label_mask"
    mask_T = cast("Tensor | None", getattr(ctx, name))
    if mask_T is not None and tuple(mask_T.shape) != (num_tokens,):
        raise MoeShapeError(
            f"ctx.{name} is {tuple(mask_T.shape)}, expected (T={num_tokens},): flatten it in the "
            "order of x_TH."
        )
    return mask_T


def mean_over(values_T: Tensor, counted_T: Tensor | None) -> Tensor:
    """The mean over the counted tokens; 0, with a graph, where there are none."""
    if counted_T is None:
        return values_T.sum() / max(values_T.shape[0], 1)
    # A choice, not a product: NaN in an uncounted row stays there.
    return torch.where(counted_T, values_T, 0).sum() / counted_T.sum().clamp(min=1)


def count_choices(
    experts_TK: Tensor,
    num_experts: int,
    counted_T: Tensor | None = None,
    sequences: Sequences = 1,
) -> Tensor:
    """(R, E) fp32: how many choices of the counted tokens name each expert, by sequence.

    R is the number of sequences; or T where `sequences` is a tensor, and then row t holds the
    counts of token t's own sequence (their number is on the device, so it cannot be a shape).
    Unused slots (-1) count nothing. Dropped choices keep their id and count: a loss must see what
    was wanted, not what had room.
    """
    num_tokens, top_k = experts_TK.shape
    used_TK = experts_TK >= 0
    if counted_T is not None:
        used_TK = used_TK & counted_T[:, None]
    ones_TK, bins_TK = used_TK.float(), experts_TK.clamp(min=0)
    if isinstance(sequences, Tensor):
        bins_TK = bins_TK + sequences[:, None] * num_experts
        sums = ones_TK.new_zeros(num_tokens * num_experts)
        sums = sums.scatter_add(0, bins_TK.flatten(), ones_TK.flatten())
        return sums.view(num_tokens, num_experts)[sequences]
    shape = (sequences, num_tokens // max(sequences, 1) * top_k)
    sums_RE = ones_TK.new_zeros(sequences, num_experts)
    return sums_RE.scatter_add(1, bins_TK.reshape(shape), ones_TK.reshape(shape))


def as_token_choice(routing: Routing, reader: str) -> TokenChoice:
    """The routing, where tokens choose; raises UnsupportedRoutingError where they do not."""
    if not isinstance(routing, TokenChoice):
        raise UnsupportedRoutingError(
            f"{reader} counts the experts that tokens chose, and this "
            f"{type(routing).__name__} is balanced by construction. Leave this loss out."
        )
    return routing


def check_coefficient(loss: Any) -> None:
    """Raise RouterConfigError unless the loss's coefficient is a finite number >= 0."""
    check_number(type(loss).__name__, "coefficient", loss.coefficient, least=0)
