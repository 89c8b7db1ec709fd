"""Loads come about through the router's own weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetk.bench.contenders import (
    block_of,
)
from moetk.bench.loads import LOADS, choice_rates, same, solve_shift, zipf, zipf_rates
from tests.test_bench_layer import model, tokens


@given(st.integers(1, 64).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))))
@settings(max_examples=40)
def test_zipf_rates_are_zipfs_below_the_full_ones(sizes: tuple[int, int]) -> None:
    num_experts, top_k = sizes
    rates_E = zipf_rates(num_experts, top_k)
    assert torch.isclose(rates_E.sum(), torch.tensor(float(top_k), dtype=torch.float64))
    assert rates_E.max() <= 1 + 1e-12 and (rates_E.diff() <= 1e-12).all()
    rank_E = torch.arange(1, num_experts + 1)
    scaled = (rates_E * rank_E)[rates_E < 1 - 1e-9]
    assert len(scaled) == 0 or torch.allclose(scaled, scaled[0].expand_as(scaled))


def test_zipf_of_qwen3_fills_the_first_rank() -> None:
    rates_E = zipf_rates(128, 8)
    assert rates_E[0] == 1 and 0.7 < rates_E[1] < 1
    assert float(zipf_rates(8, 2)[0]) == pytest.approx(2 / sum(1 / r for r in range(1, 9)))


@pytest.mark.parametrize("sizes", [(8, 2), (16, 4), (4, 1)])
def test_shifts_bring_about_the_rates(sizes: tuple[int, int]) -> None:
    num_experts, top_k = sizes
    logits_TE = torch.randn(2048, num_experts, generator=torch.Generator().manual_seed(3))
    wanted_E = zipf_rates(num_experts, top_k).flip(0)
    shift_E = solve_shift(logits_TE, wanted_E, top_k)
    found_E = choice_rates(logits_TE + shift_E, top_k)
    assert (found_E - wanted_E).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_come_about_in_the_router_itself(dtype: torch.dtype) -> None:
    block, x_TH = block_of(model(dtype)), tokens(1024)[0].to(dtype)
    before = block.gate.weight.detach().clone()
    LOADS["balanced"](block.gate.weight.data, x_TH, 2, torch.Generator())
    assert torch.equal(block.gate.weight, before)

    zipf(block.gate.weight.data, x_TH, 2, torch.Generator().manual_seed(0))
    rates_E = choice_rates(block.gate(x_TH)[0].float(), 2)
    wanted_E = zipf_rates(4, 2).float().sort().values
    assert (rates_E.sort().values - wanted_E).abs().max() < 0.05

    same(block.gate.weight.data, x_TH, 2, torch.Generator().manual_seed(0))
    assert sorted(choice_rates(block.gate(x_TH)[0].float(), 2).tolist()) == [0, 0, 1, 1]
