"""From a tile of logits to experts and weights, within a program. What the functions compute is
stated in torch by `choose_in_torch` in `moetk.kernels.choose`.

Letters: R rows (tokens) of one program, E experts, K choices, G groups, M experts of one group;
C = the G * M columns of a row, each of G and M padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(-(2**31))  # below the key of every number: padding, and what was taken


@triton.jit
def _key(x):
    """fp32 to int32 in the same order: NaN above all numbers, equal NaNs, equal zeros."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _value(key):
    """The fp32 number of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _log1p(y):
    """log(1 + y) for y >= 0, also where 1 + y loses y (W. Kahan's quotient)."""
    u = 1.0 + y
    return tl.where(u == 1.0, y, tl.div_rn(tl.log(u) * y, tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def scores(logits, largest, total, SCORE: tl.constexpr, DTYPE: tl.constexpr):
    """largest, total: of the row's softmax; unused by the other scores."""
    if SCORE == "softmax":
        scores = tl.div_rn(tl.exp(logits - largest), total)
    elif SCORE == "sigmoid":
        grown = 1.0 + tl.exp(-logits)
        scores = tl.div_rn(tl.full(grown.shape, 1.0, tl.float32), grown)
    elif SCORE == "sqrt_softplus":
        # The linear branch starts at 20, as in torch.
        plus = tl.where(logits > 20.0, logits, _log1p(tl.exp(tl.minimum(logits, 20.0))))
        plus = tl.where(logits != logits, logits, plus)
        scores = tl.sqrt_rn(rounded(plus, DTYPE))
    else:
        scores = logits
    return rounded(scores, DTYPE)


@triton.jit
def softmax_of_row(logits_RC):
    """The largest logit of each row, and the sum of exp(logit - largest), both (R, 1)."""
    largest_R1 = tl.max(logits_RC, 1)[:, None]
    return largest_R1, tl.sum(tl.exp(logits_RC - largest_R1), 1)[:, None]


@triton.jit
def _pop_largest(keys_RC, column_C):
    """The largest key of each row, the lowest column that holds it, and the keys without it."""
    largest_R = tl.max(keys_RC, 1)
    equal_RC = keys_RC == largest_R[:, None]
    column_R = tl.min(tl.where(equal_RC, column_C[None, :], 0x7FFFFFFF), 1)
    return largest_R, column_R, tl.where(column_C[None, :] == column_R[:, None], NONE, keys_RC)


@triton.jit
def _in_best_groups(
    keys_RC,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    CHOICE: tl.constexpr,
):
    """Keys outside each row's best groups become that of -inf; padding stays padding."""
    group_G = tl.arange(0, G)
    in_group_M = tl.arange(0, M)
    first_X, _, rest_XM = _pop_largest(tl.reshape(keys_RC, (R * G, M)), in_group_M)
    worth_X = rounded(_value(first_X) + _value(tl.max(rest_XM, 1)), CHOICE)
    worth_RG = tl.reshape(_key(worth_X), (R, G))
    worth_RG = tl.where(group_G[None, :] < GROUPS, worth_RG, NONE)
    best_RG = tl.zeros((R, G), tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        _, group_R, worth_RG = _pop_largest(worth_RG, group_G)
        best_RG = tl.where(group_G[None, :] == group_R[:, None], 1, best_RG)
    outside_RGM = tl.broadcast_to(best_RG[:, :, None] == 0, (R, G, M))
    outside_RC = tl.reshape(outside_RGM, (R, G * M)) & (keys_RC != NONE)
    return tl.where(outside_RC, _key(tl.full((R, G * M), float("-inf"), tl.float32)), keys_RC)


@triton.jit
def select(
    logits_RC,
    bias_E,
    expert_C,
    real_C,
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
    """Columns (R, K) of the chosen, best first, their weights, and what was chosen (R, C) as bool.
    logits_RC: fp32, -inf where no expert is."""
    column_C, choice_K = tl.arange(0, G * M), tl.arange(0, K)
    logits_RC = rounded(logits_RC, DTYPE)
    if SCORE == "softmax":
        largest_R1, total_R1 = softmax_of_row(logits_RC)
    else:
        largest_R1, total_R1 = 0.0, 1.0
    choice_RC = scores(logits_RC, largest_R1, total_R1, SCORE, DTYPE)
    if bias_E is not None:
        bias_C = tl.load(bias_E + expert_C, mask=real_C, other=0.0).to(tl.float32)
        choice_RC = rounded(choice_RC + bias_C[None, :], CHOICE)
    keys_RC = tl.where(real_C[None, :], _key(choice_RC), NONE)
    if TOP_GROUPS < GROUPS:
        keys_RC = _in_best_groups(keys_RC, R, GROUPS, TOP_GROUPS, G, M, CHOICE)

    columns_RK = tl.zeros((R, K), tl.int32)
    best_RK = tl.zeros((R, K), tl.int32)
    for k in tl.static_range(TOP_K):
        key_R, column_R, keys_RC = _pop_largest(keys_RC, column_C)
        columns_RK = tl.where(choice_K[None, :] == k, column_R[:, None], columns_RK)
        best_RK = tl.where(choice_K[None, :] == k, key_R[:, None], best_RK)
    if bias_E is None and TOP_GROUPS == GROUPS:  # then the key is the score's
        weights_RK = _value(best_RK)
    else:
        weights_RK = tl.gather(logits_RC, columns_RK, 1)
        weights_RK = scores(weights_RK, largest_R1, total_R1, SCORE, DTYPE)
    chosen_RC = keys_RC == NONE
    if E < G * M:
        chosen_RC = chosen_RC & real_C[None, :]

    there_1K = (choice_K < TOP_K)[None, :]
    if OVER_CHOSEN:
        weights_RK = tl.where(there_1K, weights_RK, float("-inf"))
        largest_R1, total_R1 = softmax_of_row(weights_RK)
        weights_RK = scores(weights_RK, largest_R1, total_R1, "softmax", DTYPE)
    if RENORMALISE:
        sum_R1 = tl.sum(tl.where(there_1K, weights_RK, 0.0), 1)[:, None]
        sum_R1 = rounded(rounded(sum_R1, DTYPE) + eps, DTYPE)
        weights_RK = rounded(tl.div_rn(weights_RK, tl.where(sum_R1 == 0, 1.0, sum_R1)), DTYPE)
    return columns_RK, rounded(weights_RK * scale, DTYPE), chosen_RC
