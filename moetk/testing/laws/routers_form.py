"""What a routing must look like, on any input."""

from __future__ import annotations

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.kernels.selection import gather, top_k
from moetk.routing import ExpertChoice, Routing, SoftChoice, TokenChoice
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.routers_cases import (
    ScoredRouter,
    broken_subject,
    inputs,
    unless_experts_are_chosen,
)
from moetk.testing.laws.routers_subject import RouterSubject, context_of
from moetk.testing.laws.routers_told import by_token


class CountsFromOne(ScoredRouter):
    """Ids as a framework with a null expert 0 has them: 1 to E."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE, scores_TE = self.scored(x_TH)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        return self.chosen(experts_TK + 1, gather(scores_TE, experts_TK))


@law(
    "R1",
    "shapes, dtypes, ids in range",
    formula="experts_TK in {-1, ..., E-1}; (T, K) both; or tokens_EC in {-1, ..., T-1}",
    source="moetk.routing; Mixtral, arXiv 2401.04088, equation 2",
    cases=inputs(training=None),
    broken=broken_subject(CountsFromOne),
)
def in_range(subject: RouterSubject, case: Case) -> None:
    routing, num_tokens = subject.on(case), len(case["x_TH"])
    known = subject.num_experts
    told = routing.num_experts
    hold(told == known, f"num_experts={told} in the routing, but there are {known} experts")
    if isinstance(routing, SoftChoice):
        _soft_form(routing, case)
        return
    ids, weights, first = _ids_and_weights(routing)
    limit = num_tokens if isinstance(routing, ExpertChoice) else known
    hold(
        ids.shape == weights.shape and ids.ndim == 2,
        f"ids are {tuple(ids.shape)} and weights {tuple(weights.shape)}; both are {first}",
    )
    hold(ids.dtype == torch.int64, f"ids are {ids.dtype}; ids are torch.int64")
    hold(weights.is_floating_point(), f"weights are {weights.dtype}; weights are floating")
    if isinstance(routing, TokenChoice):
        hold(len(ids) == num_tokens, f"{len(ids)} rows for T={num_tokens} tokens", ids=ids)
        _optional_form(routing, num_tokens)
    else:
        hold(
            routing.num_tokens == num_tokens,
            f"num_tokens={routing.num_tokens}, but there are {num_tokens}",
        )
    bad = (ids < -1) | (ids >= limit)
    hold(~bad, f"an id outside -1..{limit - 1}: {ids[bad][:4].tolist()}", ids=ids)


def _ids_and_weights(routing: TokenChoice | ExpertChoice) -> tuple[Tensor, Tensor, str]:
    if isinstance(routing, TokenChoice):
        return routing.experts_TK, routing.weights_TK, "(T, K)"
    return routing.tokens_EC, routing.weights_EC, "(E, C)"


def _optional_form(routing: TokenChoice, num_tokens: int) -> None:
    for name in ("logits_TE", "scores_TE", "choice_TE"):
        tensor = getattr(routing, name)
        expected = (num_tokens, routing.num_experts)
        hold(
            tensor is None or tuple(tensor.shape) == expected,
            f"{name} is {None if tensor is None else tuple(tensor.shape)}, expected {expected}",
        )
    kept = routing.kept_TK
    hold(
        kept is None or (kept.shape == routing.experts_TK.shape and kept.dtype == torch.bool),
        f"kept_TK is {kept if kept is None else (kept.dtype, tuple(kept.shape))}, expected "
        f"torch.bool {tuple(routing.experts_TK.shape)}",
    )


def _soft_form(routing: SoftChoice, case: Case) -> None:
    shape = tuple(routing.dispatch_BSP.shape)
    expected = (case.settings["batch"], case.settings["length"])
    hold(
        shape == tuple(routing.combine_BSP.shape) and shape[:2] == expected,
        f"dispatch_BSP is {shape}, combine_BSP {tuple(routing.combine_BSP.shape)}; both are "
        f"(B, S, P) with (B, S) = {expected}",
    )
    hold(
        shape[2] % routing.num_experts == 0,
        f"P={shape[2]} slots do not divide over {routing.num_experts} experts",
    )


class PicksTwice(ScoredRouter):
    """The second choice is the best again, where masking the first was forgotten."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE, scores_TE = self.scored(x_TH)
        experts_TK = ctx.replayed(scores_TE.argmax(-1, keepdim=True).expand(-1, self.top_k))
        return self.chosen(experts_TK, gather(scores_TE, experts_TK))


def _unless_duplicates(subject: RouterSubject) -> str | None:
    if subject.duplicates:
        return "it declares duplicates = True"
    return unless_experts_are_chosen(subject)


