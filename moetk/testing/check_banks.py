"""Checking a bank of experts against every law of its kind."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moetk.routing import Routing
from moetk.testing.law import judge_laws, untouched_random
from moetk.testing.laws import (
    banks_experts,
    banks_gradients,
    banks_kinds,
    banks_routing,
    banks_rows,
    banks_spec,
)
from moetk.testing.laws.banks_subject import bank_under_test, name_of
from moetk.testing.report import LawReport

BANK_LAWS = (
    *banks_routing.LAWS,
    *banks_kinds.LAWS,
    *banks_rows.LAWS,
    *banks_gradients.LAWS,
    *banks_experts.LAWS,
    *banks_spec.LAWS,
)


def check_expert_bank(
    bank: Callable[[Tensor, Routing], Tensor],
    *,
    hidden_size: int | None = None,
    num_experts: int | None = None,
    float64: bool = True,
    examples: int = 50,
    derandomize: bool = True,
) -> LawReport:
    """Check any `(x_TH, routing) -> y_TH` against the laws of expert banks.

    >>> check_expert_bank(ExpertBank(hidden_size=8, num_experts=4, intermediate_size=16))

    A module is checked as a float64 copy on the CPU, in evaluation, and in training where it draws
    nothing there; what it holds stays as it is, and so do torch's random numbers. A bank may refuse
    a kind of routing by any exception; UnsupportedRoutingError is the good way, which says why.

    Some laws need to know more of it: parameters with one row an expert, (E, ...); a `spec`
    (BankSpec) with `weights()` made of its parameters; `scale = "input"` where it multiplies by the
    routing weight before the expert. Of a plain function only its output and its gradients are
    known.

    hidden_size, num_experts: where the bank has no attribute of that name; num_experts counts the
    ids that it answers. float64=False: compare in float32, where it has no float64.
    examples: drawn cases for each law. derandomize=False: other cases with every call.

    Returns the report of a bank that keeps every law that speaks about it. Raises LawBrokenError,
    whose `report` says which law broke on which smallest case, and RouterConfigError where a size
    is not known or `bank` is no bank.
    """
    sizes = {"hidden_size": hidden_size, "num_experts": num_experts}
    with untouched_random():
        subject = bank_under_test(bank, **sizes, float64=float64)
        outcomes = judge_laws(BANK_LAWS, subject, examples=examples, derandomize=derandomize)
    report = LawReport(
        name_of(bank),
        tuple(outcomes),
        subject_of=bank_under_test,
        arguments={**sizes, "float64": float64},
        part=bank,
    )
    return report.or_raise()
