"""What training asks of a bank: gradients that are right, all there, and asked for one by one.

Notation: L = <g, y>; f_e one expert; y_t = sum_k w_tk f_e(x_t).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moetk.equivalence.judge import floor
from moetk.experts import BankSpec, Gated
from moetk.routing import Routing, TokenChoice
from moetk.testing.law import Case, hold
from moetk.testing.laws.banks_law import law
from moetk.testing.laws.banks_routing import RightBank
from moetk.testing.laws.banks_subject import (
    BankUnderTest,
    Tensors,
    agree,
    agree_all,
    bank_under_test,
    needs_output_scale,
    needs_parameters,
    results,
    routed,
    routed_call,
    rows_of,
    run,
)
from moetk.testing.strategies.routings import (
    DISTINCT,
    REPEATED,
    generator,
    normal,
    seed_of,
)

# B18


class _DetachesTheWeights(RightBank):
    """The router never hears what its weights did."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, TokenChoice)
        return super().forward(x_TH, replace(routing, weights_TK=routing.weights_TK.detach()))


@law(
    "B18",
    "the router's gradient is what each expert said",
    formula="dL/dw_tk = <g_t, f_e(x_t)>, e = e_tk",
    source="arXiv 1701.06538, equation 1, by w; SonicMoE, arXiv 2512.14080, computes it otherwise",
    cases=lambda subject: routed(subject, patterns=(*DISTINCT, *REPEATED)),
    broken=lambda: bank_under_test(_DetachesTheWeights()),
    unless=needs_output_scale,
)
def router_gradient(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    found_TK = results(subject, x_TH, routing, g_TH)["d weights_TK"]
    ids_TK = routing.experts_TK
    for k in range(ids_TK.shape[1]):
        ones_T1 = torch.ones_like(routing.weights_TK[:, k : k + 1])
        alone = replace(routing, experts_TK=ids_TK[:, k : k + 1], weights_TK=ones_T1)
        said_TH = subject(x_TH, alone).detach()
        agree(
            subject,
            found_TK[:, k],
            (g_TH * said_TH).sum(-1),
            f"dL/dw of slot {k}",
            num_rows=rows_of(case),
            size=(g_TH * said_TH).norm() * subject.hidden_size,
        )


# B19


def _cut_gate() -> Gated:
    return Gated(act=lambda gate: F.silu(gate.detach()))


@law(
    "B19",
    "gradients are slopes",
    formula="<dL/dv, d> = (L(v + h d) - L(v - h d)) / 2h for v = x, w, parameters; d as large as v",
    source="finite differences in float64, as torch.autograd.gradcheck",
    # Not at rows of zeros: there every ReLU without a bias has its kink, and any slope is right.
    cases=lambda subject: routed(
        subject,
        patterns=(*DISTINCT, *REPEATED, "unused"),
        row_patterns=("gaussian", "large", "tiny", "equal"),
    ),
    broken=lambda: bank_under_test(RightBank(BankSpec(4, 6, 5, activation=_cut_gate()))),
    unless=lambda subject: (
        None if subject.dtype == torch.float64 else "finite differences need float64"
    ),
)
def gradients_are_slopes(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    found, source, step = results(subject, x_TH, routing, g_TH), generator(seed_of(case)), 1e-6

    def direction(like: Tensor) -> Tensor:
        # As large as what it moves: small rows are no nearer to a kink than large ones.
        scale = float(like.norm()) / math.sqrt(max(like.numel(), 1)) or 1.0
        return scale * normal(tuple(like.shape), source, like.dtype)

    def products(h: float, moved: str) -> Tensor:
        """(T, H), what L is the sum of, h along the direction."""
        x = x_TH + h * dx_TH if moved == "x_TH" else x_TH
        w = routing.weights_TK + h * dw_TK if moved == "weights_TK" else routing.weights_TK
        held = {n: p + h * dp[n] for n, p in subject.parameters.items() if moved == "parameters"}
        with torch.no_grad():
            return g_TH * subject(x, replace(routing, weights_TK=w), held)

    dx_TH, dw_TK = direction(x_TH), direction(routing.weights_TK)
    dp = {name: direction(p.detach()) for name, p in subject.parameters.items()}
    slopes = {
        "x_TH": (found["d x_TH"] * dx_TH).sum(),
        "weights_TK": (found["d weights_TK"] * dw_TK).sum(),
        "parameters": sum((found[f"d {n}"] * d).sum() for n, d in dp.items()),
    }
    here_TH = products(0.0, "nothing")
    for moved, slope in slopes.items():
        ahead_TH, behind_TH = products(step, moved), products(-step, moved)
        # The slope lies between the two one-sided ones, at a kink of the activation too.
        gap = float((ahead_TH - 2 * here_TH + behind_TH).abs().sum()) / step
        size = float(ahead_TH.abs().sum())
        rounded = floor(torch.float64, 1) * (subject.terms + rows_of(case)) * size / step
        measured = float((ahead_TH - behind_TH).sum()) / (2 * step)
        hold(
            abs(measured - float(slope)) <= gap + rounded,
            f"the slope along {moved} is {measured:.6g}, its gradient says {float(slope):.6g}",
        )


# B20


class _SkipsEmptyExperts(nn.Module):
    """A loop over experts that leaves out those without tokens, and so their parameters."""

    hidden_size, num_experts = 6, 4

    def __init__(self) -> None:
        super().__init__()
        source = generator(0)
        self.experts = nn.ParameterList(normal((6, 6), source, torch.float64) for _ in range(4))

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, TokenChoice)
        y_TH = torch.zeros_like(x_TH) + 0 * x_TH
        for expert, matrix in enumerate(self.experts):
            tokens_N, columns_N = (routing.experts_TK == expert).nonzero(as_tuple=True)
            if len(tokens_N):
                out_NH = (x_TH[tokens_N] @ matrix).tanh()
                y_TH = y_TH.index_add(
                    0, tokens_N, out_NH * routing.weights_TK[tokens_N, columns_N, None]
                )
        return y_TH


@law(
    "B20",
    "an expert that nobody chose has gradient 0",
    formula="no token at e: dL/d(parameters of e) = 0, neither None nor NaN",
    source="a gradient of None stalls DDP's buckets and differs from 0 under weight decay",
    cases=lambda subject: routed(subject, row_patterns=("gaussian", "large")),
    broken=lambda: bank_under_test(_SkipsEmptyExperts()),
    unless=needs_parameters,
)
def empty_experts(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    made = run(subject, x_TH, routing, g_TH)
    used_TK = (
        routing.experts_TK
        if routing.kept_TK is None
        else (routing.experts_TK.masked_fill(~routing.kept_TK, -1))
    )
    empty = [e for e in range(subject.real_experts) if not bool((used_TK == e).any())]
    own = subject.per_expert
    for name, gradient in zip(made.leaves, made.gradients, strict=True):
        if name not in subject.parameters:
            continue
        hold(
            gradient is not None,
            f"{name} has no gradient (None) when experts {empty} have no token",
        )
        assert gradient is not None
        hold(gradient.isfinite(), f"the gradient of {name} is not finite", gradient=gradient)
        if name in own:
            hold(
                gradient[empty] == 0,
                f"{name}: experts {empty} have no token, but a gradient",
                gradient=gradient,
            )


# B21


class _StopsWithoutX(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        return x_TH.clone(), weights_TK.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx_TH, dw_TK = gradients
        return (dx_TH, dw_TK) if ctx.needs_input_grad[0] else (None, torch.zeros_like(dw_TK))


class _NeedsXToTrain(RightBank):
    """Its backward returns early when the rows need no gradient, as below the first layer."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        assert isinstance(routing, TokenChoice)
        x_TH, weights_TK = _StopsWithoutX.apply(x_TH, routing.weights_TK)
        return super().forward(x_TH, replace(routing, weights_TK=weights_TK))


@law(
    "B21",
    "one gradient alone",
    formula="each gradient, asked for alone, = the one of a backward to all",
    source="frozen banks (LoRA), detached routers, inputs that need no gradient",
    cases=lambda subject: routed(subject, tokens=(2, 5, 9)),
    broken=lambda: bank_under_test(_NeedsXToTrain()),
)
def one_gradient_alone(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    whole = results(subject, x_TH, routing, g_TH)
    alone = ["x_TH", "weights_TK", *subject.parameters]
    for name in alone:
        leaves = {"x_TH": x_TH, "weights_TK": routing.weights_TK, **subject.parameters}
        leaf = leaves[name] = leaves[name].detach().clone().requires_grad_()
        leaves = {n: t if n == name else t.detach() for n, t in leaves.items()}
        held = {n: leaves[n] for n in subject.parameters}
        y_TH = subject(leaves["x_TH"], replace(routing, weights_TK=leaves["weights_TK"]), held)
        found = torch.zeros_like(leaf)
        if y_TH.requires_grad:
            (found,) = torch.autograd.grad(y_TH, leaf, g_TH, materialize_grads=True)
        agree(
            subject,
            found,
            whole[f"d {name}"],
            f"d {name} where nothing else needs a gradient",
            num_rows=rows_of(case),
        )


# B22


class _DrawsItsOwnNoise(RightBank):
    """Adds noise from a generator of its own, which checkpointing does not restore."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        if not hasattr(self, "source"):
            self.source = generator(0)
        noise_TH = torch.randn(x_TH.shape, generator=self.source, dtype=x_TH.dtype)
        return super().forward(x_TH * (1 + 0.1 * noise_TH), routing)


@law(
    "B22",
    "a recomputed forward is the same forward",
    formula="every gradient through torch.utils.checkpoint = without it",
    source="torch.utils.checkpoint restores the global generators, and no other state",
    cases=lambda subject: routed(subject, tokens=(2, 5, 0)),
    broken=lambda: bank_under_test(_DrawsItsOwnNoise()),
)
def recomputed(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)

    def rerun(x_TH: Tensor, routing: Routing, parameters: Tensors) -> Tensor:
        y_TH: Tensor = checkpoint(subject, x_TH, routing, parameters, use_reentrant=False)
        return y_TH

    want = results(subject, x_TH, routing, g_TH)
    found = results(subject, x_TH, routing, g_TH, forward=rerun)
    agree_all(subject, found, want, num_rows=rows_of(case), because="recomputed in backward")


LAWS = (
    router_gradient,
    gradients_are_slopes,
    empty_experts,
    one_gradient_alone,
    recomputed,
)
