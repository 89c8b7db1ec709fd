"""What a bank's spec says that it computes, in float64 and in the dtypes of training.

Letters: N rows, T tokens, H hidden, E experts, I expert width, J = 2I for gated activations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor
from torch.nn import functional as F

from moetk.equivalence.judge import Verdict, judge, judge_together
from moetk.experts import (
    Activation,
    BankSpec,
    BankWeights,
    ClampedGated,
    ExpertBank,
    Plain,
    bank_forward,
)
from moetk.routing import Routing, TokenChoice
from moetk.testing.law import Case, hold
from moetk.testing.laws.banks_law import law
from moetk.testing.laws.banks_routing import RightBank
from moetk.testing.laws.banks_subject import (
    BankUnderTest,
    Forward,
    Tensors,
    agree,
    agree_all,
    bank_under_test,
    cotangent,
    first_reason,
    in_dtype,
    needs_spec,
    results,
    routed,
    routed_call,
    rows_of,
    weight_names,
)
from moetk.testing.strategies.routings import (
    CROWDS,
    MANY,
    TOKENS,
    generator,
    normal,
    seed_of,
    token_choice,
)


def _one_expert(
    spec: BankSpec, weights: BankWeights, expert: int, x_NH: Tensor, *, swapped: bool = False
) -> Tensor:
    """Expert `expert` on every row, (N, H) -> (N, H), written out from the spec's words.

    swapped: the halves that gate and up are read from, exchanged.
    """
    up_JH, down_HI = weights.up[expert], weights.down[expert]
    if spec.transposed:
        up_JH, down_HI = up_JH.T, down_HI.T
    hidden_NJ = torch.einsum("nh,jh->nj", x_NH, up_JH)
    if weights.up_bias is not None:
        hidden_NJ = hidden_NJ + weights.up_bias[expert]
    activation, inner = spec.activation, spec.intermediate_size
    if isinstance(activation, Plain):
        middle_NI = activation(hidden_NJ)
    else:
        where = (
            (slice(0, None, 2), slice(1, None, 2))
            if spec.interleaved
            else (slice(0, inner), slice(inner, 2 * inner))
        )
        gate, up = (where[1], where[0]) if swapped else where
        middle_NI = activation(hidden_NJ[:, gate], hidden_NJ[:, up])
    y_NH = torch.einsum("ni,hi->nh", middle_NI, down_HI)
    return y_NH if weights.down_bias is None else y_NH + weights.down_bias[expert]


def _to_one(subject: BankUnderTest, case: Case, expert: int) -> TokenChoice:
    """Every token to one expert, with the first weight that the case drew."""
    weights_T1 = case["weights_TK"][:, :1]
    return TokenChoice(torch.full(weights_T1.shape, expert), weights_T1, subject.num_experts)


def _starved(
    subject: BankUnderTest, case: Case, expert: int, *, swapped: bool = False
) -> dict[str, Tensor]:
    """What `results` says of a bank all of whose tokens go to one expert, from the spec alone."""
    spec, routing = subject.spec, _to_one(subject, case, expert)
    assert spec is not None

    def dense(x_TH: Tensor, routing: Routing, parameters: Tensors) -> Tensor:
        w_T1 = cast(TokenChoice, routing).weights_TK
        weights = subject.weights(parameters)
        if spec.scale == "input":
            return _one_expert(spec, weights, expert, x_TH * w_T1, swapped=swapped)
        return w_T1 * _one_expert(spec, weights, expert, x_TH, swapped=swapped)

    g_TH = cotangent(subject, case["x_TH"], routing, case["g_TH"])
    return results(subject, case["x_TH"], routing, g_TH, forward=dense)


# B23


class _NeighboursBias(RightBank):
    """Takes each row's up bias from the expert before its own."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        weights = self.weights()
        assert weights.up_bias is not None
        moved = replace(weights, up_bias=weights.up_bias.roll(1, 0))
        return bank_forward(self.spec, moved, x_TH, routing)


