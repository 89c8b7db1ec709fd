"""What a call asks of a dispatcher: any batch, any dtype, any kind, and nothing left behind."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any, cast

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from moetk.context import RouterContext
from moetk.dispatch import Local
from moetk.routing import ExpertChoice, Routing, SoftChoice, TokenChoice
from moetk.testing.law import Case, hold, law
from moetk.testing.laws.dispatchers import PerChoice, dispatched, wanted
from moetk.testing.laws.dispatchers_subject import (
    DispatcherUnderTest,
    arrived,
    cases_of,
    close,
    context_of,
    dispatcher_under_test,
    home,
    scaling_bank,
    send,
    through,
)
from moetk.testing.strategies.routings import (
    expert_choice,
    generator,
    normal,
    rows,
    seed_of,
    seeds,
    soft_choice,
    taken,
)

# D7


class _LooksAtTheLargestId(Local):
    """Sizes a buffer by the largest id, which no token leaves undefined."""

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, None]:
        assert isinstance(routing, TokenChoice)
        int(routing.experts_TK.max())
        return super().dispatch(x_TH, routing, ctx)


@law(
    "D7",
    "a batch without tokens",
    formula="T = 0, with or without a context: y is (0, H), and gradients pass",
    source="a rank of expert parallelism without tokens still takes part in every collective",
    cases=cases_of(lengths=(0,)),
    broken=lambda: dispatcher_under_test(_LooksAtTheLargestId()),
)
def no_tokens(subject: DispatcherUnderTest, case: Case) -> None:
    dispatcher, x_TH, routing, ctx = dispatched(subject, case)
    ones_E = torch.ones(subject.num_experts, dtype=x_TH.dtype)
    for context in (ctx, None):
        x = x_TH.clone().requires_grad_()
        _, y_TH = through(dispatcher, x, routing, context, ones_E)
        hold(y_TH.shape == x_TH.shape, f"y is {tuple(y_TH.shape)}, not {tuple(x_TH.shape)}")
        hold(y_TH.requires_grad, "y has no graph: a backward would stop before the layer below")
        (dx_TH,) = torch.autograd.grad(y_TH.sum(), x)
        hold(dx_TH.shape == x_TH.shape, f"dL/dx is {tuple(dx_TH.shape)}")


# D8


class _DropsAtRandom(Local):
    """Drops a random tenth of the choices when things get tight."""

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, None]:
        assert isinstance(routing, TokenChoice)
        kept_TK = wanted(routing) & (torch.rand(routing.experts_TK.shape) > 0.1)
        weights_TK = routing.weights_TK.masked_fill(~kept_TK, 0)
        return x_TH, replace(routing, kept_TK=kept_TK, weights_TK=weights_TK), None


@law(
    "D8",
    "the same call is the same, to the bit",
    formula="two runs: the same choices kept, the same rows, the same y",
    source="activation checkpointing dispatches a second time; arXiv 2101.03961 drops by position",
    cases=cases_of(),
    broken=lambda: dispatcher_under_test(_DropsAtRandom()),
)
def deterministic(subject: DispatcherUnderTest, case: Case) -> None:
    dispatcher, x_TH, routing, ctx = dispatched(subject, case)
    scale_E = normal((subject.num_experts,), generator(seed_of(case)), x_TH.dtype)
    seen = []
    for _ in range(2):
        sent, y_TH = through(dispatcher, x_TH, routing, ctx, scale_E)
        seen.append({"kept_TK": sent.kept_TK, "x_RH": sent.x_RH, "y_TH": y_TH})
    for name, first in seen[0].items():
        hold(torch.equal(first, seen[1][name]), f"{name} differs between two runs", first=first)


# D9


class _KeepsTheHandleItself(PerChoice):
    """Remembers the last dispatch on itself, and combines by that."""

    last: Any = None

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, Any]:
        x_RH, local, self.last = super().dispatch(x_TH, routing, ctx)
        return x_RH, local, None

    def combine(self, y_RH: Tensor, handle: Any) -> Tensor:
        return super().combine(y_RH, self.last)


@law(
    "D9",
    "two dispatches in flight",
    formula="dispatch a, dispatch b, combine a, combine b = each alone",
    source="pipelines and overlap interleave layers; DeepEP returns a handle for each dispatch",
    cases=cases_of(lengths=(2, 5, 8)),
    broken=lambda: dispatcher_under_test(_KeepsTheHandleItself()),
)
def two_in_flight(subject: DispatcherUnderTest, case: Case) -> None:
    dispatcher, x_TH, routing, ctx = dispatched(subject, case)
    scale_E = normal((subject.num_experts,), generator(seed_of(case)), x_TH.dtype)
    back_T = torch.arange(len(x_TH)).flip(0)
    calls = [(x_TH, routing), (x_TH[back_T], taken(routing, back_T))]
    alone = [through(dispatcher, *call, ctx, scale_E)[1] for call in calls]
    flying = [send(dispatcher, rows_TH, one, ctx) for rows_TH, one in calls]
    for which, sent in enumerate(flying):
        y_TH = home(dispatcher, sent, scale_E)
        hold(
            y_TH.shape == alone[which].shape and torch.equal(y_TH, alone[which]),
            f"combine {which + 1} of 2 returned another result than alone",
            found=y_TH,
            want=alone[which],
        )


# D10


class _ZeroesInPlace(Local):
    """Clears the weights of small choices in the router's own tensor."""

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, None]:
        assert isinstance(routing, TokenChoice)
        routing.weights_TK.detach()[routing.weights_TK < 0] = 0
        return super().dispatch(x_TH, routing, ctx)


