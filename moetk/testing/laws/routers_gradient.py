"""The gradient of the weights: to every parameter, to no bias, right, and within its token."""

from __future__ import annotations

import math

import torch
from hypothesis import assume
from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.kernels.selection import gather, normalise, top_k
from moetk.routing import Routing, SoftChoice, TokenChoice
from moetk.testing.law import Case, Law, hold, law
from moetk.testing.laws.routers_cases import ScoredRouter, broken_subject, inputs
from moetk.testing.laws.routers_compare import coarsest_eps
from moetk.testing.laws.routers_subject import (
    CHOICE_BIAS,
    Router,
    RouterSubject,
    context_of,
    plain_context,
)
from moetk.testing.laws.routers_symmetry import unless_choice_bias
from moetk.testing.laws.routers_told import by_token
from moetk.testing.strategies.inputs import MODERATE, rows_of


def _mixed(told: dict[str, Tensor], seed: int) -> Tensor:
    """A scalar: what is differentiable in a routing, times drawn numbers, summed in float64."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for tensor in told.values():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            total = total + (tensor.double() * noise).sum()
    return total


def _gradients(total: Tensor, wanted: list[Tensor]) -> list[Tensor | None]:
    if not total.requires_grad:
        return [None] * len(wanted)
    return list(torch.autograd.grad(total, wanted, allow_unused=True, retain_graph=True))


class LeaksThroughTheBias(ScoredRouter):
    """Takes the biased score and subtracts the bias again, detached: right in value alone."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, choice_bias=True)

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        bias_E = self.get_buffer(CHOICE_BIAS)
        choice_TE = self.scored(x_TH)[1] + bias_E
        experts_TK = top_k(choice_TE, self.top_k, ctx)
        weights_TK = gather(choice_TE, experts_TK) - bias_E.detach()[experts_TK]
        return self.chosen(experts_TK, weights_TK, choice_TE=choice_TE)


@law(
    "R37",
    "no gradient to the choice bias",
    formula="d weights / d b = 0",
    source="DeepSeek-V3, arXiv 2412.19437, section 2.1.2: a controller moves b, no loss does",
    cases=inputs(*MODERATE, training=None),
    broken=broken_subject(LeaksThroughTheBias),
    unless=unless_choice_bias,
)
def no_gradient_to_bias(subject: RouterSubject, case: Case) -> None:
    router = subject.fresh(training=bool(case.settings["training"]))
    assert isinstance(router, nn.Module)
    bias_E = subject.bias.requires_grad_()
    given = (case["x_TH"].to(subject.dtype), context_of(case))
    routing = torch.func.functional_call(router, {CHOICE_BIAS: bias_E}, given)
    (grad,) = _gradients(_mixed({"weights": by_token(routing)["weights"]}, 0), [bias_E])
    hold(
        grad is None or (grad == 0).all(),
        f"the weights' gradient reaches {CHOICE_BIAS}: take weights from the scores, not from "
        "what chooses",
    )


