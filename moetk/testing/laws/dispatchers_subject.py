"""A dispatcher as the laws see it: what it served, where each choice went, and what came home.

Letters: T tokens, R rows after dispatch, H hidden, E experts, K choices a token, N choices.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from moetk.context import RouterContext
from moetk.dispatch import Capacity, Dispatcher, Local, with_drops
from moetk.equivalence.judge import floor
from moetk.errors import RouterConfigError
from moetk.routing import ExpertChoice, Routing, TokenChoice
from moetk.settings import check_whole
from moetk.testing.law import Case, Setting, hold
from moetk.testing.strategies.routings import (
    CROWDS,
    DISTINCT,
    MANY,
    choices_of,
    generator,
    normal,
    routing_of,
    rows,
    seeds,
    token_choice,
)

FACTORS = (1.0, 0.5, 1.5, 0.01)
"""Capacity factors that are drawn; under 0.01 an expert serves a single choice of a sequence."""


@dataclass(frozen=True, eq=False)
class DispatcherUnderTest:
    """with_capacity: (factor) -> the same dispatcher, whose experts each have ceil(factor S K / E)
    places in each sequence; None = it has no capacity that could be set."""

    dispatcher: Dispatcher
    num_experts: int = 4
    hidden_size: int = 6
    with_capacity: Callable[[float], Dispatcher] | None = None

    @property
    def order(self) -> Callable[[TokenChoice], Tensor | None] | None:
        """(routing) -> priority_T of those who are served first; None = it does not say."""
        capacity = getattr(self.dispatcher, "capacity", None)
        order = getattr(capacity, "order", None)
        return order if callable(order) else None

    def at(self, case: Case) -> Dispatcher:
        """The dispatcher, or the same at the case's capacity factor."""
        factor = case.settings.get("factor")
        if factor is None or self.with_capacity is None:
            return self.dispatcher
        return self.with_capacity(float(factor))


def dispatcher_under_test(
    dispatcher: Dispatcher,
    *,
    num_experts: int = 4,
    hidden_size: int = 6,
    with_capacity: Callable[[float], Dispatcher] | None = None,
) -> DispatcherUnderTest:
    """A copy of the dispatcher, where it can be copied: a process group cannot.

    `Local(Capacity(...))` says itself how to build it at another capacity. Raises
    RouterConfigError on sizes below 1, and on what has no `dispatch` and `combine`.
    """
    check_whole("check_dispatcher", num_experts=num_experts, hidden_size=hidden_size)
    methods = (getattr(dispatcher, name, None) for name in ("dispatch", "combine"))
    if isinstance(dispatcher, type) or not all(map(callable, methods)):
        raise RouterConfigError(
            f"check_dispatcher: dispatcher={dispatcher!r} is no dispatcher; give it an object with "
            "dispatch and combine, such as Local()."
        )
    with contextlib.suppress(TypeError, RuntimeError, NotImplementedError):
        dispatcher = copy.deepcopy(dispatcher)
    capacity = getattr(dispatcher, "capacity", None)
    if with_capacity is None and type(dispatcher) is Local and isinstance(capacity, Capacity):

        def with_capacity(factor: float) -> Dispatcher:
            return Local(replace(capacity, factor=factor))

    return DispatcherUnderTest(dispatcher, num_experts, hidden_size, with_capacity)


def pair_under_test(
    pair: tuple[Dispatcher, Callable[[float], Dispatcher]],
    *,
    num_experts: int = 4,
    hidden_size: int = 6,
) -> DispatcherUnderTest:
    """`dispatcher_under_test` of a dispatcher with its with_capacity, built together."""
    dispatcher, with_capacity = pair
    return dispatcher_under_test(
        dispatcher,
        num_experts=num_experts,
        hidden_size=hidden_size,
        with_capacity=with_capacity,
    )


def needs_capacity(subject: DispatcherUnderTest) -> str | None:
    if subject.with_capacity is not None:
        return None
    return "it has no capacity to set: give check_dispatcher with_capacity=(factor) -> dispatcher"


def needs_order(subject: DispatcherUnderTest) -> str | None:
    if subject.order is not None:
        return needs_capacity(subject)
    return "it does not say whom it serves first: no capacity.order, (routing) -> priority_T | None"


# Cases.


@st.composite
def sent(
    draw: DrawFn,
    subject: DispatcherUnderTest,
    patterns: tuple[str, ...] = (*DISTINCT, "duplicates", "starved", "unused", "dropped", "mixed"),
    lengths: tuple[int, ...] = (1, 2, 5, 8, 0),
    batches: tuple[int, ...] = (1, 2, 3),
    factors: tuple[float, ...] = FACTORS,
    padding: bool = False,
    more_choices: tuple[int, ...] = (),
) -> Case:
    """x_TH, a TokenChoice, a cotangent g_TH, perhaps token_mask_T; B sequences of S tokens.

    more_choices: K that are drawn beside the usual ones.
    """
    batch, length = draw(st.sampled_from(batches)), draw(st.sampled_from(lengths))
    top_k = draw(choices_of(subject.num_experts, more_choices))
    pattern, factor = draw(st.sampled_from(patterns)), draw(st.sampled_from(factors))
    seed = draw(seeds())
    source, num_tokens = generator(seed), batch * length
    routing = token_choice(num_tokens, subject.num_experts, top_k, pattern, source)
    tensors = {
        "x_TH": rows(num_tokens, subject.hidden_size, "gaussian", source),
        "g_TH": normal((num_tokens, subject.hidden_size), source, torch.float64),
        "experts_TK": routing.experts_TK,
        "weights_TK": routing.weights_TK,
    }
    if routing.kept_TK is not None:
        tensors["kept_TK"] = routing.kept_TK
    if padding:
        tensors["token_mask_T"] = torch.rand(num_tokens, generator=source) < 0.6
    plain: dict[str, Setting] = {
        "pattern": pattern,
        "factor": factor,
        "batch": batch,
        "length": length,
        "seed": seed,
    }
    return Case(tensors, plain)


