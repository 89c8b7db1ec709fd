"""What became of the choices: dropped, unserved, repeated, made together.

Letters: T tokens, E experts, K choices a token, C places of an expert, N pairs of the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.dispatch import dropped
from moetk.errors import MoeShapeError, UnsupportedRoutingError
from moetk.kernels.counting import mask_of, used_choices
from moetk.routing import ExpertChoice, Routing, TokenChoice


def chosen(routing: Routing) -> tuple[Tensor, Tensor]:
    """(N,) int64 experts and (N,) int64 tokens, pair by pair; -1 in either = not used.

    Raises UnsupportedRoutingError for a SoftChoice.
    """
    if isinstance(routing, TokenChoice):
        ids_TK = routing.experts_TK
        rows_T = torch.arange(ids_TK.shape[0], device=ids_TK.device)
        return ids_TK.flatten(), rows_T[:, None].expand_as(ids_TK).flatten()
    if isinstance(routing, ExpertChoice):
        # Without tokens every place is empty, and an empty place has no row to point to.
        ids_EC = routing.tokens_EC if routing.num_tokens else routing.tokens_EC[:, :0]
        rows_E = torch.arange(ids_EC.shape[0], device=ids_EC.device)
        return rows_E[:, None].expand_as(ids_EC).flatten(), ids_EC.flatten()
    raise UnsupportedRoutingError(
        f"This {type(routing).__name__} uses every expert for every token: nothing is chosen or "
        "dropped, and there is nothing to count."
    )


def chosen_mask(routing: Routing) -> Tensor:
    """(T, E) bool: token t and expert e chose one another. Raises as `chosen`."""
    experts_N, tokens_N = chosen(routing)
    num_tokens, num_experts = _num_tokens(routing), routing.num_experts
    used_N = (experts_N >= 0) & (tokens_N >= 0)
    pairs_N = tokens_N.clamp(min=0) * num_experts + experts_N.clamp(min=0)
    sums = pairs_N.new_zeros(num_tokens * num_experts).scatter_add(0, pairs_N, used_N.long())
    return sums.view(num_tokens, num_experts) > 0


def unmasked_tokens(routing: Routing, ctx: RouterContext | None) -> Tensor | None:
    """(T,) bool, ctx.token_mask; None = all. Raises MoeShapeError when it is not (T,)."""
    return None if ctx is None else mask_of(ctx, _num_tokens(routing))


def drop_fraction(routing: Routing, ctx: RouterContext | None = None) -> Tensor:
    """Dropped choices over wanted choices of unmasked tokens, fp32; 0 where nothing was wanted, and
    for the kinds of routing that drop nothing."""
    lost = dropped(routing, ctx)
    if not isinstance(routing, TokenChoice):
        return lost.float()
    wanted = used_choices(routing.experts_TK, unmasked_tokens(routing, ctx)).sum()
    return lost.float() / wanted.clamp(min=1)


def unserved_fraction(routing: Routing, ctx: RouterContext | None = None) -> Tensor:
    """Unmasked tokens that no expert serves, all choices dropped or none made, over unmasked
    tokens; fp32, 0 without tokens. Raises as `chosen`."""
    if isinstance(routing, TokenChoice) and routing.kept_TK is not None:
        served_T = ((routing.experts_TK >= 0) & routing.kept_TK).any(-1)
    else:
        served_T = chosen_mask(routing).any(-1)
    unmasked_T = unmasked_tokens(routing, ctx)
    if unmasked_T is None:
        unmasked_T = torch.ones_like(served_T)
    return 1 - _ratio(served_T & unmasked_T, unmasked_T, empty=1)


def saturation(early: Routing, late: Routing, ctx: RouterContext | None = None) -> Tensor:
    """The share of `late`'s choices that `early` made too, fp32, 1 where there are none.

    Early and late in training on one batch: router saturation (arXiv 2409.02060, section 5.1);
    1 minus it, between two engines or precisions, is the rate at which routing flips. Raises
    MoeShapeError when the two are not of the same tokens and experts; else as `chosen`.
    """
    before_TE, after_TE = chosen_mask(early), chosen_mask(late)
    if before_TE.shape != after_TE.shape:
        raise MoeShapeError(
            f"saturation compares (T, E) = {tuple(before_TE.shape)} with {tuple(after_TE.shape)}; "
            "route the same tokens over the same experts."
        )
    unmasked_T = unmasked_tokens(late, ctx)
    if unmasked_T is not None:
        after_TE = after_TE & unmasked_T[:, None]
    return _ratio(before_TE & after_TE, after_TE, empty=1)


def co_activation(routing: Routing, ctx: RouterContext | None = None) -> Tensor:
    """(E, E) fp32: of the tokens that chose expert i (row), the share that chose j (column) too.

    1 on the diagonal; a row of zeros where no token chose i. arXiv 2409.02060, section 5.2.
    Raises as `chosen`.
    """
    chosen_TE = chosen_mask(routing)
    unmasked_T = unmasked_tokens(routing, ctx)
    if unmasked_T is not None:
        chosen_TE = chosen_TE & unmasked_T[:, None]
    together_EE = chosen_TE.float().T @ chosen_TE.float()
    return together_EE / together_EE.diagonal()[:, None].clamp(min=1)


def _num_tokens(routing: Routing) -> int:
    if isinstance(routing, ExpertChoice):
        return routing.num_tokens
    if isinstance(routing, TokenChoice):
        return routing.experts_TK.shape[0]
    return routing.dispatch_BSP.shape[0] * routing.dispatch_BSP.shape[1]


def _ratio(part: Tensor, whole: Tensor, empty: float) -> Tensor:
    total = whole.sum()
    return torch.where(total > 0, part.sum() / total.clamp(min=1), empty)
