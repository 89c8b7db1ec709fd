"""Causes in the auxiliary losses, each of which may be wrong alone.

Letters: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from moetk.equivalence.cause import Cause, Evidence, cause, deviation
from moetk.equivalence.causes.values import normalised, used, value
from moetk.equivalence.double import InDouble
from moetk.errors import MoetkError
from moetk.routing import TokenChoice


def _where_wrong(e: Evidence, other: Tensor) -> Tensor:
    """`other` for the losses that differ, the reference's for those that agree."""
    if e.found.shape != e.wanted.shape:
        return other
    apart = (e.found - e.wanted).abs() > e.tolerance * e.wanted.abs()
    return torch.where(apart, other.to(e.wanted), e.wanted)


def _times(name: str, fix: str, factors: Callable[[Evidence], Iterator[float]]) -> Cause:
    @cause(name, "losses", fix=fix)
    def predict(e: Evidence) -> Iterator[Tensor]:
        yield from (_where_wrong(e, e.wanted * factor) for factor in factors(e))

    return predict


def _choices(e: Evidence) -> Iterator[float]:
    ids_TK = value(e, "indices")
    if ids_TK is not None and ids_TK.shape[1] > 1:
        yield from (float(ids_TK.shape[1]), 1 / ids_TK.shape[1])


def _experts(e: Evidence) -> Iterator[float]:
    num_experts = e.facts.get("num_experts")
    if num_experts is not None:
        yield from (float(num_experts), 1 / num_experts)


def _tokens(e: Evidence) -> Iterator[float]:
    yield from (float(len(e.x_TH)), 1 / max(len(e.x_TH), 1))


def _coefficients(e: Evidence) -> Iterator[float]:
    yield from (float(getattr(loss, "coefficient", 1)) for loss in e.facts.get("losses", ()))


def _one_over_coefficients(e: Evidence) -> Iterator[float]:
    yield from (1 / factor for factor in _coefficients(e) if factor)


def _routing(e: Evidence) -> TokenChoice | None:
    """The reference's routing again, as its losses read it."""
    ids_TK, weights_TK = value(e, "indices"), value(e, "weights")
    if ids_TK is None or weights_TK is None or "num_experts" not in e.facts:
        return None
    logits_TE, scores_TE, choice_TE = (value(e, s) for s in ("logits", "scores", "choice"))
    kept_TK = value(e, "dispatched")
    return TokenChoice(
        ids_TK, weights_TK, e.facts["num_experts"], logits_TE, scores_TE, choice_TE, kept_TK
    )


def _values(e: Evidence, routing: TokenChoice, **told: Any) -> Tensor | None:
    """What the reference's losses are of this routing, in a context changed by `told`; None where
    they read what is not shown."""
    losses = e.facts.get("losses") or ()
    if len(losses) != len(e.wanted):
        return None
    ctx = replace(e.ctx, **told)
    in_its_dtype = InDouble() if e.wanted.dtype == torch.float64 else nullcontext()
    try:
        with torch.no_grad(), in_its_dtype:
            return torch.stack([loss(routing, ctx).to(e.wanted) for loss in losses])
    except MoetkError:
        return None


def _again(e: Evidence) -> TokenChoice | None:
    """The routing, where the reference's losses make its stage of it."""
    routing = _routing(e)
    own = None if routing is None else _values(e, routing)
    if own is None or deviation(own, e.wanted) > e.tolerance:
        return None
    return routing


def _recomputed(e: Evidence, routing: TokenChoice, **told: Any) -> Iterator[Tensor]:
    losses = _values(e, routing, **told)
    if losses is not None:
        yield _where_wrong(e, losses)


@cause(
    "padding counted in a loss",
    "losses",
    fix="Average over the tokens that carry a label, or at least over those that are no padding.",
)
def _padding(e: Evidence) -> Iterator[Tensor]:
    routing = _again(e)
    if routing is not None:
        yield from _recomputed(e, routing, token_mask=None, label_mask=None)


@cause(
    "unlabelled tokens counted in a loss",
    "losses",
    fix="Average over ctx.label_mask where there is one; a token that is no padding may still "
    "carry no label.",
)
def _unlabelled(e: Evidence) -> Iterator[Tensor]:
    routing = _again(e)
    if routing is not None and e.ctx.label_mask is not None and e.ctx.token_mask is not None:
        yield from _recomputed(e, routing, label_mask=None)


@cause(
    "dropped choices left out of a loss",
    "losses",
    fix="Balance what tokens wanted: count choices before capacity drops any.",
)
def _dropped(e: Evidence) -> Iterator[Tensor]:
    routing, used_TK = _again(e), used(e)
    if routing is not None and used_TK is not None:
        ids_TK = routing.experts_TK.masked_fill(~used_TK, -1)
        yield from _recomputed(e, replace(routing, experts_TK=ids_TK))


