"""One line that checks a controller."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from moetk.errors import RouterConfigError
from moetk.layers.attach import Controller, name_of
from moetk.testing.check_losses import check_object, check_sizes, own_copy
from moetk.testing.law import judge_laws, untouched_random
from moetk.testing.laws import (
    controllers_long,
    controllers_observe,
    controllers_run,
    controllers_step,
)
from moetk.testing.laws.controllers_subject import ControllerSubject, pair_under_test
from moetk.testing.report import LawReport

_ROOMS = (controllers_observe, controllers_step, controllers_run, controllers_long)
LAWS = tuple(law for room in _ROOMS for law in room.LAWS)
_PARTS = ("accumulate", "observe", "step", "state_dict", "load_state_dict")


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
        a router. It is not changed: every run has a copy of its own, as a layer has, on the CPU,
        and torch's random numbers go on after the check as if it had drawn none. Its `rate` and
        `centred`, where it has them, are believed, and checked; one whose experts are not alike
        declares `experts_differ = True`, one that only lowers the full or only raises the empty
        `one_sided = True`.
    router: makes what it steers; None = a DeepSeekV3Router of these sizes, with a bias per expert.
        With it, what `report.repro` builds again is the pair (controller, router).

    Raises LawBrokenError where a law breaks, with the smallest case; RouterConfigError for what
    is no controller and for sizes that cannot be; what the controller itself raises on an ordinary
    routing.
    """
    check_object("check_controller", controller, "controller")
    if missing := [name for name in _PARTS if not hasattr(controller, name)]:
        raise RouterConfigError(
            f"check_controller: {name_of(controller)} has no {', '.join(missing)}; a controller "
            f"has {', '.join(_PARTS)}."
        )
    check_sizes("check_controller", num_experts, top_k)
    subject = ControllerSubject(own_copy(controller), num_experts, top_k, router)
    with untouched_random():
        subject.run().step(subject.skewed(3))
        outcomes = judge_laws(LAWS, subject, examples=examples, derandomize=derandomize)
    return LawReport(
        name_of(controller),
        tuple(outcomes),
        subject_of=ControllerSubject if router is None else pair_under_test,
        arguments={"num_experts": num_experts, "top_k": top_k},
        part=controller if router is None else (controller, router),
    ).or_raise()
