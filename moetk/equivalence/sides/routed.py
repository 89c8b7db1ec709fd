"""The stages that a routing shows.

Letters: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.equivalence.trace import cotangent
from moetk.errors import EquivalenceError, MoetkError
from moetk.kernels.counting import count_choices, mask_of
from moetk.routing import Routing, TokenChoice

Given = Mapping[str, Tensor]


def routing_stages(routing: Routing, ctx: RouterContext) -> dict[str, Tensor]:
    """logits, scores and choice where the router keeps them; of a TokenChoice also indices,
    weights, counts of the unmasked tokens' choices and dispatched: those used and kept."""
    named = {"logits": "logits_TE", "scores": "scores_TE", "choice": "choice_TE"}
    stages = {
        stage: value
        for stage, name in named.items()
        if isinstance(value := getattr(routing, name, None), Tensor)
    }
    if isinstance(routing, TokenChoice):
        stages["indices"], stages["weights"] = routing.experts_TK, routing.weights_TK
        stages["counts"] = counts_of(routing.experts_TK, routing.num_experts, ctx)
        stages["dispatched"] = computed_choices(routing) >= 0
    return stages


def counts_of(ids_TK: Tensor, num_experts: int, ctx: RouterContext) -> Tensor:
    """(E,) int64."""
    return count_choices(ids_TK, num_experts, mask_of(ctx, len(ids_TK)))[0]


def computed_choices(routing: TokenChoice) -> Tensor:
    """(T, K) ids, -1 where a choice is unused or dropped."""
    ids_TK = routing.experts_TK
    return ids_TK if routing.kept_TK is None else ids_TK.masked_fill(~routing.kept_TK, -1)


def with_weights(routing: Routing, given: Given, who: str) -> Routing:
    """The routing with the given weights; a choice that the router dropped stays at 0.

    Raises EquivalenceError where they do not fit it.
    """
    if "weights" not in given:
        return routing
    weights_TK = given["weights"]
    if not isinstance(routing, TokenChoice) or weights_TK.shape != routing.experts_TK.shape:
        raise EquivalenceError(
            f"{who} cannot take weights {tuple(weights_TK.shape)}: its routing is a "
            f"{type(routing).__name__}"
            + (
                f" of {tuple(routing.experts_TK.shape)}; give indices of the weights' shape too."
                if isinstance(routing, TokenChoice)
                else ", which has no weight for each token's choices."
            )
        )
    if routing.kept_TK is not None:
        weights_TK = weights_TK.masked_fill(~routing.kept_TK, 0)
    return replace(routing, weights_TK=weights_TK)


def check_given(given: Given, num_tokens: int, num_experts: int | None, who: str) -> None:
    """Raise EquivalenceError for ids that are not (T, K) or that name no expert of this side; -1 =
    an unused slot. num_experts None = not known."""
    ids_TK = given.get("indices")
    if ids_TK is None:
        return
    if ids_TK.ndim != 2 or len(ids_TK) != num_tokens:
        raise EquivalenceError(
            f"{who} cannot take indices {tuple(ids_TK.shape)}: it has T={num_tokens} tokens."
        )
    if num_experts is not None and ids_TK.numel() and int(ids_TK.max()) >= num_experts:
        raise EquivalenceError(
            f"{who} cannot take indices with id {int(ids_TK.max())}: it has {num_experts} experts."
        )


@contextmanager
def forcing(given: Given, who: str) -> Iterator[None]:
    """moetk's own refusals of a given stage, as EquivalenceError."""
    try:
        yield
    except EquivalenceError:
        raise
    except MoetkError as error:
        if not given:
            raise
        raise EquivalenceError(f"{who} cannot take given {', '.join(given)}: {error}") from error


def loss_stage(losses: Sequence[Any], routing: Routing, ctx: RouterContext) -> dict[str, Tensor]:
    """(n,): each attached loss of the router's own routing, with its graph."""
    if not losses:
        return {}
    return {"losses": torch.stack([loss(routing, ctx) for loss in losses])}


def output_stage(y_TH: Tensor, combined: Tensor) -> dict[str, Tensor]:
    """What the part returned, unless that is its experts' sum, in value and in gradient.

    combined: y's shape, or (B, S, H)."""
    if torch.equal(y_TH, combined.reshape(y_TH.shape)) and _passes_gradients(y_TH, combined):
        return {}
    return {"output": y_TH}


def _passes_gradients(y_TH: Tensor, combined: Tensor) -> bool:
    if not (y_TH.requires_grad and combined.requires_grad):
        return y_TH.requires_grad == combined.requires_grad
    arriving_TH = cotangent(y_TH, seed=0)
    (found,) = torch.autograd.grad(
        y_TH, [combined], arriving_TH, allow_unused=True, retain_graph=True
    )
    return found is not None and torch.equal(found.reshape(y_TH.shape), arriving_TH)
