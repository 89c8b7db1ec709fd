"""A capacity as a loop over those who arrive, the plainest right one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.dispatch import Dispatcher, Local
from moetk.errors import UnsupportedRoutingError
from moetk.kernels.selection import expert_capacity
from moetk.routing import Routing, TokenChoice
from moetk.testing.laws.dispatchers_subject import (
    DispatcherUnderTest,
    dispatcher_under_test,
)


def queue(
    routing: TokenChoice, groups: Sequence[Sequence[int]], places: int, arrivals: str = "columns"
) -> Tensor:
    """(T, K) bool: who finds a place, as a loop over those who arrive. groups: tokens that share
    the places, in their order. arrivals: "columns" = all first choices, then all second ones;
    "tokens" = all choices of the first token, then of the second."""
    kept_TK = torch.zeros_like(routing.experts_TK, dtype=torch.bool)
    columns = range(routing.experts_TK.shape[1])
    for tokens in groups:
        taken = [0] * routing.num_experts
        come = (
            [(t, k) for k in columns for t in tokens]
            if arrivals == "columns"
            else [(t, k) for t in tokens for k in columns]
        )
        for t, k in come:
            expert = int(routing.experts_TK[t, k])
            if expert >= 0 and taken[expert] < places:
                taken[expert] += 1
                kept_TK[t, k] = True
    return kept_TK


class Queue:
    """A right capacity, by the loop above. Broken parts change what it counts, and nothing else."""

    order = None  # what Capacity calls first_come

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def places(self, length: int, k: int, num_experts: int) -> int:
        return expert_capacity(length, k, num_experts, self.factor)

    def groups(self, num_tokens: int, batch: int, length: int) -> list[list[int]]:
        return [list(range(b * length, (b + 1) * length)) for b in range(batch)]

    def seen(self, routing: TokenChoice, ctx: RouterContext) -> TokenChoice:
        absent_TK = torch.zeros_like(routing.experts_TK, dtype=torch.bool)
        if routing.kept_TK is not None:
            absent_TK = ~routing.kept_TK
        if ctx.token_mask is not None:
            absent_TK = absent_TK | ~ctx.token_mask[:, None]
        return replace(routing, experts_TK=routing.experts_TK.masked_fill(absent_TK, -1))

    def serve(self, routing: TokenChoice, groups: list[list[int]], places: int) -> Tensor:
        return queue(routing, groups, places)

    def __call__(self, routing: Routing, ctx: RouterContext) -> TokenChoice:
        if not isinstance(routing, TokenChoice):
            raise UnsupportedRoutingError("Queue serves what tokens choose.")
        num_tokens, k = routing.experts_TK.shape
        batch, length = ctx.batch_shape or (1, num_tokens)
        kept_TK = self.serve(
            self.seen(routing, ctx),
            self.groups(num_tokens, batch, length),
            self.places(length, k, routing.num_experts),
        )
        weights_TK = routing.weights_TK.masked_fill(~kept_TK, 0)
        return replace(routing, kept_TK=kept_TK, weights_TK=weights_TK)


def served_by(kind: type[Queue]) -> Callable[[], DispatcherUnderTest]:
    def build() -> DispatcherUnderTest:
        def at(factor: float) -> Dispatcher:
            return Local(kind(factor))

        return dispatcher_under_test(at(1.0), with_capacity=at)

    return build
