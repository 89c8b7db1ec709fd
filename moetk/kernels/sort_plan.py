"""The order in which a bank reads its rows: every assignment sorted by expert.

Letters: T tokens, K choices a token, N = T*K assignments, E experts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetk.kernels.direct import direct, on_device_of


@dataclass(frozen=True, eq=False)
class SortPlan:
    """Assignments in expert order. N is always T*K, so no step waits for a count.

    choice_N: int32, the flat (token, choice) of each row. source_N: int32, its token.
    slot_TK: int32, the row of each (token, choice). offsets_E: int32, where each expert's rows end.
    Rows behind offsets_E[-1] belong to unused or dropped choices; nothing computes them.
    full: there are none. Known on the CPU only; False where asking would wait for the device.
    """

    choice_N: Tensor
    source_N: Tensor
    slot_TK: Tensor
    offsets_E: Tensor
    full: bool = False

    def weights_of_used(self, weights_TK: Tensor) -> Tensor:
        """The weights, 0 at choices that nobody computes, whatever they were."""
        if self.full:
            return weights_TK
        return weights_TK.masked_fill(self.slot_TK >= self.offsets_E[-1], 0)

    @property
    def num_experts(self) -> int:
        return self.offsets_E.shape[0]

    @property
    def counts_E(self) -> Tensor:
        """int32, rows of each expert."""
        return self.offsets_E.diff(prepend=self.offsets_E.new_zeros(1))


class Known(NamedTuple):
    """The plan that was made with a choice. version: of experts_TK, and where: the stream and
    whether it was captured, when it was made."""

    plan: SortPlan
    version: int
    where: tuple[Any, ...]

    def holds_for(self, experts_TK: Tensor, kept_TK: Tensor | None, num_experts: int) -> bool:
        """Whether it is the plan of this choice, here and now: torch has seen nobody write to the
        ids, all are kept, and the same stream runs, within a CUDA graph's capture or outside as
        then. A graph would go on with the plan of a choice that was made before it. (Two captures
        on one stream are not told apart: a bank in one whose router is in the other reads the plan
        that the other's replay left.)"""
        return (
            kept_TK is None
            and self.version == experts_TK._version
            and self.plan.num_experts == num_experts
            and self.where == _where(experts_TK)
        )


def known_of(experts_TK: Tensor, plan: SortPlan | None) -> Known | None:
    """To be handed to `sort_plan` with the choice; None where there is no plan, or where that could
    not tell a stale one (inference mode)."""
    if plan is None or experts_TK.is_inference():
        return None
    return Known(plan, experts_TK._version, _where(experts_TK))


def _where(tensor: Tensor) -> tuple[Any, ...]:
    if not tensor.is_cuda:
        return ()
    stream = torch._C._cuda_getCurrentRawStream(tensor.get_device())
    return stream, torch.cuda.is_current_stream_capturing()


def sort_plan(
    experts_TK: Tensor, kept_TK: Tensor | None, num_experts: int, known: Known | None = None
) -> SortPlan:
    """Sort the choices by expert: stable, without atomics, without a wait for the device.

    experts_TK: int64; ids outside [0, num_experts) count as unused, and so does what kept_TK (bool,
    None = all) drops. known: with this very choice came its plan, which is returned if it holds.
    On CUDA up to 4096 experts: the op `moetk::sort_plan`.
    """
    if experts_TK.is_cuda and num_experts <= _MOST_ON_GPU:
        if not direct(experts_TK):
            return SortPlan(*_sort_plan(experts_TK, kept_TK, num_experts))
        if known is not None and known.holds_for(experts_TK, kept_TK, num_experts):
            return known.plan
        return SortPlan(*_sort_on_gpu(experts_TK, kept_TK, num_experts))
    choice_N, source_N, slot_TK, offsets_E = sort_in_torch(experts_TK, kept_TK, num_experts)
    on_cpu = experts_TK.device.type == "cpu" and not torch.compiler.is_compiling()
    full = on_cpu and int(offsets_E[-1]) == choice_N.numel()
    return SortPlan(choice_N, source_N, slot_TK, offsets_E, full)


def sort_in_torch(
    experts_TK: Tensor, kept_TK: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `moetk::sort_plan` computes: the first four fields of the plan."""
    num_choices = experts_TK.shape[1]
    ids_N = experts_TK.flatten()
    keys_N = ids_N.masked_fill(ids_N < 0, num_experts).clamp(max=num_experts)
    if kept_TK is not None:
        keys_N = keys_N.masked_fill(~kept_TK.flatten(), num_experts)
    # 16-bit keys where they fit: a radix sort on the device takes half the passes.
    key_dtype = torch.int16 if num_experts < 2**15 else torch.int32
    sorted_N, order_N = keys_N.to(key_dtype).sort(stable=True)
    experts_E = torch.arange(num_experts, device=keys_N.device, dtype=key_dtype)
    offsets_E = torch.searchsorted(sorted_N, experts_E, right=True, out_int32=True)
    choice_N = order_N.to(torch.int32)
    rows_N = torch.arange(keys_N.numel(), device=keys_N.device, dtype=torch.int32)
    slot_N = torch.empty_like(rows_N).scatter_(0, order_N, rows_N)
    source_N = choice_N // max(num_choices, 1)
    return choice_N, source_N, slot_N.view(experts_TK.shape), offsets_E


_MOST_ON_GPU = 4096  # the kernels keep one number an expert in registers

_sort_plan = torch.library.custom_op(
    "moetk::sort_plan",
    sort_in_torch,
    mutates_args=(),
    schema="(Tensor experts_TK, Tensor? kept_TK, int num_experts) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@_sort_plan.register_kernel("cuda")
def _sort_on_gpu(
    experts_TK: Tensor, kept_TK: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with on_device_of(experts_TK):
        return _gpu().sort_on_gpu(experts_TK, kept_TK, num_experts)  # type: ignore[no-any-return]


@functools.cache
def _gpu() -> Any:
    """The kernels' module; it imports Triton."""
    from moetk.kernels.gpu import plan

    return plan


@_sort_plan.register_fake
def _(
    experts_TK: Tensor, kept_TK: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows_N = experts_TK.new_empty(experts_TK.numel(), dtype=torch.int32)
    slot_TK = experts_TK.new_empty(experts_TK.shape, dtype=torch.int32)
    offsets_E = experts_TK.new_empty(num_experts, dtype=torch.int32)
    return rows_N, torch.empty_like(rows_N), slot_TK, offsets_E
