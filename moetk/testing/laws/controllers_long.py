"""Laws of where a controller brings a bias: out of a collapse and back, at its rate, within reach.

Letters: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from moetk.context import RouterContext
from moetk.equivalence.judge import floor
from moetk.kernels.counting import count_choices
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.controllers_observe import no_bias
from moetk.testing.laws.controllers_step import Rule
from moetk.testing.laws.controllers_subject import ControllerSubject, Running
from moetk.testing.strategies.losses import routings

STEPS = 128  # an average over steps has turned by then, and a fixed number of steps has run out


def _collapse(subject: ControllerSubject) -> SearchStrategy[Case]:
    return st.just(subject.skewed(64))


def _stays(subject: ControllerSubject) -> str | None:
    """Why nothing has to move: no bias, no choice, a rate of 0, or something else is moved."""
    if (reason := no_bias(subject)) is not None:
        return reason
    if subject.top_k == subject.num_experts:
        return "every expert takes every token"
    if all(subject.rate_at(step) == 0 for step in range(2 * STEPS)):
        return "its rate is 0"
    if not subject.counts_choices and not subject.moves:
        return "it observes no counts of choices, and a collapse does not move the bias"
    return None


def _after(subject: ControllerSubject, case: Case) -> Running:
    run = subject.run()
    for _ in range(STEPS):
        run.step(case)
    return run


class _FirstColumn(Rule):
    """Counts the first choices: who is everybody's second looks starved."""

    def observe(self, routing: Any, ctx: RouterContext) -> Tensor:
        first_T1 = routing.experts_TK[:, :1]
        return count_choices(first_T1, routing.num_experts, ctx.token_mask)[0]


@law(
    "C20",
    "a collapse is undone",
    formula="every token on the same K experts, 128 steps long: their biases are below all others",
    source="arXiv 2408.15664, section 3: lower where the load is heavy, whichever choice it was",
    cases=_collapse,
    broken=lambda: ControllerSubject(_FirstColumn()),
    unless=_stays,
)
def undone(subject: ControllerSubject, case: Case) -> None:
    bias_E = _after(subject, case).bias_E
    full, empty = bias_E[: subject.top_k].max(), bias_E[subject.top_k :].min()
    hold(full < empty, "128 steps with all tokens on the first experts, and these do not fall")


class _Stops(Rule):
    """A warm-up that was meant to end, and ends the controller."""

    steps = 0

    def update(self, counts_E: Tensor) -> Tensor:
        self.steps += 1
        return super().update(counts_E) * (self.steps <= 100)


def _stopped(subject: ControllerSubject) -> str | None:
    if (reason := _stays(subject)) is not None:
        return reason
    if all(subject.rate_at(step) == 0 for step in range(STEPS, 2 * STEPS)):
        return f"its rate is 0 after {STEPS} steps"
    return None


@law(
    "C21",
    "it stays awake",
    formula="after 128 steps of one collapse, 128 of another move the bias",
    source="arXiv 2412.19437, section 4.2: a speed of 0 for the last tokens is a `rate` that says "
    "so",
    cases=_collapse,
    broken=lambda: ControllerSubject(_Stops()),
    unless=_stopped,
)
def awake(subject: ControllerSubject, case: Case) -> None:
    run = _after(subject, case)
    before_E = run.bias_E
    other = subject.skewed(64, first=subject.num_experts - subject.top_k)
    for _ in range(STEPS):
        # The other way at last: a bias that has come to a limit comes back from it.
        if not torch.equal(run.step(other).bias_E, before_E):
            return
    hold(False, "128 steps, then all tokens on other experts, and nothing moves", bias=before_E)


class _MeanOfExperts(Rule):
    """Divides by the number of experts, as the mean of an error would be."""

    def update(self, counts_E: Tensor) -> Tensor:
        return super().update(counts_E) / len(counts_E)


def _no_rate_to_reach(subject: ControllerSubject) -> str | None:
    if (reason := _stays(subject)) is not None:
        return reason
    if subject.rate is None:
        return "it has no `rate`, a number or a function of the step"
    return None if subject.moves_by_sign else "it does not move by the sign alone"


