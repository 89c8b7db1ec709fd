"""A router is a function of its input and its context: nothing else in, nothing else out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moetk.context import RouterContext
from moetk.kernels.selection import gather, top_k
from moetk.routing import Routing, TokenChoice
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.routers_cases import (
    ScoredRouter,
    broken_subject,
    inputs,
    unless_it_has_a_mode,
)
from moetk.testing.laws.routers_compare import hold_close, hold_same
from moetk.testing.laws.routers_subject import RouterSubject, context_of
from moetk.testing.laws.routers_told import every_tensor
from moetk.testing.strategies.inputs import LAYOUTS, MODERATE


class DrawsFromTheGlobal(ScoredRouter):
    """Noise from torch's own generator: a recomputed forward draws other noise."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        if self.training:
            scores_TE = scores_TE * (1 + 0.1 * torch.rand_like(scores_TE))
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK))


@law(
    "R6",
    "the same input and context, the same routing",
    formula="R(x, ctx) = R(x, ctx), bit by bit",
    source="activation checkpointing runs a forward twice; other noise is a wrong gradient",
    cases=inputs(training=None),
    broken=broken_subject(DrawsFromTheGlobal),
)
def repeatable(subject: RouterSubject, case: Case) -> None:
    first, second = subject.on(case), subject.on(case)
    hold_same(first, second, "called twice with the same input and ctx.seed")


class NoiseInEvaluation(ScoredRouter):
    """Jitter that nobody turns off."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        generator = torch.Generator().manual_seed(ctx.seed or 0)
        noise_TH = torch.rand(x_TH.shape, generator=generator, dtype=x_TH.dtype)
        _, scores_TE = self.scored(x_TH * (0.99 + 0.02 * noise_TH))
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK))


@law(
    "R7",
    "no noise in evaluation",
    formula="R(x, seed=a) = R(x, seed=b) = R(x, seed=None), bit by bit, when not training",
    source="Shazeer et al., arXiv 1701.06538, section 2.1; Switch, arXiv 2101.03961, section 2.2",
    cases=inputs(),
    broken=broken_subject(NoiseInEvaluation),
    unless=unless_it_has_a_mode,
)
def quiet_in_evaluation(subject: RouterSubject, case: Case) -> None:
    ctx = context_of(case)
    drawn = subject.route(case["x_TH"], ctx)
    for seed in (None, int(case.settings["seed"] or 0) + 1):
        other = subject.route(case["x_TH"], replace(ctx, seed=seed))
        hold_same(drawn, other, f"ctx.seed is {seed} instead of {ctx.seed}, in evaluation")


class SeedAsFloat(ScoredRouter):
    """The seed travelled in a float32 tensor: neighbours beyond 2^24 became one."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        if self.training:
            seed = int(torch.tensor(ctx.require("seed"), dtype=torch.float32))
            generator = torch.Generator().manual_seed(seed)
            noise_TE = torch.rand(scores_TE.shape, generator=generator, dtype=scores_TE.dtype)
            scores_TE = scores_TE * (1 + noise_TE)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK), scores_TE=scores_TE)


def unless_it_draws_noise(subject: RouterSubject) -> str | None:
    return None if subject.draws_noise else "another ctx.seed changes nothing: it draws no noise"


@law(
    "R8",
    "another seed, other noise",
    formula="R(x, seed=a) != R(x, seed=a + i) for some i of 1..16, in training",
    source="one seed for every step is no exploration: the same experts win each time",
    cases=inputs("gaussian", least_length=8, training=True),
    broken=broken_subject(SeedAsFloat),
    unless=unless_it_draws_noise,
)
def seeds_differ(subject: RouterSubject, case: Case) -> None:
    ctx = context_of(case)
    base = 2**40 + 4096 * int(case.settings["seed"] or 0)
    drawn = [
        every_tensor(subject.route(case["x_TH"], replace(ctx, seed=base + i), training=True))
        for i in range(17)
    ]
    differ = any(not torch.equal(drawn[0][name], other[name]) for other in drawn for name in other)
    hold(
        differ or subject.num_experts == 1,
        f"17 neighbouring seeds, from {base} on, drew the same",
    )


class JitterInPlace(ScoredRouter):
    """Multiplies its input by noise, in place: the experts see the noise too."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        if self.training:
            x_TH *= 1.001
        _, scores_TE = self.scored(x_TH)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK))


@law(
    "R9",
    "input, context and torch's random state stay",
    formula="x, every tensor of ctx and the global generator: after = before, bit by bit",
    source="transformers, modeling_mixtral: the jitter of hidden_states reached the experts",
    cases=inputs(training=None),
    broken=broken_subject(JitterInPlace),
)
def input_untouched(subject: RouterSubject, case: Case) -> None:
    x_TH, ctx = case["x_TH"].to(subject.dtype).clone(), context_of(case)
    given = {"x_TH": x_TH, **{n: t for n, t in vars(ctx).items() if isinstance(t, Tensor)}}
    before = {name: tensor.clone() for name, tensor in given.items()}
    state = torch.get_rng_state()
    subject.route(x_TH, ctx, training=bool(case.settings["training"]))
    for name, tensor in given.items():
        hold(torch.equal(tensor, before[name]), f"{name} was changed in place", **{name: tensor})
    hold(
        torch.equal(torch.get_rng_state(), state),
        "torch's global random state was moved, so that dropout elsewhere draws other masks: draw "
        "from torch.Generator().manual_seed(ctx.seed)",
    )


class StepsInForward(ScoredRouter):
    """Loss-free balancing inside forward: a recompute moves the bias twice."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, choice_bias=True)

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        experts_TK = top_k(self.with_choice_bias(scores_TE), self.top_k, ctx)
        if self.training:
            counts_E = experts_TK.flatten().bincount(minlength=self.num_experts).double()
            self.get_buffer("e_score_correction_bias").add_(
                0.001 * torch.sign(counts_E.mean() - counts_E)
            )
        return self.chosen(experts_TK, gather(scores_TE, experts_TK))


