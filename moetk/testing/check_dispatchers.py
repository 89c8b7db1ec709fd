"""Checking a dispatcher against every law of its kind, on one rank."""

from __future__ import annotations

from collections.abc import Callable

from moetk.dispatch import Dispatcher
from moetk.testing.law import judge_laws, untouched_random
from moetk.testing.laws import (
    dispatchers,
    dispatchers_calls,
    dispatchers_capacity,
    dispatchers_drops,
)
from moetk.testing.laws.dispatchers_subject import dispatcher_under_test, pair_under_test
from moetk.testing.report import LawReport

DISPATCHER_LAWS = (
    *dispatchers.LAWS,
    *dispatchers_calls.LAWS,
    *dispatchers_capacity.LAWS,
    *dispatchers_drops.LAWS,
)


def check_dispatcher(
    dispatcher: Dispatcher,
    *,
    num_experts: int = 4,
    hidden_size: int = 6,
    with_capacity: Callable[[float], Dispatcher] | None = None,
    examples: int = 50,
    derandomize: bool = True,
) -> LawReport:
    """Check `dispatch` and `combine` against the laws of dispatchers.

    >>> check_dispatcher(Local(Capacity(1.25)))

    All experts are taken to be here: one rank, or a group of one. `local` may hold other rows than
    x_TH, one a choice for example, and its ids are experts 0 to E - 1. A copy is checked, on the
    CPU, where the dispatcher can be copied. It may refuse an ExpertChoice or a SoftChoice by any
    exception; UnsupportedRoutingError is the good way, which says why.

    num_experts, hidden_size: of the routings and rows that are sent.
    with_capacity: (factor) -> the same dispatcher, whose experts each have ceil(factor S K / E)
        places in each sequence. `Local(Capacity(...))` needs none; without it, the laws of
        capacity do not speak about this dispatcher. With it, what `report.repro` builds again is
        the pair (dispatcher, with_capacity).
    examples: drawn cases for each law. derandomize=False: other cases with every call.

    Returns the report of a dispatcher that keeps every law that speaks about it. Raises
    LawBrokenError, whose `report` says which law broke on which smallest case, and
    RouterConfigError on sizes below 1 and on what is no dispatcher.
    """
    sizes = {"num_experts": num_experts, "hidden_size": hidden_size}
    with untouched_random():
        subject = dispatcher_under_test(dispatcher, **sizes, with_capacity=with_capacity)
        outcomes = judge_laws(DISPATCHER_LAWS, subject, examples=examples, derandomize=derandomize)
    report = LawReport(
        type(dispatcher).__qualname__,
        tuple(outcomes),
        subject_of=dispatcher_under_test if with_capacity is None else pair_under_test,
        arguments=dict(sizes),
        part=dispatcher if with_capacity is None else (dispatcher, with_capacity),
    )
    return report.or_raise()
