"""What a layer asks of a dispatcher on one rank: each choice arrives once, or is told as dropped.

Notation: x_RH, local, handle = dispatch(x, routing); `told` is the routing with what was dropped,
as MoELayer returns it (moetk.dispatch.with_drops).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.dispatch import Local
from moetk.errors import UnsupportedRoutingError
from moetk.routing import Routing, TokenChoice, check_routing
from moetk.testing.law import Case, hold, law
from moetk.testing.laws.dispatchers_subject import (
    DispatcherUnderTest,
    arrived,
    cases_of,
    close,
    context_of,
    crowds,
    dispatcher_under_test,
    kept_counts,
    send,
    through,
)
from moetk.testing.strategies.routings import (
    generator,
    normal,
    routing_of,
    seed_of,
    taken,
)


class PerChoice:
    """A right dispatcher that sends one row for each choice, in expert order. Broken parts change
    one thing about it."""

    def sources(self, routing: TokenChoice) -> tuple[Tensor, Tensor]:
        """(token_N, column_N) of the rows sent."""
        used_TK = routing.experts_TK >= 0
        if routing.kept_TK is not None:
            used_TK = used_TK & routing.kept_TK
        token_N, column_N = used_TK.nonzero(as_tuple=True)
        order_N = routing.experts_TK[token_N, column_N].argsort(stable=True)
        return token_N[order_N], column_N[order_N]

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, Any]:
        if not isinstance(routing, TokenChoice):
            raise UnsupportedRoutingError("PerChoice sends what tokens choose.")
        token_N, column_N = self.sources(routing)
        experts_N1 = routing.experts_TK[token_N, column_N, None]
        weights_N1 = routing.weights_TK[token_N, column_N, None]
        local = TokenChoice(experts_N1, weights_N1, routing.num_experts)
        return x_TH[token_N], local, (token_N, len(x_TH))

    def combine(self, y_RH: Tensor, handle: Any) -> Tensor:
        token_N, num_tokens = handle
        return y_RH.new_zeros(num_tokens, y_RH.shape[1]).index_add(0, token_N, y_RH)


def dispatched(
    subject: DispatcherUnderTest, case: Case
) -> tuple[Any, Tensor, TokenChoice, RouterContext]:
    routing = routing_of(case, subject.num_experts)
    return subject.at(case), case["x_TH"], routing, context_of(case)


def wanted(routing: TokenChoice, ctx: RouterContext | None = None) -> Tensor:
    """(T, K) bool: used, not dropped by the router, not padding."""
    wanted_TK = routing.experts_TK >= 0
    if routing.kept_TK is not None:
        wanted_TK = wanted_TK & routing.kept_TK
    if ctx is not None and ctx.token_mask is not None:
        wanted_TK = wanted_TK & ctx.token_mask[:, None]
    return wanted_TK


# D1


class _DropsUncounted(Local):
    """Sets what finds no place to -1, and lets nobody know that it was wanted."""

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, None]:
        assert isinstance(routing, TokenChoice)
        second_TK = torch.zeros_like(routing.experts_TK, dtype=torch.bool)
        second_TK[1::2] = True
        ids_TK = routing.experts_TK.masked_fill(second_TK, -1)
        weights_TK = routing.weights_TK.masked_fill(second_TK, 0)
        return x_TH, replace(routing, experts_TK=ids_TK, weights_TK=weights_TK), None


@law(
    "D1",
    "kept and dropped is what was wanted",
    formula="for each expert: choices that arrive = choices told as kept <= choices wanted",
    source="arXiv 2006.16668, section 2.2; a token dropped uncounted hides an overflow",
    cases=cases_of(),
    broken=lambda: dispatcher_under_test(_DropsUncounted()),
)
def conservation(subject: DispatcherUnderTest, case: Case) -> None:
    dispatcher, x_TH, routing, ctx = dispatched(subject, case)
    sent = send(dispatcher, x_TH, routing, ctx)
    found_E = kept_counts(sent, subject.num_experts)
    told_E = torch.bincount(routing.experts_TK[sent.kept_TK], minlength=subject.num_experts)
    hold(
        torch.equal(found_E, told_E),
        f"{found_E.tolist()} choices arrived at the experts, told as kept were {told_E.tolist()}",
        arrived_E=found_E,
        told_E=told_E,
    )
    extra_TK = sent.kept_TK & ~wanted(routing)
    hold(~extra_TK, "choices are kept that the router had not made", kept_TK=sent.kept_TK)


# D2


class _CountsTokensFirst(PerChoice):
    """Takes the token of row n of T * K to be n % T, where choices lie token by token: n // K."""

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, Any]:
        assert isinstance(routing, TokenChoice)
        _, local, (token_N, num_tokens) = super().dispatch(x_TH, routing, ctx)
        _, column_N = self.sources(routing)
        flat_N = token_N * routing.experts_TK.shape[1] + column_N
        mixed_N = flat_N % max(num_tokens, 1)
        return x_TH[mixed_N], local, (mixed_N, num_tokens)


