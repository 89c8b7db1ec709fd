"""What a backward without a derivative of its own says when it is asked for one."""

from __future__ import annotations

import torch

from moetk.errors import SecondOrderError


def refuse_second_order(name: str, instead: str) -> None:
    """Called first in a backward: raises SecondOrderError under create_graph=True.

    name: whose backward it is. instead: what to use where second derivatives are needed.
    torch's `once_differentiable` raises only where the incoming gradient has a graph. A loss's own
    has none; what comes back would count as a constant, and a gradient penalty lose terms unseen.
    """
    if torch.is_grad_enabled():
        raise SecondOrderError(
            f"{name}: create_graph=True asks for the gradient of a gradient, and its backward "
            f"computes the first alone. Use {instead}."
        )
