"""One line for a router of one's own."""

from __future__ import annotations

from dataclasses import replace

from moetk.testing.causality import measure_causality
from moetk.testing.law import Law, Outcome, judge_laws, untouched_random
from moetk.testing.laws import (
    routers_capacity,
    routers_choice,
    routers_favour,
    routers_fields,
    routers_form,
    routers_function,
    routers_gradient,
    routers_isolation,
    routers_replay,
    routers_settings,
    routers_symmetry,
    routers_weights,
)
from moetk.testing.laws.routers_subject import Router, RouterSubject, router_subject
from moetk.testing.laws.routers_told import matrix_of
from moetk.testing.report import LawReport

ROUTER_LAWS: tuple[Law[RouterSubject], ...] = (
    *routers_form.LAWS,
    *routers_function.LAWS,
    *routers_choice.LAWS,
    *routers_symmetry.LAWS,
    *routers_capacity.LAWS,
    *routers_weights.LAWS,
    *routers_isolation.LAWS,
    *routers_replay.LAWS,
    *routers_gradient.LAWS,
    *routers_fields.LAWS,
    *routers_favour.LAWS,
    *routers_settings.LAWS,
)


@untouched_random()
def check_router(
    router: Router,
    *,
    hidden_size: int | None = None,
    num_experts: int | None = None,
    examples: int = 50,
    derandomize: bool = True,
) -> LawReport:
    """Check every law that speaks about this router, and measure whether it is causal.

    >>> from moetk.routers import MixtralRouter
    >>> from moetk.testing import check_router
    >>> check_router(MixtralRouter(16, 8, 2), examples=5).ok
    True

    router: any callable (x_TH, ctx) -> Routing, a module or a function. It is not changed: its
    copies are checked, on the CPU, in float64 where they run so.
    hidden_size, num_experts: None = read off the router. examples: drawn cases for each law.
    derandomize: the same cases every time; False draws new ones.

    What a router does on purpose it declares as an attribute: `duplicates = True` (a token may
    name one expert twice), `surrogate_gradient = True` (its gradient is not its derivative),
    `per_batch = True` (sequences of a batch share one balance), `experts_differ = True` (some are
    shared, or scaled, by their number), `train_differs = True` (training routes otherwise than
    evaluation even without noise). Where a law needs a field that the routing leaves out, the
    report says which.

    Raises LawBrokenError, with the report as its `report`, where a law is broken; RouterConfigError
    where a size cannot be read off or the router does not run.
    """
    subject = router_subject(router, hidden_size, num_experts)
    outcomes = judge_laws(ROUTER_LAWS, subject, examples=examples, derandomize=derandomize)
    report = LawReport(
        what=subject.name,
        outcomes=tuple(_with_matrix(subject, outcome) for outcome in outcomes),
        causal=measure_causality(subject),
        subject_of=router_subject,
        arguments={"hidden_size": hidden_size, "num_experts": num_experts},
        part=router,
    )
    return report.or_raise()


def _with_matrix(subject: RouterSubject, outcome: Outcome) -> Outcome:
    """The routing matrix of the smallest case that broke the law, tokens x experts, beside it."""
    if outcome.case is None or "x_TH" not in outcome.case.tensors:
        return outcome
    try:
        matrix_TE = matrix_of(subject.on(outcome.case))
    except Exception:  # the law broke because the router raises here: there is no routing to show
        return outcome
    return replace(outcome, shown={**outcome.shown, "routing_TE": matrix_TE})
