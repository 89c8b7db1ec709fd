"""How much the chosen weigh: by their scores, in every precision, and never by the choice bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.equivalence.judge import floor, relative_error
from moetk.kernels.selection import gather, top_k
from moetk.routing import SoftChoice, TokenChoice
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.routers_cases import (
    EXPERTS_DIFFER,
    ScoredRouter,
    broken_subject,
    inputs,
    padded_with_others,
    unless_experts_are_alike,
    unless_experts_are_chosen,
)
from moetk.testing.laws.routers_compare import coarsest_eps, rounding, rounding_of
from moetk.testing.laws.routers_subject import RouterSubject, context_of
from moetk.testing.laws.routers_symmetry import unless_choice_bias
from moetk.testing.laws.routers_told import by_token
from moetk.testing.strategies.inputs import MODERATE


class CentresItsWeights(ScoredRouter):
    """Takes the mean off the kept scores; the least of them counts against its expert."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        weights_TK = gather(scores_TE, experts_TK)
        weights_TK = weights_TK - weights_TK.mean(-1, keepdim=True)
        return self.chosen(experts_TK, weights_TK, scores_TE=scores_TE)


def _unless_scores(subject: RouterSubject) -> str | None:
    if isinstance(subject.first, SoftChoice) or subject.first.scores_TE is None:
        return "its routing carries no scores_TE"
    return None


@law(
    "R26",
    "weights are negative only where scores are",
    formula="scores_t >= 0  =>  weights_t >= 0",
    source="Mixtral, arXiv 2401.04088: a mixture; an expert is added, not taken away",
    cases=inputs(training=None),
    broken=broken_subject(CentresItsWeights),
    unless=_unless_scores,
)
def not_negative(subject: RouterSubject, case: Case) -> None:
    routing = subject.on(case)
    assert not isinstance(routing, SoftChoice)
    scores_TE, weights = routing.scores_TE, by_token(routing)["weights"]
    assert scores_TE is not None
    bad_T = (weights < 0).any(-1) & (scores_TE >= 0).all(-1)
    hold(
        ~bad_T,
        f"weights {weights[bad_T][:1].tolist()} of scores that are all at least 0",
        weights=weights,
        scores_TE=scores_TE,
    )


class WeighsInAnotherOrder(ScoredRouter):
    """Columns are sorted after the weights were taken: weights stand at other experts."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        weights_TK = gather(scores_TE, experts_TK.sort(-1).values)
        return self.chosen(experts_TK, weights_TK, scores_TE=scores_TE)


def _unless_scored_choices(subject: RouterSubject) -> str | None:
    if (reason := unless_experts_are_alike(subject)) is not None:
        return reason
    if not isinstance(subject.first, TokenChoice):
        return unless_experts_are_chosen(subject)
    if subject.first.scores_TE is None and subject.first.logits_TE is None:
        return "its routing carries neither scores_TE nor logits_TE"
    return "one choice has no order" if subject.top_k == 1 else None


@law(
    "R27",
    "a larger score weighs no less",
    formula="s[experts_tj] > s[experts_tk]  =>  weights_tj >= weights_tk, among the kept",
    source="weights are scores, rescaled ones or a softmax of them: all increase",
    cases=inputs(),
    broken=broken_subject(WeighsInAnotherOrder),
    unless=_unless_scored_choices,
)
def weights_follow_scores(subject: RouterSubject, case: Case) -> None:
    routing = subject.on(case)
    assert isinstance(routing, TokenChoice)
    scores_TE = routing.logits_TE if routing.scores_TE is None else routing.scores_TE
    assert scores_TE is not None
    used_TK = routing.experts_TK >= 0
    if routing.kept_TK is not None:
        used_TK = used_TK & routing.kept_TK
    chosen_TK = gather(scores_TE, routing.experts_TK).double()
    weights_TK, eps = routing.weights_TK.double(), coarsest_eps(routing)
    above_TKK = chosen_TK[:, :, None] > chosen_TK[:, None, :]
    slack_TKK = 8 * eps * weights_TK.abs().amax(-1)[:, None, None]
    less_TKK = weights_TK[:, :, None] < weights_TK[:, None, :] - slack_TKK
    both_TKK = used_TK[:, :, None] & used_TK[:, None, :]
    bad_T = (above_TKK & less_TKK & both_TKK).flatten(1).any(-1)
    hold(
        ~bad_T,
        f"scores {chosen_TK[bad_T][:1].tolist()} weigh {weights_TK[bad_T][:1].tolist()}; "
        f"{EXPERTS_DIFFER}",
        experts_TK=routing.experts_TK,
        weights_TK=weights_TK,
        scores_TE=scores_TE,
    )


class WeighsTheBiased(ScoredRouter):
    """The bias of the choice is left in the weights."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, choice_bias=True)

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        choice_TE = self.with_choice_bias(self.scored(x_TH)[1])
        experts_TK = top_k(choice_TE, self.top_k, ctx)
        return self.chosen(experts_TK, gather(choice_TE, experts_TK), choice_TE=choice_TE)


