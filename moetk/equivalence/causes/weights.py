"""Causes in what a choice weighs, at equal ids. Letters: T tokens, E experts, K choices a token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moetk.equivalence.cause import Cause, Evidence, cause, deviation
from moetk.equivalence.causes.values import (
    SCORE_FUNCTIONS,
    at_chosen,
    choice_bias,
    normalised,
    scores_of,
    value,
)


def _scale(e: Evidence) -> float:
    return float(e.facts.get("scale") or 1.0)


def _either(e: Evidence, weights_TK: Tensor) -> Iterator[Tensor]:
    """As they are and renormalised, in the reference's scale."""
    yield from (_scale(e) * weights_TK, _scale(e) * normalised(weights_TK))


@cause(
    "renormalisation missing",
    "weights",
    fix="Divide each token's chosen scores by their sum (norm_topk_prob).",
)
def _not_renormalised(e: Evidence) -> Iterator[Tensor]:
    chosen_TK = at_chosen(e, scores_of(e))
    if chosen_TK is not None:
        yield chosen_TK * _scale(e)


@cause(
    "renormalised where it should not be",
    "weights",
    fix="The chosen scores are weights as they are (norm_topk_prob=False).",
)
def _renormalised(e: Evidence) -> Iterator[Tensor]:
    yield _scale(e) * normalised(e.wanted)


@cause(
    "choice bias in the weights",
    "weights",
    fix="The bias enters the choice only: gather the weights from the scores, not from the choice "
    "scores.",
)
def _bias(e: Evidence) -> Iterator[Tensor]:
    scores_TE, bias_E = scores_of(e), choice_bias(e)
    if scores_TE is not None and bias_E is not None:
        biased_TK = at_chosen(e, scores_TE + bias_E)
        if biased_TK is not None:
            yield from _either(e, biased_TK)


@cause(
    "softmax after top-k",
    "weights",
    fix="The softmax runs over the chosen alone; it belongs before the choice, over all experts.",
)
def _softmax_after(e: Evidence) -> Iterator[Tensor]:
    for stage in ("logits", "scores", "choice"):
        chosen_TK = at_chosen(e, value(e, stage))
        if chosen_TK is not None:
            yield _scale(e) * chosen_TK.softmax(-1)


@cause(
    "softmax of the weights once more",
    "weights",
    fix="The weights are right and then go through another softmax: remove it.",
)
def _softmax_again(e: Evidence) -> Iterator[Tensor]:
    yield e.wanted.softmax(-1)
    yield _scale(e) * (e.wanted / _scale(e)).softmax(-1)


@cause(
    "scale missing",
    "weights",
    fix="Multiply the weights by the router's scale (routed_scaling_factor), after they are "
    "renormalised: before it, the scale cancels.",
)
def _scale_missing(e: Evidence) -> Iterator[Tensor]:
    yield e.wanted / _scale(e)
    if _scale(e) != 1.0:
        yield normalised(e.wanted)


@cause(
    "scale applied twice",
    "weights",
    fix="The router's scale (routed_scaling_factor) multiplies once: in the router or behind the "
    "experts.",
)
def _scale_twice(e: Evidence) -> Iterator[Tensor]:
    yield e.wanted * _scale(e)


@cause(
    "logits as weights",
    "weights",
    fix="Gather the weights from the scores.",
)
def _logits(e: Evidence) -> Iterator[Tensor]:
    chosen_TK = at_chosen(e, value(e, "logits"))
    if chosen_TK is not None:
        yield from _either(e, chosen_TK)


@cause(
    "weights in another column order",
    "weights",
    fix="The weights are right and stand at other choices: sort ids and weights together.",
)
def _columns(e: Evidence) -> Iterator[Tensor]:
    found_TK, wanted_TK = e.found, e.wanted
    if found_TK.shape == wanted_TK.shape:
        places_TK = found_TK.argsort(dim=-1, stable=True).argsort(dim=-1)
        yield wanted_TK.sort(-1).values.gather(-1, places_TK)


@cause(
    "all weights equal",
    "weights",
    fix="The router's scores do not reach the weights: each choice counts the same.",
)
def _uniform(e: Evidence) -> Iterator[Tensor]:
    for weight in (1.0, 1.0 / max(e.wanted.shape[-1], 1)):
        yield torch.full_like(e.wanted, weight)
        yield torch.full_like(e.wanted, weight * _scale(e))


@cause(
    "normalised over all experts",
    "weights",
    fix="Divide by the sum over the chosen scores, not over all of them.",
)
def _over_all(e: Evidence) -> Iterator[Tensor]:
    scores_TE = scores_of(e)
    chosen_TK = at_chosen(e, scores_TE)
    if scores_TE is not None and chosen_TK is not None:
        sums_T1 = scores_TE.sum(-1, keepdim=True)
        # Where they sum to one, dividing is no defect.
        if deviation(sums_T1, torch.ones_like(sums_T1)) > e.tolerance:
            yield _scale(e) * chosen_TK / sums_T1


@cause(
    "weights squared",
    "weights",
    fix="The scores are multiplied in twice.",
)
def _squared(e: Evidence) -> Iterator[Tensor]:
    yield e.wanted.square()
    chosen_TK = at_chosen(e, scores_of(e))
    if chosen_TK is not None:
        yield from _either(e, chosen_TK.square())


def _weighed_by(name: str) -> Cause:
    """For sides that do not show their scores."""

    @cause(
        f"weighed by {name}",
        "weights",
        fix="The two use different score functions: look at the model's scoring_func.",
    )
    def predict(e: Evidence) -> Iterator[Tensor]:
        logits_TE = value(e, "logits")
        if logits_TE is None or "scores" in e.b.values:
            return
        scores_TE, known_TE = SCORE_FUNCTIONS[name](logits_TE), scores_of(e)
        if known_TE is None or deviation(scores_TE, known_TE) > e.tolerance:
            chosen_TK = at_chosen(e, scores_TE)
            if chosen_TK is not None:
                yield from _either(e, chosen_TK)

    return predict


WEIGHTS = (
    _not_renormalised,
    _renormalised,
    _bias,
    _softmax_after,
    _softmax_again,
    _scale_missing,
    _scale_twice,
    _logits,
    _columns,
    _uniform,
    _over_all,
    _squared,
    *(_weighed_by(name) for name in ("softmax", "sigmoid", "sqrt(softplus)")),
)
