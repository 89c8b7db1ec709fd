"""One row of a report: a stage judged as a function, as arithmetic, and left to itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moetk.equivalence.cause import deviation, read
from moetk.equivalence.judge import Verdict, floor
from moetk.equivalence.passes import Pass
from moetk.equivalence.report import Row
from moetk.equivalence.trace import EXACT, STAGES, Trace

PARITY = 1e-10
GROSS = 16.0  # times what rounding explains: no accumulation of it
SAMPLE = 2**20  # values behind a percentile
# In reverse of the computation. Parameters stand where their gradient appears; others before x.
GRADIENTS = (
    "losses", "combined", "expert_output", "down_bias", "down_weight", "activation", "up",
    "up_bias", "up_weight", "weights", "scores", "logits", "router.bias", "router.weight", "x",
)  # fmt: skip
BY_TOKEN = frozenset(
    {"weights", "dispatched", "up", "activation", "expert_output", "combined", "output", "x",
     "scores", "logits"}
)  # fmt: skip
# How often a value has been rounded to its dtype by the time a stage is reached, its own inputs
# being exact: any implementation may err by a unit of roundoff each time.
ROUNDINGS = {"logits": 1, "scores": 1, "choice": 2, "weights": 3, "up": 1, "activation": 3,
             "expert_output": 5}  # fmt: skip
Pair = Callable[[str, Tensor, Tensor, Trace, Trace], tuple[Tensor, Tensor] | None]
Judged = tuple[float | None, Verdict | None, Verdict | None, str]


def common_stages(a: Trace, b: Trace) -> tuple[list[str], list[str], list[str]]:
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


def rows_of(
    stages: Sequence[str], own_a: Trace, own_b: Trace, function: Pass | None, dtypes: Pass
) -> tuple[Row, ...]:
    """A row a stage, in their order."""
    rows = [_row(stage, own_a, own_b, function, dtypes) for stage in stages]
    rows = _forgiven(rows, own_a, own_b)
    if all(row.ok for row in rows):
        rows = [_unforced(row, function, dtypes) for row in rows]
    return tuple(rows)


def _row(stage: str, own_a: Trace, own_b: Trace, function: Pass | None, dtypes: Pass) -> Row:
    a, b = read(own_a, stage), read(own_b, stage)
    judge = _exact if stage in EXACT else _measured
    error, local, accumulated, why = judge(stage, function, dtypes)
    equal, largest, worst, ulp = _distance(a, b)
    alike, differing = _by_choice(a, b, own_a, own_b)
    return Row(
        stage, tuple(a.shape), tuple(b.shape), a.dtype, b.dtype, error, local, accumulated,
        equal, largest, worst, ulp, alike, differing, not why, why,
    )  # fmt: skip


def _forgiven(rows: Sequence[Row], own_a: Trace, own_b: Trace) -> list[Row]:
    """The scores' gradient counts only where the logits' differs too, and both sides have one: a
    formula may pass by the scores (the softmax of the kept logits is the renormalised softmax)."""
    by_stage = {row.stage: row for row in rows}
    logits, scores = by_stage.get("grad logits"), by_stage.get("grad scores")
    if scores is None or scores.ok:
        return list(rows)
    used = all(bool(side.grads["scores"].any()) for side in (own_a, own_b))
    if logits is not None and not logits.ok and used:
        return list(rows)
    return [replace(row, ok=True, why="") if row is scores else row for row in rows]


def _unforced(row: Row, function: Pass | None, dtypes: Pass) -> Row:
    """Each stage is right on the reference's inputs: so must the whole be on its own. Judged in
    fp64 where both chose the same; else only what no accumulation of rounding explains."""
    stage, why = row.stage, ""
    if stage in EXACT or stage in ("choice", "grad scores"):
        return row
    if function is not None and function.local and _shows(stage, function.own_a, function.own_b):
        if function.same_ids:
            scale = _scale(stage, function.own_a)
            error = deviation(read(function.own_b, stage), read(function.own_a, stage), scale)
            if not error <= PARITY:
                why = f"only when left to itself: {error:.1e} apart in fp64"
    elif dtypes.local and row.accumulated is not None and row.accumulated.ratio > GROSS:
        why = f"only when left to itself: error {row.accumulated.error:.1e}"
    return replace(row, ok=False, why=why) if why else row


def _exact(stage: str, function: Pass | None, dtypes: Pass) -> Judged:
    """Whole numbers: equal or not. Choices are compared aware of ties."""
    for one in (function, dtypes):
        if one is None:
            continue
        if stage == "indices":
            if one.choices is not None and not one.choices.ok:
                n, total = one.choices.flipped, one.choices.total
                return None, None, None, f"{n} of {total} tokens chose other experts, not at a tie"
        elif _shows(stage, one.a, one.b) and (one.local or one.same_ids):
            a, b = one.a.values[stage], one.b.values[stage]
            if not torch.equal(a, b):
                return None, None, None, f"{_count(a, b)} differ at equal choices"
    return None, None, None, ""


def _count(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return f"{int((a != b).sum())} of {a.numel()}"


def _measured(stage: str, function: Pass | None, dtypes: Pass) -> Judged:
    error = local = None
    if function is not None and _shows(stage, function.a, function.b):
        error = _as_functions(stage, function)
    if stage == "choice" and _same_choice(function or dtypes):
        return 0.0 if function is not None else None, None, None, ""
    if dtypes.local:
        local = _verdict(stage, dtypes.b, dtypes.a, dtypes.truth, dtypes.truth, dtypes, _as_given)
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


def _as_functions(stage: str, function: Pass) -> float | None:
    """Relative error in fp64, at equal inputs; on the tokens that chose alike where b could not be
    given a's choices; None where no such comparison is left."""
    a, b = read(function.a, stage), read(function.b, stage)
    if not (function.local or function.same_ids or _before_choice(stage)):
        both = _alike(stage, b, a, function.own_b, function.own_a)
        if both is None:
            return None
        b, a = both
    return deviation(b, a, _scale(stage, function.a))