@cause(
    "loss reads the logits as scores",
    "losses",
    fix="The balance loss averages probabilities, not logits.",
)
def _logits(e: Evidence) -> Iterator[Tensor]:
    routing = _again(e)
    if routing is not None and routing.logits_TE is not None:
        yield from _recomputed(e, replace(routing, scores_TE=routing.logits_TE))


@cause(
    "loss reads the scores of the chosen alone",
    "losses",
    fix="The mean score of an expert is over all tokens, those that did not choose it too.",
)
def _chosen(e: Evidence) -> Iterator[Tensor]:
    routing = _again(e)
    if routing is not None and routing.scores_TE is not None:
        ids_TK, scores_TE = routing.experts_TK, routing.scores_TE
        unchosen_TE = torch.ones_like(scores_TE).scatter(1, ids_TK.clamp(min=0), 0).bool()
        alone_TE = scores_TE.masked_fill(unchosen_TE, 0)
        for kept_TE in (alone_TE, normalised(alone_TE)):
            yield from _recomputed(e, replace(routing, scores_TE=kept_TE))


@cause(
    "loss counts first choices alone",
    "losses",
    fix="All K choices of a token are load.",
)
def _first(e: Evidence) -> Iterator[Tensor]:
    routing = _again(e)
    if routing is not None and routing.experts_TK.shape[1] > 1:
        ids_TK = routing.experts_TK.clone()
        ids_TK[:, 1:] = -1
        yield from _recomputed(e, replace(routing, experts_TK=ids_TK))


@cause(
    "loss counted over another scope",
    "losses",
    fix="Choices are counted within each sequence, or over the whole micro-batch: compare the "
    "scopes.",
)
def _scope(e: Evidence) -> Iterator[Tensor]:
    routing = _again(e)
    if routing is None:
        return
    losses = e.facts["losses"]
    if not any(_has_scope(loss) for loss in losses):
        return
    other = {"sequence": "micro_batch", "micro_batch": "sequence"}
    changed = tuple(
        replace(loss, scope=other[loss.scope]) if _has_scope(loss) and loss.scope in other else loss
        for loss in losses
    )
    if e.ctx.batch_shape is not None or e.ctx.sequence_ids is not None:
        yield from _recomputed(replace(e, facts={**e.facts, "losses": changed}), routing)


def _has_scope(loss: Any) -> bool:
    known = getattr(loss, "__dataclass_fields__", None)
    return known is not None and "scope" in {one.name for one in fields(loss)}


@cause(
    "a loss is missing: zero",
    "losses",
    fix="A loss of the reference is not computed: it was not attached, or its coefficient is 0.",
)
def _missing(e: Evidence) -> Iterator[Tensor]:
    yield _where_wrong(e, torch.zeros_like(e.wanted))


@cause(
    "a loss is negated",
    "losses",
    fix="The sign is turned round: a loss is added to what is minimised.",
)
def _negated(e: Evidence) -> Iterator[Tensor]:
    yield _where_wrong(e, -e.wanted)


@cause(
    "a loss is scaled by a constant",
    "losses",
    fix="Compare coefficients, means and sums.",
    general=True,
)
def _scaled(e: Evidence) -> Iterator[Tensor]:
    if len(e.wanted) > 1 and e.found.shape == e.wanted.shape:
        ratios = e.found / e.wanted
        apart = (ratios - 1).abs() > e.tolerance
        if int(apart.sum()) > 1:  # of one number alone, a factor says nothing
            yield _where_wrong(e, e.wanted * ratios[apart][0])


LOSSES = (
    _times(
        "K factor in a loss",
        "A share of choices is divided by K, a count a token is not: at balance the loss is 1 "
        "(Switch) or K (Transformers).",
        _choices,
    ),
    _times(
        "E factor in a loss",
        "The balance loss is E times the sum over experts, so that it is 1 at balance.",
        _experts,
    ),
    _times(
        "sum over tokens for a mean in a loss",
        "A loss is a mean over tokens: as a sum it grows with the batch.",
        _tokens,
    ),
    _times(
        "coefficient applied twice",
        "The coefficient is in the loss already: add it up as it is.",
        _coefficients,
    ),
    _times(
        "coefficient missing",
        "Multiply the loss by its coefficient.",
        _one_over_coefficients,
    ),
    _padding,
    _unlabelled,
    _dropped,
    _logits,
    _chosen,
    _first,
    _scope,
    _missing,
    _negated,
    _scaled,
)
