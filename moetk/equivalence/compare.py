"""Where do two implementations first differ: at a tie, in the rounding, or by a bug?

Every stage is judged twice. As a function: both in fp64, each stage of b at a's inputs, where two
statements of one function agree to 1e-10 whatever their order of sums. And as arithmetic: both in
their own dtypes against that fp64 truth, where b may err twice as much as the plain implementation
does (`moetk.equivalence.judge`). A fault shows as a wrong function; a sum in too narrow a dtype
only as bad arithmetic.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.equivalence.cause import Cause, Evidence, deviation, diagnose, read
from moetk.equivalence.causes.all import CAUSES
from moetk.equivalence.double import InDouble
from moetk.equivalence.judge import FACTOR, Choices, Verdict, compare_choices, floor, largest_error
from moetk.equivalence.report import Question, Report, Row
from moetk.equivalence.sides.pick import side_of
from moetk.equivalence.trace import EXACT, GIVEN, STAGES, Side, Trace, observe
from moetk.errors import EquivalenceError
from moetk.routing import Routing

PARITY = 1e-10
SCORES = ("choice", "scores", "logits")
# What code raises that cannot run in fp64: torch's grouped_mm, a kernel, a tensor of another dtype
# in a closure. It is then judged in its own dtype alone, and the report says so.
NO_TWIN = (EquivalenceError, RuntimeError, TypeError, NotImplementedError)
# In reverse of the computation. Parameters stand where their gradient appears; others before x.
GRADIENTS = (
    "losses", "combined", "expert_output", "down_bias", "down_weight", "activation", "up",
    "up_bias", "up_weight", "weights", "choice", "scores", "logits", "router.bias",
    "router.weight", "x",
)  # fmt: skip
# How often a value has been rounded to its dtype by the time a stage is reached, its own inputs
# being exact: any implementation may err by a unit of roundoff each time.
ROUNDINGS = {"logits": 1, "scores": 1, "choice": 2, "weights": 3, "up": 1, "activation": 3,
             "expert_output": 5}  # fmt: skip


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

    Neither part changes. Parts run in evaluation mode: noise and dropout are off.
    Raises EquivalenceError where a or b cannot be read as a layer, router, bank or trace.
    """
    side_a, side_b = (side_of(part, x, ctx, routing) for part in (a, b))
    x_TH = x.detach().flatten(0, -2)
    own_a, own_b = observe(side_a, x_TH, seed=seed), observe(side_b, x_TH, seed=seed)
    notes: list[str] = []
    function = _in_double(side_a, side_b, x_TH, seed, notes)
    if function is None and _has_twin(side_b) and not _has_twin(side_a):
        # The truth can only be b's: what is asked is then whether a is as close to it as b.
        arithmetic = _in_their_dtypes(side_b, side_a, x_TH, own_b, own_a, seed, notes)
    else:
        arithmetic = _in_their_dtypes(side_a, side_b, x_TH, own_a, own_b, seed, notes)
    choices = arithmetic.choices
    if choices is not None and choices.tied:
        notes.append(
            f"{choices.tied} of {choices.total} tokens chose other experts at a tie: the two "
            "differ in their tie rule, or in the rounding of nearly equal scores."
        )
    stages, only_a, only_b = _common(own_a, own_b)
    notes += [f"only a, {side_a.name}, shows {name}" for name in only_a]
    notes += [f"only b, {side_b.name}, shows {name}" for name in only_b]
    rows = _forgiven(
        [_row(stage, own_a, own_b, function, arithmetic) for stage in stages], own_a, own_b
    )
    question = Question(a, b, x.detach(), ctx, routing, seed)
    report = Report(
        side_a.name, side_b.name, rows, (), choices, tuple(notes), own_a, own_b, None, question,
        _environment(),
    )  # fmt: skip
    if report.first is None:
        return report
    told = ctx or RouterContext(batch_shape=(x.shape[0], x.shape[1]) if x.ndim == 3 else None)
    evidence = _evidence(report.first, side_a, side_b, x_TH, function, arithmetic, told, seed)

    def untried(cause: Cause, error: Exception) -> None:
        notes.append(f"not tried as a cause: {cause.name} ({_first_line(error)})")

    causes = diagnose(evidence, CAUSES, untried)
    return replace(report, causes=causes, evidence=evidence, notes=tuple(notes))


