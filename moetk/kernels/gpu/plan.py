"""`moetk::sort_plan` on CUDA: a stable counting sort in three launches, in one for few choices.
What they compute is stated in torch by `sort_in_torch` in `moetk.kernels.sort_plan`.

Programs share no counter: each counts its own block, so that every run gives the same rows.

Letters: N = T*K choices, E experts; B blocks of choices, X the experts of one program of the scan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetk.kernels.gpu.launch import dense, divided, launch, power_of_two

_BLOCK = 256  # choices of one program
_PART = 32  # choices that a block is compared with at a time; with twice as many it spills
_SCAN_BLOCKS, _SCAN_EXPERTS = 512, 8
# Up to here every program counts all choices by itself: two launches less on the host, where a
# small layer spends its time.
_FEW = 4096
_COUNTS = 4096  # numbers that a program reads at a time where all blocks' counts are added up


@triton.jit
def _load_expert(experts_N, kept_N, choice, num_choices, E: tl.constexpr):
    """The expert of each choice as int32; E = unused, dropped, or behind the last choice."""
    inside = choice < num_choices
    expert = tl.load(experts_N + choice, mask=inside, other=E)
    used = (expert >= 0) & (expert < E)
    if kept_N is not None:
        used = used & (tl.load(kept_N + choice, mask=inside, other=0) != 0)
    return tl.where(used, expert, E).to(tl.int32)


@triton.jit
def _ranks(
    expert,
    choice,
    first,
    experts_N,
    kept_N,
    num_choices,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """How many choices of the block name the same expert before each one."""
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, BLOCK, PART):
        other = first + start + tl.arange(0, PART)
        other_expert = _load_expert(experts_N, kept_N, other, num_choices, E)
        same = other_expert[None, :] == expert[:, None]
        rank += tl.sum((same & (other[None, :] < choice[:, None])).to(tl.int32), 1)
    return rank


@triton.jit
def _count_kernel(
    experts_N,
    kept_N,
    counts_BE,
    rank_N,
    num_choices,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """Of one block: how many choices name each expert, and how many before a choice name its."""
    block = tl.program_id(0)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    expert = _load_expert(experts_N, kept_N, choice, num_choices, E)
    first = block * BLOCK
    rank = _ranks(expert, choice, first, experts_N, kept_N, num_choices, E, BLOCK, PART)
    tl.store(rank_N + choice, rank, mask=choice < num_choices)
    column = tl.arange(0, COLUMNS)
    count = tl.histogram(expert, COLUMNS, mask=expert < E)
    tl.store(counts_BE + block.to(tl.int64) * E + column, count, mask=column < E)


@triton.jit
def _scan_kernel(
    counts_BE, num_blocks, E: tl.constexpr, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr
):
    """In place, the counts of a block become those of the blocks before it. Behind the last block
    stand those of all."""
    expert_X = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    total_X = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        block_B = start + tl.arange(0, BLOCKS)
        inside_BX = (block_B < num_blocks)[:, None] & (expert_X < E)[None, :]
        at_BX = counts_BE + block_B.to(tl.int64)[:, None] * E + expert_X[None, :]
        counts_BX = tl.load(at_BX, mask=inside_BX, other=0)
        before_BX = total_X[None, :] + tl.cumsum(counts_BX, 0) - counts_BX
        tl.store(at_BX, before_BX, mask=inside_BX)
        total_X += tl.sum(counts_BX, 0)
    counts_E = counts_BE + tl.cast(num_blocks, tl.int64) * E
    tl.store(counts_E + expert_X, total_X, mask=expert_X < E)


@triton.jit
def _put(
    expert,
    choice,
    rank,
    counts,
    before,
    block,
    choice_N,
    source_N,
    slot_N,
    offsets_E,
    num_choices,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a block's rows; counts: of all choices, before: of those in the blocks before."""
    inside = choice < num_choices
    ends = tl.cumsum(counts, 0)
    first_used = ends - counts + before
    first_unused = tl.sum(counts, 0) + block * BLOCK - tl.sum(before, 0)
    first = tl.gather(first_used, tl.minimum(expert, E - 1), 0)
    row = rank + tl.where(expert < E, first, first_unused)
    tl.store(slot_N + choice, row, mask=inside)
    tl.store(choice_N + row, choice, mask=inside)
    tl.store(source_N + row, choice // TOP_K, mask=inside)
    if block == 0:
        column = tl.arange(0, COLUMNS)
        tl.store(offsets_E + column, ends, mask=column < E)


@triton.jit
def _place_kernel(
    experts_N,
    kept_N,
    before_BE,
    choice_N,
    source_N,
    slot_N,
    offsets_E,
    num_choices,
    num_blocks,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """slot_N holds the ranks in their blocks and becomes the rows. COLUMNS: E, padded."""
    block = tl.program_id(0)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    of_all = before_BE + tl.cast(num_blocks, tl.int64) * E + column
    counts = tl.load(of_all, mask=column < E, other=0)
    before = tl.load(before_BE + block.to(tl.int64) * E + column, mask=column < E, other=0)
    expert = _load_expert(experts_N, kept_N, choice, num_choices, E)
    rank = tl.load(slot_N + choice, mask=choice < num_choices, other=0)
    _put(
        expert,
        choice,
        rank,
        counts,
        before,
        block,
        choice_N,
        source_N,
        slot_N,
        offsets_E,
        num_choices,
        TOP_K,
        E,
        COLUMNS,
        BLOCK,
    )


@triton.jit
def _sort_few_kernel(
    experts_N,
    kept_N,
    choice_N,
    source_N,
    slot_N,
    offsets_E,
    num_choices,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    FEW: tl.constexpr,
):
    """All of it for one block, each counting all choices and those before it. FEW: N, padded."""
    block = tl.program_id(0)
    every = tl.arange(0, FEW)
    all_experts = _load_expert(experts_N, kept_N, every, num_choices, E)
    counts = tl.histogram(all_experts, COLUMNS, mask=all_experts < E)
    earlier = (all_experts < E) & (every < block * BLOCK)
    before = tl.histogram(all_experts, COLUMNS, mask=earlier)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    expert = _load_expert(experts_N, kept_N, choice, num_choices, E)
    first = block * BLOCK
    rank = _ranks(expert, choice, first, experts_N, kept_N, num_choices, E, BLOCK, PART)
    _put(
        expert,
        choice,
        rank,
        counts,
        before,
        block,
        choice_N,
        source_N,
        slot_N,
        offsets_E,
        num_choices,
        TOP_K,
        E,
        COLUMNS,
        BLOCK,
    )


@triton.jit
def _place_ranked_kernel(
    experts_TK,
    rank_TK,
    counts_BE,
    choice_N,
    source_N,
    slot_TK,
    offsets_E,
    num_tokens,
    num_blocks,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Blocks of R tokens. Every choice is used."""
    block = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    counts = tl.zeros((COLUMNS,), tl.int32)
    before = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        block_B = start + tl.arange(0, BLOCKS)
        there = (block_B < num_blocks)[:, None] & (column < E)[None, :]
        at = counts_BE + block_B.to(tl.int64)[:, None] * E + column[None, :]
        counts_BX = tl.load(at, mask=there, other=0)
        counts += tl.sum(counts_BX, 0)
        before += tl.sum(tl.where((block_B < block)[:, None], counts_BX, 0), 0)
    ends = tl.cumsum(counts, 0)
    if block == 0:
        tl.store(offsets_E + column, ends, mask=column < E)
    of_block = tl.arange(0, R * K)
    token, k = block * R + of_block // K, of_block % K
    inside = (token < num_tokens) & (k < TOP_K)
    choice = token * TOP_K + k
    expert = tl.load(experts_TK + choice, mask=inside, other=0).to(tl.int32)
    rank = tl.load(rank_TK + choice, mask=inside, other=0)
    row = rank + tl.gather(ends - counts + before, expert, 0)
    tl.store(slot_TK + choice, row, mask=inside)
    tl.store(choice_N + row, choice, mask=inside)
    tl.store(source_N + row, token, mask=inside)


def place_on_gpu(
    experts_TK: Tensor, rank_TK: Tensor, counts_BE: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sort_on_gpu` in one launch, of choices that were counted and ranked as they were made, those
    of one token or more.

    rank_TK: int32, how many choices of its block of `rows` tokens name the same expert before this
    one. counts_BE: int32, how many choices of a block name each expert. Every id lies in [0, E).
    """
    (num_tokens, top_k), (num_blocks, num_experts) = experts_TK.shape, counts_BE.shape
    plan = empty_plan(experts_TK, num_experts)
    columns, choices = power_of_two(num_experts), power_of_two(top_k)
    launch(
        _place_ranked_kernel,
        (num_blocks,),
        (experts_TK, rank_TK, counts_BE, *plan, num_tokens, num_blocks),
        (top_k, num_experts, columns, rows, choices, _COUNTS // columns),
    )
    return plan


def empty_plan(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """choice_N, source_N, slot_TK, offsets_E, not yet written."""
    num_choices, dtype = experts_TK.numel(), torch.int32
    return (
        experts_TK.new_empty(num_choices, dtype=dtype),
        experts_TK.new_empty(num_choices, dtype=dtype),
        experts_TK.new_empty(experts_TK.shape, dtype=dtype),
        experts_TK.new_empty(num_experts, dtype=dtype),
    )


def sort_on_gpu(
    experts_TK: Tensor, kept_TK: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """choice_N, source_N, slot_TK, offsets_E of a `SortPlan`, int32."""
    num_choices = experts_TK.numel()
    _, _, slot_TK, offsets_E = plan = empty_plan(experts_TK, num_experts)
    if num_choices == 0:
        offsets_E.zero_()
        return plan
    experts_N = dense(experts_TK)
    kept_N = None if kept_TK is None else dense(kept_TK)
    num_blocks = divided(num_choices, _BLOCK)
    columns = max(32, power_of_two(num_experts))  # a warp's width, for the histogram
    sizes = experts_TK.shape[1], num_experts, columns, _BLOCK
    if num_choices <= _FEW:
        args = experts_N, kept_N, *plan, num_choices
        few = max(_BLOCK, power_of_two(num_choices))
        launch(_sort_few_kernel, (num_blocks,), args, (*sizes, _PART, few), warps=8)
        return plan
    counts_BE = experts_TK.new_empty((num_blocks + 1, num_experts), dtype=torch.int32)
    launch(
        _count_kernel,
        (num_blocks,),
        (experts_N, kept_N, counts_BE, slot_TK, num_choices),
        (num_experts, columns, _BLOCK, _PART),
        warps=8,
    )
    launch(
        _scan_kernel,
        (divided(num_experts, _SCAN_EXPERTS),),
        (counts_BE, num_blocks),
        (num_experts, _SCAN_BLOCKS, _SCAN_EXPERTS),
    )
    launch(
        _place_kernel,
        (num_blocks,),
        (experts_N, kept_N, counts_BE, *plan, num_choices, num_blocks),
        sizes,
    )
    return plan