@law(
    "R28",
    "the choice bias moves no weight",
    formula="R(b), R(b') choose the same of a token  =>  weights are the same",
    source="DeepSeek-V3, arXiv 2412.19437, equation 16: the bias is for routing alone",
    cases=inputs(*MODERATE),
    broken=broken_subject(WeighsTheBiased),
    unless=unless_choice_bias,
)
def bias_weighs_nothing(subject: RouterSubject, case: Case) -> None:
    plain, generator = subject.on(case), torch.Generator().manual_seed(0)
    assert isinstance(plain, TokenChoice)
    allowed_TK = rounding(subject, plain, case)
    for size in (0.01, 0.3):
        noise_E = torch.randn(subject.num_experts, generator=generator, dtype=torch.float64)
        router = subject.with_bias(subject.bias + size * noise_E)
        with torch.no_grad():
            moved = router(case["x_TH"].to(subject.dtype), context_of(case))
        assert isinstance(moved, TokenChoice)
        same_T = (plain.experts_TK == moved.experts_TK).all(-1)
        if plain.kept_TK is not None and moved.kept_TK is not None:
            same_T = same_T & (plain.kept_TK == moved.kept_TK).all(-1)
        off_TK = (plain.weights_TK.double() - moved.weights_TK.double()).abs()
        bad_T = (~(off_TK <= allowed_TK)).any(-1) & same_T
        hold(
            ~bad_T,
            f"experts {plain.experts_TK[bad_T][:1].tolist()} weigh "
            f"{plain.weights_TK[bad_T][:1].tolist()}, and {moved.weights_TK[bad_T][:1].tolist()} "
            "under another choice bias",
            experts_TK=plain.experts_TK,
            weights_TK=plain.weights_TK,
        )


class MixesOverTheSlots(nn.Module):
    """Soft mixtures whose dispatch is a softmax over slots, not over tokens."""

    def __init__(self, hidden_size: int, num_experts: int, slots: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.randn(num_experts * slots, hidden_size))

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> SoftChoice:
        assert ctx.batch_shape is not None
        x_BSH = x_TH.view(*ctx.batch_shape, x_TH.shape[1])
        mixed_BSP = (x_BSH @ self.weight.T).softmax(-1)
        return SoftChoice(mixed_BSP, mixed_BSP, self.num_experts)


def _unless_soft(subject: RouterSubject) -> str | None:
    if isinstance(subject.first, SoftChoice):
        return None
    return f"a {type(subject.first).__name__} is not soft"


