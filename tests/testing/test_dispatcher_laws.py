"""Right dispatchers keep the laws, and each law is broken by a part that has its bug."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.dispatch import Capacity, Local, by_weight
from moetk.errors import LawBrokenError, RouterConfigError
from moetk.routing import Routing
from moetk.testing.check_dispatchers import DISPATCHER_LAWS, check_dispatcher
from moetk.testing.law import judge_law
from moetk.testing.laws.dispatchers import PerChoice
from moetk.testing.laws.dispatchers_queue import Queue
from tests.testing.drawn import drawn

CAPACITY = {"D13", "D14", "D15", "D16", "D17", "D18"}


class ReadsIds(Local):
    """A user's dispatcher, which leaves other kinds to Python."""

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, None]:
        assert len(routing.experts_TK) == len(x_TH)
        return x_TH, routing, None


@pytest.mark.parametrize(
    "dispatcher, silent",
    [
        (Local(), CAPACITY),
        (Local(Capacity(1.0)), {"D12"}),
        (Local(Capacity(0.7, by_weight)), {"D12"}),
        (PerChoice(), CAPACITY | {"D12"}),
        (ReadsIds(), CAPACITY | {"D12"}),
    ],
    ids=["local", "first_come", "by_weight", "a_row_a_choice", "no_words_for_other_kinds"],
)
def test_right_dispatchers_keep_every_law(dispatcher: object, silent: set[str]) -> None:
    report = check_dispatcher(dispatcher, **drawn())
    assert {one.law.number for one in report.having("not applicable")} == silent
    assert {one.law.number for one in report.having("kept")} == set(REASONS) - silent


def test_a_users_capacity_is_checked_where_it_can_be_set() -> None:
    def at(factor: float) -> Local:
        return Local(Queue(factor))

    unsaid = check_dispatcher(at(1.0), examples=6)
    assert {one.law.number for one in unsaid.having("not applicable")} == CAPACITY | {"D12"}
    said = check_dispatcher(at(1.0), with_capacity=at, examples=6)
    silent = {one.law.number: one.reason for one in said.having("not applicable")}
    assert silent.keys() == {"D12", "D18"}
    assert "whom it serves first" in silent["D18"] and "refuses" in silent["D12"]


@pytest.mark.parametrize("sizes", [{"num_experts": 1}, {"num_experts": 9, "hidden_size": 1}])
def test_other_sizes(sizes: dict[str, int]) -> None:
    assert check_dispatcher(Local(Capacity(1.0)), examples=6, **sizes).ok


REASONS = {
    "D1": "choices arrived at the experts, told as kept were",
    "D2": "pairs that arrived are not those that were kept",
    "D3": "y of identity experts differs",
    "D4": "dL/dw differs",
    "D5": "<x, combine(y)> against <dispatch(x), y> differs",
    "D6": "y with tokens in another order differs",
    "D7": "max()",
    "D8": "kept_TK differs between two runs",
    "D9": "combine 1 of 2 returned another result than alone",
    "D10": "the dispatcher changed weights_TK",
    "D11": "a row arrived that no token sent",
    "D12": "y of identity experts differs",
    "D13": "choices a sequence and have",
    "D14": "wanted and have 1 places",
    "D15": "factor 0.9 serves",
    "D16": "choices are dropped, or padding kept",
    "D17": "are kept where an earlier column was turned away",
    "D18": "one before it was not",
    "D19": "a dropped choice carries weight",
    "D20": "padding changes which choices of other tokens are kept",
    "D21": "a choice is kept that the router dropped",
    "D22": "a sequence keeps other choices in a batch than alone",
    "D23": "other choices are kept when experts are renamed",
    "D24": "torch.get_rng_state() differs after the call",
}


@pytest.mark.parametrize("law", DISPATCHER_LAWS, ids=lambda law: law.number)
def test_each_law_is_broken_by_its_broken_part(law: object) -> None:
    outcome = judge_law(law, law.broken(), examples=50)
    assert outcome.status == "broken"
    assert REASONS[law.number] in outcome.reason
    assert outcome.case is not None and law.formula and law.source


def test_numbers_name_one_law_each() -> None:
    numbers = [law.number for law in DISPATCHER_LAWS]
    assert len(numbers) == len(set(numbers)) and set(numbers) == set(REASONS)


def test_a_broken_dispatcher_raises_with_the_law_and_its_case() -> None:
    class Negates(Local):
        def dispatch(
            self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
        ) -> tuple[Tensor, Routing, None]:
            return -x_TH, routing, None

    with pytest.raises(LawBrokenError, match="Negates breaks") as caught:
        check_dispatcher(Negates(), examples=5)
    broken = {one.law.number for one in caught.value.report.having("broken")}
    assert {"D3", "D4", "D5", "D11"} <= broken and "D1" not in broken


class LosesCrowds(PerChoice):
    """Brings no more than 128 rows home."""

    def combine(self, y_RH: Tensor, handle: Any) -> Tensor:
        token_N, num_tokens = handle
        return super().combine(y_RH[:128], (token_N[:128], num_tokens))


def test_what_only_large_batches_show() -> None:
    with pytest.raises(LawBrokenError) as raised:
        check_dispatcher(LosesCrowds(), examples=30)
    assert {one.law.number for one in raised.value.report.having("broken")} == {"D3", "D5"}


@pytest.mark.parametrize("dispatcher", [None, Local])
def test_what_is_no_dispatcher(dispatcher: object) -> None:
    with pytest.raises(RouterConfigError, match="is no dispatcher; give it an object with"):
        check_dispatcher(dispatcher)


class Counts(Local):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, None]:
        self.seen += 1
        return super().dispatch(x_TH, routing, ctx)


def test_the_dispatcher_that_is_checked_and_the_random_numbers_stay() -> None:
    dispatcher, before = Counts(), torch.get_rng_state()
    check_dispatcher(dispatcher, examples=1)
    assert dispatcher.seen == 0 and torch.equal(before, torch.get_rng_state())


def test_a_dispatcher_that_cannot_be_copied_is_checked_itself() -> None:
    dispatcher = Counts()
    dispatcher.group = (one for one in ())  # a generator, as little as a process group
    assert check_dispatcher(dispatcher, examples=1).ok and dispatcher.seen > 0


class Greedy(Queue):
    def places(self, length: int, k: int, num_experts: int) -> int:
        return super().places(length, k, num_experts) + 1


def greedy(factor: float) -> Local:
    return Local(Greedy(factor))


def greedy_pair() -> tuple[Local, Callable[[float], Local]]:
    return greedy(1.0), greedy


def test_a_law_of_capacity_is_broken_again_by_its_repro(tmp_path: Path) -> None:
    with pytest.raises(LawBrokenError) as raised:
        check_dispatcher(greedy(1.0), with_capacity=greedy, examples=10)
    build = f"{__name__}:greedy_pair"
    (path,) = (p for p in raised.value.report.repro(tmp_path, build) if p.name == "test_d13.py")
    scope: dict[str, Any] = {"__file__": str(path)}
    exec(path.read_text(), scope)
    with pytest.raises(LawBrokenError, match="D13 no expert serves more than its capacity"):
        scope["test_d13"]()


def test_sizes_are_whole_numbers() -> None:
    with pytest.raises(RouterConfigError, match="check_dispatcher: num_experts=0"):
        check_dispatcher(Local(), num_experts=0)
