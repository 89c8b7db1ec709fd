"""The runs behind a comparison: both sides in fp64, and both in their own dtypes beside a truth."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetk.equivalence.double import InDouble
from moetk.equivalence.judge import FACTOR, Choices, compare_choices, largest_error
from moetk.equivalence.trace import GIVEN, Side, Trace, observe
from moetk.errors import EquivalenceError

SCORES = ("choice", "scores", "logits")
# What code raises that cannot run in fp64: torch's grouped_mm, a kernel, a tensor of another dtype
# in a closure. It is then judged in its own dtype alone, and the report says so.
NO_TWIN = (EquivalenceError, RuntimeError, TypeError, NotImplementedError)


@dataclass(frozen=True, eq=False)
class Pass:
    """Both sides on equal inputs of each stage (a, b), and left to themselves (own_a, own_b).

    local: whether b took a's choices and weights. truth: fp64 at those; truth_own_a, truth_own_b:
    fp64 at each one's own choices, or at the truth's own where none can be forced on it; None
    where there is no fp64. reduction: the longest sum. num_choices: K.
    """

    a: Trace
    b: Trace
    own_a: Trace
    own_b: Trace
    local: bool
    choices: Choices | None
    truth: Trace | None = None
    truth_own_a: Trace | None = None
    truth_own_b: Trace | None = None
    reduction: int = 1
    num_choices: int = 1

    @property
    def same_ids(self) -> bool:
        a, b = self.own_a.values.get("indices"), self.own_b.values.get("indices")
        return a is not None and b is not None and torch.equal(a, b)


def in_double(side_a: Side, side_b: Side, x_TH: Tensor, seed: int, notes: list[str]) -> Pass | None:
    """Both in fp64; None, and a note, where one of them has no twin there."""
    try:
        with InDouble(x_TH.dtype):
            a, b = side_a.in_double(), side_b.in_double()
            x_TH = x_TH.double()
            own_a, own_b = observe(a, x_TH, seed=seed), observe(b, x_TH, seed=seed)
            at_a, at_b, local = _forced(a, b, x_TH, own_a, own_b, seed)
    except NO_TWIN as error:
        notes.append(f"not judged as a function in fp64: {first_line(error)}")
        return None
    scores = _scores(own_a, own_b)
    # In fp64 the order of a sum moves a score by so much; what is closer is a tie.
    slack = 0.0
    if scores is not None and scores[0].numel():
        slack = 1e-13 * float(_finite(scores[0]).abs().amax())
    return Pass(at_a, at_b, own_a, own_b, local, _choices(own_a, own_b, scores, slack))


def has_twin(side: Side) -> bool:
    try:
        side.in_double()
    except NO_TWIN:
        return False
    return True


def in_their_dtypes(
    side_a: Side, side_b: Side, x_TH: Tensor, own_b: Trace, seed: int, notes: list[str]
) -> Pass:
    """a's plain implementation and b, and the truth that a's fp64 twin is."""
    eager = side_a.eager()
    own_eager = observe(eager, x_TH, seed=seed)
    at_a, at_b, local = _forced(eager, side_b, x_TH, own_eager, own_b, seed)
    truth = truth_a = truth_b = None
    try:
        with InDouble(x_TH.dtype):
            exact, x64 = side_a.in_double(), x_TH.double()
            own = observe(exact, x64, seed=seed)
            truth = own
            if local:
                given, upstream = _given(own_eager)
                given = {name: _widest(value) for name, value in given.items()}
                truth = observe(exact, x64, given=given, upstream=upstream, seed=seed)
            truth_a = _at(exact, x64, own_eager, own, seed)
            truth_b = _at(exact, x64, own_b, own, seed)
    except NO_TWIN as error:
        notes.append(f"{side_a.name} is no fp64 truth: {first_line(error)}")
        truth = truth_a = truth_b = None
    leaves = [leaf.tensor.shape for leaf in side_a.leaves().values()]
    reduction = max([len(x_TH), x_TH.shape[1], *(max(shape, default=1) for shape in leaves)])
    scores = _scores(truth_a or own_eager, own_b)
    slack = _slack(own_eager, own_b, truth_a)
    ids = own_eager.values.get("indices")
    return Pass(
        at_a, at_b, own_eager, own_b, local, _choices(own_eager, own_b, scores, slack),
        truth, truth_a, truth_b, reduction, 1 if ids is None else max(ids.shape[-1], 1),
    )  # fmt: skip


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]


def _at(exact: Side, x64: Tensor, chose: Trace, own: Trace, seed: int) -> Trace:
    """The truth at somebody's choices, or at its own where it cannot be forced."""
    if "indices" not in chose.values:
        return own
    given = {"indices": chose.values["indices"]}
    try:
        forced = observe(exact, x64, given=given, seed=seed)
    except EquivalenceError:
        return own
    return replace(forced, values={**forced.values, **given})


