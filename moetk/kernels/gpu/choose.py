"""`moetk::choose` on CUDA: one kernel each way. What they compute is stated in torch by
`choose_in_torch` and `choose_backward_in_torch` in `moetk.kernels.choose`.

Letters: R rows (tokens) of one program, E experts, K choices, G groups, M experts of one group;
C = the G * M columns of a row, each of G and M padded to a power of two.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetk.errors import MoeDtypeError, RouterConfigError
from moetk.kernels.choose import MAX_EXPERTS, MAX_TOP_K
from moetk.kernels.gpu.launch import divided, launch, power_of_two
from moetk.kernels.gpu.select import rounded, scores, select, softmax_of_row
from moetk.kernels.recipe import Recipe

_TL: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_NUM_WARPS = 4
_TILE = 1024  # elements of one program: eight a thread


@triton.jit
def _columns(E: tl.constexpr, GROUPS: tl.constexpr, G: tl.constexpr, M: tl.constexpr):
    """The expert of each column, and whether there is one."""
    column_C = tl.arange(0, G * M)
    size: tl.constexpr = E // GROUPS
    expert_C = column_C // M * size + column_C % M
    return expert_C, (column_C // M < GROUPS) & (column_C % M < size)


@triton.jit
def _choose_kernel(
    logits_TE,
    bias_E,
    experts_TK,
    weights_TK,
    num_tokens,
    eps,
    scale,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    RENORMALISE: tl.constexpr,
    DTYPE: tl.constexpr,
    CHOICE: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside_R1 = (row_R < num_tokens)[:, None]
    expert_C, real_C = _columns(E, GROUPS, G, M)
    logits_RC = tl.load(
        logits_TE + row_R[:, None] * E + expert_C[None, :],
        mask=inside_R1 & real_C[None, :],
        other=float("-inf"),
    ).to(tl.float32)
    columns_RK, weights_RK, _ = select(
        logits_RC,
        bias_E,
        expert_C,
        real_C,
        eps,
        scale,
        E,
        TOP_K,
        SCORE,
        OVER_CHOSEN,
        GROUPS,
        TOP_GROUPS,
        RENORMALISE,
        DTYPE,
        CHOICE,
        R,
        G,
        M,
        K,
    )
    choice_K = tl.arange(0, K)
    size: tl.constexpr = E // GROUPS
    stored_RK = inside_R1 & (choice_K < TOP_K)[None, :]
    place_RK = row_R[:, None] * TOP_K + choice_K[None, :]
    experts_RK = columns_RK // M * size + columns_RK % M
    tl.store(experts_TK + place_RK, experts_RK.to(tl.int64), mask=stored_RK)
    tl.store(weights_TK + place_RK, weights_RK, mask=stored_RK)


@triton.jit
def _choose_backward_kernel(
    dweights_TK,
    logits_TE,
    experts_TK,
    dlogits_TE,
    num_tokens,
    eps,
    scale,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
    RENORMALISE: tl.constexpr,
    DTYPE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside_R1 = (row_R < num_tokens)[:, None]
    choice_K = tl.arange(0, K)
    stored_RK = inside_R1 & (choice_K < TOP_K)[None, :]
    place_RK = row_R[:, None] * TOP_K + choice_K[None, :]
    column_C = tl.arange(0, C)
    stored_RC = inside_R1 & (column_C < E)[None, :]
    at_RC = row_R[:, None] * E + column_C[None, :]

    experts_RK = tl.load(experts_TK + place_RK, mask=stored_RK, other=0).to(tl.int32)
    dweights_RK = tl.load(dweights_TK + place_RK, mask=stored_RK, other=0.0).to(tl.float32) * scale
    chosen_RK = tl.load(logits_TE + row_R[:, None] * E + experts_RK, mask=stored_RK, other=0.0)
    chosen_RK = rounded(chosen_RK.to(tl.float32), DTYPE)

    if SCORE == "softmax":
        logits_RC = tl.load(logits_TE + at_RC, mask=stored_RC, other=float("-inf"))
        logits_RC = rounded(logits_RC.to(tl.float32), DTYPE)
        largest_R1, total_R1 = softmax_of_row(logits_RC)
    else:
        largest_R1, total_R1 = 0.0, 1.0
    scores_RK = scores(chosen_RK, largest_R1, total_R1, SCORE, tl.float32)
    weights_RK = scores_RK
    if OVER_CHOSEN:
        weights_RK = tl.where(stored_RK, scores_RK, float("-inf"))
        largest_of_K, total_of_K = softmax_of_row(weights_RK)
        weights_RK = scores(weights_RK, largest_of_K, total_of_K, "softmax", tl.float32)
    weights_RK = tl.where(stored_RK, weights_RK, 0.0)

    if RENORMALISE:
        sum_R1 = tl.sum(weights_RK, 1)[:, None] + eps
        sum_R1 = tl.where(sum_R1 == 0, 1.0, sum_R1)
        mean_R1 = tl.div_rn(tl.sum(dweights_RK * weights_RK, 1)[:, None], sum_R1)
        dweights_RK = tl.div_rn(dweights_RK - mean_R1, sum_R1)
    if OVER_CHOSEN:
        mean_R1 = tl.sum(dweights_RK * weights_RK, 1)[:, None]
        dweights_RK = weights_RK * (dweights_RK - mean_R1)
    if SCORE == "sigmoid":
        dweights_RK = dweights_RK * scores_RK * (1.0 - scores_RK)
    elif SCORE == "sqrt_softplus":
        slope_RK = scores(chosen_RK, largest_R1, total_R1, "sigmoid", tl.float32)
        slope_RK = tl.div_rn(slope_RK, tl.where(scores_RK == 0, 1.0, 2.0 * scores_RK))
        dweights_RK = dweights_RK * tl.where(scores_RK == 0, 0.0, slope_RK)

    dlogits_RC = tl.zeros((R, C), tl.float32)
    for k in tl.static_range(TOP_K):
        expert_R = tl.sum(tl.where(choice_K[None, :] == k, experts_RK, 0), 1)
        d_R = tl.sum(tl.where(choice_K[None, :] == k, dweights_RK, 0.0), 1)
        dlogits_RC = tl.where(column_C[None, :] == expert_R[:, None], d_R[:, None], dlogits_RC)
    if SCORE == "softmax":
        mean_R1 = tl.sum(tl.where(stored_RK, dweights_RK * scores_RK, 0.0), 1)[:, None]
        scores_RC = scores(logits_RC, largest_R1, total_R1, SCORE, tl.float32)
        dlogits_RC = scores_RC * (dlogits_RC - mean_R1)
    tl.store(dlogits_TE + at_RC, dlogits_RC, mask=stored_RC)


def choose_on_gpu(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    recipe: Recipe,
    weight_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """`choose_in_torch` in one launch, the weights rounded to weight_dtype as well.

    Raises RouterConfigError past MAX_EXPERTS or MAX_TOP_K, MoeDtypeError on a dtype wider than
    float32.
    """
    num_tokens, num_experts = logits_TE.shape
    bias_dtype = None
    if bias_E is not None:
        bias_dtype, bias_E = bias_E.dtype, bias_E.contiguous()
    score_dtype, _, constants, (groups, members, choices) = constants_of(
        logits_TE.dtype, num_experts, top_k, recipe, bias_dtype
    )
    rows = max(1, _TILE // (groups * members))
    experts_TK = logits_TE.new_empty((num_tokens, top_k), dtype=torch.int64)
    weights_TK = logits_TE.new_empty((num_tokens, top_k), dtype=weight_dtype or score_dtype)
    if num_tokens == 0:
        return experts_TK, weights_TK
    logits_TE = logits_TE.contiguous()
    args = (logits_TE, bias_E, experts_TK, weights_TK, num_tokens, recipe.eps, recipe.scale)
    constants = (*constants, rows, groups, members, choices)
    launch(_choose_kernel, (divided(num_tokens, rows),), args, constants, warps=_NUM_WARPS)
    return experts_TK, weights_TK


@functools.cache
def constants_of(
    dtype: torch.dtype,
    num_experts: int,
    top_k: int,
    recipe: Recipe,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.dtype, Any, tuple[Any, ...], tuple[int, int, int]]:
    """For logits of `dtype`: the score dtype, Triton's name of `dtype`, what `select` is compiled
    for from E to CHOICE, and its G, M and K. Raises where it cannot run."""
    score_dtype = _check(dtype, num_experts, top_k, recipe)
    groups = recipe.groups if recipe.limited else 1
    choice_dtype = score_dtype
    if bias_dtype is not None:
        choice_dtype = torch.promote_types(score_dtype, bias_dtype)
    constants = (
        num_experts,
        top_k,
        recipe.score,
        recipe.over_chosen,
        groups,
        recipe.top_groups if recipe.limited else 1,
        recipe.renormalise,
        _TL[score_dtype],
        _TL[choice_dtype],
    )
    sizes = power_of_two(groups), power_of_two(num_experts // groups), power_of_two(top_k)
    return score_dtype, _TL[dtype], constants, sizes


def choose_backward_on_gpu(
    dweights_TK: Tensor, logits_TE: Tensor, experts_TK: Tensor, recipe: Recipe
) -> Tensor:
    """`choose_backward_in_torch` in one launch. Raises as `choose_on_gpu`."""
    (num_tokens, num_experts), top_k = logits_TE.shape, experts_TK.shape[1]
    score_dtype = _check(logits_TE.dtype, num_experts, top_k, recipe)
    dlogits_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        return dlogits_TE
    columns = power_of_two(num_experts)
    rows = max(1, _TILE // columns)
    launch(
        _choose_backward_kernel,
        (divided(num_tokens, rows),),
        (
            dweights_TK.contiguous(),
            logits_TE.contiguous(),
            experts_TK.contiguous(),
            dlogits_TE,
            num_tokens,
            recipe.eps,
            recipe.scale,
        ),
        (
            num_experts,
            top_k,
            recipe.score,
            recipe.over_chosen,
            recipe.renormalise,
            _TL[score_dtype],
            rows,
            columns,
            power_of_two(top_k),
        ),
        warps=_NUM_WARPS,
    )
    return dlogits_TE


def _check(dtype: torch.dtype, num_experts: int, top_k: int, recipe: Recipe) -> torch.dtype:
    """The score dtype for logits of a dtype; raises where the kernels cannot run."""
    if num_experts > MAX_EXPERTS or top_k > MAX_TOP_K:
        raise RouterConfigError(
            f"moetk::choose: {num_experts} experts and top_k={top_k}; its kernels take up to "
            f"{MAX_EXPERTS} and {MAX_TOP_K}. Call the router's own forward."
        )
    score_dtype = recipe.score_dtype or dtype
    for name, found in (("logits_TE", dtype), ("score_dtype", score_dtype)):
        if found not in _TL:
            raise MoeDtypeError(
                f"moetk::choose: {name} is {found}; its kernels take float32, bfloat16 and "
                "float16. Call the router's own forward."
            )
    return score_dtype
