"""Choosing: which experts a token gets, which tokens an expert gets, and what still fits.

Letters: T tokens, E experts, K choices a token, G groups of experts, M experts of one group,
B sequences, S positions, C tokens an expert takes, N = T * K choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.errors import MoeShapeError, ReplayError, RouterConfigError
from moetk.kernels.counting import mask_of, used_choices
from moetk.settings import is_number

Tie: TypeAlias = Literal["low", "stock"]


def largest(x_RN: Tensor, k: int, tie: Tie = "low") -> Tensor:
    """Columns of the k largest values of each row, (R, k) int64, in descending order.

    tie="low": of equal values the lower column comes first, on every device. NaN is larger than
    any number, as in torch.topk, and equal to NaN. tie="stock": exactly `torch.topk(x_RN, k)`.

    Raises RouterConfigError when a row has fewer than k columns, or on another `tie`.
    """
    if not 0 <= k <= x_RN.shape[1]:
        raise RouterConfigError(
            f"k={k}, but there are {x_RN.shape[1]} to choose from; need 0 <= k <= {x_RN.shape[1]}."
        )
    if tie == "stock":
        return x_RN.topk(k).indices
    if tie != "low":
        raise RouterConfigError(f"tie={tie!r} is not a rule; use tie='low' or tie='stock'.")
    if k == 1:
        return x_RN.argmax(-1, keepdim=True)
    if x_RN.device.type == "cpu" and not torch.compiler.is_compiling():
        return _largest_on_cpu(x_RN, k)
    return torch.sort(x_RN, dim=-1, descending=True, stable=True).indices[:, :k]


def _largest_on_cpu(x_RN: Tensor, k: int) -> Tensor:
    # A full sort costs three times a topk here, and looking at a value costs no wait: sort only
    # the rows where two of the first k + 1 values are equal (or NaN, which is never greater).
    values, ids = x_RN.detach().topk(min(k + 1, x_RN.shape[1]))
    ids, falls = ids[:, :k], values[:, :-1] > values[:, 1:]
    if not bool(falls.all()):
        rows = (~falls).any(-1).nonzero()[:, 0]
        ordered = torch.sort(x_RN.detach()[rows], dim=-1, descending=True, stable=True).indices
        ids = ids.index_copy(0, rows, ordered[:, :k])
    return ids


def _surely_used(experts_TK: Tensor) -> bool:
    """True where no slot is -1 and knowing it costs no wait."""
    if experts_TK.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return experts_TK.numel() == 0 or int(experts_TK.min()) >= 0


def top_k(choice_TE: Tensor, k: int, ctx: RouterContext, tie: Tie = "low") -> Tensor:
    """Ids of the k best experts of each token, (T, k) int64, best first; or the replayed choice.

    tie: see `largest`. Raises RouterConfigError (k > E), ReplayError (a replay of other tokens).
    """
    return ctx.replayed(largest(choice_TE, k, tie))


def top_k_as_summed(
    choice_TE: Tensor, k: int, ctx: RouterContext, tie: Tie = "low"
) -> tuple[Tensor, Tensor | None]:
    """`top_k`, with columns in the order in which the stock router adds the weights up.

    transformers' deepseek_v3 and deepseek_v4 routers call topk(sorted=False) and normalise in the
    order which that leaves; any other order of three or more addends rounds differently, forward
    and backward. With tie="stock" this returns (picked_TK, order_TK): weigh picked_TK, then
    `in_order(..., order_TK)` puts ids and weights into descending choice. With tie="low" the
    columns are in that order already, and order_TK is None.

    A replayed row keeps its recorded columns; where it names what this call would have chosen, it
    is summed as it was when it was recorded.
    """
    if tie != "stock":
        return top_k(choice_TE, k, ctx, tie), None
    values_TK, picked_TK = choice_TE.topk(k, sorted=False)
    order_TK = values_TK.argsort(dim=-1, descending=True, stable=True)
    if ctx.replay is None:
        return picked_TK, order_TK
    replayed_TK = ctx.replayed(picked_TK)
    if replayed_TK.shape != picked_TK.shape:
        return replayed_TK, None
    same_T1 = (picked_TK.gather(1, order_TK) == replayed_TK).all(-1, keepdim=True)
    as_recorded_K = torch.arange(k, device=picked_TK.device)
    return (
        torch.where(same_T1, picked_TK, replayed_TK),
        torch.where(same_T1, order_TK, as_recorded_K),
    )


def in_order(x_TK: Tensor, order_TK: Tensor | None) -> Tensor:
    """Columns of x_TK as order_TK names them; None = as they are."""
    return x_TK if order_TK is None else x_TK.gather(1, order_TK)


def gather(scores_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """The scores of the chosen experts, (T, K), in the dtype of the scores; 0 at id -1."""
    if _surely_used(experts_TK):
        return scores_TE.gather(1, experts_TK)
    chosen_TK = scores_TE.gather(1, experts_TK.clamp(min=0))
    return chosen_TK.masked_fill(experts_TK < 0, 0)


def softmax_over(logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Softmax over the chosen logits alone, (T, K), in the dtype of the logits; 0 at id -1."""
    if _surely_used(experts_TK):
        return logits_TE.gather(1, experts_TK).softmax(-1)
    unused_TK = experts_TK < 0
    lowest = torch.finfo(logits_TE.dtype).min  # finite: a row of nothing but -1 is 0, not NaN
    chosen_TK = logits_TE.gather(1, experts_TK.clamp(min=0)).masked_fill(unused_TK, lowest)
    return chosen_TK.softmax(-1).masked_fill(unused_TK, 0)