@law(
    "D10",
    "the router's values are left as they were",
    formula="x, ids, weights, kept and mask are bitwise the same after dispatch and combine",
    source="losses and controllers read the routing after the dispatch",
    cases=cases_of(padding=True),
    broken=lambda: dispatcher_under_test(_ZeroesInPlace()),
)
def inputs_unchanged(subject: DispatcherUnderTest, case: Case) -> None:
    dispatcher, x_TH, routing, ctx = dispatched(subject, case)
    before = {name: tensor.clone() for name, tensor in case.tensors.items()}
    sent = send(dispatcher, x_TH, routing, ctx)
    dispatcher.combine(2 * sent.x_RH, sent.handle)
    for name, tensor in before.items():
        hold(torch.equal(case[name], tensor), f"the dispatcher changed {name}", before=tensor)
    hold(sent.told.experts_TK is routing.experts_TK, "losses would count other ids than wanted")


# D11


class _SendsBfloat16(Local):
    """Rounds the rows to bfloat16 for the way."""

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, None]:
        return x_TH.bfloat16().to(x_TH.dtype), routing, None


@st.composite
def _any_dtype(draw: DrawFn, subject: DispatcherUnderTest) -> Case:
    name = draw(st.sampled_from(("float32", "bfloat16", "float16", "float64")))
    case = draw(cases_of()(subject))
    return Case(case.tensors, {**case.settings, "dtype": name})


@law(
    "D11",
    "rows travel as they are",
    formula="every row that arrives is bitwise its token's, in its dtype; combine keeps y's dtype",
    source="a dispatcher moves rows; what is rounded on the way is another method (FP8 dispatch)",
    cases=_any_dtype,
    broken=lambda: dispatcher_under_test(_SendsBfloat16()),
)
def rows_travel_unchanged(subject: DispatcherUnderTest, case: Case) -> None:
    dispatcher, x_TH, routing, ctx = dispatched(subject, case)
    x_TH = x_TH.to(getattr(torch, str(case.settings["dtype"])))
    sent = send(dispatcher, x_TH, routing, ctx)
    hold(sent.x_RH.dtype == x_TH.dtype, f"x_RH is {sent.x_RH.dtype}, x_TH {x_TH.dtype}")
    row_N, _, _ = arrived(sent.local)
    from_here_NT = (sent.x_RH[row_N][:, None] == x_TH[None]).all(-1)
    hold(from_here_NT.any(-1), "a row arrived that no token sent", x_RH=sent.x_RH)
    y_TH = dispatcher.combine(sent.x_RH, sent.handle)
    hold(y_TH.dtype == x_TH.dtype, f"combine turns {x_TH.dtype} into {y_TH.dtype}")


# D12


class _CutsOtherKinds(Local):
    """Lets each expert of an ExpertChoice have one token, and says nothing."""

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, None]:
        if isinstance(routing, ExpertChoice):
            one = replace(
                routing,
                tokens_EC=routing.tokens_EC[:, :1],
                weights_EC=routing.weights_EC[:, :1],
            )
            return x_TH, one, None
        return x_TH, routing, None


