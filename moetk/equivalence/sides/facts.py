"""What a part says about itself, in one vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moetk.dispatch import Capacity
from moetk.equivalence.sides.bank_view import BankView
from moetk.layers.attach import Attachment

# The common name, and what transformers' gates call it.
_OF_ROUTER = {
    "top_k": ("top_k",),
    "num_experts": ("num_experts", "n_routed_experts"),
    "groups": ("groups", "num_group", "n_group"),
    "top_groups": ("top_groups", "topk_group"),
    "scale": ("scale", "routed_scaling_factor"),
    "renormalise": ("renormalise", "norm_topk_prob"),
    "eps": ("eps",),
    "tie": ("tie",),
    "choice_bias": ("e_score_correction_bias",),
    "gemm_dtype": ("gemm_dtype",),
    "score_dtype": ("score_dtype",),
}


def router_facts(router: Any, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings of a router or gate; `settings` are read off its family's row and go first."""
    facts = dict(settings or {})
    for name, spellings in _OF_ROUTER.items():
        for spelling in spellings:
            value = getattr(router, spelling, None)
            if value is not None and name not in facts:
                facts[name] = value.detach() if isinstance(value, Tensor) else value
    factor = getattr(router, "capacity_factor", None)
    if factor is not None:
        facts["capacity"] = Capacity(factor)
    return facts


def bank_facts(bank: BankView | None) -> dict[str, Any]:
    """Layout, activation and clamp of a bank."""
    if bank is None:
        return {}
    facts: dict[str, Any] = {
        "num_experts": len(bank.up),
        "transposed": bank.transposed,
        "interleaved": bank.interleaved,
    }
    if bank.activation is not None:
        facts["activation"] = bank.activation
        if hasattr(bank.activation, "limit"):
            facts["limit"] = bank.activation.limit
    return facts


def dispatch_facts(dispatcher: Any) -> dict[str, Any]:
    capacity = getattr(dispatcher, "capacity", None)
    return {} if capacity is None else {"capacity": capacity}


def attachment_facts(attachment: Attachment) -> dict[str, Any]:
    """What a layer trains with: its losses, the scale that it gives them, and what moves its router
    between steps, in words."""
    scale = attachment.aux_scale
    facts: dict[str, Any] = {
        "losses": tuple(attachment.losses),
        "controllers": tuple(_in_words(one.controller) for one in attachment.steered),
    }
    if attachment.losses and isinstance(scale, int | float):
        facts["aux_scale"] = float(scale)
    return facts


def _in_words(part: object) -> str:
    """Its own repr, or its type's name where that only tells its place in memory."""
    return type(part).__name__ if type(part).__repr__ is object.__repr__ else repr(part)