def normalise(weights_TK: Tensor, eps: float = 0.0) -> Tensor:
    """weights / (their sum + eps), row by row. A row of zeros (nothing chosen) stays zero."""
    total_T1 = weights_TK.sum(-1, keepdim=True)
    if eps:
        total_T1 = total_T1 + eps
    return weights_TK / (total_T1 + (total_T1 == 0))


def best_two(choice_TGM: Tensor) -> Tensor:
    """A group is worth its two best experts together (DeepSeek-V3, arXiv 2412.19437)."""
    return choice_TGM.topk(2, dim=-1).values.sum(-1)


def best_one(choice_TGM: Tensor) -> Tensor:
    """A group is worth its best expert (DeepSeek-V2, arXiv 2405.04434)."""
    return choice_TGM.amax(-1)


def in_best_groups(
    choice_TE: Tensor,
    groups: int,
    top_groups: int,
    tie: Tie = "low",
    worth: Callable[[Tensor], Tensor] = best_two,
) -> Tensor:
    """choice_TE with -inf outside each token's `top_groups` best groups of neighbouring experts.

    worth: (T, G, M) -> (T, G), what a group is judged by. -inf, not 0: choice scores may be
    negative once a bias is added. Raises RouterConfigError when E does not divide into groups.
    """
    if top_groups >= groups:
        return choice_TE
    num_tokens, num_experts = choice_TE.shape
    if num_experts % groups:
        raise RouterConfigError(f"groups={groups} does not divide num_experts={num_experts}.")
    choice_TGM = choice_TE.reshape(num_tokens, groups, num_experts // groups)
    worth_TG = worth(choice_TGM)
    best_TG = largest(worth_TG, top_groups, tie)
    outside_TG = torch.ones_like(worth_TG, dtype=torch.bool).scatter(1, best_TG, False)
    return choice_TGM.masked_fill(outside_TG[..., None], -math.inf).flatten(1)


def expert_capacity(num_tokens: int, k: int, num_experts: int, factor: float) -> int:
    """ceil(factor * num_tokens * k / num_experts), with the factor taken to six decimals.

    In whole numbers: in binary 1.1 * 50 is a little more than 55, and its ceiling would be 56.
    Raises RouterConfigError when the factor is below 1e-6 or no finite number.
    """
    if not (is_number(factor) and factor >= 1e-6):
        raise RouterConfigError(f"capacity_factor={factor!r}; need a finite number above 0.")
    millionths = round(factor * 1_000_000)
    return -(-millionths * num_tokens * k // (1_000_000 * num_experts))


def within_capacity(
    experts_TK: Tensor,
    num_experts: int,
    capacity_factor: float,
    ctx: RouterContext,
    priority_T: Tensor | None = None,
) -> Tensor:
    """Which choices find a place at their expert, (T, K) bool.

    Each expert has ceil(capacity_factor * S * K / E) places in each sequence (a packed batch is one
    sequence). All first choices are served before any second choice, and within a column the
    earlier token first; with priority_T, the token with the higher priority first (arXiv
    2106.05974). Unused slots (-1) and padding (ctx.token_mask) take no place and are not kept.

    Places are ranks in a stable sort: a topk over the 0/1 mask would not serve the first comers.
    Raises MoeShapeError when ctx.token_mask is not (T,) or ctx.batch_shape not of T tokens.
    """
    (num_tokens, k), device = experts_TK.shape, experts_TK.device
    batch, length = sequences(ctx, num_tokens)
    capacity = expert_capacity(length, k, num_experts, capacity_factor)

    token_T = torch.arange(num_tokens, device=device)
    sequence_T1 = (token_T // max(length, 1))[:, None]
    wanted_TK = used_choices(experts_TK, mask_of(ctx, num_tokens))
    queues = batch * num_experts  # one for each expert of each sequence, and one of no interest
    queue_N = torch.where(wanted_TK, sequence_T1 * num_experts + experts_TK, queues).flatten()

    if priority_T is not None:
        token_T = priority_T.argsort(descending=True, stable=True)
    arrival_N = (token_T * k + torch.arange(k, device=device)[:, None]).flatten()
    served_N = arrival_N[queue_N[arrival_N].argsort(stable=True)]
    served_queue_N = queue_N[served_N]
    place_N = torch.arange(num_tokens * k, device=device)
    place_N = place_N - torch.searchsorted(served_queue_N, served_queue_N)
    fits_N = (place_N < capacity) & (served_queue_N < queues)
    return torch.zeros_like(fits_N).scatter(0, served_N, fits_N).view(num_tokens, k)


def top_tokens(
    scores_TE: Tensor, k: int, ctx: RouterContext, tie: Tie = "low"
) -> tuple[Tensor, Tensor]:
    """Each expert takes its ceil(k * S / E) best tokens of each sequence (arXiv 2202.09368).

    Returns tokens_EC int64 and weights_EC, the scores of those tokens, the sequences side by side:
    C = B * min(S, ceil(k * S / E)). Padding (ctx.token_mask) is never taken; a place that finds no
    token is -1 with weight 0. A packed batch is one sequence.

    Raises ReplayError under a replay, which holds experts of tokens, not tokens of experts;
    MoeShapeError when ctx.token_mask is not (T,) or ctx.batch_shape not of T tokens.
    """
    if ctx.replay is not None:
        raise ReplayError(
            f"ctx.replay {tuple(ctx.replay.shape)} names experts for tokens; top_tokens chooses "
            "tokens for experts and cannot follow it. Replay into a token-choice router."
        )
    num_tokens, num_experts = scores_TE.shape
    batch, length = sequences(ctx, num_tokens)
    capacity = min(length, expert_capacity(length, k, num_experts, 1.0))
    scores_BES = scores_TE.reshape(batch, length, num_experts).transpose(1, 2)
    choice_BES, mask_T = scores_BES, mask_of(ctx, num_tokens)
    if mask_T is not None:
        padding_B1S = ~mask_T.view(batch, 1, length)
        choice_BES = scores_BES.masked_fill(padding_B1S, -math.inf)
    position_RC = largest(choice_BES.flatten(0, 1), capacity, tie)  # R rows, one an expert
    position_BEC = position_RC.view(batch, num_experts, capacity)
    weights_BEC = scores_BES.gather(2, position_BEC)
    first_B11 = length * torch.arange(batch, device=scores_TE.device)[:, None, None]
    tokens_BEC = position_BEC + first_B11
    if mask_T is not None:
        empty_BEC = ~mask_T[tokens_BEC]
        tokens_BEC = tokens_BEC.masked_fill(empty_BEC, -1)
        weights_BEC = weights_BEC.masked_fill(empty_BEC, 0)
    return tokens_BEC.transpose(0, 1).flatten(1), weights_BEC.transpose(0, 1).flatten(1)


def sequences(ctx: RouterContext, num_tokens: int) -> tuple[int, int]:
    """(B, S) of the batch; a packed one is (1, T). Raises MoeShapeError unless B * S = T."""
    batch, length = ctx.batch_shape or (1, num_tokens)
    if batch * length != num_tokens:
        raise MoeShapeError(
            f"ctx.batch_shape={(batch, length)} is {batch * length} tokens, but there are "
            f"T={num_tokens}; pass the batch shape of this input."
        )
    return batch, length