@law(
    "B23",
    "a bank starved to one expert is that expert",
    formula="all tokens at e: y = w f_e(x), f_e(x) = W_down act(W_up x + b) + c, and each gradient",
    source="arXiv 2002.05202 (gated units), with the activation and layout of the bank's spec",
    cases=lambda subject: routed(subject, patterns=("random", "duplicates")),
    broken=lambda: bank_under_test(_NeighboursBias()),
    unless=needs_spec,
)
def starved_to_one(subject: BankUnderTest, case: Case) -> None:
    expert = seed_of(case) % subject.real_experts
    routing = _to_one(subject, case, expert)
    g_TH = cotangent(subject, case["x_TH"], routing, case["g_TH"])
    found = results(subject, case["x_TH"], routing, g_TH)
    want = _starved(subject, case, expert)
    agree_all(
        subject, found, want, num_rows=rows_of(case), because=f"all tokens at expert {expert}"
    )


# B28


class _ReadsHalves(RightBank):
    """Reads gate and up from two halves, where its spec says that they alternate."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        halves = replace(self.spec, interleaved=False)
        return bank_forward(halves, self.weights(), x_TH, routing)


@law(
    "B28",
    "gate and up are where the spec says",
    formula="gate and up exchanged in the parameters: y = w W_down act(up, gate)",
    source="gpt-oss interleaves gate and up, Mixtral and Qwen3 put one behind the other",
    cases=lambda subject: routed(subject, patterns=("random", "duplicates")),
    broken=lambda: bank_under_test(_ReadsHalves(BankSpec(4, 6, 5, interleaved=True))),
    unless=first_reason(
        needs_spec,
        lambda subject: (
            None if subject.spec is not None and subject.spec.gated else "it has no gate"
        ),
    ),
)
def gate_and_up(subject: BankUnderTest, case: Case) -> None:
    spec, names = subject.spec, weight_names(subject)
    assert spec is not None
    expert = seed_of(case) % subject.real_experts
    routing = _to_one(subject, case, expert)

    def exchanged(tensor: Tensor, dim: int) -> Tensor:
        """J with the two halves, or each pair of neighbours, exchanged."""
        pairs = (-1, 2) if spec.interleaved else (2, -1)
        inner = dim + 1 if spec.interleaved else dim
        apart: Tensor = tensor.unflatten(dim, pairs)
        return apart.flip(inner).flatten(dim, dim + 1)

    moved = {names["up"]: exchanged(subject.parameters[names["up"]].detach(), 1 + spec.transposed)}
    if "up_bias" in names:
        moved[names["up_bias"]] = exchanged(subject.parameters[names["up_bias"]].detach(), 1)
    found = subject(case["x_TH"], routing, moved).detach()
    want = _starved(subject, case, expert, swapped=True)["y_TH"]
    agree(subject, found, want, "y_TH with gate and up exchanged", num_rows=rows_of(case))


# B29


@dataclass(frozen=True)
class _StraightThrough:
    """Clamps going forward, and lets every gradient pass coming back."""

    limit: float

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        gate = gate + (gate.clamp(max=self.limit) - gate).detach()
        up = up + (up.clamp(-self.limit, self.limit) - up).detach()
        return F.silu(gate) * up


class _GradientPassesTheClamp(RightBank):
    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        other = cast(Activation, _StraightThrough(0.4))
        spec = replace(self.spec, activation=other)
        return bank_forward(spec, self.weights(), x_TH, routing)


@law(
    "B29",
    "the reference backend is the truth",
    formula="y and every gradient = bank_forward(spec, weights, x, routing, 'reference')",
    source="moetk.experts.reference: a loop over experts in plain torch",
    cases=lambda subject: routed(subject, tokens=(*TOKENS, *CROWDS), more_choices=MANY),
    broken=lambda: bank_under_test(
        _GradientPassesTheClamp(BankSpec(4, 6, 5, activation=ClampedGated(0.4)))
    ),
    unless=needs_spec,
)
def reference_agrees(subject: BankUnderTest, case: Case) -> None:
    x_TH, routing, g_TH = routed_call(subject, case)
    found = results(subject, x_TH, routing, g_TH)
    want = results(subject, x_TH, routing, g_TH, forward=_reference(subject))
    agree_all(subject, found, want, num_rows=rows_of(case), because="against reference")


def _reference(subject: BankUnderTest) -> Forward:
    spec = subject.spec
    assert spec is not None

    def forward(x_TH: Tensor, routing: Routing, parameters: Tensors) -> Tensor:
        return bank_forward(spec, subject.weights(parameters), x_TH, routing, "reference")

    return forward


# B30


class _AccumulatesInItsDtype(ExpertBank):
    """Adds the products of a matrix product one by one, each sum rounded to the rows' dtype."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(48, 3, 8)

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        routing = cast(TokenChoice, routing)
        y_TH = torch.zeros_like(x_TH)
        for expert in range(self.num_experts):
            tokens_N, columns_N = (routing.experts_TK == expert).nonzero(as_tuple=True)
            hidden_NJ = x_TH.new_zeros(len(tokens_N), self.spec.up_width)
            for h in range(self.spec.hidden_size):
                product_NJ = x_TH[tokens_N, h, None] * self.gate_up_proj[expert, :, h]
                hidden_NJ = hidden_NJ + product_NJ
            out_NH = self.spec.activate(hidden_NJ) @ self.down_proj[expert].T
            weights_N1 = routing.weights_TK[tokens_N, columns_N, None]
            y_TH = y_TH.index_add(0, tokens_N, (out_NH * weights_N1).to(x_TH.dtype))
        return y_TH


