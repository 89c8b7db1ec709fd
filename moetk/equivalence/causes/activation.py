"""Causes between the experts' two products. Letters: I expert width."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from moetk.equivalence.cause import Cause, Evidence
from moetk.equivalence.causes.chain import CHAIN, otherwise, with_activation
from moetk.experts import ClampedGated, GptOssGated, Plain

STAGES = CHAIN[CHAIN.index("activation") :]
Elementwise = Callable[[Tensor], Tensor]

FUNCTIONS: dict[str, Elementwise] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh-gelu": lambda t: F.gelu(t, approximate="tanh"),
    "quick gelu": lambda t: t * torch.sigmoid(1.702 * t),
    "relu": torch.relu,
    "squared relu": lambda t: torch.relu(t).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _instead(name: str) -> Cause:
    other = FUNCTIONS[name]

    @otherwise(
        f"activation is {name}",
        *STAGES,
        fix="The two use different activation functions: compare hidden_act.",
    )
    def worlds(e: Evidence) -> Iterator[Evidence]:
        own = e.facts.get("activation")
        if isinstance(own, Plain):
            yield with_activation(e, Plain(other))
        elif isinstance(own, ClampedGated):
            yield with_activation(e, ClampedGated(own.limit, other))
        elif own is not None:
            yield with_activation(e, lambda gate, up: other(gate) * up)

    return worlds


def _clamped(e: Evidence) -> ClampedGated | GptOssGated | None:
    own = e.facts.get("activation")
    return own if isinstance(own, ClampedGated | GptOssGated) else None


@otherwise(
    "clamp missing",
    *STAGES,
    fix="Gate and up are clamped to the limit before they are multiplied.",
)
def _no_clamp(e: Evidence) -> Iterator[Evidence]:
    if own := _clamped(e):
        yield with_activation(e, _with_limit(own, torch.inf))


def _with_limit(own: ClampedGated | GptOssGated, limit: float) -> Callable[..., Tensor]:
    if isinstance(own, ClampedGated):
        return ClampedGated(limit, own.act)
    return GptOssGated(own.alpha, limit)


@otherwise(
    "gate clamped from below too",
    *STAGES,
    fix="The gate is clamped from above only; up is clamped on both sides.",
)
def _gate_below(e: Evidence) -> Iterator[Evidence]:
    if own := _clamped(e):
        limit = own.limit
        yield with_activation(e, lambda gate, up: own(gate.clamp(min=-limit), up))


@otherwise(
    "up not clamped from below",
    *STAGES,
    fix="The gate is clamped from above only; up is clamped on both sides.",
)
def _up_below(e: Evidence) -> Iterator[Evidence]:
    if own := _clamped(e):
        top, free = own.limit, _with_limit(own, torch.inf)
        yield with_activation(e, lambda gate, up: free(gate.clamp(max=top), up.clamp(max=top)))


@otherwise(
    "gate not clamped",
    *STAGES,
    fix="The gate is clamped from above, and up on both sides.",
)
def _gate_free(e: Evidence) -> Iterator[Evidence]:
    if own := _clamped(e):
        top, free = own.limit, _with_limit(own, torch.inf)
        yield with_activation(e, lambda gate, up: free(gate, up.clamp(-top, top)))


@otherwise(
    "up not clamped",
    *STAGES,
    fix="The gate is clamped from above, and up on both sides.",
)
def _up_free(e: Evidence) -> Iterator[Evidence]:
    if own := _clamped(e):
        top, free = own.limit, _with_limit(own, torch.inf)
        yield with_activation(e, lambda gate, up: free(gate.clamp(max=top), up))


@otherwise(
    "up is not shifted by one",
    *STAGES,
    fix="gpt-oss multiplies by up + 1.",
)
def _no_one(e: Evidence) -> Iterator[Evidence]:
    own = e.facts.get("activation")
    if isinstance(own, GptOssGated):
        top, free = own.limit, _with_limit(own, torch.inf)
        yield with_activation(
            e, lambda gate, up: free(gate.clamp(max=top), up.clamp(-top, top) - 1)
        )


@otherwise(
    "alpha missing in the gate",
    *STAGES,
    fix="gpt-oss gates with gate sigmoid(alpha gate), alpha = 1.702.",
)
def _no_alpha(e: Evidence) -> Iterator[Evidence]:
    own = e.facts.get("activation")
    if isinstance(own, GptOssGated):
        yield with_activation(e, GptOssGated(1.0, own.limit))


@otherwise(
    "up is not multiplied in",
    *STAGES,
    fix="A gated activation is act(gate) * up; here it is act(gate) alone.",
)
def _gate_alone(e: Evidence) -> Iterator[Evidence]:
    own = e.facts.get("activation")
    if own is not None and not isinstance(own, Plain):
        one = 0.0 if isinstance(own, GptOssGated) else 1.0
        yield with_activation(e, lambda gate, up: own(gate, torch.full_like(up, one)))


@otherwise(
    "gate without its activation",
    *STAGES,
    fix="A gated activation is act(gate) * up; here it is gate * up.",
)
def _bilinear(e: Evidence) -> Iterator[Evidence]:
    own = e.facts.get("activation")
    if own is not None and not isinstance(own, Plain):
        yield with_activation(e, lambda gate, up: gate * up)


ACTIVATION = (
    *(_instead(name) for name in FUNCTIONS),
    _no_clamp,
    _gate_below,
    _up_below,
    _gate_free,
    _up_free,
    _no_one,
    _no_alpha,
    _gate_alone,
    _bilinear,
)