class RescalesOne(ScoredRouter):
    """One choice, rescaled to sum to one: its weight is 1, whatever the router thinks."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        return self.chosen(experts_TK, normalise(gather(scores_TE, experts_TK)))


def _unless_it_learns(subject: RouterSubject) -> str | None:
    if subject.num_experts == 1:
        return "of one expert there is nothing to learn"
    if not subject.trained(subject.copy_at(True)):
        return "it has no parameters that require a gradient"
    return None


BATCHES, BATCH = 8, 256  # beside the drawn case, until each parameter has been reached


@law(
    "R38",
    "the gradient reaches every parameter",
    formula="d weights / d w != 0, or d extras / d w != 0 for its own loss, for each parameter w",
    source="K = 1, rescaled: s / s = 1 has no gradient; Switch, arXiv 2101.03961, keeps s",
    cases=inputs("gaussian", least_length=13, training=True),
    broken=broken_subject(RescalesOne, 4, 4, 1),
    unless=_unless_it_learns,
)
def reaches_parameters(subject: RouterSubject, case: Case) -> None:
    router, seed = subject.copy_at(True), int(case.settings["seed"] or 0)
    routing: Routing = router(case["x_TH"].to(subject.dtype), context_of(case))
    unmoved, chosen = _unreached(subject, router, case["x_TH"], routing), _chosen(routing)
    # What belongs to one expert is reached by the tokens that choose it: perhaps by none of these.
    for more in range(1, 1 + BATCHES) if unmoved else ():
        x_TH = rows_of("gaussian", seed + more, BATCH, subject.hidden_size)
        told = router(x_TH.to(subject.dtype), plain_context(1, BATCH, seed + more))
        unmoved &= _unreached(subject, router, x_TH, told)
        chosen |= _chosen(told)
    unmoved -= _of_experts(subject, router, set(range(subject.num_experts)) - chosen)
    weights = by_token(routing)["weights"]
    one = isinstance(routing, TokenChoice) and bool((weights == 1).all())
    trap = " (K = 1 and a rescaled weight: it is always 1; keep the score itself)" if one else ""
    hold(
        not unmoved,
        f"no gradient of the weights reaches {', '.join(sorted(unmoved))}{trap}",
        weights=weights,
    )


def _chosen(routing: Routing) -> set[int]:
    """Experts that some token chooses; all, where tokens do not choose."""
    if isinstance(routing, TokenChoice):
        return set(routing.experts_TK.flatten().tolist())
    return set(range(routing.num_experts))


def _of_experts(subject: RouterSubject, router: Router, experts: set[int]) -> set[str]:
    """Parameters with the number of one of these experts in their name, "keys.3", where each
    expert has its own."""
    named, found = subject.trained(router), set()
    for name in named:
        parts = name.split(".")
        for place, part in enumerate(parts):
            if part.isdigit() and int(part) in experts:
                before, after = parts[:place], parts[place + 1 :]
                others = (".".join([*before, str(e), *after]) for e in range(subject.num_experts))
                if all(other in named for other in others):
                    found.add(name)
    return found


def _unreached(subject: RouterSubject, router: Router, x_TH: Tensor, routing: Routing) -> set[str]:
    """Names of the parameters that neither the weights nor the extras of this batch move."""
    named, told = subject.trained(router), by_token(routing)
    wanted = list(named.values())
    from_weights = _gradients(_mixed({n: t for n, t in told.items() if n != "kept"}, 1), wanted)
    from_extras = _gradients(_mixed(dict(routing.extras), 2), wanted)
    # Exactly 0 in maths may be a rounding in numbers: s / s has the derivative 1 / s - s / s^2.
    least = 4 * coarsest_eps(routing) * float(x_TH.double().norm())
    return {
        name
        for name, *grads in zip(named, from_weights, from_extras, strict=True)
        if all(grad is None or float(grad.double().norm()) <= least for grad in grads)
    }


class ForgetsTheDenominator(ScoredRouter):
    """The sum that rescales is detached, as if it were a number."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        chosen_TK = gather(scores_TE, experts_TK)
        return self.chosen(experts_TK, chosen_TK / chosen_TK.sum(-1, keepdim=True).detach())


def _unless_surrogate(subject: RouterSubject) -> str | None:
    return "it declares surrogate_gradient = True" if subject.surrogate_gradient else None


class _Line:
    """A router along one drawn direction of its input and of all its trained parameters."""

    def __init__(self, router: Router, trained: dict[str, Tensor], case: Case, dtype: torch.dtype):
        self.router, self.ctx = router, context_of(case)
        self.start = {**trained, "": case["x_TH"].to(dtype).requires_grad_()}
        generator = torch.Generator().manual_seed(int(case.settings["seed"] or 0))
        self.moves = {}
        for name, tensor in self.start.items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            size = tensor.detach().double().abs().mean().clamp(min=1e-3)
            self.moves[name] = (noise * size).to(dtype)

    def at(self, step: float) -> Routing:
        """The routing `step` along the line, with graph at 0 alone."""
        if step == 0.0:
            return self.router(self.start[""], self.ctx)
        with torch.no_grad():
            moved = {name: t + step * self.moves[name] for name, t in self.start.items()}
            x_TH = moved.pop("")
            if not isinstance(self.router, nn.Module):
                return self.router(x_TH, self.ctx)
            told = torch.func.functional_call(self.router, moved, (x_TH, self.ctx))
            return told  # type: ignore[no-any-return]

    def slope(self, total: Tensor) -> float:
        """The derivative along the line that backward gives."""
        grads = _gradients(total, list(self.start.values()))
        pairs = zip(grads, self.moves.values(), strict=True)
        return sum(float((g.double() * move.double()).sum()) for g, move in pairs if g is not None)


def _decided(routing: Routing) -> list[Tensor]:
    """What must not change along the line: between two choices there is no derivative."""
    told = by_token(routing)
    if isinstance(routing, SoftChoice):
        return []
    return [tensor for name, tensor in told.items() if name != "weights"]


