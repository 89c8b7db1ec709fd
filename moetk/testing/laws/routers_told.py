"""What a routing tells of each token, whatever its kind, and where two of them differ."""

from __future__ import annotations

import torch
from torch import Tensor

from moetk.routing import ExpertChoice, Routing, SoftChoice, TokenChoice


def by_token(routing: Routing) -> dict[str, Tensor]:
    """What a routing says about each token: tensors whose first axis is T, whatever its kind.

    "chosen" and "weights" are always there: (T, K) for a TokenChoice, (T, E) for an ExpertChoice,
    (T, P) for a SoftChoice, whose dispatch and combine weights they are.
    """
    if isinstance(routing, TokenChoice):
        told = {"chosen": routing.experts_TK, "weights": routing.weights_TK}
        return told if routing.kept_TK is None else {**told, "kept": routing.kept_TK}
    if isinstance(routing, ExpertChoice):
        taken_TE = scatter_to_tokens(routing, torch.ones_like(routing.weights_EC))
        return {"chosen": taken_TE, "weights": scatter_to_tokens(routing, routing.weights_EC)}
    return {
        "chosen": routing.dispatch_BSP.flatten(0, 1),
        "weights": routing.combine_BSP.flatten(0, 1),
    }


def every_tensor(routing: Routing) -> dict[str, Tensor]:
    """All that a routing carries, its logits, scores and extras too."""
    plain = {name: t for name, t in vars(routing).items() if isinstance(t, Tensor)}
    return {**plain, **{f"extras {name}": t for name, t in routing.extras.items()}}


def scatter_to_tokens(routing: ExpertChoice, values_EC: Tensor) -> Tensor:
    """(T, E): values_EC summed where each expert's tokens are; empty places nowhere."""
    sums_ET = values_EC.new_zeros(routing.num_experts, routing.num_tokens + 1)
    rows_EC = routing.tokens_EC.masked_fill(routing.tokens_EC < 0, routing.num_tokens)
    return sums_ET.scatter_add(1, rows_EC, values_EC)[:, :-1].T


def matrix_of(routing: Routing) -> Tensor:
    """The routing matrix, tokens x experts: the weight of each pair, NaN where a token does not
    go. For a SoftChoice the combine weights, tokens x slots."""
    if isinstance(routing, SoftChoice):
        return by_token(routing)["weights"].detach().double()
    if isinstance(routing, ExpertChoice):
        taken_TE, weights_TE = (t.detach().double() for t in by_token(routing).values())
        return weights_TE.masked_fill(taken_TE == 0, float("nan"))
    used_TK = (routing.experts_TK >= 0) & (routing.experts_TK < routing.num_experts)
    ids_TK = routing.experts_TK.masked_fill(~used_TK, routing.num_experts)
    shape = (ids_TK.shape[0], routing.num_experts + 1)
    weights_TE = torch.zeros(shape, dtype=torch.float64)
    weights_TE.scatter_add_(1, ids_TK, routing.weights_TK.detach().double())
    counts_TE = torch.zeros(shape).scatter_add_(1, ids_TK, torch.ones(ids_TK.shape))
    return weights_TE.masked_fill(counts_TE == 0, float("nan"))[:, :-1]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    """(T,) bool: tokens about which two `by_token` differ in any bit; NaN is equal to NaN."""
    rows = []
    for name, left in a.items():
        right = b.get(name)
        if right is None or right.shape != left.shape:
            return torch.ones(len(left), dtype=torch.bool)
        same = (left == right) | ((left != left) & (right != right))
        rows.append(~same.flatten(1).all(1))
    return torch.stack(rows).any(0)
