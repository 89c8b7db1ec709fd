"""A law of banks is a law in evaluation, and in training where the bank draws nothing there."""

from __future__ import annotations

import functools
from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import nn

from moetk.testing.law import Case, Law
from moetk.testing.law import law as law_of_any_kind
from moetk.testing.laws.banks_subject import BankUnderTest


def law(
    number: str,
    title: str,
    *,
    formula: str,
    source: str,
    cases: Callable[[BankUnderTest], SearchStrategy[Case]],
    broken: Callable[[], BankUnderTest],
    unless: Callable[[BankUnderTest], str | None] = lambda _: None,
) -> Callable[[Callable[[BankUnderTest, Case], None]], Law[BankUnderTest]]:
    """`moetk.testing.law.law`, whose cases draw `training` beside the rest."""

    def in_every_mode(subject: BankUnderTest) -> SearchStrategy[Case]:
        modes = st.sampled_from(subject.modes)
        return st.builds(
            lambda case, mode: Case(case.tensors, {**case.settings, "training": mode}),
            cases(subject),
            modes,
        )

    def make(check: Callable[[BankUnderTest, Case], None]) -> Law[BankUnderTest]:
        @functools.wraps(check)
        def in_its_mode(subject: BankUnderTest, case: Case) -> None:
            if not isinstance(subject.bank, nn.Module):
                return check(subject, case)
            subject.bank.train(bool(case.settings.get("training")))
            try:
                check(subject, case)
            finally:
                subject.bank.eval()

        told = {"formula": formula, "source": source}
        mine = law_of_any_kind(
            number, title, **told, cases=in_every_mode, broken=broken, unless=unless
        )
        return mine(in_its_mode)

    return make