@dataclass(frozen=True, eq=False)
class _Pass:
    """Both sides on equal inputs of each stage (a, b), and left to themselves (own_a, own_b).

    local: whether b took a's choices and weights. truth...: fp64 at the inputs of a and b, and at
    each one's own choices; None where there is no fp64.
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


def _in_double(
    side_a: Side, side_b: Side, x_TH: Tensor, seed: int, notes: list[str]
) -> _Pass | None:
    try:
        with InDouble():
            a, b = side_a.in_double(), side_b.in_double()
            x_TH = x_TH.double()
            own_a, own_b = observe(a, x_TH, seed=seed), observe(b, x_TH, seed=seed)
            at_a, at_b, local = _forced(a, b, x_TH, own_a, own_b, seed)
    except NO_TWIN as error:
        notes.append(f"not judged as a function in fp64: {_first_line(error)}")
        return None
    scores = _scores(own_a, own_b)
    # In fp64 the order of a sum moves a score by so much; what is closer is a tie.
    slack = 0.0
    if scores is not None and scores[0].numel():
        slack = 1e-13 * float(_finite(scores[0]).abs().amax())
    return _Pass(at_a, at_b, own_a, own_b, local, _choices(own_a, own_b, scores, slack))


def _has_twin(side: Side) -> bool:
    try:
        side.in_double()
    except NO_TWIN:
        return False
    return True


def _in_their_dtypes(
    side_a: Side,
    side_b: Side,
    x_TH: Tensor,
    own_a: Trace,
    own_b: Trace,
    seed: int,
    notes: list[str],
) -> _Pass:
    eager = side_a.eager()
    own_eager = observe(eager, x_TH, seed=seed)
    at_a, at_b, local = _forced(eager, side_b, x_TH, own_eager, own_b, seed)
    truth = truth_a = truth_b = None
    try:
        with InDouble():
            exact, x64 = side_a.in_double(), x_TH.double()
            given, upstream = _given(own_eager) if local else ({}, {})
            given = {name: _widest(value) for name, value in given.items()}
            truth = observe(exact, x64, given=given, upstream=upstream, seed=seed)
            truth_a = observe(exact, x64, given=_ids(own_eager), seed=seed)
            truth_b = observe(exact, x64, given=_ids(own_b), seed=seed)
    except NO_TWIN as error:
        notes.append(f"{side_a.name} is no fp64 truth: {_first_line(error)}")
        truth = truth_a = truth_b = None
    scores = _scores(truth_a or own_eager, own_b)
    slack = math.inf if truth_a is None else _slack(own_eager, truth_a)
    leaves = [leaf.tensor.shape for leaf in side_a.leaves().values()]
    reduction = max([len(x_TH), x_TH.shape[1], *(max(shape, default=1) for shape in leaves)])
    ids = own_a.values.get("indices")
    return _Pass(
        at_a, at_b, own_eager, own_b, local, _choices(own_a, own_b, scores, slack),
        truth, truth_a, truth_b, reduction, 1 if ids is None else max(ids.shape[-1], 1),
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]


def _widest(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _slack(plain: Trace, truth: Trace) -> float:
    """The error that a right implementation's scores may have: twice the plain one's, and the
    rounding of the largest score."""
    name = next((name for name in SCORES if name in truth.values), None)
    if name is None or name not in plain.values:
        return 0.0
    scores_TE = plain.values[name]
    unit = torch.finfo(scores_TE.dtype).eps / 2
    largest = float(_finite(scores_TE).abs().amax()) if scores_TE.numel() else 0.0
    return max(FACTOR * largest_error(scores_TE, truth.values[name]), unit * largest)


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


def _ids(own: Trace) -> dict[str, Tensor]:
    return {"indices": own.values["indices"]} if "indices" in own.values else {}


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
        blank = torch.full((len(ids_a), max(largest, 0) + 1), math.nan)
        return compare_choices(ids_b, ids_a, blank, blank, error=0.0)
    return compare_choices(ids_b, ids_a, scores[0], scores[1], error=slack)


def _common(a: Trace, b: Trace) -> tuple[list[str], list[str], list[str]]:
    """Stages of both in order, and those of one alone."""
    of_a, of_b = set(a.values), set(b.values)
    if "output" in of_a ^ of_b and "combined" in of_a & of_b:
        # One side adds something to its experts' sum, and the other returns that sum.
        of_a, of_b = of_a | {"output"}, of_b | {"output"}
    forward = [name for name in STAGES if name in of_a & of_b]
    # Nothing differentiates a choice; where it has a gradient, it is the scores under another name.
    both = [name for name in a.grads if name in b.grads and name != "choice"]
    order = {name: place for place, name in enumerate(GRADIENTS)}
    middle = order["x"] - 0.5
    both.sort(key=lambda name: order.get(name, middle))
    stages = forward + [f"grad {name}" for name in both]
    names_a = of_a | {f"grad {name}" for name in a.grads}
    names_b = of_b | {f"grad {name}" for name in b.grads}
    return stages, sorted(names_a - names_b), sorted(names_b - names_a)


def _row(stage: str, own_a: Trace, own_b: Trace, function: _Pass | None, dtypes: _Pass) -> Row:
    a, b = read(own_a, stage), read(own_b, stage)
    if stage in EXACT:
        error, local, accumulated, why = _exact(stage, function, dtypes)
    else:
        error, local, accumulated, why = _measured(stage, function, dtypes)
    equal, largest, worst, ulp = _distance(a, b)
    alike, differing = _by_choice(a, b, own_a, own_b)
    return Row(
        stage, tuple(a.shape), tuple(b.shape), a.dtype, b.dtype, error, local, accumulated,
        equal, largest, worst, ulp, alike, differing, not why, why,
    )  # fmt: skip


def _forgiven(rows: Sequence[Row], own_a: Trace, own_b: Trace) -> tuple[Row, ...]:
    """The scores' gradient counts only where the logits' differs too, and both sides have one: a
    formula may pass by the scores (the softmax of the kept logits is the renormalised softmax)."""
    by_stage = {row.stage: row for row in rows}
    logits = by_stage.get("grad logits")
    kept = []
    for row in rows:
        if row.stage == "grad scores" and not row.ok:
            used = all(bool(side.grads["scores"].any()) for side in (own_a, own_b))
            if logits is None or logits.ok or not used:
                row = replace(row, ok=True, why="")
        kept.append(row)
    return tuple(kept)


def _exact(
    stage: str, function: _Pass | None, dtypes: _Pass
) -> tuple[float | None, Verdict | None, Verdict | None, str]:
    """Whole numbers: equal or not. Choices are compared aware of ties."""
    if stage == "indices":
        for one in (function, dtypes):
            if one is not None and one.choices is not None and not one.choices.ok:
                n, total = one.choices.flipped, one.choices.total
                return None, None, None, f"{n} of {total} tokens chose other experts, not at a tie"
        return None, None, None, ""
    for one in (function, dtypes):
        if one is None or not _shows(stage, one.a, one.b):
            continue
        if not (one.local or _same_ids(one)):
            continue
        a, b = one.a.values[stage], one.b.values[stage]
        if not torch.equal(a, b):
            return None, None, None, f"{_count(a, b)} differ at equal choices"
    return None, None, None, ""


def _same_ids(one: _Pass) -> bool:
    a, b = one.own_a.values.get("indices"), one.own_b.values.get("indices")
    return a is not None and b is not None and torch.equal(a, b)


def _count(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return f"{int((a != b).sum())} of {a.numel()}"


def _measured(
    stage: str, function: _Pass | None, dtypes: _Pass
) -> tuple[float | None, Verdict | None, Verdict | None, str]:
    error: float | None = None
    if function is not None and not _shows(stage, function.a, function.b):
        function = None
    if function is not None and (function.local or _same_ids(function) or _before_choice(stage)):
        scale = _scale(stage, function.a)
        error = deviation(read(function.b, stage), read(function.a, stage), scale)
    local = accumulated = None
    if dtypes.local:
        local = _verdict(stage, dtypes.b, dtypes.a, dtypes.truth, dtypes.truth, dtypes)
    accumulated = _verdict(
        stage, dtypes.own_b, dtypes.own_a, dtypes.truth_own_b, dtypes.truth_own_a, dtypes
    )
    if error is not None and not error <= PARITY:
        return error, local, accumulated, f"another function: {error:.1e} apart in fp64"
    judged = local if local is not None else accumulated
    if judged is not None and not judged.ok:
        return error, local, accumulated, (
            f"error {judged.error:.1e}, the plain implementation's {judged.eager_error:.1e}"
        )  # fmt: skip
    return error, local, accumulated, ""


def _shows(stage: str, *traces: Trace) -> bool:
    """fp64 may take another path through the code, where less can be seen."""
    name = stage.removeprefix("grad ")
    return all(name in (t.values if name == stage else t.grads) for t in traces)


def _before_choice(stage: str) -> bool:
    return stage in STAGES[: STAGES.index("indices")]


def _verdict(
    stage: str, b: Trace, a: Trace, truth_b: Trace | None, truth_a: Trace | None, one: _Pass
) -> Verdict | None:
    """b's error and a's, each to the truth at its own choices; without a truth, to one another."""
    try:
        ours, plain = read(b, stage), read(a, stage)
    except KeyError:
        return None
    base = _floor(stage, plain, a, one)
    if truth_a is None or truth_b is None:
        return Verdict(stage, deviation(ours, plain), 0.0, 2 * base)
    try:
        exact_b, exact_a = read(truth_b, stage), read(truth_a, stage)
    except KeyError:
        return Verdict(stage, deviation(ours, plain), 0.0, 2 * base)
    scale = _scale(stage, a)
    return Verdict(stage, deviation(ours, exact_b, scale), deviation(plain, exact_a, scale), base)


def _scale(stage: str, a: Trace) -> float:
    """The size that a gradient of the router has before its terms cancel. With K = 1 and weights
    that sum to one they all do: what is left is rounding, and relative to itself it says nothing.
    """
    if stage not in ("grad logits", "grad router.weight", "grad router.bias"):
        return 0.0
    arriving = a.grads.get("weights")
    size = 0.0 if arriving is None else float(arriving.double().norm())
    if stage == "grad router.weight" and "logits" in a.grads:
        # d weight = d logits' x: as much larger as a token is long.
        own, of_logits = (float(a.grads[n].double().norm()) for n in ("router.weight", "logits"))
        return size * own / of_logits if of_logits else size
    return size


def _floor(stage: str, plain: Tensor, a: Trace, one: _Pass) -> float:
    """What rounding alone excuses: of the sums, and of the values to the narrowest dtype that the
    reference itself rounds to on the way here."""
    if not plain.is_floating_point():
        return 0.0
    steps = ROUNDINGS.get(stage, 6 + one.num_choices)
    router = stage.startswith("grad router.") or stage == "grad logits"
    end = STAGES.index("counts") if router else len(STAGES)
    end = end if stage.startswith("grad ") else STAGES.index(stage) + 1
    way = [a.values[name] for name in STAGES[:end] if name in a.values]
    dtypes = [value.dtype for value in (*way, plain) if value.is_floating_point()]
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    unit = torch.finfo(coarsest).eps / 2
    return max(floor(coarsest, one.reduction), unit * math.sqrt(steps))


def _distance(a: Tensor, b: Tensor) -> tuple[float, float, tuple[int, ...] | None, float | None]:
    if a.shape != b.shape or a.numel() == 0:
        return float(a.shape == b.shape), math.nan, None, None
    equal = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
    apart = (a.double() - b.double()).abs().masked_fill(equal, 0).nan_to_num(nan=math.inf)
    largest = float(apart.max())
    place = torch.unravel_index(apart.flatten().argmax(), apart.shape)
    worst = tuple(int(index) for index in place) if largest > 0 else None
    ulp = None
    if a.is_floating_point():
        size = a.detach().double().abs()
        # Near zero the unit of the last place says nothing about an error of the sum.
        above = size > torch.finfo(a.dtype).eps * size[size.isfinite()].amax().nan_to_num()
        if bool((above & size.isfinite()).any()):
            spacing = torch.exp2(size.log2().floor()) * torch.finfo(a.dtype).eps
            ulps = (apart / spacing)[above & size.isfinite()]
            ulp = float(ulps.quantile(0.99))
    return float(equal.double().mean()), largest, worst, ulp


def _by_choice(
    a: Tensor, b: Tensor, own_a: Trace, own_b: Trace
) -> tuple[float | None, float | None]:
    ids_a, ids_b = own_a.values.get("indices"), own_b.values.get("indices")
    if ids_a is None or ids_b is None or ids_a.shape != ids_b.shape or a.shape != b.shape:
        return None, None
    if a.ndim == 0 or len(a) != len(ids_a) or not a.is_floating_point():
        return None, None
    alike_T = (ids_a.sort(-1).values == ids_b.sort(-1).values).all(-1)
    parts = [deviation(b[rows], a[rows]) if bool(rows.any()) else None
             for rows in (alike_T, ~alike_T)]  # fmt: skip
    return parts[0], parts[1]


def _evidence(
    first: Row,
    side_a: Side,
    side_b: Side,
    x_TH: Tensor,
    function: _Pass | None,
    dtypes: _Pass,
    ctx: RouterContext,
    seed: int,
) -> Evidence:
    """From the fp64 pass where the function differs there, else from their own dtypes."""
    wrong_function = first.function is not None and not first.function <= PARITY
    if first.stage in EXACT and function is not None:
        wrong_function = first.stage != "indices" or not (function.choices or dtypes.choices).ok  # type: ignore[union-attr]
    chosen, parameters = (function, side_a.in_double()) if wrong_function else (dtypes, side_a)
    assert chosen is not None
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