def _same_choice(one: Pass) -> bool:
    """Whether both rank the experts alike and choose alike, in whatever numbers: the softmax of the
    logits chooses what the logits do, and what is masked may be masked by any low number."""
    a, b = one.a.values["choice"], one.b.values["choice"]
    if a.shape != b.shape or one.choices is None or not one.choices.ok:
        return False
    shares = _of_shares(one.a) and _of_shares(one.b)
    return _same_order(_as_masked(a, b, shares), _as_masked(b, a, shares))


def _of_shares(trace: Trace) -> bool:
    """What was chosen from are scores of which none is negative, as softmax and sigmoid give them:
    there a mask of 0 is as good as one of -inf."""
    choice_TE, scores_TE = trace.values["choice"], trace.values.get("scores")
    if scores_TE is None or scores_TE.shape != choice_TE.shape or bool((scores_TE < 0).any()):
        return False
    masked_TE = (choice_TE == 0) | (choice_TE == -torch.inf)
    return bool((masked_TE | (choice_TE == scores_TE)).all())


def _as_masked(x_TE: Tensor, other_TE: Tensor, shares: bool) -> Tensor:
    """x with -inf where the other has it and x a number far below all its others, or the 0 that is
    below all shares."""
    out_TE = (other_TE == -torch.inf) & x_TE.isfinite()
    used = x_TE[~out_TE & x_TE.isfinite()]
    if not bool(out_TE.any()) or used.numel() == 0:
        return x_TE
    low, high = used.aminmax()
    far = low - 100 * (high - low + 1)
    below_TE = (x_TE <= far) | (shares & (x_TE == 0))
    return torch.where(out_TE & below_TE, -torch.inf, x_TE)


def _same_order(a_TE: Tensor, b_TE: Tensor) -> bool:
    """Whether both rank the same experts, and alike; equal in one may be apart in the other."""
    if a_TE.shape != b_TE.shape or not torch.equal(a_TE.isfinite(), b_TE.isfinite()):
        return False
    for one, other in ((a_TE, b_TE), (b_TE, a_TE)):
        ranked = other.gather(-1, one.argsort(dim=-1, descending=True, stable=True))
        if not bool((ranked[:, :-1] >= ranked[:, 1:]).all()):
            return False
    return True


def _alike(
    stage: str, one: Tensor, other: Tensor, by_one: Trace, by_other: Trace
) -> tuple[Tensor, Tensor] | None:
    """Both over the tokens for which the two traces chose the same experts; None for a sum over
    tokens that did not all choose alike."""
    ids, other_ids = by_one.values.get("indices"), by_other.values.get("indices")
    if ids is None or other_ids is None or ids.shape != other_ids.shape or _before_choice(stage):
        return one, other
    if torch.equal(ids, other_ids):
        return one, other
    if one.shape[:2] == other.shape[:2] == ids.shape:
        one, other = _by_expert(one, ids), _by_expert(other, other_ids)
    same_T = (ids.sort(-1).values == other_ids.sort(-1).values).all(-1)
    if bool(same_T.all()):
        return one, other
    by_token = stage.removeprefix("grad ") in BY_TOKEN
    if not by_token or not len(one) == len(other) == len(same_T) or not bool(same_T.any()):
        return None
    return one[same_T], other[same_T]


