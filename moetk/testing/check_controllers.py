"""One line that checks a controller."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from moetk.layers.attach import Controller, name_of
from moetk.testing.check_losses import check_sizes
from moetk.testing.law import judge_laws
from moetk.testing.laws import controllers_observe, controllers_run, controllers_step
from moetk.testing.laws.controllers_subject import ControllerSubject
from moetk.testing.report import LawReport

LAWS = (*controllers_observe.LAWS, *controllers_step.LAWS, *controllers_run.LAWS)


def check_controller(
    controller: Controller,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    examples: int = 50,
    derandomize: bool = True,
    router: Callable[[], nn.Module] | None = None,
) -> LawReport:
    """Check every law of controllers that speaks about this one, on `examples` drawn routings.

    controller: with accumulate, observe, step, state_dict, load_state_dict, and bind where it moves
        a router. It is copied for every run, as a layer copies it. Its `rate` and `centred`, where
        it has them, are believed, and checked; one whose experts are not alike declares
        `experts_differ = True`.
    router: makes what it steers; None = a DeepSeekV3Router of these sizes, with a bias per expert.

    Raises LawBrokenError where a law breaks, with the smallest case; RouterConfigError for sizes
    that cannot be; what the controller itself raises on an ordinary routing.
    """
    check_sizes("check_controller", num_experts, top_k)
    subject = ControllerSubject(controller, num_experts, top_k, router)
    subject.run().step(subject.skewed(3))
    outcomes = judge_laws(LAWS, subject, examples=examples, derandomize=derandomize)
    return LawReport(
        name_of(controller),
        tuple(outcomes),
        subject_of=ControllerSubject,
        arguments={"num_experts": num_experts, "top_k": top_k},
        part=controller,
    ).or_raise()