@law(
    "R2",
    "a token names no expert twice",
    formula="experts_tj = experts_tk >= 0  =>  j = k",
    source="GShard, arXiv 2006.16668, algorithm 1: the second choice is made without the first",
    cases=inputs(training=None),
    broken=broken_subject(PicksTwice),
    unless=_unless_duplicates,
)
def distinct(subject: RouterSubject, case: Case) -> None:
    routing = subject.on(case)
    assert isinstance(routing, TokenChoice)
    ordered_TK = routing.experts_TK.sort(-1).values
    same_T = ((ordered_TK[:, 1:] == ordered_TK[:, :-1]) & (ordered_TK[:, 1:] >= 0)).any(-1)
    rows = routing.experts_TK[same_T]
    hold(
        ~same_T,
        f"{rows[:1].tolist()}: an expert twice. A router that means it declares duplicates = True",
        experts_TK=routing.experts_TK,
    )


class ExpWithoutMaximum(ScoredRouter):
    """A softmax by hand that overflows where logits are large."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.logits(x_TH)
        scores_TE = logits_TE.exp() / logits_TE.exp().sum(-1, keepdim=True)
        experts_TK = top_k(logits_TE, self.top_k, ctx)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK))


@law(
    "R3",
    "weights are finite on finite input",
    formula="|x| <= 1e5  =>  |weights| < inf",
    source="ST-MoE, arXiv 2202.08906, section 3: router logits grow until exp overflows",
    cases=inputs(training=None),
    broken=broken_subject(ExpWithoutMaximum),
)
def finite(subject: RouterSubject, case: Case) -> None:
    told = by_token(subject.on(case))
    for name in ("weights", "chosen"):
        bad = ~torch.isfinite(told[name])
        hold(~bad, f"{int(bad.sum())} {name} are not finite on finite input", **{name: told[name]})


class ForgetsTheMask(ScoredRouter):
    """Counts who is over capacity, and lets them weigh all the same."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE, scores_TE = self.scored(x_TH)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        kept_TK = gather(scores_TE, experts_TK) > 0.5
        return self.chosen(experts_TK, gather(scores_TE, experts_TK), kept_TK=kept_TK)


def _unless_nothing_is_unused(subject: RouterSubject) -> str | None:
    return "a SoftChoice has no places" if isinstance(subject.first, SoftChoice) else None


@law(
    "R4",
    "what is unused or dropped weighs nothing",
    formula="experts_tk = -1 or not kept_tk  =>  weights_tk = 0",
    source="Switch, arXiv 2101.03961, section 2.2: an overflowing token passes by the residual",
    cases=inputs(training=None),
    broken=broken_subject(ForgetsTheMask),
    unless=_unless_nothing_is_unused,
)
def unused_weighs_nothing(subject: RouterSubject, case: Case) -> None:
    routing = subject.on(case)
    assert not isinstance(routing, SoftChoice)
    ids, weights, _ = _ids_and_weights(routing)
    out = ids < 0
    if isinstance(routing, TokenChoice) and routing.kept_TK is not None:
        out = out | ~routing.kept_TK
    loose = out & (weights != 0)
    hold(
        ~loose,
        f"{int(loose.sum())} unused or dropped choices weigh {weights[loose][:3].tolist()}",
        ids=ids,
        weights=weights,
    )


class ShiftsByTheBatch(ScoredRouter):
    """Subtracts the largest logit of all tokens before exp; of no token there is none."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.logits(x_TH)
        scores_TE = (logits_TE - logits_TE.max()).softmax(-1)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK))


@law(
    "R5",
    "no tokens are an ordinary batch",
    formula="T = 0  =>  an empty routing, and gradients of 0",
    source="an expert-parallel rank, or a pipeline stage, may hold none",
    cases=inputs("gaussian", sequences=0, least_sequences=0, training=None),
    broken=broken_subject(ShiftsByTheBatch),
)
def empty(subject: RouterSubject, case: Case) -> None:
    router = subject.copy_at(bool(case.settings["training"]))
    x_TH = case["x_TH"].to(subject.dtype).requires_grad_()
    routing: Routing = router(x_TH, context_of(case))
    told = by_token(routing)
    hold(len(told["weights"]) == 0, f"{len(told['weights'])} rows for no tokens")
    if told["weights"].requires_grad:
        wanted = [x_TH, *subject.trained(router).values()]
        for grad in torch.autograd.grad(told["weights"].sum(), wanted, allow_unused=True):
            hold(grad is None or (grad == 0).all(), "a gradient that is not 0 from no tokens")


LAWS: tuple[Law[RouterSubject], ...] = (in_range, distinct, finite, unused_weighs_nothing, empty)
