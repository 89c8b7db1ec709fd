"""Parts that run on the device, as laws that draw on the CPU see them: what comes in is taken
there, what comes out is brought back, and gradients cross as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree

from moetk.context import RouterContext
from moetk.experts import BankWeights, ExpertBank, bank_forward
from moetk.kernels.selection import in_best_groups
from moetk.routers import LinearRouter
from moetk.routers.fused import choose_fused, why_not_fused
from moetk.routing import Routing
from tests.gpu.device import DEVICE, KERNELS

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda z: F.softplus(z).sqrt(),
    "identity": lambda z: z,
}


def moved(tree: Any, *to: Any) -> Any:
    return _pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(*to), tree)


def no_float64(x_TH: Tensor) -> None:
    """The laws then take the next narrower dtype."""
    if x_TH.dtype == torch.float64:
        raise TypeError("the kernels take no float64")


class BankThere(nn.Module):
    """A bank that runs fused, in bf16, or in fp16 for rows of it; its own weights are rounded to
    bf16, so that what it is compared with reads the same."""

    def __init__(self, bank: ExpertBank) -> None:
        super().__init__()
        self.bank, self.spec = bank, bank.spec
        with torch.no_grad():
            for parameter in bank.parameters():
                parameter.copy_(parameter.bfloat16())

    def weights(self) -> BankWeights:
        return self.bank.weights()

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        no_float64(x_TH)
        dtype = x_TH.dtype if x_TH.dtype == torch.float16 else torch.bfloat16
        held = self.bank.weights()
        tensors = (held.up, held.down, held.up_bias, held.down_bias)
        weights = BankWeights(*moved(tensors, DEVICE, dtype))
        x, routed = x_TH.to(DEVICE, dtype), moved(routing, DEVICE)
        return bank_forward(self.spec, weights, x, routed, "fused").to("cpu", x_TH.dtype)


class _RouterThere:
    """In front of a catalogue router's class."""

    _there = False

    def forward(self: Any, x_TH: Tensor, ctx: RouterContext) -> Routing:
        no_float64(x_TH)
        if self._there:
            return self._by_kernels(x_TH, ctx)
        held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        self._there = True
        try:
            there = (x_TH.to(DEVICE), moved(ctx, DEVICE))
            return moved(functional_call(self, moved(held, DEVICE), there), "cpu")
        finally:
            self._there = False

    def _by_kernels(self: Any, x_TH: Tensor, ctx: RouterContext) -> Routing:
        if ctx.replay is not None:  # the one call that is left to the plain forward
            return super().forward(x_TH, ctx)  # type: ignore[misc]
        why = why_not_fused(self, ctx)
        assert why is None or (not KERNELS and why == "device cpu, needs cuda"), why
        routing = choose_fused(self, x_TH, ctx)
        return replace(routing, choice_TE=self._choice(routing.logits_TE))

    def _choice(self: Any, logits_TE: Tensor) -> Tensor:
        """What chose, which stays in the kernel: the laws of choosing ask for it."""
        recipe, bias_E = self.recipe(), getattr(self, "e_score_correction_bias", None)
        choice_TE = SCORES[recipe.score](logits_TE.to(recipe.score_dtype or logits_TE.dtype))
        choice_TE = choice_TE if bias_E is None else choice_TE + bias_E
        if recipe.limited:
            return in_best_groups(choice_TE, recipe.groups, recipe.top_groups)
        return choice_TE


def router_there(router: LinearRouter) -> LinearRouter:
    """The router, its forward now its kernels on the device; its parameters stay where they are."""
    own = type(router)
    router.__class__ = type(own.__name__, (_RouterThere, own), {})
    return router
