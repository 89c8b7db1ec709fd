"""Causes in the score function. Letters: T tokens, E experts, K choices a token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moetk.equivalence.cause import Cause, Evidence, cause
from moetk.equivalence.causes.any_stage import NARROW, name_of
from moetk.equivalence.causes.values import (
    SCORE_FUNCTIONS,
    Scores,
    is_rounding,
    normalised,
    score_function,
    softmax,
    value,
)

SOFTCAPS = (5.0, 10.0, 15.0, 20.0, 30.0, 50.0)


def _instead(name: str, function: Scores) -> Cause:
    @cause(
        f"score function is {name}",
        "scores",
        fix="The two use different score functions: look at the model's scoring_func.",
    )
    def predict(e: Evidence) -> Iterator[Tensor]:
        logits_TE = value(e, "logits")
        if logits_TE is not None:
            yield function(logits_TE)

    return predict


def _in(dtype: torch.dtype) -> Cause:
    def matches(e: Evidence) -> bool:
        logits_TE, function = value(e, "logits"), score_function(e)
        if logits_TE is None or function is None:
            return False
        exact_TE = function(logits_TE.to(dtype).double())
        return is_rounding(e.found, exact_TE, e.wanted, dtype) or e.equals(exact_TE)

    name = name_of(dtype)
    return Cause(
        f"scores from logits in {name}",
        ("scores",),
        f"The logits are rounded to {name} before the score function; cast them up to float32 "
        "(score_dtype) instead: narrow scores tie, and ties choose other experts.",
        matches,
    )


@cause(
    "softmax over tokens",
    "scores",
    fix="The softmax runs along the tokens; it belongs along the experts (dim=-1).",
)
def _over_tokens(e: Evidence) -> Iterator[Tensor]:
    logits_TE = value(e, "logits")
    if logits_TE is not None:
        yield logits_TE.softmax(0)


@cause(
    "logits capped before the score function",
    "scores",
    fix="Only one of the two caps the logits, c tanh(logits / c).",
)
def _softcap(e: Evidence) -> Iterator[Tensor]:
    logits_TE, function = value(e, "logits"), score_function(e)
    if logits_TE is not None and function is not None:
        for cap in SOFTCAPS:
            yield function(cap * (logits_TE / cap).tanh())


@cause(
    "temperature in the softmax",
    "scores",
    fix="Only one of the two multiplies the logits by a constant before the softmax.",
)
def _temperature(e: Evidence) -> Iterator[Tensor]:
    logits_TE = value(e, "logits")
    if logits_TE is None or score_function(e) is not softmax:
        return
    if e.found.shape != logits_TE.shape or not bool((e.found > 0).all()):
        return
    # Logarithms of softmax scores are the logits, up to a constant for each token.
    wide_TE, log_TE = (t - t.mean(-1, keepdim=True) for t in (logits_TE, e.found.log()))
    yield (logits_TE * (log_TE * wide_TE).sum() / wide_TE.square().sum()).softmax(-1)


@cause(
    "choice bias in the scores",
    "scores",
    fix="The bias that steers the choice is kept out of the scores, which weigh and enter losses.",
)
def _bias_in_scores(e: Evidence) -> Iterator[Tensor]:
    bias_E, logits_TE, function = e.facts.get("choice_bias"), value(e, "logits"), score_function(e)
    if bias_E is None:
        return
    yield e.wanted + bias_E.to(e.wanted)
    if logits_TE is not None and function is not None:
        yield function(logits_TE + bias_E.to(logits_TE))


@cause(
    "scores of the chosen alone",
    "scores",
    fix="The softmax sees only the chosen experts, the others are 0: losses need it over all.",
)
def _chosen_alone(e: Evidence) -> Iterator[Tensor]:
    ids_TK, logits_TE = value(e, "indices"), value(e, "logits")
    if ids_TK is None or logits_TE is None or not bool((ids_TK >= 0).all()):
        return
    others_TE = torch.ones_like(logits_TE, dtype=torch.bool).scatter(1, ids_TK, False)
    yield logits_TE.masked_fill(others_TE, -torch.inf).softmax(-1)
    yield e.wanted.masked_fill(others_TE, 0)


@cause(
    "scores normalised over the experts",
    "scores",
    fix="Only one of the two divides each token's scores by their sum over all experts.",
)
def _normalised(e: Evidence) -> Iterator[Tensor]:
    yield normalised(e.wanted)


SCORES = (
    *(_instead(name, function) for name, function in SCORE_FUNCTIONS.items()),
    *(_in(dtype) for dtype in NARROW),
    _over_tokens,
    _softcap,
    _temperature,
    _bias_in_scores,
    _chosen_alone,
    _normalised,
)