def _served(subject: DispatcherUnderTest) -> list[type[Routing]]:
    """The other kinds that it does not refuse, by whatever exception: nobody overlooks one."""
    source, num_experts = generator(0), subject.num_experts
    x_TH = rows(4, subject.hidden_size, "gaussian", source)
    served: list[type[Routing]] = []
    for routing in (
        expert_choice(4, num_experts, 1, source),
        soft_choice(2, 2, num_experts, 1, source),
    ):
        with contextlib.suppress(Exception):
            subject.dispatcher.dispatch(x_TH, routing, RouterContext(batch_shape=(2, 2)))
            served.append(type(routing))
    return served


@st.composite
def _other_kinds(draw: DrawFn, subject: DispatcherUnderTest) -> Case:
    seed, soft = draw(seeds()), draw(st.sampled_from(_served(subject))) is SoftChoice
    source, num_experts = generator(seed), subject.num_experts
    tensors = {"x_TH": rows(4, subject.hidden_size, "gaussian", source)}
    plain = {"seed": seed, "batch": 2, "length": 2}
    routing: Routing
    if soft:
        routing = soft_choice(2, 2, num_experts, 1, source)
        named = {"dispatch_BSP": routing.dispatch_BSP, "combine_BSP": routing.combine_BSP}
    else:
        routing = expert_choice(4, num_experts, draw(st.integers(0, 4)), source)
        named = {"tokens_EC": routing.tokens_EC, "weights_EC": routing.weights_EC}
    return Case({**tensors, **named}, plain)


@law(
    "D12",
    "another kind of routing is served in full, or refused",
    formula="ExpertChoice, SoftChoice: arrives whole, or raises (best: UnsupportedRoutingError)",
    source="their load is fixed by the router: arXiv 2202.09368, arXiv 2308.00951",
    cases=_other_kinds,
    broken=lambda: dispatcher_under_test(_CutsOtherKinds()),
    unless=lambda subject: None if _served(subject) else "it refuses every other kind of routing",
)
def other_kinds(subject: DispatcherUnderTest, case: Case) -> None:
    x_TH, dispatcher, routing = case["x_TH"], subject.dispatcher, cast(Routing, None)
    if "tokens_EC" in case.tensors:
        routing = ExpertChoice(case["tokens_EC"], case["weights_EC"], len(x_TH))
    else:
        routing = SoftChoice(case["dispatch_BSP"], case["combine_BSP"], subject.num_experts)
    x_RH, local, handle = dispatcher.dispatch(x_TH, routing, context_of(case))
    if isinstance(routing, SoftChoice):
        whole = isinstance(local, SoftChoice) and all(
            torch.equal(getattr(local, name), getattr(routing, name))
            for name in ("dispatch_BSP", "combine_BSP")
        )
        hold(whole, f"the SoftChoice arrived as another {type(local).__name__}")
        return
    ones_E = torch.ones(subject.num_experts, dtype=x_TH.dtype)
    y_TH = dispatcher.combine(scaling_bank(x_RH, local, ones_E), handle)
    want_TH = scaling_bank(x_TH, routing, ones_E)
    size = x_TH.norm() * (1 + case["weights_EC"].abs().sum())
    close(y_TH, want_TH, "y of identity experts", terms=subject.num_experts + 2, size=size)


# D24


class _SeedsTheWorld(Local):
    """Seeds torch, to break ties alike on every rank: whatever draws later draws the same."""

    def dispatch(
        self, x_TH: Tensor, routing: Routing, ctx: RouterContext | None = None
    ) -> tuple[Tensor, Routing, None]:
        torch.manual_seed(1234)
        return x_TH, routing, None


@law(
    "D24",
    "the global random state is left alone",
    formula="torch.get_rng_state() is the same after dispatch and combine",
    source="dropout and noisy routers of other layers draw from it",
    cases=cases_of(),
    broken=lambda: dispatcher_under_test(_SeedsTheWorld()),
)
def random_state_unchanged(subject: DispatcherUnderTest, case: Case) -> None:
    dispatcher, x_TH, routing, ctx = dispatched(subject, case)
    ones_E = torch.ones(subject.num_experts, dtype=x_TH.dtype)
    torch.default_generator.manual_seed(seed_of(case))  # not the state that a seed of 0 leaves
    before = torch.get_rng_state()
    through(dispatcher, x_TH, routing, ctx, ones_E)
    hold(
        torch.equal(before, torch.get_rng_state()),
        "torch.get_rng_state() differs after the call: the dispatcher seeds torch, or draws what "
        "it does not use",
    )


LAWS = (
    no_tokens,
    deterministic,
    two_in_flight,
    inputs_unchanged,
    rows_travel_unchanged,
    other_kinds,
    random_state_unchanged,
)
