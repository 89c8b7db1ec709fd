"""The router as one kernel: product, choice, and how often each expert was chosen; and the plan of
the choices, by the same kernel for a few tokens, else by one more. What they compute is stated in
torch by the op `moetk::route` in `moetk.kernels.route` and by `moetk.kernels.sort_plan`.

Letters: T tokens, H hidden, E experts, K choices; R tokens of one program, and for the columns of
its tile of logits C, G, M as in `moetk.kernels.gpu.select`, the columns being the experts in order.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetk.kernels.gpu.choose import constants_of
from moetk.kernels.gpu.launch import Tiled, dense, divided, launch
from moetk.kernels.gpu.plan import empty_plan, place_on_gpu
from moetk.kernels.gpu.select import rounded, select
from moetk.kernels.recipe import Recipe
from moetk.kernels.sort_plan import SortPlan

_MANY = 8192  # logits of a program from which on it takes eight warps: 32 a thread, or 64
_ROWS = (16, 32, 64, 128)
_FEW = 64  # tokens of a single program, which then makes the plan too: a launch less
_MOST_BLOCKS = 1024  # each program of the plan reads the counts of all
_ENOUGH = 132  # programs; where fewer rows each would only read the weight more often
_ROOM = 200 * 1024  # bytes of shared memory that the deeper reads take, at 128 columns
_ALIGNED = 8  # numbers in 16 bytes, of which the copy engine's rows are multiples


@triton.jit
def _route_kernel(
    x_TH,
    x_desc,
    weight_EH,
    weight_desc,
    bias_E,
    choice_bias_E,
    logits_TE,
    experts_TK,
    weights_TK,
    slot_TK,
    counts_BE,
    choice_N,
    source_N,
    offsets_E,
    num_tokens,
    eps,
    scale,
    TILED: tl.constexpr,
    H: tl.constexpr,
    GEMM: tl.constexpr,
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
    BK: tl.constexpr,
):
    block = tl.program_id(0)
    in_block_R, k_range = tl.arange(0, R), tl.arange(0, BK)
    row_R = block.to(tl.int64) * R + in_block_R
    inside_R1 = (row_R < num_tokens)[:, None]
    expert_C = tl.arange(0, G * M)
    real_C = expert_C < E

    # Clamped, not masked: what is read twice so is masked where it is stored.
    x_RK = x_TH + tl.minimum(row_R, num_tokens - 1)[:, None] * H + k_range[None, :]
    weight_KC = weight_EH + tl.minimum(expert_C, E - 1)[None, :] * H + k_range[:, None]
    logits_RC = tl.zeros((R, G * M), tl.float32)
    for k in range(0, H, BK):
        if TILED:
            x, weight = x_desc.load([block * R, k]), weight_desc.load([0, k]).T
        elif H % BK == 0:
            x, weight = tl.load(x_RK + k), tl.load(weight_KC + k)
        else:
            left = k + k_range < H
            x = tl.load(x_RK + k, mask=left[None, :], other=0.0)
            weight = tl.load(weight_KC + k, mask=left[:, None], other=0.0)
        logits_RC = tl.dot(x, weight, logits_RC)
    if bias_E is not None:
        bias_C = tl.load(bias_E + expert_C, mask=real_C, other=0.0).to(tl.float32)
        logits_RC += rounded(bias_C, GEMM)[None, :]
    logits_RC = rounded(logits_RC, GEMM).to(logits_TE.dtype.element_ty)
    at_RC = logits_TE + row_R[:, None] * E + expert_C[None, :]
    tl.store(at_RC, logits_RC, mask=inside_R1 & real_C[None, :])

    experts_RK, weights_RK, chosen_RC = select(
        tl.where(real_C[None, :], logits_RC.to(tl.float32), float("-inf")),
        choice_bias_E,
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
    stored_RK = inside_R1 & (choice_K < TOP_K)[None, :]
    place_RK = row_R[:, None] * TOP_K + choice_K[None, :]
    tl.store(experts_TK + place_RK, experts_RK.to(tl.int64), mask=stored_RK)
    tl.store(weights_TK + place_RK, weights_RK, mask=stored_RK)

    # How many tokens of the block chose an expert before this one: a product with ones below the
    # diagonal, which 16 bits hold exactly.
    ones_RC = tl.where(chosen_RC, 1.0, 0.0)
    below_RR = tl.where(in_block_R[:, None] > in_block_R[None, :], 1.0, 0.0)
    before_RC = tl.dot(below_RR.to(tl.float16), ones_RC.to(tl.float16)).to(tl.int32)
    count_C = tl.sum(tl.where(inside_R1, ones_RC, 0.0), 0).to(tl.int32)
    if counts_BE is not None:
        slot_RK = tl.gather(before_RC.to(tl.int8), experts_RK, 1).to(tl.int32)
        tl.store(counts_BE + block.to(tl.int64) * E + expert_C, count_C, mask=real_C)
    else:  # one block: the ranks and counts are the plan
        end_C = tl.cumsum(count_C, 0)
        slot_RK = tl.gather(before_RC + (end_C - count_C)[None, :], experts_RK, 1)
        tl.store(offsets_E + expert_C, end_C, mask=real_C)
        tl.store(choice_N + slot_RK, place_RK.to(tl.int32), mask=stored_RK)
        token_RK = tl.broadcast_to(in_block_R[:, None], (R, K))
        tl.store(source_N + slot_RK, token_RK, mask=stored_RK)
    tl.store(slot_TK + place_RK, slot_RK, mask=stored_RK)


def route_on_gpu(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    choice_bias_E: Tensor | None,
    top_k: int,
    recipe: Recipe,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    wants_plan: bool,
) -> tuple[Tensor, Tensor, Tensor, SortPlan | None]:
    """weights_TK, experts_TK, logits_TE of `dtype`, and the plan of the choices; None where nobody
    wants it and it takes a kernel, where sorting is cheaper, and for no tokens.

    The plan is made at once, and in vain where it turns out that it does not hold (choices that a
    dispatcher drops, another stream): the host is late here, and the device waits for it.

    Raises RouterConfigError past 32 choices, MoeDtypeError on a score dtype wider than float32.
    """
    (num_tokens, hidden), num_experts = x_TH.shape, weight_EH.shape[0]
    choice_bias_dtype = None
    if choice_bias_E is not None:
        choice_bias_dtype, choice_bias_E = choice_bias_E.dtype, dense(choice_bias_E)
    score_dtype, gemm, constants, (groups, members, choices) = constants_of(
        dtype, num_experts, top_k, recipe, choice_bias_dtype
    )
    logits_TE = x_TH.new_empty(
        (num_tokens, num_experts), dtype=score_dtype if recipe.score == "identity" else dtype
    )
    experts_TK = x_TH.new_empty((num_tokens, top_k), dtype=torch.int64)
    weights_TK = x_TH.new_empty((num_tokens, top_k), dtype=weight_dtype or score_dtype)
    columns = groups * members
    rows = _rows(num_tokens)
    num_blocks = divided(num_tokens, rows)
    plan: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    written: tuple[Tensor | None, ...]
    if num_blocks == 1:
        choice_N, source_N, slot_TK, offsets_E = plan = empty_plan(experts_TK, num_experts)
        written = (slot_TK, None, choice_N, source_N, offsets_E)
    else:
        rank_TK = x_TH.new_empty((num_tokens, top_k), dtype=torch.int32)
        counts_BE = x_TH.new_empty((num_blocks, num_experts), dtype=torch.int32)
        written = (rank_TK, counts_BE, None, None, None)
    if num_tokens:
        x_TH, weight_EH = dense(x_TH), dense(weight_EH)
        step, stages, warps = _reads(rows, columns, x_TH.device)
        tiled = num_experts == columns and hidden % _ALIGNED == 0
        launch(
            _route_kernel,
            (num_blocks,),
            (
                x_TH,
                Tiled(x_TH, (num_tokens, hidden), (rows, step)) if tiled else None,
                weight_EH,
                Tiled(weight_EH, (num_experts, hidden), (columns, step)) if tiled else None,
                None if bias_E is None else dense(bias_E),
                choice_bias_E,
                logits_TE,
                experts_TK,
                weights_TK,
                *written,
                num_tokens,
                recipe.eps,
                recipe.scale,
            ),
            (tiled, hidden, gemm, *constants, rows, groups, members, choices, step),
            warps=warps,
            stages=stages,
        )
        if plan is None and wants_plan and num_blocks <= _MOST_BLOCKS:
            plan = place_on_gpu(experts_TK, rank_TK, counts_BE, rows)
    return weights_TK, experts_TK, logits_TE, None if plan is None else SortPlan(*plan)


def _rows(num_tokens: int) -> int:
    """Of one program: all, where they are few; else as few as keep the device busy."""
    programs = 1 if num_tokens <= _FEW else _ENOUGH
    for rows in _ROWS:
        if num_tokens <= rows * programs:
            return rows
    return _ROWS[-1]


@functools.cache
def _reads(rows: int, columns: int, device: torch.device) -> tuple[int, int, int]:
    """How far a program reads at once along H, how many such reads are under way, and its warps."""
    warps = 8 if rows * columns >= _MANY else 4
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)  # of which stubs know little
        shared = properties.shared_memory_per_block_optin
        if shared >= _ROOM:
            return (64, 5, warps) if rows == _ROWS[-1] else (128, 4, warps)
    return 64, 3, warps
