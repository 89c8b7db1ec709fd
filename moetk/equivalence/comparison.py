"""Where do two implementations first differ: at a tie, in the rounding, or by a bug?

Every stage is judged twice. As a function: both in fp64, each stage of b at a's inputs, where two
statements of one function agree to 1e-10 whatever their order of sums. And as arithmetic: both in
their own dtypes against that fp64 truth, where b may err twice as much as the plain implementation
does (`moetk.equivalence.judge`). A fault shows as a wrong function; a sum in too narrow a dtype
only as bad arithmetic.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.equivalence.cause import Cause, Evidence, diagnose
from moetk.equivalence.causes.all import CAUSES
from moetk.equivalence.double import InDouble
from moetk.equivalence.judge import Choices
from moetk.equivalence.passes import Pass, first_line, has_twin, in_double, in_their_dtypes
from moetk.equivalence.report import Question, Report, Row
from moetk.equivalence.rows import PARITY, common_stages, rows_of
from moetk.equivalence.sides.pick import side_of
from moetk.equivalence.trace import EXACT, Side, Trace, observe
from moetk.equivalence.unseen import unseen
from moetk.errors import EquivalenceError
from moetk.routing import Routing


def compare(
    a: Any,
    b: Any,
    x: Tensor,
    *,
    ctx: RouterContext | None = None,
    routing: Routing | None = None,
    seed: int = 0,
) -> Report:
    """Compare two implementations of a layer, of a router or of an expert bank, on one input.

    >>> report = moetk.compare(theirs, mine, torch.randn(2, 16, 64))
    >>> report.ok, report.first, report.cause
    >>> print(report.table())

    a: the reference; what is asked is whether b does what a does. Each is a moetk.MoELayer, a
    mixture-of-experts block of a Transformers v5 model (stock or replaced), a router, a bank, a
    stored trace, or a function x_TH -> {stage: array} (see `moetk.equivalence.trace.STAGES`).
    x: (T, H) or (B, S, H), in the dtype the parts run in. ctx: what the routers may know.
    routing: what bare banks are given. seed: of the gradient that enters backward.

    Neither part changes. Parts run in evaluation mode: noise and dropout are off. What one of them
    alone does in training, or on a second call, and other controllers are in the report's notes.
    Raises EquivalenceError where a or b cannot be read as a layer, router, bank or trace.
    """
    _check_input(x)
    side_a, side_b = (side_of(part, x, ctx, routing) for part in (a, b))
    x_TH = x.detach().flatten(0, -2)
    own_a, own_b = observe(side_a, x_TH, seed=seed), observe(side_b, x_TH, seed=seed)
    if not common_stages(own_a, own_b)[0]:
        raise EquivalenceError(
            f"{side_a.name} and {side_b.name} have no stage in common to compare: a shows "
            f"{sorted(own_a.values) or 'nothing'}, b {sorted(own_b.values) or 'nothing'}."
        )
    notes: list[str] = []
    function = in_double(side_a, side_b, x_TH, seed, notes)
    if function is None and has_twin(side_b) and not has_twin(side_a):
        # The truth can only be b's: what is asked is then whether a is as close to it as b.
        arithmetic = in_their_dtypes(side_b, side_a, x_TH, own_a, seed, notes)
    else:
        arithmetic = in_their_dtypes(side_a, side_b, x_TH, own_b, seed, notes)
        own_a = _with_hidden(own_a, arithmetic.own_a, own_b)
    stages, only_a, only_b = common_stages(own_a, own_b)
    choices = arithmetic.choices
    rows = rows_of(stages, own_a, own_b, function, arithmetic)
    notes += _notes(rows, choices)
    notes += [f"only a, {side_a.name}, shows {name}" for name in only_a]
    notes += [f"only b, {side_b.name}, shows {name}" for name in only_b]
    question = Question(a, b, x.detach(), ctx, routing, seed)
    report = Report(
        side_a.name, side_b.name, rows, (), choices, tuple(notes), own_a, own_b, None, question,
        _environment(),
    )  # fmt: skip
    if report.first is None:
        return replace(report, notes=(*notes, *unseen(side_a, side_b, x_TH)))
    told = ctx or RouterContext(batch_shape=(x.shape[0], x.shape[1]) if x.ndim == 3 else None)
    evidence = _evidence(report.first, side_a, side_b, x_TH, function, arithmetic, told, seed)

    def untried(cause: Cause, error: Exception) -> None:
        notes.append(f"not tried as a cause: {cause.name} ({first_line(error)})")

    causes = diagnose(evidence, CAUSES, untried)
    return replace(report, causes=causes, evidence=evidence, notes=tuple(notes))


def _check_input(x: Any) -> None:
    """Raise EquivalenceError unless x is what a layer is given."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim not in (2, 3):
        is_ = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise EquivalenceError(
            f"x is {is_}; give a floating tensor (T, H) or (B, S, H), of the dtype that the parts "
            "run in."
        )
    if x.is_inference():
        raise EquivalenceError(
            "x was made under torch.inference_mode, where nothing has a gradient: give x.clone() "
            "made outside of it, and call compare outside of it."
        )


def _with_hidden(own: Trace, plain: Trace, other: Trace) -> Trace:
    """What a shows, and of the stages that its way of running hides (one batched product for all
    experts) those that b shows too, as a's plain implementation has them."""
    values = {name: one for name, one in plain.values.items() if name in other.values}
    grads = {name: one for name, one in plain.grads.items() if name in other.grads}
    return Trace({**values, **own.values}, {**grads, **own.grads})


def _notes(rows: tuple[Row, ...], choices: Choices | None) -> list[str]:
    notes = []
    if choices is not None and choices.tied:
        notes.append(
            f"{choices.tied} of {choices.total} tokens chose other experts at a tie: the two "
            "differ in their tie rule, or in the rounding of nearly equal scores."
        )
    for row in rows:
        if row.dtype != row.other_dtype and row.stage in ("combined", "output"):
            notes.append(f"{row.stage} is {row.dtype} in a, {row.other_dtype} in b")
        judged = (row.function, row.local, row.accumulated)
        by_number = row.stage not in EXACT and row.stage != "choice"
        if by_number and row.ok and all(one is None for one in judged):
            notes.append(f"{row.stage} was not judged: too few tokens chose alike")
    return notes


def _evidence(
    first: Row,
    side_a: Side,
    side_b: Side,
    x_TH: Tensor,
    function: Pass | None,
    dtypes: Pass,
    ctx: RouterContext,
    seed: int,
) -> Evidence:
    """From the fp64 pass where the function differs there, else from their own dtypes."""
    wrong_function = first.function is not None and not first.function <= PARITY
    if first.stage in EXACT and function is not None:
        wrong_function = first.stage != "indices" or not (function.choices or dtypes.choices).ok  # type: ignore[union-attr]
    chosen, parameters = dtypes, side_a
    if wrong_function:
        assert function is not None
        with InDouble(x_TH.dtype):
            chosen, parameters = function, side_a.in_double()
    tolerance = 1e-9
    if not wrong_function:
        judged = first.local or first.accumulated
        error = 0.0 if judged is None else max(2 * judged.eager_error, judged.floor)
        tolerance = max(error, tolerance)
    return Evidence(
        first.stage,
        chosen.a,
        chosen.b,
        chosen.own_a,
        chosen.own_b,
        x_TH.double() if wrong_function else x_TH,
        side_a.facts,
        side_b.facts,
        {name: leaf.common(leaf.tensor.detach()) for name, leaf in parameters.leaves().items()},
        tolerance,
        ctx,
        seed,
    )


def _environment() -> Mapping[str, str]:
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