def _as_given(
    stage: str, one: Tensor, other: Tensor, by_one: Trace, by_other: Trace
) -> tuple[Tensor, Tensor]:
    """All tokens: both were given the same choices."""
    return one, other


def _by_expert(value: Tensor, ids_TK: Tensor) -> Tensor:
    """(T, K, ...) with each token's columns in the order of their experts' ids."""
    order_TK = ids_TK.argsort(dim=-1, stable=True)
    return value.gather(1, order_TK.view(*order_TK.shape, *[1] * (value.ndim - 2)).expand_as(value))


def _shows(stage: str, *traces: Trace) -> bool:
    """fp64 may take another path through the code, where less can be seen."""
    if stage == "output":  # without anything added, the experts' sum is the output
        return all("output" in t.values or "combined" in t.values for t in traces)
    name = stage.removeprefix("grad ")
    return all(name in (t.values if name == stage else t.grads) for t in traces)


def _before_choice(stage: str) -> bool:
    return stage in STAGES[: STAGES.index("indices")]


def _verdict(
    stage: str,
    b: Trace,
    a: Trace,
    truth_b: Trace | None,
    truth_a: Trace | None,
    one: Pass,
    pair: Pair | None = None,
) -> Verdict | None:
    """b's error and a's, each to the truth at its own choices; without a truth, to one another.
    pair: which tokens of two traces are compared; None = those that chose alike. None where too few
    did."""
    pair = pair or _alike
    if not _shows(stage, a, b):
        return None
    ours, plain, scale = read(b, stage), read(a, stage), _scale(stage, a)
    base = _floor(stage, plain, a, one)
    if truth_a is None or truth_b is None or not _shows(stage, truth_a, truth_b):
        both = pair(stage, ours, plain, b, a)
        return both and Verdict(stage, deviation(*both, scale), 0.0, 2 * base)
    of_b = pair(stage, ours, read(truth_b, stage), b, truth_b)
    of_a = pair(stage, plain, read(truth_a, stage), a, truth_a)
    if of_a is None or of_b is None:
        return None
    return Verdict(stage, deviation(*of_b, scale), deviation(*of_a, scale), base)


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


def _floor(stage: str, plain: Tensor, a: Trace, one: Pass) -> float:
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
    """Share of bitwise equal values, largest difference, where, and 99th percentile in ulp."""
    if a.shape != b.shape or a.numel() == 0:
        return float(a.shape == b.shape), math.nan, None, None
    equal = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
    apart = (a.double() - b.double()).abs().masked_fill(equal, 0).nan_to_num(nan=math.inf)
    largest = float(apart.max())
    place = torch.unravel_index(apart.flatten().argmax(), apart.shape)
    worst = tuple(int(index) for index in place) if largest > 0 else None
    return float(equal.double().mean()), largest, worst, _ulp(a, apart)


def _ulp(a: Tensor, apart: Tensor) -> float | None:
    if not a.is_floating_point():
        return None
    size = a.detach().double().abs()
    finite = size.isfinite()
    if not bool(finite.any()):
        return None
    # Near zero the unit of the last place says nothing about an error of the sum.
    above = finite & (size > torch.finfo(a.dtype).eps * size[finite].amax())
    spacing = torch.exp2(size[above].log2().floor()) * torch.finfo(a.dtype).eps
    ulps = apart[above] / spacing
    if ulps.numel() == 0:
        return None
    stride = -(-ulps.numel() // SAMPLE)
    return float(ulps[::stride].quantile(0.99))


def _by_choice(
    a: Tensor, b: Tensor, own_a: Trace, own_b: Trace
) -> tuple[float | None, float | None]:
    """Relative difference over tokens with equal and with other choices."""
    ids_a, ids_b = own_a.values.get("indices"), own_b.values.get("indices")
    if ids_a is None or ids_b is None or ids_a.shape != ids_b.shape or a.shape != b.shape:
        return None, None
    if a.ndim == 0 or len(a) != len(ids_a) or not a.is_floating_point():
        return None, None
    alike_T = (ids_a.sort(-1).values == ids_b.sort(-1).values).all(-1)
    parts = [deviation(b[rows], a[rows]) if bool(rows.any()) else None
             for rows in (alike_T, ~alike_T)]  # fmt: skip
    return parts[0], parts[1]
