"""Each expert's rows, as many as the host must know of, and the copies between them and tokens.

Twins: `Tensor.index_select` for `gather`, `moetk.kernels.form.Form.activate` for `activate`.

Letters: T tokens, K choices a token, N = T * K choices in expert order, E experts, U rows that are
computed: used choices and padding, B any width, I expert width, J up width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetk.kernels.form import Form
from moetk.kernels.fused_mlp import row_experts
from moetk.kernels.gpu.activation import _act, gated
from moetk.kernels.gpu.launch import divided, launch, power_of_two
from moetk.kernels.sort_plan import SortPlan


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """A sort plan whose experts have whole multiples of some number of rows.

    plan: the rows as they were, which sums over an expert's own rows read. choice_U: int32, the
    flat (token, choice) of each row, T * K where it is padding. source_U: int32, its token, -1
    where it is padding. slot_TK: int32, the row of each choice, U or more where the choice is
    unused. ends_E: int32, where each expert's rows end. counts: the rows of each expert, as ints.
    """

    plan: SortPlan
    choice_U: Tensor
    source_U: Tensor
    slot_TK: Tensor
    ends_E: Tensor
    counts: list[int]

    @property
    def total(self) -> int:
        return len(self.source_U)


def expert_rows(plan: SortPlan, align: int) -> ExpertRows:
    """Each expert's rows, filled up to a multiple of `align`.

    Waits for the device once: the ends of all experts come to the host in one copy.
    """
    ends = plan.offsets_E.tolist()
    starts = [0, *ends[:-1]]
    counts = [divided(end - start, align) * align for start, end in zip(starts, ends, strict=True)]
    used, total = ends[-1], sum(counts)
    choice_U, source_U = plan.choice_N[:used], plan.source_N[:used]
    if total == used:
        return ExpertRows(plan, choice_U, source_U, plan.slot_TK, plan.offsets_E, counts)
    num_choices = len(plan.choice_N)
    ends_E = ((plan.counts_E + (align - 1)) // align * align).cumsum(0, dtype=torch.int32)
    # How far each expert's rows move; behind the experts, how far the unused choices do.
    shift_F = torch.nn.functional.pad(ends_E - plan.offsets_E, (1, 0))
    at_N = torch.arange(num_choices, device=ends_E.device)
    at_N = at_N + shift_F[row_experts(plan.offsets_E, num_choices)]
    padding = choice_U.new_full((total,), num_choices), source_U.new_full((total,), -1)
    return ExpertRows(
        plan,
        padding[0].index_copy_(0, at_N[:used], choice_U),
        padding[1].index_copy_(0, at_N[:used], source_U),
        at_N[plan.slot_TK.long()].to(torch.int32),
        ends_E,
        counts,
    )


@triton.jit
def _gather(x_ptr, source_ptr, rows_ptr, B: tl.constexpr, BB: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BB + tl.arange(0, BB)
    token = tl.load(source_ptr + row).to(tl.int64)
    read = (column < B) & (token >= 0)
    values = tl.load(x_ptr + token * B + column, mask=read, other=0)
    tl.store(rows_ptr + row * B + column, values, mask=column < B)


def gather(x_TB: Tensor, source_U: Tensor) -> Tensor:
    """(U, B): the token of each row, zeros where source_U is -1. x_TB: contiguous, any dtype."""
    width = x_TB.shape[1]
    rows_UB = x_TB.new_empty(len(source_U), width)
    block = min(power_of_two(width), 4096)
    grid = (len(source_U), divided(width, block))
    launch(_gather, grid, (x_TB, source_U, rows_UB), (width, block))
    return rows_UB


@triton.jit
def _activate(
    h_ptr,
    a_ptr,
    U,
    I: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    R: tl.constexpr,
    BI: tl.constexpr,
):
    rows = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    first = tl.program_id(1) * BI
    column = first + tl.arange(0, BI)[None, :]
    ok = (rows < U) & (column < I)
    r64 = rows.to(tl.int64)
    if GATED:
        if INTERLEAVED:
            pairs = 2 * first + tl.arange(0, 2 * BI)[None, :]
            both = (rows < U) & (pairs < 2 * I)
            h = tl.load(h_ptr + r64 * 2 * I + pairs, mask=both, other=0.0).to(tl.float32)
            gate, up = tl.split(tl.reshape(h, (R, BI, 2)))
        else:
            gate = tl.load(h_ptr + r64 * 2 * I + column, mask=ok, other=0.0).to(tl.float32)
            up = tl.load(h_ptr + r64 * 2 * I + I + column, mask=ok, other=0.0).to(tl.float32)
        a = gated(gate, up, ACT, ALPHA, LIMIT)
    else:
        a = _act(tl.load(h_ptr + r64 * I + column, mask=ok, other=0.0).to(tl.float32), ACT)
    tl.store(a_ptr + r64 * I + column, a.to(a_ptr.dtype.element_ty), mask=ok)


def activate(h_UJ: Tensor, form: Form) -> Tensor:
    """(U, I) in the dtype of h (contiguous), computed in fp32."""
    num_rows, width = h_UJ.shape
    if form.gated:
        width //= 2
    a_UI = h_UJ.new_empty(num_rows, width)
    block, rows = min(256, power_of_two(width)), 4 if num_rows >= 4096 else 1
    shape = (width, form.gated, form.interleaved, form.act, form.alpha, form.limit, rows, block)
    grid = (divided(num_rows, rows), divided(width, block))
    launch(_activate, grid, (h_UJ, a_UI, num_rows), shape)
    return a_UI
