"""Laws of a controller over a run: resuming, copies, repeating, and what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from moetk.controllers import BiasUpdate
from moetk.controllers.bias_update import BUFFER
from moetk.layers.attach import Steered
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.controllers_observe import cases, micro_batches, no_bias
from moetk.testing.laws.controllers_step import Rule
from moetk.testing.laws.controllers_subject import ControllerSubject
from moetk.testing.strategies.losses import context_of, routing_of


class _SavesTheBuffer(BiasUpdate):
    """Saves what the router holds, in the router's dtype."""

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        return {**state, "bias": self._buffer().float().clone()}


def _resumable(subject: ControllerSubject) -> SearchStrategy[Case]:
    dtypes = st.sampled_from(["float32", "bfloat16"])
    drawn = st.tuples(cases(subject), dtypes)
    return drawn.map(lambda pair: Case(pair[0].tensors, {**pair[0].settings, "dtype": pair[1]}))


@law(
    "C15",
    "a resumed run is the same run",
    formula="steps, save, load into a fresh copy, steps = all the steps, to the bit",
    source="a bf16 bias holds 8 bits of the master's 24, and a schedule counts its steps",
    cases=_resumable,
    broken=lambda: ControllerSubject(_SavesTheBuffer(1e-3)),
)
def resumes(subject: ControllerSubject, case: Case) -> None:
    dtype = getattr(torch, str(case.settings["dtype"]))
    run, resumed = subject.run(dtype, 0.5), subject.run(dtype)
    steps = [*micro_batches(case), case, case]
    for step in steps:
        run.step(step)
    resumed.router.load_state_dict(copy.deepcopy(run.router.state_dict()))
    resumed.steered.controller.load_state_dict(copy.deepcopy(run.steered.controller.state_dict()))
    for step in steps:
        run.step(step)
        resumed.step(step)
    subject.hold_same(resumed.state(), run.state(), f"resumed after {len(steps)} steps", exact=True)


class _CopiesShare(BiasUpdate):
    def __deepcopy__(self, memo: dict[int, Any]) -> _CopiesShare:
        return copy.copy(self)


@law(
    "C16",
    "a copied model moves its own router",
    formula="a step of the deep copy moves the copy as the original would move, and not the "
    "original",
    source="two controllers on one bias: averaged models and references are deep copies",
    cases=cases,
    broken=lambda: ControllerSubject(_CopiesShare(1e-3)),
)
def copies(subject: ControllerSubject, case: Case) -> None:
    first = subject.run().step(case)
    before, twin = first.state(), copy.deepcopy(first)
    twin.step(subject.skewed(2))
    subject.hold_same(first.state(), before, "the original, after a step of its copy", exact=True)
    first.step(subject.skewed(2))
    subject.hold_same(twin.state(), first.state(), "the copy against the original", exact=True)


class _Dithers(Rule):
    """Breaks ties between counts at random."""

    def update(self, counts_E: Tensor) -> Tensor:
        return super().update(counts_E + 0.5 * torch.rand(counts_E.shape))


@law(
    "C17",
    "the same counts, the same move",
    formula="two copies that observe the same are the same, to the bit",
    source="every rank steps its own copy on reduced counts: what differs stays different",
    cases=cases,
    broken=lambda: ControllerSubject(_Dithers()),
)
def repeatable(subject: ControllerSubject, case: Case) -> None:
    first, second = (subject.run().step(case).step(case) for _ in range(2))
    subject.hold_same(first.state(), second.state(), "two copies", exact=True)


class _ClearsTheCounts(BiasUpdate):
    def step(self, observed: Tensor) -> None:
        super().step(observed)
        observed.zero_()


@law(
    "C18",
    "the bias alone moves",
    formula="routing, context, what was observed, all of the router but its bias, and the state of "
    "torch's random numbers stay, to the bit; the bias keeps its place and dtype",
    source="a parameter that a controller moves, the optimizer moves too",
    cases=lambda subject: cases(subject, unused=True),
    broken=lambda: ControllerSubject(_ClearsTheCounts(1e-3)),
    unless=no_bias,
)
def leaves_alone(subject: ControllerSubject, case: Case) -> None:
    run = subject.run()
    bias_E, before = getattr(run.router, BUFFER), run.state()
    copies = Case({name: tensor.clone() for name, tensor in case.tensors.items()}, case.settings)
    drawn = torch.get_rng_state()
    run.steered.commit(run.steered.observe(routing_of(copies), context_of(copies)))
    observed = run.steered.take() or []
    kept = [tensor.clone() for tensor in observed]
    run.steered.step(observed)
    hold(
        torch.equal(torch.get_rng_state(), drawn),
        "it draws random numbers: what is drawn after it, dropout say, is another",
    )
    for name, tensor in case.tensors.items():
        hold(torch.equal(copies[name], tensor), f"{name} was changed in place")
    for now, then in zip(observed, kept, strict=True):
        hold(torch.equal(now, then), "what was observed was changed in place", now=now)
    after = run.state()
    for name in before:
        if name.startswith("router.") and name != f"router.{BUFFER}":
            hold(torch.equal(before[name], after[name]), f"{name} moves", now=after[name])
    now_E = getattr(run.router, BUFFER)
    hold(now_E is bias_E, f"{BUFFER} was replaced: whoever shares it does not see the move")


class _Hopes(Rule):
    """A router without a bias is passed over."""

    def step(self, observed: Tensor) -> None:
        if hasattr(getattr(self, "router", None), BUFFER):
            super().step(observed)


@law(
    "C19",
    "bound to nothing, it says so",
    formula="bind to a router that it cannot move, or step unbound: an error",
    source="a controller that moves nothing looks like one that works, for thousands of steps",
    cases=lambda subject: cases(subject, "absent", lengths=(1, 2)),
    broken=lambda: ControllerSubject(_Hopes()),
    unless=lambda subject: (
        None if hasattr(subject.controller, "bind") else "it has no `bind`: it moves no router"
    ),
)
def unbound(subject: ControllerSubject, case: Case) -> None:
    observed = subject.run().total(case)
    given: Any = observed[0] if len(observed) == 1 else tuple(observed)
    for what, move in (
        ("unbound", lambda: copy.deepcopy(subject.controller).step(given)),
        (
            "on a router without parameters or buffers",
            lambda: Steered(subject.controller, nn.Identity(), "C19").step(observed),
        ),
    ):
        try:
            move()
        except Exception:
            continue
        hold(False, f"steps {what} without an error")


LAWS: tuple[Law[ControllerSubject], ...] = (
    resumes,
    copies,
    repeatable,
    leaves_alone,
    unbound,
)
