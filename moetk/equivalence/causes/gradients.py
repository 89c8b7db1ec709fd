"""Causes in backward, where forward agrees.

Letters: T tokens, E experts, K choices a token, J = 2I up-projection width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moetk.equivalence.cause import Cause, Evidence, cause
from moetk.equivalence.causes.chain import hidden
from moetk.equivalence.causes.values import (
    at,
    multiple_of_all,
    multiple_of_rows,
    score_function,
    softmax,
    value,
)
from moetk.equivalence.sides.loads import repeats
from moetk.equivalence.trace import cotangent
from moetk.experts import ClampedGated, GptOssGated

ANY = tuple(
    f"grad {name}"
    for name in (
        "losses",
        "combined",
        "expert_output",
        "down_bias",
        "down_weight",
        "activation",
        "up",
        "up_bias",
        "up_weight",
        "weights",
        "scores",
        "logits",
        "router.bias",
        "router.weight",
        "x",
    )
)


@cause(
    "gradient clipped at the clamp bound",
    "grad up",
    fix="At the bound itself torch.clamp passes the gradient whole; a mask with < passes none, "
    "and a clip that splits ties half.",
)
def _clamped(e: Evidence) -> Iterator[Tensor]:
    own, hidden_TKJ = e.facts.get("activation"), hidden(e)
    if not isinstance(own, ClampedGated | GptOssGated) or hidden_TKJ is None:
        return
    gate, up = hidden_TKJ.chunk(2, -1)
    at_bound = torch.cat([gate == own.limit, up.abs() == own.limit], -1)
    for share in (0.0, 0.5):
        yield torch.where(at_bound, share * e.wanted, e.wanted)


@cause(
    "gradient passed through the clamp",
    "grad up",
    fix="Beyond the bound a clamp has no gradient: do not replace it by an identity.",
)
def _unclamped(e: Evidence) -> Iterator[Tensor]:
    own, hidden_TKJ = e.facts.get("activation"), hidden(e)
    arriving = e.a.grads.get("activation")
    if not isinstance(own, ClampedGated | GptOssGated) or hidden_TKJ is None or arriving is None:
        return
    gate, up = hidden_TKJ.chunk(2, -1)
    with torch.enable_grad():
        held = torch.cat([gate.clamp(max=own.limit), up.clamp(-own.limit, own.limit)], -1)
        held = held.detach().requires_grad_()
        yield torch.autograd.grad(own(*held.chunk(2, -1)), held, arriving.to(held))[0]


@cause(
    "gradient of one slot missing",
    "grad weights",
    fix="Every choice's weight has a gradient, the dot product of its expert's output with the "
    "arriving one.",
)
def _slot_missing(e: Evidence) -> Iterator[Tensor]:
    for slot in range(e.wanted.shape[-1] if e.wanted.ndim == 2 else 0):
        without = e.wanted.clone()
        without[:, slot] = 0
        yield without


@cause(
    "gradient of one of two equal ids missing",
    "grad weights",
    "grad expert_output",
    fix="A token that names one expert twice has a gradient for both.",
)
def _duplicate(e: Evidence) -> Iterator[Tensor]:
    ids_TK = value(e, "indices")
    if ids_TK is None or e.wanted.shape[:2] != ids_TK.shape:
        return
    for again_TK in (repeats(ids_TK), repeats(ids_TK.flip(-1)).flip(-1)):
        again = again_TK if e.wanted.ndim == 2 else again_TK[..., None]
        yield e.wanted.masked_fill(again, 0)


def _to_scores(e: Evidence, weigh: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """The scores' or the logits' gradient if the weights were this function of the chosen scores,
    (T, K) each."""
    source = e.stage.removeprefix("grad ")
    from_TE, ids_TK, shown_TK = (value(e, s) for s in (source, "indices", "weights"))
    if from_TE is None or ids_TK is None or shown_TK is None:
        return
    # A router alone ends at its weights, where the gradient enters.
    arriving_TK = e.a.grads.get("weights", cotangent(shown_TK, e.seed))
    with torch.enable_grad():
        leaf_TE = from_TE.detach().requires_grad_()
        scores = (score_function(e) or softmax) if source == "logits" else torch.Tensor.clone
        weights_TK = weigh(at(scores(leaf_TE), ids_TK))
        yield torch.autograd.grad(weights_TK, leaf_TE, arriving_TK.to(weights_TK))[0]


@cause(
    "sum of the renormalisation detached",
    "grad scores",
    "grad logits",
    fix="The sum that divides the chosen scores has a gradient too.",
)
def _sum_detached(e: Evidence) -> Iterator[Tensor]:
    weights_TK = value(e, "weights")
    if weights_TK is not None:
        # Whatever the weights are of the chosen scores, as a constant factor.
        yield from _to_scores(e, lambda chosen_TK: chosen_TK * _ratio(weights_TK, chosen_TK))


def _ratio(weights_TK: Tensor, chosen_TK: Tensor) -> Tensor:
    chosen_TK = chosen_TK.detach()
    return weights_TK / (chosen_TK + (chosen_TK == 0))


@cause(
    "renormalisation skipped in backward",
    "grad scores",
    "grad logits",
    fix="Backward goes straight from the weights to the chosen scores; the division has a "
    "gradient.",
)
def _no_division(e: Evidence) -> Iterator[Tensor]:
    scale = float(e.facts.get("scale") or 1.0)
    yield from _to_scores(e, lambda chosen_TK: scale * chosen_TK)


@cause(
    "score function skipped in backward",
    "grad logits",
    fix="The gradient of the scores is handed to the logits as it is (straight through): multiply "
    "by the derivative of the score function.",
)
def _straight_through(e: Evidence) -> Iterator[Tensor]:
    if "scores" in e.a.grads:
        yield e.a.grads["scores"]


@cause(
    "no gradient: detached",
    *ANY,
    fix="Nothing arrives here: look for detach, no_grad, .data, .item() or an op without a "
    "backward on the way.",
)
def _detached(e: Evidence) -> Iterator[Tensor]:
    yield torch.zeros_like(e.wanted)


def _flows(e: Evidence) -> bool:
    found, wanted = e.found, e.wanted
    return found.shape == wanted.shape and not bool(wanted.any()) and bool(found.any())


@cause(
    "gradient negated",
    *ANY,
    fix="The sign is turned round.",
)
def _negated(e: Evidence) -> Iterator[Tensor]:
    yield -e.wanted


_scaled = cause(
    "gradient scaled by a constant",
    *ANY,
    fix="Look for a factor of the world size, of T or K, or a mean for a sum.",
    general=True,
)(multiple_of_all)

_scaled_rows = cause(
    "gradient scaled by a factor for each row",
    *ANY,
    fix="Each expert's or token's gradient has the right direction and another length: look for "
    "a division by its number of tokens.",
    general=True,
)(multiple_of_rows)


GRADIENTS = (
    _clamped,
    _unclamped,
    _slot_missing,
    _duplicate,
    _sum_detached,
    _no_division,
    _straight_through,
    _detached,
    Cause(
        "gradient where there should be none",
        ANY,
        "The reference keeps this out of backward: detach it (a choice bias is a buffer, counts "
        "are constants).",
        _flows,
    ),
    _negated,
    _scaled,
    _scaled_rows,
)