def _all_decided(line: _Line, middle: Routing, step: float) -> bool:
    decided = _decided(middle)
    return all(
        torch.equal(first, second)
        for at in (step, step / 2, -step / 2, -step)
        for first, second in zip(decided, _decided(line.at(at)), strict=True)
    )


def _smooth(routing: Routing) -> dict[str, Tensor]:
    told = by_token(routing)
    names = ("chosen", "weights") if isinstance(routing, SoftChoice) else ("weights",)
    return {name: told[name] for name in names}


@law(
    "R39",
    "the gradient is the derivative",
    formula="|g - D(h/2)| <= |D(h) - D(h/2)| + rounding / h, D(h) = (f(h) - f(-h)) / 2h",
    source="central differences: D(h/2) is off by a third of D(h) - D(h/2), at fixed choices",
    cases=inputs(*MODERATE, least_length=1, training=None),
    broken=broken_subject(ForgetsTheDenominator),
    unless=_unless_surrogate,
)
def gradient_is_derivative(subject: RouterSubject, case: Case) -> None:
    router = subject.copy_at(bool(case.settings["training"]))
    line = _Line(router, subject.trained(router), case, subject.dtype)
    middle = line.at(0.0)
    eps = coarsest_eps(middle)
    # In bfloat16 the best step is so wide that some choice changes on it: then a shorter one.
    steps = (eps**0.25 / 8**shorter for shorter in range(4))
    step = next((step for step in steps if _all_decided(line, middle, step)), None)
    assume(step is not None)
    assert step is not None

    def value(at: float) -> float:
        return float(_mixed(_smooth(line.at(at)), 3))

    wide = (value(step) - value(-step)) / (2 * step)
    near = (value(step / 2) - value(-step / 2)) / step
    slope = line.slope(_mixed(_smooth(middle), 3))
    size = sum(float(tensor.detach().double().abs().sum()) for tensor in _smooth(middle).values())
    rounded = 64 * eps * size * math.sqrt(subject.hidden_size) / step
    # A quotient that doubles as its step is halved has met a jump: there is no derivative here.
    assume(abs(near - wide) <= max(abs(near), abs(wide)) / 4 + rounded)
    allowed = abs(wide - near) + rounded
    hold(
        abs(slope - near) <= allowed,
        f"the gradient along a drawn direction is {slope:.6g}, the difference quotient {near:.6g} "
        f"+- {allowed:.2g}. A surrogate on purpose declares surrogate_gradient = True",
    )


class SmugglesALoss(ScoredRouter):
    """Adds a balance term to the weights with its value taken off again: no value changes, and
    every token's gradient reaches every other one."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        _, scores_TE = self.scored(x_TH)
        experts_TK = top_k(scores_TE, self.top_k, ctx)
        balance = scores_TE.mean(0).square().sum()
        weights_TK = gather(scores_TE, experts_TK) + (balance - balance.detach())
        return self.chosen(experts_TK, weights_TK)


def _unless_gradients_mix(subject: RouterSubject) -> str | None:
    if subject.per_batch:
        return "it declares per_batch = True"
    return _unless_surrogate(subject)


@law(
    "R40",
    "gradients stay where values stay",
    formula="d weights_t / d x_s = 0, s another sequence (s != t where tokens do not compete)",
    source="batch independence, differentiated: a token does not move what it does not read",
    cases=inputs(*MODERATE, least_sequences=2, least_length=1, training=None),
    broken=broken_subject(SmugglesALoss),
    unless=_unless_gradients_mix,
)
def gradients_stay(subject: RouterSubject, case: Case) -> None:
    router = subject.copy_at(bool(case.settings["training"]))
    x_TH = case["x_TH"].to(subject.dtype).requires_grad_()
    told = _smooth(router(x_TH, context_of(case)))
    length = int(case.settings["length"] or 0)
    token = int(case.settings["seed"] or 0) % len(x_TH)
    (grad_TH,) = _gradients(_mixed({n: t[token : token + 1] for n, t in told.items()}, 4), [x_TH])
    if grad_TH is None:
        return
    token_T = torch.arange(len(x_TH))
    apart_T = (token_T // length != token // length) if subject.mixes else (token_T != token)
    leaked_T = (grad_TH != 0).any(-1) & apart_T
    reached = leaked_T.nonzero()[:, 0].tolist()
    hold(
        ~leaked_T,
        f"the weights of token {token} have a gradient in tokens {reached}",
        grad_TH=grad_TH,
    )


LAWS: tuple[Law[RouterSubject], ...] = (
    no_gradient_to_bias,
    reaches_parameters,
    gradient_is_derivative,
    gradients_stay,
)