@law(
    "R10",
    "forward changes no state",
    formula="parameters and buffers, after = before, bit by bit, in training too",
    source="Loss-free balancing, arXiv 2408.15664, algorithm 1: the bias moves after the step",
    cases=inputs(*MODERATE, training=None),
    broken=broken_subject(StepsInForward),
    unless=lambda s: None if s.is_module else "a function holds no parameters and buffers",
)
def state_untouched(subject: RouterSubject, case: Case) -> None:
    router = subject.fresh(training=bool(case.settings["training"]))
    assert isinstance(router, nn.Module)
    before = {name: tensor.clone() for name, tensor in _state(router).items()}
    modes = [module.training for module in router.modules()]
    router(case["x_TH"].to(subject.dtype), context_of(case))
    hold(torch.is_grad_enabled(), "a forward turned gradients off for all that comes after it")
    hold(
        [module.training for module in router.modules()] == modes,
        f"a forward took the router out of {'training' if modes[0] else 'evaluation'} mode",
    )
    for name, tensor in _state(router).items():
        same = name in before and torch.equal(tensor, before[name])
        hold(same, f"{name} is another after a forward; a controller moves it, after the step")


def _state(router: nn.Module) -> dict[str, Tensor]:
    return {**dict(router.named_parameters()), **dict(router.named_buffers())}


class AssumesRows(ScoredRouter):
    """Reads memory as if rows lay one after the other, as a kernel without strides does."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        packed_TH = torch.as_strided(x_TH, x_TH.shape, (x_TH.shape[1], 1))
        _, scores_TE = self.scored(packed_TH)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK))


@law(
    "R11",
    "the layout in memory is no input",
    formula="R(x) = R(x transposed, sliced, shifted or repeated in memory)",
    source="DLPack and torch hand strides over; a kernel must read them or ask for a copy",
    cases=inputs(*MODERATE, training=None),
    broken=broken_subject(AssumesRows),
)
def any_layout(subject: RouterSubject, case: Case) -> None:
    training = bool(case.settings["training"])
    for name, laid_out in LAYOUTS.items():
        strided_TH = laid_out(case["x_TH"].to(subject.dtype))
        dense = Case(
            {"x_TH": strided_TH.clone(memory_format=torch.contiguous_format)}, case.settings
        )
        other = subject.route(strided_TH, context_of(dense), training=training)
        hold_close(subject, subject.on(dense), other, dense, f"x_TH is {name}")


class KeepsAStaleCopy(ScoredRouter):
    """Normalises its weight once and keeps the result: a checkpoint loaded later is not seen."""

    kept_EH: Tensor | None = None

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        if self.kept_EH is None:
            self.kept_EH = normalize(self.weight.detach(), dim=-1)
        scores_TE = (x_TH @ self.kept_EH.T).sigmoid()
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        return self.chosen(experts_TK, gather(scores_TE, experts_TK))


def _unless_it_has_a_state(subject: RouterSubject) -> str | None:
    router = subject.original
    if isinstance(router, nn.Module) and router.state_dict():
        return None
    return "it has no state_dict, or an empty one"


@law(
    "R12",
    "the state_dict holds the router",
    formula="load_state_dict(state_dict of A) into B  =>  R_B(x) = R_A(x), bit by bit",
    source="checkpoints: what is not in the state is lost, what is cached is stale",
    cases=inputs(*MODERATE),
    broken=broken_subject(KeepsAStaleCopy),
    unless=_unless_it_has_a_state,
)
def state_is_whole(subject: RouterSubject, case: Case) -> None:
    ours, theirs = subject.copy_at(False), subject.fresh()
    assert isinstance(ours, nn.Module) and isinstance(theirs, nn.Module)
    x_TH, ctx = case["x_TH"].to(subject.dtype), context_of(case)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.5
        wanted: Routing = ours(x_TH, ctx)
        theirs(x_TH, ctx)
        theirs.load_state_dict(ours.state_dict())
        hold_same(wanted, theirs(x_TH, ctx), "its state was loaded into a copy of other values")


LAWS: tuple[Law[RouterSubject], ...] = (
    repeatable,
    quiet_in_evaluation,
    seeds_differ,
    input_untouched,
    state_untouched,
    any_layout,
    state_is_whole,
)
