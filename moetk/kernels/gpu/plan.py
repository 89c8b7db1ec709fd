"""`moetk::sort_plan` on CUDA: a stable counting sort in three launches. What they compute is stated
in torch by `sort_in_torch` in `moetk.kernels.sort_plan`.

Programs share no counter: each counts its own block, so that every run gives the same rows.

Letters: N = T*K choices, E experts; B blocks of choices, X the experts of one program of the scan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetk.kernels.gpu.launch import divided, launch, power_of_two

_BLOCK = 256  # choices of one program
_PART = 32  # choices that a block is compared with at a time; with twice as many it spills
_SCAN_BLOCKS, _SCAN_EXPERTS = 512, 8


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
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, BLOCK, PART):
        other = block * BLOCK + start + tl.arange(0, PART)
        other_expert = _load_expert(experts_N, kept_N, other, num_choices, E)
        same = other_expert[None, :] == expert[:, None]
        before = other[None, :] < choice[:, None]
        rank += tl.sum((same & before).to(tl.int32), 1)
    tl.store(rank_N + choice, rank, mask=choice < num_choices)
    column = tl.arange(0, COLUMNS)
    count = tl.histogram(expert, COLUMNS, mask=expert < E)
    tl.store(counts_BE + block.to(tl.int64) * E + column, count, mask=column < E)


@triton.jit
def _scan_kernel(
    counts_BE, counts_E, num_blocks, E: tl.constexpr, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr
):
    """In place, the counts of a block become those of the blocks before it; counts_E is of all."""
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
    tl.store(counts_E + expert_X, total_X, mask=expert_X < E)


@triton.jit
def _place_kernel(
    experts_N,
    kept_N,
    before_BE,
    counts_E,
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
    """slot_N holds the ranks in their blocks and becomes the rows. COLUMNS: E, padded."""
    block = tl.program_id(0)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    inside = choice < num_choices
    column = tl.arange(0, COLUMNS)
    counts = tl.load(counts_E + column, mask=column < E, other=0)
    before = tl.load(before_BE + block.to(tl.int64) * E + column, mask=column < E, other=0)
    ends = tl.cumsum(counts, 0)
    first_used = ends - counts + before
    first_unused = tl.sum(counts, 0) + block * BLOCK - tl.sum(before, 0)

    expert = _load_expert(experts_N, kept_N, choice, num_choices, E)
    first = tl.gather(first_used, tl.minimum(expert, E - 1), 0)
    rank = tl.load(slot_N + choice, mask=inside, other=0)
    row = rank + tl.where(expert < E, first, first_unused)
    tl.store(slot_N + choice, row, mask=inside)
    tl.store(choice_N + row, choice, mask=inside)
    tl.store(source_N + row, choice // TOP_K, mask=inside)
    if block == 0:
        tl.store(offsets_E + column, ends, mask=column < E)


def sort_on_gpu(
    experts_TK: Tensor, kept_TK: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """choice_N, source_N, slot_TK, offsets_E of a `SortPlan`, int32."""
    num_choices = experts_TK.numel()

    def fresh(*shape: int) -> Tensor:
        return experts_TK.new_empty(shape, dtype=torch.int32)

    choice_N, source_N = fresh(num_choices), fresh(num_choices)
    slot_TK, offsets_E = fresh(*experts_TK.shape), fresh(num_experts)
    if num_choices == 0:
        return choice_N, source_N, slot_TK, offsets_E.zero_()
    num_blocks = divided(num_choices, _BLOCK)
    columns = max(32, power_of_two(num_experts))  # a warp's width, for the histogram
    counts_BE, counts_E = fresh(num_blocks, num_experts), fresh(num_experts)
    experts_N = experts_TK.contiguous()
    kept_N = None if kept_TK is None else kept_TK.contiguous()
    launch(
        _count_kernel,
        (num_blocks,),
        (
            experts_N,
            kept_N,
            counts_BE,
            slot_TK,
            num_choices,
        ),
        (
            num_experts,
            columns,
            _BLOCK,
            _PART,
        ),
        warps=8,
    )
    launch(
        _scan_kernel,
        (divided(num_experts, _SCAN_EXPERTS),),
        (
            counts_BE,
            counts_E,
            num_blocks,
        ),
        (
            num_experts,
            _SCAN_BLOCKS,
            _SCAN_EXPERTS,
        ),
    )
    launch(
        _place_kernel,
        (num_blocks,),
        (
            experts_N,
            kept_N,
            counts_BE,
            counts_E,
            choice_N,
            source_N,
            slot_TK,
            offsets_E,
            num_choices,
        ),
        (
            experts_TK.shape[1],
            num_experts,
            columns,
            _BLOCK,
        ),
    )
    return choice_N, source_N, slot_TK, offsets_E
