"""The same router elsewhere: alone with a token, in training, in another precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.kernels.selection import gather, normalise, top_k
from moetk.routing import TokenChoice
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.routers_cases import (
    ScoredRouter,
    broken_subject,
    inputs,
    unless_experts_are_chosen,
    unless_it_has_a_mode,
)
from moetk.testing.laws.routers_compare import hold_close
from moetk.testing.laws.routers_function import unless_it_draws_noise
from moetk.testing.laws.routers_subject import RouterSubject, context_of
from moetk.testing.laws.routers_told import by_token, every_tensor
from moetk.testing.strategies.inputs import MODERATE


class ScalesByTheWrongAxis(ScoredRouter):
    """Divides by the root of shape[0], the tokens, where shape[1] was meant."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH / max(x_TH.shape[0], 1) ** 0.5)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK))


def _unless_tokens_are_apart(subject: RouterSubject) -> str | None:
    if not subject.chooses_experts:
        return unless_experts_are_chosen(subject)
    if subject.per_batch:
        return "it declares per_batch = True"
    return "tokens of a sequence compete or read each other" if subject.mixes else None


@law(
    "R46",
    "a token alone is routed as in a batch",
    formula="R(x)_t = R(x_t), with the position, id and sequence it has in the batch",
    source="decoding sends one token where training sent thousands",
    cases=inputs(*MODERATE, least_length=2),
    broken=broken_subject(ScalesByTheWrongAxis),
    unless=_unless_tokens_are_apart,
)
def alone(subject: RouterSubject, case: Case) -> None:
    whole, ctx = subject.on(case), context_of(case)
    assert isinstance(whole, TokenChoice)
    rows = []
    for token in range(len(case["x_TH"])):
        held: dict[str, Any] = {
            n: t[token : token + 1] for n, t in vars(ctx).items() if isinstance(t, Tensor)
        }
        one = subject.route(
            case["x_TH"][token : token + 1], replace(ctx, batch_shape=(1, 1), **held)
        )
        assert isinstance(one, TokenChoice)
        rows.append(one)
    joined = replace(
        whole,
        experts_TK=torch.cat([one.experts_TK for one in rows]),
        weights_TK=torch.cat([one.weights_TK for one in rows]),
    )
    hold_close(subject, whole, joined, case, "it is alone in its batch")


class RescalesInTrainingAlone(ScoredRouter):
    """Weights sum to one in training; the line is missing where inference was written anew."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        weights_TK = gather(scores_TE, experts_TK)
        return self.chosen(experts_TK, normalise(weights_TK) if self.training else weights_TK)


def _unless_train_differs(subject: RouterSubject) -> str | None:
    if (reason := unless_it_has_a_mode(subject)) is not None:
        return reason
    if subject.train_differs:
        return "it declares train_differs = True"
    return "it draws noise in training" if subject.draws_noise else None


@law(
    "R47",
    "without noise, training routes as evaluation does",
    formula="R(x) in training = R(x) in evaluation, where ctx.seed changes nothing",
    source="a model is evaluated with the routing that it was trained with, but for noise",
    cases=inputs(*MODERATE),
    broken=broken_subject(RescalesInTrainingAlone),
    unless=_unless_train_differs,
)
def modes_agree(subject: RouterSubject, case: Case) -> None:
    trained = subject.route(case["x_TH"], context_of(case), training=True)
    when = "it is in training (where that is on purpose, declare train_differs = True)"
    hold_close(subject, subject.on(case), trained, case, when)


class OneNoiseForAll(ScoredRouter):
    """Noise of shape (1, H), broadcast: every token is pushed the same way."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        if self.training:
            generator = torch.Generator().manual_seed(int(ctx.require("seed", self)))
            shape = (1, x_TH.shape[1])
            x_TH = x_TH + torch.randn(shape, generator=generator, dtype=x_TH.dtype)
        _, scores_TE = self.scored(x_TH)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK), scores_TE=scores_TE)


def _unless_noise_of_tokens(subject: RouterSubject) -> str | None:
    if (reason := unless_it_draws_noise(subject)) is not None:
        return reason
    if not subject.chooses_experts:
        return unless_experts_are_chosen(subject)
    if subject.num_experts == 1:
        return "of one expert there is nothing to try"
    return "it declares per_batch = True" if subject.per_batch else None


