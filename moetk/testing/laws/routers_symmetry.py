"""What a routing may not depend on: the order of experts and of tokens, a constant bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.kernels.selection import gather, top_k
from moetk.routing import ExpertChoice, Routing, SoftChoice, TokenChoice
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.routers_cases import (
    EXPERTS_DIFFER,
    ScoredRouter,
    broken_subject,
    inputs,
    unless_experts_are_alike,
    unless_experts_are_chosen,
)
from moetk.testing.laws.routers_compare import coarsest_eps, hold_close
from moetk.testing.laws.routers_subject import CHOICE_BIAS, RouterSubject, context_of
from moetk.testing.laws.routers_told import by_token, differing
from moetk.testing.strategies.inputs import MODERATE
from moetk.testing.strategies.sequences import VOCABULARY


class HashesTheRow(ScoredRouter):
    """A hash of the token id and of the row it happens to stand in."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        ids_T = ctx.require("token_ids", self) + torch.arange(len(x_TH))
        experts_TK = ctx.replayed((ids_T[:, None] + torch.arange(self.top_k)) % self.num_experts)
        return self.chosen(experts_TK, gather(self.scored(x_TH)[1], experts_TK))


def _unless_ids_alone_choose(subject: RouterSubject) -> str | None:
    if not subject.chooses_experts:
        return unless_experts_are_chosen(subject)
    if subject.choice_reads_x:
        return "its choice reads x"
    _, ctx = subject.probe()
    assert ctx.token_ids is not None and ctx.positions is not None
    other_T = (ctx.token_ids + 1) % VOCABULARY
    if not subject.minds(token_ids=other_T):
        return "other ctx.token_ids change nothing"
    besides: dict[str, Any] = {
        "positions": ctx.positions.flip(0),
        "sequence_ids": ctx.positions // 3,
        "batch_shape": (len(other_T) // 3, 3),
    }
    read = [name for name, value in besides.items() if subject.minds(**{name: value})]
    if read:
        return f"it also reads {', '.join(read)}"
    return "it also reads the ids of other tokens" if _reads_other_ids(subject) else None


def _reads_other_ids(subject: RouterSubject) -> bool:
    x_TH, ctx = subject.probe()
    assert ctx.token_ids is not None
    before = by_token(subject.route(x_TH, ctx))
    for token, token_id in enumerate(ctx.token_ids):
        other_T = (ctx.token_ids + 1) % VOCABULARY
        other_T[token] = token_id
        after = by_token(subject.route(x_TH, replace(ctx, token_ids=other_T)))
        if bool(differing(before, after)[token]):
            return True
    return False


@law(
    "R17",
    "a table of token ids reads the ids alone",
    formula="id_t = id_s  =>  experts_t = experts_s, whatever x, the place and the other tokens",
    source="Hash layers, arXiv 2106.04426, section 3",
    cases=inputs("gaussian", least_length=2),
    broken=broken_subject(HashesTheRow),
    unless=_unless_ids_alone_choose,
)
def ids_alone(subject: RouterSubject, case: Case) -> None:
    told = by_token(subject.on(case))["chosen"]
    ids_T = context_of(case).token_ids
    assert ids_T is not None
    for token, token_id in enumerate(ids_T.tolist()):
        first = int((ids_T == token_id).nonzero()[0])
        hold(
            torch.equal(told[token], told[first]),
            f"token id {token_id} goes to {told[first].tolist()} in row {first} and to "
            f"{told[token].tolist()} in row {token}",
            experts_TK=told,
            token_ids=ids_T,
        )


class PrefersLowIds(ScoredRouter):
    """A tie-break that is larger than the scores' differences."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        preferred_TE = scores_TE - 0.02 * torch.arange(self.num_experts)
        experts_TK = top_k(preferred_TE, self.top_k, ctx)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK))


RELABELLED = frozenset({"weight", "bias", "noise_weight", CHOICE_BIAS})


def _unless_relabelled(subject: RouterSubject) -> str | None:
    if (reason := unless_experts_are_alike(subject)) is not None:
        return reason
    if not isinstance(subject.original, nn.Module):
        return "a function has no parameters to permute"
    if subject.groups is not None and subject.groups[0] > 1:
        return "its groups are of neighbouring experts, which a relabelling would tear apart"
    if not subject.choice_reads_x:
        return "its choice does not read x"
    named = subject.original.state_dict()
    strange = [
        name
        for name, tensor in named.items()
        if tensor.ndim
        and (name.split(".")[-1] not in RELABELLED or len(tensor) != subject.num_experts)
    ]
    if strange or sum(name.split(".")[-1] == "weight" for name in named) != 1:
        told = ", ".join(strange) or "its parameters"
        return f"which rows of {told} belong to an expert is not said by a name known here"
    return None


@law(
    "R18",
    "experts have no order",
    formula="rows of W, b permuted by p  =>  experts are p(experts), weights stay",
    source="papers on routing define it on a set of experts; a tie-break must only break ties",
    cases=inputs(*MODERATE),
    broken=broken_subject(PrefersLowIds),
    unless=_unless_relabelled,
)
def relabelled(subject: RouterSubject, case: Case) -> None:
    generator = torch.Generator().manual_seed(int(case.settings["seed"] or 0) + 2)
    order_E = torch.randperm(subject.num_experts, generator=generator)
    router = subject.fresh()
    assert isinstance(router, nn.Module)
    with torch.no_grad():
        for tensor in router.state_dict().values():
            if tensor.ndim:
                tensor.copy_(tensor[order_E].clone())
        routing = router(case["x_TH"].to(subject.dtype), context_of(case))
    when = f"experts are renamed ({EXPERTS_DIFFER})"
    hold_close(subject, subject.on(case), _renamed(routing, order_E), case, when)


def _renamed(routing: Routing, order_E: Tensor) -> Routing:
    """The routing in the old names, where new expert i is old expert order_E[i]."""
    if isinstance(routing, TokenChoice):
        ids_TK = order_E[routing.experts_TK.clamp(min=0)]
        return replace(routing, experts_TK=ids_TK.masked_fill(routing.experts_TK < 0, -1))
    assert isinstance(routing, ExpertChoice)
    back_E = order_E.argsort()
    return replace(
        routing, tokens_EC=routing.tokens_EC[back_E], weights_EC=routing.weights_EC[back_E]
    )


class TakesTurns(ScoredRouter):
    """Moves on by one expert a row, as a forced balance for benchmarks does, left in."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        turns_T1 = torch.arange(len(x_TH))[:, None]
        experts_TK = ctx.replayed((top_k(scores_TE, self.top_k, ctx) + turns_T1) % self.num_experts)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK))


