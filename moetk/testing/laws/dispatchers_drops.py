"""What a drop means, whoever decides on it: nothing is added, and others are not touched."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.routing import Routing, TokenChoice
from moetk.testing.law import Case, hold, law
from moetk.testing.laws.dispatchers_queue import Queue, queue, served_by
from moetk.testing.laws.dispatchers_subject import (
    DispatcherUnderTest,
    cases_of,
    context_of,
    kept,
    scaling_bank,
    send,
)
from moetk.testing.strategies.routings import generator, routing_of, seed_of

# D19


class _KeepsTheWeight(Queue):
    """Says that a choice is dropped, and leaves its weight."""

    def __call__(self, routing: Routing, ctx: RouterContext) -> TokenChoice:
        assert isinstance(routing, TokenChoice)
        return replace(super().__call__(routing, ctx), weights_TK=routing.weights_TK)


@law(
    "D19",
    "a dropped choice adds nothing and gets no gradient",
    formula="kept_tk False: its weight is 0, dL/dw_tk = 0; all of t dropped: y_t = 0, dL/dx_t = 0",
    source="arXiv 2006.16668, section 2.2: the token passes on by the residual connection",
    cases=cases_of(factors=(0.5, 0.01, 1.0)),
    broken=served_by(_KeepsTheWeight),
)
def drops_add_nothing(subject: DispatcherUnderTest, case: Case) -> None:
    routing, ctx = routing_of(case, subject.num_experts), context_of(case)
    dispatcher = subject.at(case)
    x_TH = case["x_TH"].clone().requires_grad_()
    weights_TK = routing.weights_TK.clone().requires_grad_()
    sent = send(dispatcher, x_TH, replace(routing, weights_TK=weights_TK), ctx)
    gone_TK = ~sent.kept_TK
    hold(
        sent.told.weights_TK[gone_TK] == 0,
        "a dropped choice carries weight",
        weights_TK=sent.told.weights_TK,
    )
    ones_E = torch.ones(subject.num_experts, dtype=x_TH.dtype)
    y_TH = dispatcher.combine(scaling_bank(sent.x_RH, sent.local, ones_E), sent.handle)
    dx_TH, dw_TK = torch.autograd.grad(
        y_TH, (x_TH, weights_TK), case["g_TH"], materialize_grads=True
    )
    hold(dw_TK[gone_TK] == 0, "a dropped choice's weight has a gradient", gradient=dw_TK)
    alone_T = gone_TK.all(-1)
    hold(y_TH[alone_T] == 0, "a token without a kept choice has an output", y_TH=y_TH)
    hold(dx_TH[alone_T] == 0, "a token without a kept choice has a gradient", gradient=dx_TH)


# D20


class _PaddingTakesPlaces(Queue):
    """Does not read the mask."""

    def seen(self, routing: TokenChoice, ctx: RouterContext) -> TokenChoice:
        return super().seen(routing, replace(ctx, token_mask=None))


def _without(case: Case, absent_TK: Tensor) -> Case:
    """The case with those slots unused, no mask and no drops."""
    tensors = {n: t for n, t in case.tensors.items() if n not in ("kept_TK", "token_mask_T")}
    tensors["experts_TK"] = case["experts_TK"].masked_fill(absent_TK, -1)
    tensors["weights_TK"] = case["weights_TK"].masked_fill(absent_TK, 0)
    return Case(tensors, case.settings)


@law(
    "D20",
    "padding takes no place",
    formula="kept of unmasked tokens = kept with every masked token's slots at -1",
    source="arXiv 2202.08906, appendix: padding is not routed",
    cases=cases_of(padding=True, patterns=("random", "hot", "starved", "unused")),
    broken=served_by(_PaddingTakesPlaces),
)
def padding_takes_no_place(subject: DispatcherUnderTest, case: Case) -> None:
    mask_T = case["token_mask_T"]
    found_TK = kept(subject, case)[mask_T]
    want_TK = kept(subject, _without(case, ~mask_T[:, None]))[mask_T]
    hold(
        torch.equal(found_TK, want_TK),
        "padding changes which choices of other tokens are kept",
        found_TK=found_TK,
        want_TK=want_TK,
    )


# D21


class _ForgetsTheRoutersDrops(Queue):
    """Serves whatever has an id, as though the router had dropped nothing."""

    def seen(self, routing: TokenChoice, ctx: RouterContext) -> TokenChoice:
        return super().seen(replace(routing, kept_TK=None), ctx)


@law(
    "D21",
    "what the router dropped stays dropped and takes no place",
    formula="kept <= routing.kept_TK, and = kept with those slots at -1",
    source="arXiv 2101.03961: a router that drops for itself has counted already",
    cases=cases_of(patterns=("dropped", "mixed")),
    broken=served_by(_ForgetsTheRoutersDrops),
)
def router_drops_stay(subject: DispatcherUnderTest, case: Case) -> None:
    absent_TK = ~case["kept_TK"]
    found_TK = kept(subject, case)
    hold(~(found_TK & absent_TK), "a choice is kept that the router dropped", kept_TK=found_TK)
    want_TK = kept(subject, _without(case, absent_TK))
    hold(
        torch.equal(found_TK, want_TK),
        "what the router dropped takes a place of others",
        found_TK=found_TK,
        want_TK=want_TK,
    )


# D22


class _OneQueueForAll(Queue):
    """Pools the places of all sequences: one of them may use up another's."""

    def groups(self, num_tokens: int, batch: int, length: int) -> list[list[int]]:
        return [list(range(num_tokens))]