@law(
    "C22",
    "a sign reaches its rate",
    formula="in a collapse: max b' - b less min b' - b is the rate at least, in one of 128 steps",
    source="arXiv 2408.15664, algorithm 1: full experts u down, starved ones u up",
    cases=_collapse,
    broken=lambda: ControllerSubject(_MeanOfExperts()),
    unless=_no_rate_to_reach,
)
def reaches(subject: ControllerSubject, case: Case) -> None:
    run, widest = subject.run(), 0.0
    for step in range(STEPS):
        before_E, rate = run.bias_E, subject.rate_at(step) or 0.0
        move_E = run.step(case).bias_E - before_E
        apart = float(move_E.max() - move_E.min())
        rounded = 2 * floor(torch.float32, len(move_E)) * float(run.bias_E.abs().max())
        if rate and apart >= rate - rounded:
            return
        widest = max(widest, apart)
    hold(False, f"128 steps of a collapse, the widest of {widest:.4g}; its rate is {rate:.4g}")


class _OnlyDown(Rule):
    def update(self, counts_E: Tensor) -> Tensor:
        return super().update(counts_E).clamp(max=0)


def _one_side(subject: ControllerSubject) -> str | None:
    if getattr(subject.controller, "one_sided", False):
        return "it declares one_sided"
    return _stays(subject) if subject.counts_choices else "it observes no counts of choices"


@law(
    "C23",
    "some rise while others fall",
    formula="every token on the same K experts, 128 steps long: b_e < 0 for these, > 0 for others",
    source="arXiv 2408.15664, algorithm 1: chance fluctuations move a bias up as often as down; "
    "one that only falls runs out of its precision",
    cases=_collapse,
    broken=lambda: ControllerSubject(_OnlyDown()),
    unless=_one_side,
)
def both_sides(subject: ControllerSubject, case: Case) -> None:
    bias_E = _after(subject, case).bias_E
    full_K, empty_E = bias_E[: subject.top_k], bias_E[subject.top_k :]
    hold((full_K < 0).all(), "full experts do not fall (one_sided = True?)", bias=bias_E)
    hold((empty_E > 0).all(), "empty experts do not rise (one_sided = True?)", bias=bias_E)


class _InTokens(Rule):
    """As many thousandths as tokens are missing: right for a batch of one size."""

    rate: Any = None

    def update(self, counts_E: Tensor) -> Tensor:
        return 1e-3 * (counts_E.double().mean() - counts_E)


def _says_how_far(subject: ControllerSubject) -> str | None:
    if (reason := _stays(subject)) is not None:
        return reason
    if not subject.counts_choices:
        return "it observes no counts of choices"
    if subject.rate is not None:
        return "its `rate` says how far a step goes"
    if subject.router is not None:
        return "the scores of a router of one's own have a range of their own"
    return None


@law(
    "C24",
    "scores keep their say",
    formula="an ordinary step of 2^21 tokens moves no two biases apart by 1, the range of sigmoids",
    source="a bias that moved by more decides for every token alone; a step in units of tokens "
    "grows with the batch, and arXiv 2408.15664, section 3, prefers the sign",
    cases=lambda subject: routings(
        subject.num_experts,
        subject.top_k,
        patterns=("gaussian",),
        noisy=False,
        batches=(1,),
        lengths=(512,),
    ),
    broken=lambda: ControllerSubject(_InTokens()),
    unless=_says_how_far,
)
def scores_count(subject: ControllerSubject, case: Case) -> None:
    run = subject.run()
    run.steered.commit([value * 4096 for value in run.observe(case)])
    move_E = run.step().bias_E
    apart = float(move_E.max() - move_E.min())
    hold(apart < 1, f"one step moves two biases apart by {apart:.4g}", move=move_E)


LAWS: tuple[Law[ControllerSubject], ...] = (undone, awake, reaches, both_sides, scores_count)
