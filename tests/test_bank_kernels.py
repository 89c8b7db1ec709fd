"""The products and sums that the banks are made of, on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from moetk.equivalence.judge import relative_error
from moetk.kernels.gather_sum import gather_sum
from moetk.kernels.grouped_mm import grouped_mm, grouped_outer
from moetk.kernels.sort_plan import sort_plan


@given(
    st.integers(0, 2**16),
    st.sampled_from([0, 1, 7, 32]),
    st.integers(1, 5),
    st.sampled_from([1, 3, 8]),
    st.booleans(),
)
@settings(max_examples=60)
def test_sort_plan(seed: int, tokens: int, k: int, experts: int, drops: bool) -> None:
    torch.manual_seed(seed)
    ids_TK = torch.randint(-1, experts + 2, (tokens, k))  # E and E + 1: special, or another rank's
    kept_TK = torch.rand(tokens, k) < 0.5 if drops else None
    plan = sort_plan(ids_TK, kept_TK, experts)
    used_TK = (ids_TK >= 0) & (ids_TK < experts)
    if kept_TK is not None:
        used_TK &= kept_TK
    for tensor in (plan.source_N, plan.slot_TK, plan.offsets_E, plan.counts_E):
        assert tensor.dtype == torch.int32
    counts_E = torch.bincount(ids_TK[used_TK], minlength=experts)
    assert torch.equal(plan.counts_E.long(), counts_E)
    slots_N = plan.slot_TK.flatten().long()
    assert torch.equal(slots_N.sort().values, torch.arange(tokens * k))
    assert torch.equal(plan.source_N[slots_N].long(), torch.arange(tokens).repeat_interleave(k))
    expert_of_row_N = torch.searchsorted(plan.offsets_E, torch.arange(tokens * k), right=True)
    want_TK = ids_TK.masked_fill(~used_TK, experts)
    assert torch.equal(expert_of_row_N[slots_N], want_TK.flatten())
    for expert in range(experts + 1):  # stable: earlier tokens first
        row_N = slots_N[want_TK.flatten() == expert]
        assert torch.equal(row_N, row_N.sort().values)


@given(
    st.integers(0, 2**16),
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
    st.integers(0, 3),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([3, 8]),
)
@settings(max_examples=60)
def test_grouped_products(
    seed: int, counts: list[int], tail: int, dtype: torch.dtype, width: int
) -> None:
    torch.manual_seed(seed)
    offsets_E = torch.tensor(counts).cumsum(0).int()
    total = sum(counts) + tail
    x_NA, y_NB = torch.randn(total, width).to(dtype), torch.randn(total, 8).to(dtype)
    weight_EAB = torch.randn(len(counts), width, 8).to(dtype)
    found, outer = grouped_mm(x_NA, weight_EAB, offsets_E), grouped_outer(x_NA, y_NB, offsets_E)
    assert found.dtype == outer.dtype == dtype
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    start = 0
    for expert, count in enumerate(counts):
        rows_ = slice(start, start + count)
        want = x_NA[rows_].double() @ weight_EAB[expert].double()
        assert relative_error(found[rows_], want) < bound
        assert relative_error(outer[expert], x_NA[rows_].double().T @ y_NB[rows_].double()) < bound
        start += count
    assert (found[start:] == 0).all()


@given(st.integers(0, 2**16), st.sampled_from([0, 1, 6]), st.booleans(), st.booleans())
@settings(max_examples=30)
def test_gather_sum(seed: int, tokens: int, weighted: bool, mixed: bool) -> None:
    torch.manual_seed(seed)
    rows_NH = torch.randn(tokens * 3, 5)
    slot_TK = torch.randperm(tokens * 3).view(tokens, 3).int()
    weights_TK = torch.randn(tokens, 3) if weighted else None
    if weights_TK is not None and mixed:
        weights_TK = weights_TK.double()
    found = gather_sum(rows_NH, slot_TK, weights_TK)
    want_TH = torch.zeros(tokens, 5, dtype=torch.float64)
    for k in range(3):
        part_TH = rows_NH[slot_TK[:, k].long()].double()
        want_TH += part_TH if weights_TK is None else part_TH * weights_TK[:, k, None].double()
    assert found.dtype == (
        rows_NH.dtype
        if weights_TK is None
        else torch.promote_types(rows_NH.dtype, weights_TK.dtype)
    )
    assert relative_error(found, want_TH) < 1e-6


@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0, 0], [5, 5, 0]])
def test_ops_for_the_compiler(counts: list[int]) -> None:
    offsets_E = torch.tensor(counts).cumsum(0).int()
    x_NA, y_NB = torch.randn(10, 4), torch.randn(10, 6)
    opcheck(torch.ops.moetk.grouped_mm.default, (x_NA, torch.randn(3, 4, 6), offsets_E))
    opcheck(torch.ops.moetk.grouped_outer.default, (x_NA, y_NB, offsets_E))
