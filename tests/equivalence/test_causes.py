"""What a cause may say: its prediction is what was read, or it says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetk import MoELayer, RouterContext
from moetk.dispatch import Capacity, Local
from moetk.equivalence.cause import Evidence, cause, deviation, diagnose, read
from moetk.equivalence.causes.all import CAUSES
from moetk.equivalence.causes.values import (
    concatenated,
    halves_swapped,
    interleaved,
    is_rounding,
    rearranged,
)
from moetk.equivalence.double import InDouble
from moetk.equivalence.sides.pick import side_of
from moetk.equivalence.trace import EXACT, Side, Trace, observe
from moetk.losses import LoadBalancingLoss, RouterZLoss
from tests.equivalence.planted_experts import gpt_oss_bank
from tests.equivalence.steps import E, H, gpt_oss, mixtral, v3

ROUTERS = {"v3": v3, "mixtral": mixtral, "gpt_oss": gpt_oss}


@cache
def reference(router: str, num_tokens: int, capacity: float | None) -> tuple[Side, Trace, Tensor]:
    layer = MoELayer(
        ROUTERS[router](),
        gpt_oss_bank(),
        dispatcher=None if capacity is None else Local(capacity=Capacity(capacity)),
        losses=[] if router == "gpt_oss" else [LoadBalancingLoss(1e-2), RouterZLoss(1e-3)],
    ).double()
    x_TH = torch.randn(num_tokens, H, dtype=torch.float64)
    side = side_of(layer, x_TH)
    with InDouble():
        return side, observe(side, x_TH), x_TH


def evidence(
    stage: str, found: Tensor, router: str = "v3", num_tokens: int = 6, capacity: float | None = 1.0
) -> Evidence:
    """The reference against a side that reads `found` at one stage and agrees elsewhere."""
    side, trace, x_TH = reference(router, num_tokens, capacity)
    if stage.startswith("grad "):
        other = replace(trace, grads={**trace.grads, stage.removeprefix("grad "): found})
    else:
        other = replace(trace, values={**trace.values, stage: found})
    parameters = {n: leaf.common(leaf.tensor.detach()) for n, leaf in side.leaves().items()}
    return Evidence(
        stage, trace, other, trace, other, x_TH, side.facts, {}, parameters, 1e-9,
        RouterContext(batch_shape=(1, num_tokens)),
    )  # fmt: skip


def names(e: Evidence) -> list[str]:
    return [one.name for one in diagnose(e, CAUSES)]


def stages(router: str, num_tokens: int, capacity: float | None) -> list[str]:
    _, trace, _ = reference(router, num_tokens, capacity)
    return [*trace.values, *(f"grad {name}" for name in trace.grads)]


@settings(max_examples=60)
@given(st.data())
def test_what_no_cause_explains_is_unknown(data: st.DataObject) -> None:
    router = data.draw(st.sampled_from(sorted(ROUTERS)))
    num_tokens = data.draw(st.sampled_from([2, 6]))
    capacity = data.draw(st.sampled_from([None, 1.0]))
    stage = data.draw(st.sampled_from(stages(router, num_tokens, capacity)))
    wanted = read(reference(router, num_tokens, capacity)[1], stage)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    if stage in EXACT or wanted.numel() < 2:
        # A handful of whole numbers may be what some defect gives: draw what none does.
        found = torch.full(wanted.shape, 777)
    else:
        size = 10.0 ** data.draw(st.integers(-6, 1))
        noise = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
        found = wanted + size * noise * wanted.masked_fill(~wanted.isfinite(), 0).abs().amax()
    assert names(evidence(stage, found, router, num_tokens, capacity)) == []


@settings(max_examples=60)
@given(st.data())
def test_no_cause_fails_on_what_it_cannot_read(data: st.DataObject) -> None:
    """Stages, facts and parameters that are missing, no tokens at all, other shapes, NaN."""
    router = data.draw(st.sampled_from(sorted(ROUTERS)))
    num_tokens = data.draw(st.sampled_from([0, 1, 6]))
    stage = data.draw(st.sampled_from(stages(router, num_tokens, 1.0)))
    wanted = read(reference(router, num_tokens, 1.0)[1], stage)
    shape = data.draw(
        st.sampled_from([wanted.shape, (*wanted.shape, 2), wanted.shape[:-1], (3, 5), ()])
    )
    value = data.draw(st.sampled_from([0.0, 1.0, float("nan"), float("inf")]))
    e = evidence(stage, torch.full(shape, value, dtype=torch.float64), router, num_tokens)
    keep = st.sets(st.sampled_from(sorted(e.a.values)))
    shown = data.draw(keep) | ({stage} & e.a.values.keys())
    a = replace(e.a, values={name: e.a.values[name] for name in shown})
    facts = {name: e.facts[name] for name in e.facts if data.draw(st.booleans())}
    parameters = {n: e.parameters[n] for n in e.parameters if data.draw(st.booleans())}
    e = replace(e, a=a, own_a=a, facts=facts, parameters=parameters)
    for one in CAUSES:
        if stage in one.stages:
            assert one.matches(e) in (True, False)


@pytest.mark.parametrize("router", ROUTERS)
def test_no_cause_fails_where_a_stage_is_all_that_is_seen(router: str) -> None:
    for stage in stages(router, 6, 1.0):
        wanted = read(reference(router, 6, 1.0)[1], stage)
        e = evidence(stage, torch.ones_like(wanted), router)
        for shown in ({stage}, {stage, "indices"}, {stage, "indices", "weights"}):
            a = replace(e.a, values={n: one for n, one in e.a.values.items() if n in shown})
            for facts in ({}, e.facts):
                bare = replace(e, a=a, own_a=a, facts=facts, parameters={})
                for one in CAUSES:
                    assert stage not in one.stages or one.matches(bare) in (True, False)


class TestEquals:
    def test_a_prediction_of_what_was_wanted_explains_nothing(self) -> None:
        e = evidence("weights", read(reference("v3", 6, 1.0)[1], "weights"))
        assert not e.equals(e.wanted)
        assert names(e) == []

    def test_a_prediction_near_a_small_difference_is_no_explanation_of_it(self) -> None:
        wanted = read(reference("v3", 6, 1.0)[1], "weights")
        e = evidence("weights", wanted * (1 + 1e-9))
        assert not e.equals(wanted * (1 + 1.5e-9))
        assert e.equals(wanted * (1 + 1e-9))

    def test_columns_of_chosen_experts_have_no_order(self) -> None:
        wanted = read(reference("v3", 6, 1.0)[1], "indices")
        e = evidence("indices", (wanted + 1) % E)
        assert e.equals(((wanted + 1) % E).flip(-1))
        assert names(e) == ["ids shifted by one"]

    def test_one_number_that_differs_says_too_little(self) -> None:
        wanted = read(reference("v3", 6, 1.0)[1], "dispatched")
        found = wanted.clone()
        place = tuple(wanted.nonzero()[0].tolist())
        found[place] = False
        assert not evidence("dispatched", found).equals(found)

    def test_another_shape_is_another_value(self) -> None:
        wanted = read(reference("v3", 6, 1.0)[1], "counts")
        assert not evidence("counts", wanted * 2).equals(wanted.double()[:, None] * 2)
        assert deviation(wanted.double(), wanted[1:].double()) == float("inf")

    def test_nan_where_nothing_is_wanted_is_no_match(self) -> None:
        wanted = read(reference("v3", 6, 1.0)[1], "weights")
        found = wanted * 0.5
        found[0] = float("nan")
        assert names(evidence("weights", found)) == []


class TestDiagnose:
    def test_what_only_describes_speaks_where_nothing_else_does(self) -> None:
        wanted = read(reference("v3", 6, 1.0)[1], "weights")
        assert names(evidence("weights", wanted * 0.9)) == ["scaled by a constant"]
        # 2.5 is this router's scale.
        assert names(evidence("weights", wanted * 2.5)) == ["scale applied twice"]

    def test_one_factor_for_all_is_not_one_for_each(self) -> None:
        wanted = read(reference("v3", 6, 1.0)[1], "combined")
        rows = torch.arange(1, 7, dtype=torch.float64)[:, None]
        assert names(evidence("combined", wanted * 0.9)) == ["scaled by a constant"]
        assert names(evidence("combined", wanted * rows)) == ["scaled by a factor for each token"]

    def test_causes_of_other_stages_are_not_asked(self) -> None:
        def fail(e: Evidence) -> Iterator[Tensor]:
            raise AssertionError("asked")
            yield e.wanted

        asked = cause("never", "scores", fix="")(fail)
        e = evidence("weights", read(reference("v3", 6, 1.0)[1], "weights"))
        assert diagnose(e, [asked]) == ()
        with pytest.raises(AssertionError, match="asked"):
            diagnose(replace(e, stage="scores"), [asked])

    def test_every_cause_says_what_to_do(self) -> None:
        for one in CAUSES:
            assert one.fix.endswith((".", "?")) and one.stages, one.name


class TestValues:
    @given(st.integers(1, 4), st.integers(-3, 2))
    @settings(max_examples=10)
    def test_column_orders_undo_one_another(self, width: int, dim: int) -> None:
        values = torch.randn(2 * width, 2 * width, 2 * width)
        assert torch.equal(concatenated(interleaved(values, dim), dim), values)
        assert torch.equal(interleaved(concatenated(values, dim), dim), values)
        assert torch.equal(halves_swapped(halves_swapped(values, dim), dim), values)

    @given(st.integers(0, 2**31), st.sampled_from([0, 1]))
    @settings(max_examples=10)
    def test_slices_are_found_where_they_went(self, seed: int, dim: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(5, 7, generator=generator)
        moved = values.index_select(dim, torch.randperm(values.shape[dim], generator=generator))
        again = rearranged(values, moved, dim)
        assert again is not None and torch.equal(again, moved)

    def test_a_rounding_is_of_every_element_and_of_no_other_values(self) -> None:
        exact = torch.randn(50, dtype=torch.float64)
        rounded = exact.to(torch.bfloat16).double()
        assert is_rounding(rounded, exact, exact, torch.bfloat16)
        assert not is_rounding(exact.float().double(), exact, exact, torch.bfloat16)
        assert not is_rounding(rounded, exact, rounded, torch.bfloat16)  # it was that wide before
        assert not is_rounding(2 * rounded, exact, exact, torch.bfloat16)
