"""What strategies promise: shapes, patterns, masks and layouts, each as its docstring says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from moetk.testing.strategies.inputs import (
    BAD_VALUES,
    LAYOUTS,
    PATTERNS,
    not_finite,
    pattern_names,
    rows_of,
)
from moetk.testing.strategies.sequences import (
    MASKS,
    VOCABULARY,
    mask_of_kind,
    packed,
    positions,
    token_ids,
)
from moetk.testing.strategies.shapes import (
    LENGTHS,
    ROOM,
    batch_shapes,
    capacity_factors,
    expert_counts,
    float_dtypes,
    seeds,
)


@settings(max_examples=30)
@given(batch_shapes(sequences=2, least_length=1), expert_counts(), capacity_factors(), seeds())
def test_sizes_are_in_range(
    shape: tuple[int, int], experts: tuple[int, int], factor: float, seed: int
) -> None:
    assert 1 <= shape[0] <= 2 and shape[1] in LENGTHS and shape[1] >= 1
    assert 1 <= experts[1] <= experts[0]
    assert factor in ROOM and seed >= 0


@given(float_dtypes(), pattern_names(), seeds(), batch_shapes())
@settings(max_examples=40)
def test_a_pattern_and_a_seed_decide_the_tensor(
    dtype: torch.dtype, pattern: str, seed: int, shape: tuple[int, int]
) -> None:
    rows = shape[0] * shape[1]
    first, second = (rows_of(pattern, seed, rows, 5, dtype) for _ in range(2))
    assert first.shape == (rows, 5) and first.dtype == dtype
    assert torch.equal(first, second)
    assert bool(first.isfinite().all())


def test_patterns_are_what_they_say() -> None:
    made = {name: rows_of(name, 3, 6, 8) for name in PATTERNS}
    assert bool((made["zeros"] == 0).all())
    assert bool((made["one_hot"].sum(-1) == 1).all())
    assert torch.equal(made["tied_pairs"][:, ::2], made["tied_pairs"][:, 1::2])
    zeros = made["signed_zeros"]
    assert bool((zeros == 0).all()) and 0 < int(zeros.signbit().sum()) < zeros.numel()
    assert bool((made["collapsed"] == made["collapsed"][0]).all())
    assert bool((made["starved"][:, 1:].amax(-1) < made["starved"][:, 0]).all())
    assert bool((made["ascending"].diff(dim=-1) > 0).all())
    assert float(made["huge"].abs().amax()) > 1e3
    assert 0 < float(made["tiny"].abs().amax()) < 1e-28
    steps = made["one_ulp"].float().sort(-1).values.diff(dim=-1)
    assert bool((steps == torch.finfo(torch.float32).eps).all())


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("whole", [True, False])
def test_a_bad_row_is_bad_alone(value: float, whole: bool) -> None:
    x_TH = rows_of("gaussian", 0, 4, 3)
    bad_TH = not_finite(x_TH, 2, value, whole=whole)
    assert int((~bad_TH.isfinite()).sum()) == (3 if whole else 1)
    assert bool(x_TH.isfinite().all())
    keep = torch.tensor([0, 1, 3])
    assert torch.equal(bad_TH[keep], x_TH[keep])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_layouts_hold_the_same_numbers(name: str, rows: int) -> None:
    x_TH = rows_of("gaussian", 0, rows, 3)
    other_TH = LAYOUTS[name](x_TH)
    expected = x_TH[:1].expand(rows, 3) if name == "repeated" else x_TH
    assert torch.equal(other_TH, expected)
    if rows > 1:
        moved = other_TH.stride() != (3, 1) or other_TH.storage_offset() % 2 == 1
        assert moved


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1), (3, 5)])
def test_masks_are_of_the_batch(kind: str, shape: tuple[int, int]) -> None:
    mask_T = mask_of_kind(kind, 1, *shape)
    assert mask_T.shape == (shape[0] * shape[1],) and mask_T.dtype == torch.bool


def test_masks_pad_where_they_say() -> None:
    right, left = (
        mask_of_kind(f"{side}_padding", 2, 3, 5).view(3, 5) for side in ("right", "left")
    )
    assert bool(right[:, 0].all()) and bool((right.int().diff(dim=1) <= 0).all())
    assert bool(left[:, -1].all()) and bool((left.int().diff(dim=1) >= 0).all())
    assert not mask_of_kind("only_padding", 0, 2, 3).any()
    empty = mask_of_kind("one_empty_sequence", 0, 2, 3).view(2, 3)
    assert not empty[0].any() and bool(empty[1].all())


@given(seeds())
@settings(max_examples=20)
def test_packed_sequences_are_runs_with_positions_of_their_own(seed: int) -> None:
    sequence_T, position_T = packed(seed, 9, 3)
    assert bool((sequence_T.diff() >= 0).all()) and len(sequence_T.unique()) <= 3
    for one in sequence_T.unique():
        run_T = position_T[sequence_T == one]
        assert torch.equal(run_T, torch.arange(len(run_T)))


def test_ids_and_positions() -> None:
    assert int(token_ids(0, 50).max()) < VOCABULARY and len(token_ids(0, 0)) == 0
    assert positions(2, 3).tolist() == [0, 1, 2, 0, 1, 2]
