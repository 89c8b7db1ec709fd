"""What is a counter of choices, and what only looks like one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetk import RouterContext, TokenChoice, compare
from moetk.equivalence.sides.loads import is_load, loads
from moetk.equivalence.sides.pick import side_of
from moetk.equivalence.trace import observe
from tests.equivalence.steps import GROUPED, V3, E, K, T, inputs, largest, router, v3

NOBODY = torch.zeros(E, dtype=torch.int64)


class Holds(V3):
    """A router with a buffer of one number an expert."""

    def __init__(self, *sizes: int, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.register_buffer("held", torch.zeros(E))

    def moved(self, ids_TK: Tensor) -> Tensor:
        raise NotImplementedError

    def select(self, choice_TE: Tensor) -> Tensor:
        ids_TK = largest(choice_TE, self.top_k)
        self.held.copy_(self.moved(ids_TK))
        return ids_TK


def holds(moved: Any) -> Any:
    return router(Holds, GROUPED, moved=moved)


def load(ids_TK: Tensor) -> Tensor:
    return ids_TK.flatten().bincount(minlength=E)


def idle(self: Holds, ids_TK: Tensor) -> Tensor:
    """Steps since each expert was last used."""
    return (self.held + 1).masked_fill(load(ids_TK) > 0, 0)


def used_at_all(self: Holds, ids_TK: Tensor) -> Tensor:
    return self.held + (load(ids_TK) > 0)


def sign_of_load(self: Holds, ids_TK: Tensor) -> Tensor:
    return self.held + (load(ids_TK) - T * K / E).sign()


@pytest.mark.parametrize("moved", [idle, used_at_all, sign_of_load])
def test_whole_numbers_that_count_no_choices(moved: Any) -> None:
    report = compare(v3(), holds(moved), inputs())
    assert report.ok and report.notes == ()
    counts = report.own_b.values["counts"]
    assert torch.equal(counts, load(report.own_b.values["indices"]))


@pytest.mark.parametrize(
    ("moved", "counted"),
    [
        (lambda self, ids: load(ids), lambda ids: load(ids)),
        (lambda self, ids: self.held + load(ids), lambda ids: 2 * load(ids)),
        (lambda self, ids: 8 * load(ids), lambda ids: 8 * load(ids)),
        (lambda self, ids: load(ids[:, :1]), lambda ids: load(ids[:, :1])),
        (lambda self, ids: load(ids).roll(1), lambda ids: load(ids).roll(1)),
    ],
    ids=["once", "under recompute", "over replicas", "first choices", "for the next expert"],
)
def test_right_and_wrong_counters(moved: Any, counted: Any) -> None:
    trace = observe(side_of(holds(moved), inputs()), inputs().flatten(0, 1))
    assert torch.equal(trace.values["counts"], counted(trace.values["indices"]))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), times=st.integers(1, 9), masked=st.booleans())
def test_each_way_of_counting_is_known(seed: int, times: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.randint(-1, E, (T, K), generator=generator)
    kept_TK = torch.rand(T, K, generator=generator) < 0.7
    real_T = torch.rand(T, generator=generator) < 0.6
    ctx = RouterContext(token_mask=real_T if masked else None)
    known = loads(TokenChoice(ids_TK, torch.ones(T, K), E, kept_TK=kept_TK), ctx)
    rows = range(T) if not masked else [t for t in range(T) if real_T[t]]
    wanted, kept, distinct, first = (NOBODY.clone() for _ in range(4))
    for t in rows:
        chosen = [int(e) for e in ids_TK[t]]
        for k, expert in enumerate(chosen):
            if expert >= 0:
                wanted[expert] += 1
                kept[expert] += bool(kept_TK[t, k])
                distinct[expert] += expert not in chosen[:k]
                first[expert] += k == 0
    for count_E in (wanted, kept, distinct, first):
        assert is_load(times * count_E, known) == bool(count_E.any())
    assert not is_load(times * wanted + torch.eye(E, dtype=torch.int64)[0] * 1000, known)


def test_nothing_is_no_load() -> None:
    known = loads(TokenChoice(torch.empty(0, K).long(), torch.empty(0, K), E), RouterContext())
    assert not is_load(NOBODY, known) and not is_load(NOBODY + 1, known)
