"""What every loss asks first: which tokens it averages over, and whether these choose at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.errors import UnsupportedRoutingError
from moetk.kernels.counting import check_mask, mask_of
from moetk.routing import Routing, TokenChoice
from moetk.settings import check_number


def counted_tokens(ctx: RouterContext, num_tokens: int) -> Tensor | None:
    """(T,) bool: the tokens that carry a label, else those that are no padding; None = all.

    Raises MoeShapeError when the mask is not (T,), MoeDtypeError when it is not bool.
    """
    return mask_of(ctx, num_tokens, "token_mask" if ctx.label_mask is None else "label_mask")


def mean_over(values_T: Tensor, counted_T: Tensor | None) -> Tensor:
    """The mean over the counted tokens; 0, with a graph, where there are none.

    Raises MoeShapeError when counted_T is not (T,), MoeDtypeError when it is not bool.
    """
    if counted_T is None:
        return values_T.sum() / max(values_T.shape[0], 1)
    check_mask("counted_T", counted_T, values_T.shape[0])
    # A choice, not a product: NaN in an uncounted row stays there.
    return torch.where(counted_T, values_T, 0).sum() / counted_T.sum().clamp(min=1)


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