def _widest(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _slack(plain: Trace, other: Trace, truth: Trace | None) -> float:
    """The error that a right implementation's scores may have, and the rounding of the largest:
    twice the plain one's where a truth tells it; else what the two differ by, which is judged at
    the scores' own stage."""
    names = [name for name in SCORES if name in plain.values]
    if not names or not plain.values[names[0]].is_floating_point():
        return 0.0
    scores_TE = plain.values[names[0]]
    coarsest = max(torch.finfo(plain.values[name].dtype).eps for name in names)
    largest = float(_finite(scores_TE).abs().amax()) if scores_TE.numel() else 0.0
    if truth is not None and names[0] in truth.values:
        error = FACTOR * largest_error(scores_TE, truth.values[names[0]])
    elif names[0] in other.values and other.values[names[0]].shape == scores_TE.shape:
        error = largest_error(scores_TE, other.values[names[0]])
    else:
        error = 0.0
    return max(error, coarsest / 2 * largest)


def _forced(
    a: Side, b: Side, x_TH: Tensor, own_a: Trace, own_b: Trace, seed: int
) -> tuple[Trace, Trace, bool]:
    """Both at a's choices and weights; left to themselves where one of them cannot be forced."""
    given, upstream = _given(own_a)
    try:
        return (
            observe(a, x_TH, given=given, upstream=upstream, seed=seed),
            observe(b, x_TH, given=given, upstream=upstream, seed=seed),
            True,
        )
    except EquivalenceError:
        return own_a, own_b, False


def _given(own: Trace) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    given = {name: own.values[name] for name in GIVEN if name in own.values}
    upstream = {name: own.grads[name] for name in given if name in own.grads}
    return given, upstream


def _finite(scores_TE: Tensor) -> Tensor:
    return scores_TE.masked_fill(~scores_TE.isfinite(), 0)


def _scores(a: Trace, b: Trace) -> tuple[Tensor, Tensor] | None:
    """What the choices were made from: the reference's, and b's own for its border ties."""
    name = next((name for name in SCORES if name in a.values), None)
    if name is None:
        return None
    return a.values[name], b.values.get(name, a.values[name])


def _choices(
    a: Trace, b: Trace, scores: tuple[Tensor, Tensor] | None, slack: float
) -> Choices | None:
    ids_a, ids_b = a.values.get("indices"), b.values.get("indices")
    if ids_a is None or ids_b is None:
        return None
    if ids_a.shape != ids_b.shape:
        return Choices(0, 0, 0, len(ids_a), 0)
    if scores is None or scores[1].shape != scores[0].shape:
        largest = int(torch.cat([ids_a, ids_b]).amax()) if ids_a.numel() else 0
        blank = torch.full((len(ids_a), max(largest, 0) + 1), math.nan, device=ids_a.device)
        return compare_choices(ids_b, ids_a, blank, blank, error=0.0)
    return compare_choices(ids_b, ids_a, scores[0], scores[1], error=slack)