@law(
    "D22",
    "sequences do not compete",
    formula="kept of a batch (B, S) = kept of each sequence alone, one behind the other",
    source="arXiv 2006.16668 counts by group, so that a sequence's result is its own",
    cases=cases_of(batches=(2, 3), lengths=(1, 2, 5, 8)),
    broken=served_by(_OneQueueForAll),
)
def sequences_apart(subject: DispatcherUnderTest, case: Case) -> None:
    whole_TK, parts = kept(subject, case), []
    for tokens_S in torch.arange(len(whole_TK)).split(int(case.settings["length"] or 0)):
        tensors = {name: tensor[tokens_S] for name, tensor in case.tensors.items()}
        parts.append(kept(subject, Case(tensors, {**case.settings, "batch": 1})))
    want_TK = torch.cat(parts)
    hold(
        torch.equal(whole_TK, want_TK),
        "a sequence keeps other choices in a batch than alone",
        found_TK=whole_TK,
        want_TK=want_TK,
    )


# D23


class _ServesByExpert(Queue):
    """Has one buffer for all experts and fills it in the order of their ids."""

    def serve(self, routing: TokenChoice, groups: list[list[int]], places: int) -> Tensor:
        kept_TK = queue(routing, groups, places)
        room = places * routing.num_experts // 2
        ids_N = routing.experts_TK.masked_fill(~kept_TK, routing.num_experts).flatten()
        late_N = ids_N.argsort(stable=True)[room:]
        kept_TK.view(-1)[late_N] = False
        return kept_TK


@law(
    "D23",
    "experts have no names",
    formula="ids renamed by a permutation: the same choices are kept",
    source="an expert's id says where it lies, and nothing about who is served",
    cases=cases_of(padding=True),
    broken=served_by(_ServesByExpert),
)
def renamed_experts(subject: DispatcherUnderTest, case: Case) -> None:
    name_E = torch.randperm(subject.num_experts, generator=generator(seed_of(case)))
    ids_TK = case["experts_TK"]
    renamed_TK = torch.where(ids_TK >= 0, name_E[ids_TK.clamp(min=0)], -1)
    renamed = Case({**case.tensors, "experts_TK": renamed_TK}, case.settings)
    found_TK, want_TK = kept(subject, renamed), kept(subject, case)
    hold(
        torch.equal(found_TK, want_TK),
        "other choices are kept when experts are renamed",
        found_TK=found_TK,
        want_TK=want_TK,
    )


LAWS = (
    drops_add_nothing,
    padding_takes_no_place,
    router_drops_stay,
    sequences_apart,
    renamed_experts,
)
