"""The shape of a law: drawn cases, the smallest that breaks it, and what is told of it."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

from moetk.errors import LawBrokenError
from moetk.testing.law import (
    Breach,
    Case,
    Law,
    hold,
    judge_law,
    judge_laws,
    law,
    raise_if_broken,
    untouched_random,
)


@law(
    "X1",
    "numbers stay below the limit",
    formula="n < limit",
    source="this test",
    cases=lambda limit: st.builds(
        lambda n: Case({"n": torch.tensor(n)}, {"n": n}), st.integers(0, 1000)
    ),
    broken=lambda: 10,
    unless=lambda limit: "no limit" if limit == 0 else None,
)
def below(limit: int, case: Case) -> None:
    n = int(case["n"])
    assume(n != 500)
    hold(n < limit, f"{n} is not below {limit}", seen=case["n"])


def test_a_law_that_holds_is_kept() -> None:
    outcome = judge_law(below, 2000, examples=20)
    assert (outcome.status, outcome.reason, outcome.case) == ("kept", "", None)
    assert outcome.examples >= 20 and outcome.seconds > 0


def test_the_smallest_case_is_told() -> None:
    outcome = judge_law(below, 10, examples=50)
    assert outcome.status == "broken" and outcome.reason == "10 is not below 10"
    assert outcome.case is not None and outcome.case.settings["n"] == 10
    assert outcome.shown["seen"] == 10


def test_a_law_that_does_not_speak_says_why() -> None:
    outcome = judge_law(below, 0, examples=50)
    assert (outcome.status, outcome.reason, outcome.examples) == ("not applicable", "no limit", 0)


def test_the_same_cases_each_time() -> None:
    assert judge_law(below, 700, examples=30).reason == judge_law(below, 700, examples=30).reason


def with_check(check: object) -> Law[int]:
    return law("X2", "t", formula="f", source="s", cases=below.cases, broken=lambda: 0)(check)  # type: ignore[arg-type]


def test_a_part_that_raises_has_broken_the_law() -> None:
    def crash(limit: int, case: Case) -> None:
        raise ValueError("no such thing")

    outcome = judge_law(with_check(crash), 1, examples=5)
    assert (outcome.status, outcome.reason) == ("broken", "ValueError: no such thing")


def test_randomness_starts_anew_for_each_case_and_is_given_back() -> None:
    draws = []

    def draw(limit: int, case: Case) -> None:
        draws.append(float(torch.rand(())))

    torch.manual_seed(5)
    state = torch.get_rng_state()
    judge_law(with_check(draw), 1, examples=5)
    assert len(set(draws)) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_a_law_that_finds_no_case_to_judge_does_not_speak() -> None:
    def picky(limit: int, case: Case) -> None:
        assume(False)

    outcome = judge_law(with_check(picky), 1, examples=5)
    told = (outcome.status, outcome.reason)
    assert told == ("not applicable", "no drawn case could be judged")


def test_a_case_is_judged_with_gradients_whatever_was_left() -> None:
    seen = []

    def leaves(limit: int, case: Case) -> None:
        seen.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    judge_law(with_check(leaves), 1, examples=5)
    assert all(seen) and torch.is_grad_enabled()
    with torch.no_grad():
        judge_law(with_check(leaves), 1, examples=5)
        assert all(seen) and not torch.is_grad_enabled()


def test_random_numbers_go_on_as_if_none_had_been_drawn() -> None:
    def draw() -> tuple[float, float]:
        return float(torch.rand(())), random.random()

    states = torch.get_rng_state(), random.getstate()
    with untouched_random():
        first = draw()
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    draw()
    with pytest.raises(ValueError), untouched_random():
        assert draw() == first
        state = random.getstate()
        raise ValueError
    assert random.getstate() != state


def test_a_strategy_that_fails_is_not_the_parts_fault() -> None:
    broken = law(
        "X3", "t", formula="f", source="s", broken=lambda: 0,
        cases=lambda _: st.integers().map(lambda n: 1 // 0),
    )(lambda limit, case: None)  # type: ignore[var-annotated]  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        judge_law(broken, 1, examples=5)


def test_hold_takes_tensors() -> None:
    hold(torch.ones(3, dtype=torch.bool), "fine")
    hold(torch.ones(0, dtype=torch.bool), "fine")
    with pytest.raises(Breach, match="not so") as raised:
        hold(torch.tensor([True, False]), "not so", which=torch.tensor(1))
    assert int(raised.value.tensors["which"]) == 1


def test_the_error_names_each_broken_law_with_its_case() -> None:
    raise_if_broken("fine", judge_laws([below], 2000, examples=5))
    outcomes = judge_laws([below], 10, examples=50)
    with pytest.raises(
        LawBrokenError, match="ten breaks 1 of 1 laws:\n  X1 numbers stay"
    ) as raised:
        raise_if_broken("ten", outcomes)
    assert "[n < limit]: 10 is not below 10" in str(raised.value)
    assert "on Case(n: torch.int64 (), n=10)" in str(raised.value)


def test_a_case_is_read_by_name() -> None:
    case = Case({"x": torch.ones(2)}, {"k": 1})
    assert case.get("y") is None and case["x"].shape == (2,)