@law(
    "D2",
    "each kept choice arrives exactly once, at its expert",
    formula="the multiset of (token, expert) that arrived = that of the kept choices",
    source="arXiv 2006.16668, algorithm 1; rows carry their token's number as a tag",
    cases=crowds,
    broken=lambda: dispatcher_under_test(_CountsTokensFirst()),
)
def exactly_once(subject: DispatcherUnderTest, case: Case) -> None:
    dispatcher, x_TH, routing, ctx = dispatched(subject, case)
    tags_T = torch.arange(len(x_TH), dtype=x_TH.dtype)
    sent = send(dispatcher, tags_T[:, None].expand_as(x_TH).contiguous(), routing, ctx)
    check_routing(
        sent.local, len(sent.x_RH), subject.num_experts, where="dispatch", duplicates=True
    )
    row_N, expert_N, _ = arrived(sent.local)
    token_N = sent.x_RH[row_N, 0].round().long()
    wanted_N, column_N = sent.kept_TK.nonzero(as_tuple=True)
    pairs = [
        (tokens * subject.num_experts + experts).sort().values
        for tokens, experts in (
            (token_N, expert_N),
            (wanted_N, routing.experts_TK[wanted_N, column_N]),
        )
    ]
    hold(
        torch.equal(*pairs),
        "the (token, expert) pairs that arrived are not those that were kept",
        arrived_N=pairs[0],
        kept_N=pairs[1],
    )


# D3


class _RoundsWeights(Local):
    """Sends the routing weights in bfloat16, to save a little traffic."""

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, None]:
        assert isinstance(routing, TokenChoice)
        low_TK = routing.weights_TK.bfloat16().to(routing.weights_TK.dtype)
        return x_TH, replace(routing, weights_TK=low_TK), None


@law(
    "D3",
    "identity experts return the token times its kept weights",
    formula="f_e(x) = x: y_t = x_t sum over kept k of w_tk",
    source="arXiv 1701.06538, equation 1, with identity experts",
    cases=crowds,
    broken=lambda: dispatcher_under_test(_RoundsWeights()),
)
def identity_experts(subject: DispatcherUnderTest, case: Case) -> None:
    dispatcher, x_TH, routing, ctx = dispatched(subject, case)
    ones_E = torch.ones(subject.num_experts, dtype=x_TH.dtype)
    sent, y_TH = through(dispatcher, x_TH, routing, ctx, ones_E)
    kept_TK = routing.weights_TK * sent.kept_TK
    close(
        y_TH,
        x_TH * kept_TK.sum(-1, keepdim=True),
        "y of identity experts",
        terms=kept_TK.shape[1] + 2,
        size=(x_TH * kept_TK.abs().sum(-1, keepdim=True)).norm(),
    )


# D4


class _SendsWeightsWithoutGraph(PerChoice):
    """Ships the weights beside the rows, outside of autograd: the router never learns."""

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, Any]:
        assert isinstance(routing, TokenChoice)
        alone = replace(routing, weights_TK=routing.weights_TK.detach())
        return super().dispatch(x_TH, alone, ctx)