def context_of(case: Case) -> RouterContext:
    shape = cast(int, case.settings["batch"]), cast(int, case.settings["length"])
    return RouterContext(batch_shape=shape, token_mask=case.get("token_mask_T"))


def sequence_of(case: Case) -> Tensor:
    """(T,) int64: which sequence each token is of."""
    length = cast(int, case.settings["length"])
    return torch.arange(len(case["x_TH"])) // max(length, 1)


# What a dispatcher did.


@dataclass(frozen=True, eq=False)
class Sent:
    """One dispatch: what arrived, and what the layer then says was kept of the router's wish."""

    x_RH: Tensor
    local: Routing
    handle: Any
    told: TokenChoice

    @property
    def kept_TK(self) -> Tensor:
        """(T, K) bool: used choices that were kept."""
        used_TK = self.told.experts_TK >= 0
        return used_TK if self.told.kept_TK is None else used_TK & self.told.kept_TK


def through(
    dispatcher: Dispatcher,
    x_TH: Tensor,
    routing: TokenChoice,
    ctx: RouterContext | None,
    scale_E: Tensor,
) -> tuple[Sent, Tensor]:
    """What was sent, and y_TH: there, through experts that multiply by scale_E, and home."""
    there = send(dispatcher, x_TH, routing, ctx)
    return there, home(dispatcher, there, scale_E)


def home(dispatcher: Dispatcher, there: Sent, scale_E: Tensor) -> Tensor:
    return dispatcher.combine(scaling_bank(there.x_RH, there.local, scale_E), there.handle)


def send(
    dispatcher: Dispatcher, x_TH: Tensor, routing: TokenChoice, ctx: RouterContext | None
) -> Sent:
    x_RH, local, handle = dispatcher.dispatch(x_TH, routing, ctx)
    return Sent(x_RH, local, handle, cast(TokenChoice, with_drops(routing, local)))


def kept(subject: DispatcherUnderTest, case: Case, factor: float | None = None) -> Tensor:
    """(T, K) bool: what is kept of the case, at its own capacity factor or another."""
    routing, ctx = routing_of(case, subject.num_experts), context_of(case)
    dispatcher = subject.at(case)
    if factor is not None:
        assert subject.with_capacity is not None
        dispatcher = subject.with_capacity(factor)
    return send(dispatcher, case["x_TH"], routing, ctx).kept_TK


def arrived(local: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """(row_N, expert_N, weight_N) of every kept choice that arrived."""
    if isinstance(local, ExpertChoice):
        expert_N, place_N = (local.tokens_EC >= 0).nonzero(as_tuple=True)
        return local.tokens_EC[expert_N, place_N], expert_N, local.weights_EC[expert_N, place_N]
    hold(isinstance(local, TokenChoice), f"a TokenChoice arrived as {type(local).__name__}")
    assert isinstance(local, TokenChoice)
    kept_RK = local.experts_TK >= 0
    if local.kept_TK is not None:
        kept_RK = kept_RK & local.kept_TK
    row_N, column_N = kept_RK.nonzero(as_tuple=True)
    return row_N, local.experts_TK[row_N, column_N], local.weights_TK[row_N, column_N]


def scaling_bank(x_RH: Tensor, local: Routing, scale_E: Tensor) -> Tensor:
    """Experts that multiply by a number of their own: y_r = sum of w_rk s_e x_r over kept choices.

    scale_E of ones: the identity, which leaves only what dispatch and combine do.
    """
    row_N, expert_N, weight_N = arrived(local)
    scaled_NH = x_RH[row_N] * (weight_N.to(x_RH.dtype) * scale_E[expert_N])[:, None]
    return torch.zeros_like(x_RH).index_add(0, row_N, scaled_NH)


def kept_counts(sent_: Sent, num_experts: int) -> Tensor:
    """(E,) int64: the kept choices that arrived at each expert."""
    return torch.bincount(arrived(sent_.local)[1], minlength=num_experts)


def close(found: Tensor, want: Tensor, what: str, *, terms: int, size: Tensor | float) -> None:
    """Hold |found - want|_F <= eps x terms x size: every rounding in one direction."""
    hold(found.shape == want.shape, f"{what} is {tuple(found.shape)}, not {tuple(want.shape)}")
    error = float((found - want).double().norm())
    bound = floor(found.dtype, 1) * terms * float(size)
    hold(
        error <= bound,
        f"{what} differs by {error:.3g}, where rounding explains {bound:.3g}",
        found=found,
        want=want,
    )


def crowds(subject: DispatcherUnderTest) -> SearchStrategy[Case]:
    """Batches of every size, up to three sequences of 129 tokens with 12 choices each."""
    return sent(subject, lengths=(1, 2, 5, 8, 0, *CROWDS[:2]), more_choices=MANY)


def cases_of(**narrow: Any) -> Callable[[DispatcherUnderTest], SearchStrategy[Case]]:
    return lambda subject: sent(subject, **narrow)