def _unless_order_may_matter(subject: RouterSubject) -> str | None:
    if subject.chooses_experts and subject.mixes:
        return "tokens of a sequence compete or are read in order"
    return None


@law(
    "R19",
    "tokens have no order",
    formula="R(Q x, Q ctx) = Q R(x, ctx), for a permutation Q within each sequence",
    source="a choice of one's own, or the best of a set (arXiv 2202.09368, equation 2)",
    cases=inputs(*MODERATE, least_length=2),
    broken=broken_subject(TakesTurns),
    unless=_unless_order_may_matter,
)
def any_token_order(subject: RouterSubject, case: Case) -> None:
    batch, length = int(case.settings["batch"] or 0), int(case.settings["length"] or 0)
    generator = torch.Generator().manual_seed(int(case.settings["seed"] or 0) + 3)
    order_BS = torch.rand(batch, length, generator=generator).argsort(-1)
    order_T = (order_BS + length * torch.arange(batch)[:, None]).flatten()
    ctx = context_of(case)
    moved: dict[str, Any] = {
        name: value[order_T] for name, value in vars(ctx).items() if isinstance(value, Tensor)
    }
    routing = subject.route(case["x_TH"][order_T], replace(ctx, **moved))
    hold_close(subject, subject.on(case), _put_back(routing, order_T), case, "tokens change places")


def _put_back(routing: Routing, order_T: Tensor) -> Routing:
    """The routing of the tokens in their old places, where new row t is old row order_T[t]."""
    back_T = order_T.argsort()
    if isinstance(routing, TokenChoice):
        return replace(
            routing, experts_TK=routing.experts_TK[back_T], weights_TK=routing.weights_TK[back_T]
        )
    if isinstance(routing, ExpertChoice):
        ids_EC = order_T[routing.tokens_EC.clamp(min=0)]
        return replace(routing, tokens_EC=ids_EC.masked_fill(routing.tokens_EC < 0, -1))
    assert isinstance(routing, SoftChoice)
    shape = routing.dispatch_BSP.shape
    return replace(
        routing,
        dispatch_BSP=routing.dispatch_BSP.flatten(0, 1)[back_T].view(shape),
        combine_BSP=routing.combine_BSP.flatten(0, 1)[back_T].view(shape),
    )


class ClampsTheBiased(ScoredRouter):
    """Keeps scores plus bias above 0, as a probability: below it, all are equal."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, choice_bias=True)

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        experts_TK = top_k(self.with_choice_bias(scores_TE).clamp(min=0), self.top_k, ctx)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK))


def unless_choice_bias(subject: RouterSubject) -> str | None:
    if not subject.has_choice_bias:
        return f"it has no {CHOICE_BIAS}"
    return unless_experts_are_chosen(subject)


@law(
    "R20",
    "a constant choice bias chooses nothing",
    formula="R(b + c) = R(b), for any number c",
    source="Loss-free balancing, arXiv 2408.15664: b ranks experts, and a rank has no zero",
    cases=inputs(*MODERATE),
    broken=broken_subject(ClampsTheBiased),
    unless=unless_choice_bias,
)
def constant_bias(subject: RouterSubject, case: Case) -> None:
    x_TH, ctx = case["x_TH"].to(subject.dtype), context_of(case)
    plain = subject.on(case)
    assert isinstance(plain, TokenChoice)
    for constant in (-2.0, 2.0):
        with torch.no_grad():
            moved = subject.with_bias(subject.bias + constant)(x_TH, ctx)
        assert isinstance(moved, TokenChoice)
        clear_T = _clear_border(plain) & _clear_border(moved)
        before_TK, after_TK = plain.experts_TK.sort(-1).values, moved.experts_TK.sort(-1).values
        bad_T = (before_TK != after_TK).any(-1) & clear_T
        hold(
            ~bad_T,
            f"experts {before_TK[bad_T][:1].tolist()} became {after_TK[bad_T][:1].tolist()} when "
            f"{constant} was added to the whole {CHOICE_BIAS}",
            experts_TK=plain.experts_TK,
            moved_TK=moved.experts_TK,
        )


def _clear_border(routing: TokenChoice) -> Tensor:
    """(T,) bool: adding a number of size 2 cannot round the border of the choice away. All, where
    the routing does not say what the selection saw."""
    if routing.choice_TE is None:
        return torch.ones(len(routing.experts_TK), dtype=torch.bool)
    # Groups are judged by sums of scores: any two experts that are close may be a close pair of
    # groups as well.
    ordered_TE = routing.choice_TE.double().sort(-1).values
    gaps = ordered_TE.diff(dim=-1)
    return ~(gaps <= 256 * coarsest_eps(routing)).any(-1)


LAWS: tuple[Law[RouterSubject], ...] = (
    ids_alone,
    relabelled,
    any_token_order,
    constant_bias,
)