@law(
    "D4",
    "the layer is the same with every token at home",
    formula="f_e(x) = s_e x: y and dL/dx, dL/dw, dL/ds = those of sum over kept k of w_tk s_e x_t",
    source="arXiv 1701.06538, equation 1, and its derivatives",
    cases=cases_of(),
    broken=lambda: dispatcher_under_test(_SendsWeightsWithoutGraph()),
)
def like_at_home(subject: DispatcherUnderTest, case: Case) -> None:
    dispatcher, x_TH, routing, ctx = dispatched(subject, case)
    scale_E = normal((subject.num_experts,), generator(seed_of(case)), x_TH.dtype)
    leaves = [t.clone().requires_grad_() for t in (x_TH, routing.weights_TK, scale_E)]
    x, weights_TK, s_E = leaves
    sent, y_TH = through(dispatcher, x, replace(routing, weights_TK=weights_TK), ctx, s_E)
    found = torch.autograd.grad(y_TH, leaves, case["g_TH"], materialize_grads=True)

    ids_TK, kept_TK = routing.experts_TK.clamp(min=0), sent.kept_TK
    scaled_TK = weights_TK * s_E[ids_TK] * kept_TK
    want_TH = x * scaled_TK.sum(-1, keepdim=True)
    want = torch.autograd.grad(want_TH, leaves, case["g_TH"])
    terms = x_TH.numel() * kept_TK.shape[1] + 4
    largest = [1 + t.norm() for t in (x_TH, routing.weights_TK, scale_E, case["g_TH"])]
    size = torch.stack(largest).prod()
    names = ("y", "dL/dx", "dL/dw", "dL/ds")
    for name, value, truth in zip(names, (y_TH, *found), (want_TH, *want), strict=True):
        close(value.detach(), truth.detach(), name, terms=terms, size=size)


# D5


class _Averages(PerChoice):
    """Combines by the mean of a token's rows; the weights are in them already."""

    def combine(self, y_RH: Tensor, handle: Any) -> Tensor:
        token_N, num_tokens = handle
        rows_T = torch.bincount(token_N, minlength=num_tokens).clamp(min=1)
        return super().combine(y_RH, handle) / rows_T[:, None]


@law(
    "D5",
    "combine is the transpose of dispatch",
    formula="<dispatch(x), y> = <x, combine(y)> for any rows y",
    source="the backward of each is then the other, as in Megatron-LM's token dispatchers",
    cases=crowds,
    broken=lambda: dispatcher_under_test(_Averages()),
)
def transposes(subject: DispatcherUnderTest, case: Case) -> None:
    dispatcher, x_TH, routing, ctx = dispatched(subject, case)
    sent = send(dispatcher, x_TH, routing, ctx)
    y_RH = normal(tuple(sent.x_RH.shape), generator(seed_of(case)), x_TH.dtype)
    home_TH = dispatcher.combine(y_RH, sent.handle)
    there_RH, here_TH = sent.x_RH * y_RH, x_TH * home_TH
    close(
        there_RH.sum(),
        here_TH.sum(),
        "<x, combine(y)> against <dispatch(x), y>",
        terms=there_RH.numel() + here_TH.numel(),
        size=there_RH.abs().sum() + here_TH.abs().sum(),
    )


# D6


class _CutsBlocks(PerChoice):
    """Works in blocks of two tokens, and forgets the odd one at the end."""

    def sources(self, routing: TokenChoice) -> tuple[Tensor, Tensor]:
        token_N, column_N = super().sources(routing)
        whole = len(routing.experts_TK) // 2 * 2
        return token_N[token_N < whole], column_N[token_N < whole]


@law(
    "D6",
    "where nothing is dropped, the order of the tokens is irrelevant",
    formula="dispatch, scale by expert, combine: y(x[p], routing[p]) = y(x, routing)[p]",
    source="arXiv 2211.15841: dropless banks are sums over tokens' own choices",
    cases=cases_of(batches=(1,)),
    broken=lambda: dispatcher_under_test(_CutsBlocks()),
)
def token_order(subject: DispatcherUnderTest, case: Case) -> None:
    dispatcher, x_TH, routing, ctx = dispatched(subject, case)
    if subject.with_capacity is not None:
        dispatcher = subject.with_capacity(float(subject.num_experts))
    source = generator(seed_of(case))
    scale_E = normal((subject.num_experts,), source, x_TH.dtype)
    order_T = torch.randperm(len(x_TH), generator=source)
    outputs = []
    for rows_TH, one in ((x_TH, routing), (x_TH[order_T], taken(routing, order_T))):
        sent, y_TH = through(dispatcher, rows_TH, one, ctx, scale_E)
        if not torch.equal(sent.kept_TK, wanted(one)):
            return  # it drops, and whom it drops may depend on the order
        outputs.append(y_TH)
    size = x_TH.norm() * (1 + routing.weights_TK.abs().sum()) * scale_E.norm()
    close(
        outputs[1],
        outputs[0][order_T],
        "y with tokens in another order",
        terms=routing.experts_TK.shape[1] + 3,
        size=size,
    )


LAWS = (
    conservation,
    exactly_once,
    identity_experts,
    like_at_home,
    transposes,
    token_order,
)
