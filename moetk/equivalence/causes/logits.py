"""Causes in the router's matrix product. Letters: T tokens, E experts, H hidden."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from moetk.equivalence.cause import Cause, Evidence, cause
from moetk.equivalence.causes.any_stage import NARROW, name_of
from moetk.equivalence.causes.values import SCORE_FUNCTIONS, is_rounding, rearranged

EPSILONS = (0.0, 1e-12, 1e-8, 1e-6, 1e-5)


def _weight(e: Evidence) -> Tensor | None:
    return e.parameters.get("router.weight")


def _bias(e: Evidence) -> Tensor | None:
    return e.parameters.get("router.bias")


def _gemm_in(dtype: torch.dtype) -> Cause:
    def matches(e: Evidence) -> bool:
        weight_EH, bias_E = _weight(e), _bias(e)
        if weight_EH is None or weight_EH.shape[-1:] != e.x_TH.shape[-1:]:
            return False
        # Products of rounded operands; sums run wide, and round once, with or without the bias.
        x_TH, rounded_EH = (t.to(dtype).double() for t in (e.x_TH, weight_EH))
        exact_TE = F.linear(x_TH, rounded_EH)
        if bias_E is not None:
            if e.equals(exact_TE.to(dtype).to(bias_E.dtype) + bias_E):
                return True
            exact_TE = exact_TE + bias_E.to(dtype).double()
        return is_rounding(e.found, exact_TE, e.wanted, dtype) or e.equals(exact_TE)

    name = name_of(dtype)
    return Cause(
        f"router GEMM in {name}",
        ("logits",),
        f"x and the router's weight were rounded to {name} for their product: cast both to "
        "float32 before it (gemm_dtype=torch.float32), not the logits after it.",
        matches,
    )


@cause(
    "router bias missing",
    "logits",
    fix="Add the router's bias to the logits.",
)
def _bias_missing(e: Evidence) -> Iterator[Tensor]:
    bias_E = _bias(e)
    if bias_E is not None:
        yield e.wanted - bias_E


@cause(
    "router bias added twice",
    "logits",
    fix="The bias is in the product already (F.linear with a bias): add it once.",
)
def _bias_twice(e: Evidence) -> Iterator[Tensor]:
    bias_E = _bias(e)
    if bias_E is not None:
        yield e.wanted + bias_E


@cause(
    "choice bias in the logits",
    "logits",
    fix="The bias that steers the choice is added to the scores, and only where experts are "
    "chosen.",
)
def _choice_bias_in_logits(e: Evidence) -> Iterator[Tensor]:
    bias_E = e.facts.get("choice_bias")
    if bias_E is not None:
        yield e.wanted + bias_E.to(e.wanted)


@cause(
    "experts in another order",
    "logits",
    fix="The columns are right, under other ids: look at how the rows of the router's weight were "
    "permuted (expert placement, a merged checkpoint).",
)
def _expert_order(e: Evidence) -> Iterator[Tensor]:
    moved_TE = rearranged(e.wanted, e.found, 1)
    if moved_TE is not None:
        yield moved_TE


@cause(
    "router weight transposed",
    "logits",
    fix="A Linear's weight is (E, H) and multiplies as x W'; with E = H both ways fit.",
)
def _transposed(e: Evidence) -> Iterator[Tensor]:
    weight_EH, bias_E = _weight(e), _bias(e)
    if weight_EH is not None and weight_EH.shape[0] == weight_EH.shape[1]:
        yield e.x_TH @ weight_EH + (0 if bias_E is None else bias_E)


@cause(
    "router input normalised",
    "logits",
    fix="Only one of the two normalises x before the router's product (a unit or RMS norm).",
)
def _input_normalised(e: Evidence) -> Iterator[Tensor]:
    weight_EH, bias_E = _weight(e), _bias(e)
    if weight_EH is None:
        return
    for x_TH in (F.normalize(e.x_TH, dim=-1), *_norms(e.x_TH)):
        yield F.linear(x_TH, weight_EH, bias_E)


def _norms(x_TH: Tensor) -> Iterator[Tensor]:
    width = (x_TH.shape[-1],)
    for eps in EPSILONS:
        yield F.rms_norm(x_TH, width, eps=eps)
        yield F.layer_norm(x_TH, width, eps=eps)


@cause(
    "cosine similarity instead of a product",
    "logits",
    fix="Only one of the two divides by the lengths of x and of the router's rows.",
)
def _cosine(e: Evidence) -> Iterator[Tensor]:
    weight_EH = _weight(e)
    if weight_EH is not None:
        yield F.linear(F.normalize(e.x_TH, dim=-1), F.normalize(weight_EH, dim=-1))


@cause(
    "logits scaled with the width",
    "logits",
    fix="Only one of the two divides by the square root of the hidden size.",
)
def _width_scale(e: Evidence) -> Iterator[Tensor]:
    root = e.x_TH.shape[-1] ** 0.5
    yield from (e.wanted / root, e.wanted * root)


@cause(
    "scores in place of logits",
    "logits",
    fix="What is called logits has been through the score function already; losses and a second "
    "score function then read the wrong thing.",
)
def _scores_for_logits(e: Evidence) -> Iterator[Tensor]:
    for name, function in SCORE_FUNCTIONS.items():
        if name != "no function":
            yield function(e.wanted)
    yield e.wanted.log_softmax(-1)


LOGITS = (
    *(_gemm_in(dtype) for dtype in NARROW),
    _bias_missing,
    _bias_twice,
    _choice_bias_in_logits,
    _expert_order,
    _transposed,
    _input_normalised,
    _cosine,
    _width_scale,
    _scores_for_logits,
)