_BATCHES = 8
"""One batch's errors in a few numbers are single draws: so many are averaged, ours and eager's."""


def _needs_width(subject: BankUnderTest) -> str | None:
    if subject.hidden_size >= 4:
        return None
    return f"rows of H={subject.hidden_size} numbers: single roundings decide, need H >= 4"


@st.composite
def _precisions(draw: DrawFn, subject: BankUnderTest) -> Case:
    dtype = draw(st.sampled_from(("bfloat16", "float16", "float32")))
    top_k = draw(st.sampled_from(sorted({1, min(2, subject.num_experts)})))
    pattern, seed = draw(st.sampled_from(("random", "mixed"))), draw(st.integers(0, 1))
    return Case({}, {"dtype": dtype, "top_k": top_k, "pattern": pattern, "seed": seed})


@law(
    "B30",
    "in low precision no worse than the plain loop",
    formula="error(bank) <= max(2 error(reference, same dtype), eps sqrt(n)), to fp64 truth",
    source="moetk.equivalence.judge: the pass rule",
    cases=_precisions,
    broken=lambda: bank_under_test(_AccumulatesInItsDtype()),
    unless=first_reason(needs_spec, _needs_width),
)
def low_precision(subject: BankUnderTest, case: Case) -> None:
    dtype, top_k = getattr(torch, str(case.settings["dtype"])), cast(int, case.settings["top_k"])
    low, source = in_dtype(subject, dtype), generator(seed_of(case))
    raised = {name: p.detach().double() for name, p in low.parameters.items()}
    shape = 48, subject.hidden_size
    verdicts: dict[str, list[Verdict]] = {}
    for _ in range(_BATCHES):
        pattern, num_ids = str(case.settings["pattern"]), subject.num_experts
        routing = token_choice(shape[0], num_ids, top_k, pattern, source, dtype)
        x_TH, g_TH = (normal(shape, source, dtype) for _ in range(2))
        found = results(low, x_TH, routing, g_TH)
        eager = results(low, x_TH, routing, g_TH, forward=_reference(low))
        exact = replace(routing, weights_TK=routing.weights_TK.double())
        truth = results(low, x_TH.double(), exact, g_TH.double(), raised, forward=_reference(low))
        terms = subject.terms + shape[0] * top_k
        for name, tensor in truth.items():
            verdict = judge(name, found[name], eager[name], tensor, reduction=terms)
            verdicts.setdefault(name, []).append(verdict)
    for name, of_batches in verdicts.items():
        (mean,) = judge_together(of_batches)
        hold(
            mean.ok,
            f"{name} in {dtype} is {mean.error:.3g} from the truth, the plain loop "
            f"{mean.eager_error:.3g}, rounding of the sums explains {mean.floor:.3g}",
        )


LAWS = (starved_to_one, gate_and_up, reference_agrees, low_precision)
