"""A catalogue router as a launch or two: its logits, and what its recipe makes of them.

A router that can be run so has a method `recipe()`, which says what its forward does after the
logits. It says so for that forward alone: a subclass with another forward is not run fused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.held import held
from moetk.kernels.choose import MAX_EXPERTS, MAX_TOP_K
from moetk.kernels.recipe import Recipe
from moetk.kernels.route import route
from moetk.memo import remembered
from moetk.routers.linear import LinearRouter
from moetk.routing import TokenChoice

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_fused(
    router: LinearRouter,
    x_TH: Tensor,
    ctx: RouterContext,
    weight_dtype: torch.dtype | None = None,
) -> TokenChoice:
    """The router's forward by `moetk.kernels.route`, for a router and context of which
    `why_not_fused` says None.

    The routing carries logits_TE; scores_TE and choice_TE exist only inside a kernel and are None.
    weight_dtype: what weights_TK are rounded to; None = as the router computes them.

    Ties go to the lower id and weights are added up in descending choice, also where the router
    says tie="stock": the pick and the order of torch.topk follow from how it is written. Module
    hooks are not run; call it inside the router's `__call__`, or for a router without hooks.
    """
    recipe: Recipe = router.recipe()  # type: ignore[operator]
    experts_TK, weights_TK, logits_TE, known = route(
        x_TH,
        router.weight,
        held(router, "bias"),
        held(router, "e_score_correction_bias"),
        router.top_k,
        recipe,
        router.gemm_dtype,
        weight_dtype,
    )
    routing = TokenChoice(experts_TK, weights_TK, router.num_experts, logits_TE)
    if known is not None:
        object.__setattr__(routing, "known", known)
    return routing


def why_not_fused(router: LinearRouter, ctx: RouterContext) -> str | None:
    """Why `choose_fused` cannot stand for this router in this call; None where it can."""
    if ctx.replay is not None:
        return "a choice is replayed"
    weight = router.weight
    reason = _why_never(
        type(router),
        weight.device.type,
        weight.dtype,
        router.gemm_dtype,
        router.score_dtype,
        router.num_experts,
        router.top_k,
    )
    if reason is None and torch.is_autocast_enabled("cuda"):
        return "autocast changes the dtypes that the router declares"
    return reason


@remembered
def _why_never(
    cls: type,
    device: str,
    weight_dtype: torch.dtype,
    gemm_dtype: torch.dtype | None,
    score_dtype: torch.dtype | None,
    num_experts: int,
    top_k: int,
) -> str | None:
    """Of `why_not_fused`, what holds in every call."""
    if not _has_recipe(cls):
        return f"{cls.__name__} has no recipe of its forward"
    if device != "cuda":
        return f"device {device}, needs cuda"
    if num_experts > MAX_EXPERTS or top_k > MAX_TOP_K:
        return (
            f"num_experts={num_experts}, top_k={top_k}; needs at most {MAX_EXPERTS} and {MAX_TOP_K}"
        )
    for name, dtype in (("gemm_dtype", gemm_dtype), ("score_dtype", score_dtype)):
        if dtype is not None and dtype not in _DTYPES:
            return f"{name} {dtype}, needs float32, bfloat16 or float16"
    if weight_dtype not in _DTYPES:
        return f"weight {weight_dtype}, needs float32, bfloat16 or float16"
    return None


def _has_recipe(cls: type) -> bool:
    """Its recipe is written beside its forward, and it changes none of the steps between."""

    def owner(name: str) -> Any:
        # transformers' gates run a catalogue forward under a shell of their own: look past it.
        mro = (c for c in cls.__mro__ if issubclass(c, LinearRouter))
        return next((c for c in mro if name in vars(c)), None)

    steps = ("logits", "in_score_dtype", "with_choice_bias")
    return (
        owner("recipe") is not None
        and owner("recipe") is owner("forward")
        and all(owner(step) is LinearRouter for step in steps)
    )