@law(
    "R48",
    "each token has noise of its own",
    formula="x_t = x_s, R(x) not the same for 16 seeds  =>  R(x)_t != R(x)_s, some t, s and seed",
    source="Shazeer et al., arXiv 1701.06538, equation 4: StandardNormal() is drawn per element",
    cases=inputs("collapsed", least_length=8, training=True),
    broken=broken_subject(OneNoiseForAll),
    unless=_unless_noise_of_tokens,
)
def noise_of_tokens(subject: RouterSubject, case: Case) -> None:
    x_TH, ctx = case["x_TH"], context_of(case)
    drawn = []
    for seed in range(16):
        told = every_tensor(subject.route(x_TH, replace(ctx, seed=seed), training=True))
        rows = [tensor for tensor in told.values() if len(tensor) == len(x_TH)]
        if any(bool((tensor != tensor[:1]).any()) for tensor in rows):
            return
        drawn.append(rows)
    # Noise of the choice alone may be too weak to be seen here in any token.
    seen = any(
        not torch.equal(first, other)
        for rows in drawn[1:]
        for first, other in zip(drawn[0], rows, strict=True)
    )
    hold(
        not seen,
        f"{len(x_TH)} equal tokens are routed the same with each of 16 seeds: draw noise for each "
        "row (one noise for the whole batch, on purpose, declares per_batch = True)",
    )


class RescalesWithoutEpsilon(ScoredRouter):
    """Sigmoids over their sum, with nothing added: where all vanish, 0 / 0."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE, scores_TE = self.scored(x_TH)
        experts_TK = top_k(logits_TE, self.top_k, ctx)
        weights_TK = gather(scores_TE, experts_TK)
        return self.chosen(experts_TK, weights_TK / weights_TK.sum(-1, keepdim=True))


LOGITS = (-20.0, 20.0, -80.0, 80.0, -150.0, 150.0)
"""Around where float16, and on both sides of where float32, runs out of exp's range."""


@law(
    "R49",
    "weights are finite in float32 and bfloat16",
    formula="|logits| <= 150  =>  |weights| < inf, all logits of a token large or small together",
    source="exp ends at 88 in float32 and in bfloat16, at 709 in float64; ST-MoE, arXiv 2202.08906",
    cases=inputs("gaussian", "collapsed", least_length=1),
    broken=broken_subject(RescalesWithoutEpsilon),
)
def finite_in_less(subject: RouterSubject, case: Case) -> None:
    x_TH, ctx = _aimed(subject, case), context_of(case)
    for other in (subject.single, subject.half):
        if other is None:
            continue
        told = by_token(other.route(x_TH.to(other.dtype), ctx))
        bad_T = (~told["weights"].isfinite()).any(-1)
        hold(
            ~bad_T,
            f"{int(bad_T.sum())} tokens have weights that are not finite in {other.dtype}: "
            f"{told['weights'][bad_T][:1].tolist()}",
            x_TH=x_TH,
            **told,
        )


def _aimed(subject: RouterSubject, case: Case) -> Tensor:
    """x_TH plus rows that a matrix (E, H) of the router, if it has one, takes to equal logits of
    each size in turn: small scores of all experts at once are rare among drawn rows."""
    x_TH, shape = case["x_TH"], (subject.num_experts, subject.hidden_size)
    router = subject.copy_at(False)
    named = router.parameters() if isinstance(router, nn.Module) else ()
    matrix_EH = next((t.detach().double() for t in named if tuple(t.shape) == shape), None)
    sizes_T = torch.tensor(LOGITS, dtype=torch.float64)[torch.arange(len(x_TH)) % len(LOGITS)]
    if matrix_EH is None:
        return x_TH * sizes_T[:, None]
    row_H: Tensor = torch.linalg.pinv(matrix_EH).sum(-1)
    return x_TH + sizes_T[:, None] * row_H


LAWS: tuple[Law[RouterSubject], ...] = (alone, modes_agree, noise_of_tokens, finite_in_less)