@law(
    "R29",
    "slots mix tokens, tokens mix slots, by shares",
    formula="sum_s dispatch_bsp = 1 (0 where all is padding); sum_p combine_bsp = 1",
    source="Soft MoE, arXiv 2308.00951, equations 1 and 2",
    cases=inputs(least_length=1, added=padded_with_others),
    broken=broken_subject(MixesOverTheSlots),
    unless=_unless_soft,
)
def soft_sums(subject: RouterSubject, case: Case) -> None:
    routing, token_mask = subject.on(case), context_of(case).token_mask
    assert isinstance(routing, SoftChoice) and token_mask is not None
    dispatch_BSP, combine_BSP = routing.dispatch_BSP.double(), routing.combine_BSP.double()
    real_B1 = token_mask.view(dispatch_BSP.shape[:2]).any(1, keepdim=True).double()
    eps = torch.finfo(routing.dispatch_BSP.dtype).eps
    length, slots = dispatch_BSP.shape[1:]
    off_BP = (dispatch_BSP.sum(1) - real_B1).abs()
    hold(
        off_BP <= 4 * eps * length,
        f"dispatch sums to {dispatch_BSP.sum(1).flatten()[:4].tolist()} over the tokens",
        dispatch_BSP=routing.dispatch_BSP,
    )
    off_BS = (combine_BSP.sum(2) - 1).abs()
    hold(
        off_BS <= 4 * eps * slots,
        f"combine sums to {combine_BSP.sum(2).flatten()[:4].tolist()} over the slots",
        combine_BSP=routing.combine_BSP,
    )


class MasksByAdding(ScoredRouter):
    """Lifts the chosen logits by 10000 and takes a softmax of all: exact in float64, and in
    bfloat16 nothing of the logits is left."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, score_dtype=None)

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.logits(x_TH)
        experts_TK = top_k(logits_TE, self.top_k, ctx)
        lift_TE = torch.zeros_like(logits_TE).scatter(1, experts_TK, 1e4)
        return self.chosen(experts_TK, gather((logits_TE + lift_TE).softmax(-1), experts_TK))


def _unless_half(subject: RouterSubject) -> str | None:
    if not subject.chooses_experts:
        return unless_experts_are_chosen(subject)
    if subject.dtype != torch.float64:
        return "it does not run in float64, so that there is no truth to compare with"
    return "it does not run in bfloat16" if subject.half is None else None


@law(
    "R30",
    "bfloat16 costs what rounding costs",
    formula="error(bf16) <= max(2 x what rounding x changes + 4 eps, floor), at equal experts",
    source="moetk.equivalence.judge; ST-MoE, arXiv 2202.08906, section 3.3",
    cases=inputs("gaussian", least_length=1),
    broken=broken_subject(MasksByAdding),
    unless=_unless_half,
)
def half_precision(subject: RouterSubject, case: Case) -> None:
    half, truth_of = subject.half, subject.rounded
    assert half is not None
    rounded_TH = case["x_TH"].bfloat16()
    ours = half.route(rounded_TH, context_of(case))
    truth = truth_of.route(rounded_TH.double(), context_of(case))
    assert isinstance(ours, TokenChoice) and isinstance(truth, TokenChoice)
    same_T = (ours.experts_TK == truth.experts_TK).all(-1)
    if ours.kept_TK is not None and truth.kept_TK is not None:
        same_T = same_T & (ours.kept_TK == truth.kept_TK).all(-1)
    ours_TK, truth_TK = ours.weights_TK[same_T], truth.weights_TK[same_T]
    eps = torch.finfo(torch.bfloat16).eps
    rounded = Case({"x_TH": rounded_TH.double()}, case.settings)
    moved_TK = rounding_of(truth_of, truth, rounded, eps=eps, terms=1, ulps=4)[same_T]
    allowed = float(moved_TK.norm()) / max(float(truth_TK.double().norm()), 1e-300)
    error = relative_error(ours_TK, truth_TK)
    hold(
        error <= max(allowed, floor(torch.bfloat16, subject.hidden_size)),
        f"weights in bfloat16 are off by {error:.3g}, where rounding explains {allowed:.3g}",
        ours_TK=ours_TK,
        truth_TK=truth_TK,
    )


LAWS: tuple[Law[RouterSubject], ...] = (
    not_negative,
    weights_follow_scores,
    bias_weighs_nothing,
    soft_sums,
    half_precision,
)
