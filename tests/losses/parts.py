"""Routings that carry every field a loss may read."""

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.routing import TokenChoice

ANY = RouterContext()


def route(T: int, E: int, K: int, seed: int = 0, sigmoid: bool = False) -> TokenChoice:
    """A noisy top-k routing with every field a loss may read; its leaf is extras["leaf"]."""
    g = torch.Generator().manual_seed(seed)
    leaf_TE = torch.randn(T, E, generator=g).requires_grad_()
    scores_TE = leaf_TE.sigmoid() if sigmoid else leaf_TE.softmax(-1)
    std_TE = torch.rand(T, E, generator=g) + 0.1
    choice_TE = leaf_TE + std_TE * torch.randn(T, E, generator=g)
    experts_TK = choice_TE.topk(K, -1).indices
    return TokenChoice(
        experts_TK,
        scores_TE.gather(-1, experts_TK),
        E,
        leaf_TE,
        scores_TE,
        choice_TE,
        extras={"std_TE": std_TE, "leaf": leaf_TE},
    )


def ids(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows)
