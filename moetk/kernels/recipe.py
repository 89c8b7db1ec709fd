"""What a router does after its logits, as data: one op runs every recipe (`moetk.kernels.choose`).

Letters: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch

from moetk.errors import RouterConfigError

Score: TypeAlias = Literal["softmax", "sigmoid", "sqrt_softplus", "identity"]


class Recipe(NamedTuple):
    """From logits to experts and weights; each step is rounded to the score dtype, as torch would.

    score: softmax over E, sigmoid, sqrt(softplus), or the logits themselves.
    over_chosen: the weights are a softmax over the K chosen scores, not those scores.
    groups, top_groups: experts of the top_groups best groups alone can be chosen; a group of
        neighbouring experts is worth its two best. groups=1 = no limit.
    renormalise, eps: weights / (their sum + eps). scale: what the weights are multiplied by.
    score_dtype: what scores are computed in; None = the dtype of the logits.

    A choice bias is no part of it: it changes from step to step and is handed to the op. Ties go to
    the lower id, and weights are added up in the order of the columns, descending choice.
    """

    score: Score
    over_chosen: bool = False
    groups: int = 1
    top_groups: int = 1
    renormalise: bool = False
    eps: float = 0.0
    scale: float = 1.0
    score_dtype: torch.dtype | None = None

    @property
    def limited(self) -> bool:
        """True where groups rule experts out."""
        return self.top_groups < self.groups


# The arguments of an operator that takes a recipe: these are numbers and names.
FIELDS = (
    "str score, bool over_chosen, int groups, int top_groups, bool renormalise, float eps, "
    "float scale, ScalarType? score_dtype"
)


def check_recipe(recipe: Recipe, num_experts: int, top_k: int) -> None:
    """Raise RouterConfigError unless `recipe` can choose top_k of num_experts experts."""
    if recipe.score not in get_args(Score):
        names = ", ".join(repr(name) for name in get_args(Score))
        raise RouterConfigError(f"Recipe: score={recipe.score!r} is none of {names}.")
    if not 1 <= top_k <= num_experts:
        raise RouterConfigError(
            f"Recipe: top_k={top_k} of {num_experts} experts; need 1 <= top_k <= {num_experts}."
        )
    if not recipe.limited:
        return
    size, left = divmod(num_experts, recipe.groups)
    if left:
        raise RouterConfigError(
            f"Recipe: groups={recipe.groups} does not divide num_experts={num_experts}."
        )
    if size < 2 or not top_k <= recipe.top_groups * size:
        raise RouterConfigError(
            f"Recipe: top_groups={recipe.top_groups} of groups={recipe.groups} hold "
            f"{max(recipe.top_groups, 0) * size} experts, {size} a group; need two a group, and "
            f"top_k={top_k} in all."
        )
