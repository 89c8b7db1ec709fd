"""The fused bank on the CPU, where its operators run what the kernels are compared with: it
computes what `reference` computes, gradients included, and keeps little for backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

import moetk.kernels.fused_mlp as room
from moetk.equivalence.judge import judge, relative_error
from moetk.errors import SecondOrderError
from moetk.experts import (
    Activation,
    BankSpec,
    BankWeights,
    ClampedGated,
    Gated,
    GptOssGated,
    Plain,
)
from moetk.experts.fused import form_of, fused
from moetk.experts.grouped import grouped
from moetk.experts.reference import reference
from moetk.kernels.sort_plan import sort_plan
from moetk.routing import Routing, TokenChoice
from tests.banks import (
    PATTERNS,
    a_case,
    gradients,
    make_weights,
    rows,
    token_choice,
)

EXACT = 1e-12
gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS: list[Activation] = [
    Gated(),
    Gated(F.gelu),
    Gated(gelu_tanh),
    Gated(F.relu),
    ClampedGated(0.4),
    ClampedGated(0.4, F.gelu),
    GptOssGated(1.7, 0.5),
    Plain(),
    Plain(F.silu),
    Plain(F.gelu),
    Plain(gelu_tanh),
]
SPECS = [
    BankSpec(5, 32, 24),
    BankSpec(5, 32, 24, ClampedGated(0.4), transposed=True),
    BankSpec(5, 32, 24, GptOssGated(1.7, 0.5), transposed=True, interleaved=True),
    BankSpec(5, 32, 24, Gated(gelu_tanh), interleaved=True),
    BankSpec(5, 32, 24, Plain(F.gelu)),
]
of_specs = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec.activation).__name__)


@st.composite
def banks(draw: st.DrawFn) -> tuple[BankSpec, BankWeights]:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    spec = BankSpec(
        draw(st.sampled_from([1, 2, 3, 8])),
        draw(st.sampled_from([2, 4, 8])),
        draw(st.sampled_from([2, 4, 6])),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        transposed=draw(st.booleans()),
        interleaved=draw(st.booleans()),
    )
    return spec, make_weights(spec, draw(st.booleans()))


def assert_is_reference(
    spec: BankSpec, weights: BankWeights, x_TH: Tensor, routing: Routing
) -> None:
    """Values and every gradient."""
    found = gradients(fused(spec, weights, x_TH, routing), weights, x_TH, routing)
    want = gradients(reference(spec, weights, x_TH, routing), weights, x_TH, routing)
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype
        error = (found[name] - tensor).norm() / tensor.norm().clamp(min=1)
        assert error <= EXACT, (name, float(error))


@given(banks(), st.sampled_from([0, 1, 2, 7, 29]), st.integers(1, 8), st.sampled_from(PATTERNS))
@settings(max_examples=150)
def test_it_is_the_reference(
    bank: tuple[BankSpec, BankWeights], tokens: int, k: int, pattern: str
) -> None:
    spec, weights = bank
    routing = token_choice(tokens, spec.num_experts, min(k, spec.num_experts), pattern)
    assert_is_reference(spec, weights, rows(tokens, spec.hidden_size), routing)


@pytest.mark.parametrize("pattern", ["none", "all dropped", "more choices than experts"])
@of_specs
def test_ordinary_extremes(spec: BankSpec, pattern: str) -> None:
    weights, x_TH, routing = a_case(spec)
    if pattern == "none":
        none_TK = torch.full_like(routing.experts_TK, -1)
        routing = replace(routing, experts_TK=none_TK, weights_TK=torch.zeros(12, 2).double())
    elif pattern == "all dropped":
        kept_TK = torch.zeros(12, 2, dtype=torch.bool)
        routing = replace(routing, kept_TK=kept_TK, weights_TK=torch.zeros(12, 2).double())
    else:
        routing = token_choice(12, spec.num_experts, 9, "duplicates")
    assert_is_reference(spec, weights, x_TH, routing)


@given(
    st.sampled_from([a for a in ACTIVATIONS if not isinstance(a, Plain)]),
    st.booleans(),
    st.lists(st.sampled_from([-9.0, -0.5, -0.4, 0.0, 0.1, 0.4, 0.5, 9.0, 300.0]), min_size=8),
    st.integers(0, 2**16),
)
@settings(max_examples=120)
def test_gated_forms_at_the_bounds(
    activation: Activation, interleaved: bool, values: list[float], seed: int
) -> None:
    """A clamped number and its bound, both halves: value and derivative are torch's."""
    spec = BankSpec(1, 2, len(values) // 2, activation, interleaved=interleaved)
    assert_form(spec, torch.tensor(values[: spec.up_width], dtype=torch.float64)[None], seed)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if isinstance(a, Plain)])
def test_plain_forms(activation: Activation) -> None:
    values = [-300.0, -9.0, -0.5, -0.0, 0.0, 0.3, 9.0, 300.0]
    assert_form(BankSpec(1, 2, 8, activation), torch.tensor(values, dtype=torch.float64)[None], 0)


def assert_form(spec: BankSpec, h_NJ: Tensor, seed: int) -> None:
    form, h_NJ = form_of(spec), h_NJ.clone().requires_grad_()
    assert form is not None
    want_NI = spec.activate(h_NJ)
    da_NI = torch.randn(
        want_NI.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    (want_NJ,) = torch.autograd.grad(want_NI, h_NJ, da_NI)
    found_NJ = form.backward(h_NJ.detach(), da_NI)
    torch.testing.assert_close(form.activate(h_NJ), want_NI, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(found_NJ, want_NJ, rtol=EXACT, atol=EXACT)


@of_specs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["fp32_weights", "own"])
def test_pass_rule(spec: BankSpec, dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    weights = make_weights(spec, True, dtype)
    x_TH = torch.randn(96, 32).to(dtype).requires_grad_()
    drawn = token_choice(96, 5, 3, "random")
    weights_TK = drawn.weights_TK.detach().to(weight_dtype or dtype).requires_grad_()
    routing = replace(drawn, weights_TK=weights_TK)
    ours, eager = (
        gradients(run(spec, weights, x_TH, routing), weights, x_TH, routing)
        for run in (fused, reference)
    )

    def raised(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_()

    held = {name: t for name, t in vars(weights).items() if isinstance(t, Tensor)}
    weights = replace(weights, **{name: raised(tensor) for name, tensor in held.items()})
    x_TH, routing = raised(x_TH), replace(routing, weights_TK=raised(weights_TK))
    truth = gradients(reference(spec, weights, x_TH, routing), weights, x_TH, routing)
    for name, tensor in truth.items():
        assert ours[name].dtype == eager[name].dtype
        verdict = judge(name, ours[name], eager[name], tensor, reduction=96)
        assert verdict.ok, verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@of_specs
def test_a_row_of_nan_stays_alone(spec: BankSpec, dtype: torch.dtype) -> None:
    weights, x_TH, routing = a_case(spec, dtype=dtype)
    others = torch.arange(12) != 5
    found = []
    for value in (1.0, float("nan")):
        x_TH = x_TH.detach().clone()
        x_TH[5] = value
        x_TH.requires_grad_()
        y_TH = fused(spec, weights, x_TH, routing)
        asked = (x_TH, routing.weights_TK)
        found.append((y_TH.detach(), *torch.autograd.grad(y_TH[others].float().sum(), asked)))
    for clean, spoiled in zip(*found, strict=True):
        assert torch.equal(clean[others], spoiled[others])
    assert found[1][0][5].isnan().all()


def test_a_row_of_nan_that_nobody_computes_reaches_nothing() -> None:
    """Rows behind the last offset are of unused choices; their token's output is 0."""
    spec = SPECS[2]
    weights, x_TH, routing = a_case(spec)
    x_TH = x_TH.detach().clone()
    x_TH[5] = float("nan")
    x_TH.requires_grad_()
    experts_TK, weights_TK = routing.experts_TK.clone(), routing.weights_TK.detach().clone()
    experts_TK[5], weights_TK[5] = -1, 0.0
    routing = TokenChoice(experts_TK, weights_TK.requires_grad_(), 5)
    found = gradients(fused(spec, weights, x_TH, routing), weights, x_TH, routing)
    assert all(tensor.isfinite().all() for tensor in found.values())
    for name in ("y", "x", "weights_TK"):
        assert (found[name][5] == 0).all()


@pytest.mark.parametrize("trained", ["x", "weights_TK", "up", "down", "up_bias", "down_bias"])
def test_one_gradient_alone(trained: str) -> None:
    spec = SPECS[0]
    weights, x_TH, routing = a_case(spec)
    leaves = {"x": x_TH, "weights_TK": routing.weights_TK, **vars(weights)}
    want = gradients(fused(spec, weights, x_TH, routing), weights, x_TH, routing)
    for name, leaf in leaves.items():
        if isinstance(leaf, Tensor):
            leaf.requires_grad_(name == trained)
    y_TH = fused(spec, weights, x_TH, routing)
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(y_TH.shape, generator=generator, dtype=torch.float64)
    (found,) = torch.autograd.grad(y_TH, leaves[trained], cotangent)
    assert relative_error(found, want[trained]) < EXACT


# What is kept.


def saved(forward: Callable[[], Tensor]) -> list[Tensor]:
    """What a forward hands to backward."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return kept


def test_it_keeps_its_input_the_up_product_and_the_plan() -> None:
    spec = BankSpec(4, 32, 24)
    weights, x_TH, routing = a_case(spec)
    kept = saved(lambda: fused(spec, weights, x_TH, routing))
    inputs = (x_TH, routing.weights_TK, *vars(weights).values())
    given_ = {t.data_ptr() for t in inputs if isinstance(t, Tensor)}
    new = [tensor for tensor in kept if tensor.data_ptr() not in given_]
    rows_, plan = 12 * 2, [(24,), (24,), (12, 2), (4,)]
    assert [tuple(t.shape) for t in new if t.dtype == torch.float64] == [(rows_, 48)]
    assert [tuple(t.shape) for t in new if t.dtype == torch.int32] == plan
    assert len(new) == 5


def test_nothing_is_kept_where_nobody_wants_a_gradient() -> None:
    spec = SPECS[0]
    weights, x_TH, routing = a_case(spec)
    with torch.no_grad():
        assert not saved(lambda: fused(spec, weights, x_TH, routing))
    args = operator_arguments(spec, weights, x_TH, routing)
    y_TH, h_NJ = room.moe_mlp(*args, keep=False)
    assert h_NJ.shape == (0, 48) and torch.equal(y_TH, room.moe_mlp(*args, keep=True)[0])


def operator_arguments(
    spec: BankSpec, weights: BankWeights, x_TH: Tensor, routing: TokenChoice
) -> tuple[Any, ...]:
    plan, form = sort_plan(routing.experts_TK, routing.kept_TK, spec.num_experts), form_of(spec)
    assert form is not None
    fields = (plan.choice_N, plan.source_N, plan.slot_TK, plan.offsets_E)
    tensors = (weights.up, weights.down, weights.up_bias, weights.down_bias)
    return (x_TH, routing.weights_TK, *tensors, *fields, *astuple(form))


# How it is called.


def test_views_are_what_they_show() -> None:
    """Rows, routing weights and gradients with other strides; the gradient of a sum has none."""
    spec = SPECS[1]
    weights, x_TH, routing = a_case(spec)
    plain = fused(spec, weights, x_TH, routing)
    sliced_TH = torch.full((24, 40), float("nan")).double()
    sliced_TH[::2, 4:36] = x_TH.detach()
    turned_TK = routing.weights_TK.detach().t().contiguous().t()
    view_TH = sliced_TH[::2, 4:36].requires_grad_()
    viewed_by = replace(routing, weights_TK=turned_TK.requires_grad_())
    y_TH = fused(spec, weights, view_TH, viewed_by)
    assert torch.equal(y_TH, plain)
    dy_TH = torch.randn(32, 12).double().t()
    pairs = [
        torch.autograd.grad(y, (x, r.weights_TK, weights.up), g, retain_graph=True)
        for g in (dy_TH, dy_TH.contiguous())
        for y, x, r in ((y_TH, view_TH, viewed_by), (plain, x_TH, routing))
    ]
    for grads in pairs[1:]:
        assert all(map(torch.equal, grads, pairs[0]))
    ones = torch.autograd.grad(plain, (x_TH, weights.down), torch.ones(12, 32).double())
    summed = torch.autograd.grad(fused(spec, weights, x_TH, routing).sum(), (x_TH, weights.down))
    assert all(map(torch.equal, ones, summed))


@pytest.mark.parametrize("x_dtype", [torch.float64, torch.bfloat16])
def test_rows_of_another_dtype(x_dtype: torch.dtype) -> None:
    """The products run in the weights' dtype; output and gradient come back in the rows'."""
    spec = SPECS[0]
    weights, x_TH, routing = a_case(spec, dtype=torch.float32)
    other_TH = x_TH.detach().to(x_dtype).requires_grad_()
    y_TH = fused(spec, weights, other_TH, routing)
    (dx_TH,) = torch.autograd.grad(y_TH.float().sum(), other_TH)
    assert y_TH.dtype == dx_TH.dtype == x_dtype
    cast_TH = other_TH.detach().float().requires_grad_()
    want_TH = fused(spec, weights, cast_TH, routing)
    assert torch.equal(y_TH, want_TH.to(x_dtype))
    assert torch.equal(dx_TH, torch.autograd.grad(want_TH.sum(), cast_TH)[0].to(x_dtype))


def test_twice_in_one_graph() -> None:
    spec = SPECS[2]
    weights, x_TH, routing = a_case(spec)

    def twice(run: Callable[..., Tensor]) -> Tensor:
        return run(spec, weights, x_TH + run(spec, weights, x_TH, routing), routing)

    found, want = (gradients(twice(run), weights, x_TH, routing) for run in (fused, reference))
    for name, tensor in want.items():
        assert relative_error(found[name], tensor) < EXACT, name


def test_backward_may_run_again_but_has_no_gradient() -> None:
    spec = SPECS[0]
    weights, x_TH, routing = a_case(spec)
    y_TH = fused(spec, weights, x_TH, routing)
    first, second = (
        torch.autograd.grad(y_TH.sum(), (x_TH, weights.up), retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    with pytest.raises(SecondOrderError, match='backend="fused": create_graph=True asks'):
        torch.autograd.grad(y_TH.sum(), x_TH, create_graph=True)


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[2]], ids=["silu", "gpt_oss"])
def test_operators_for_the_compiler(spec: BankSpec, bias: bool, tokens: int) -> None:
    weights, x_TH, routing = a_case(spec, tokens, "dropped", torch.float32)
    if not bias:
        weights = replace(weights, up_bias=None, down_bias=None)
    args = operator_arguments(spec, weights, x_TH, routing)
    opcheck(torch.ops.moetk.moe_mlp.default, (*args, True))
    args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    _, h_NJ = room.moe_mlp(*args, keep=True)
    for need in ([True] * 4 + [bias] * 2, [False, True] * 2 + [False] * 2):
        given_ = (torch.randn_like(args[0]), h_NJ, *args, need)
        opcheck(torch.ops.moetk.moe_mlp_backward.default, given_)


def test_a_compiled_bank_equals_an_eager_one() -> None:
    spec = SPECS[2]
    weights, x_TH, routing = a_case(spec, pattern="dropped")
    torch._dynamo.reset()
    run = torch.compile(fused, fullgraph=True, backend="aot_eager")
    found = gradients(run(spec, weights, x_TH, routing), weights, x_TH, routing)
    want = gradients(fused(spec, weights, x_TH, routing), weights, x_TH, routing)
    for name, tensor in want.items():
        assert relative_error(found[name], tensor) < EXACT


@pytest.mark.parametrize("name", ["grouped", "fused"])
@pytest.mark.parametrize("how", ["unused", "dropped"])
def test_the_weight_of_a_choice_that_nobody_computes_may_be_anything(name: str, how: str) -> None:
    spec = BankSpec(2, 8, 4)
    weights = BankWeights(torch.randn(2, 8, 8), torch.randn(2, 8, 4))
    x_TH, weights_TK = torch.randn(3, 8), torch.tensor([[1.0, math.nan]] * 3)
    second = -1 if how == "unused" else 1
    kept_TK = None if how == "unused" else torch.tensor([[True, False]] * 3)
    routing = TokenChoice(torch.tensor([[0, second]] * 3), weights_TK, 2, kept_TK=kept_TK)
    run = {"grouped": grouped, "fused": fused}[name]
    assert torch.allclose(
        run(spec, weights, x_TH, routing), reference(spec, weights, x_TH, routing), atol=1e-6
    )


def test_an_idle_experts_bias_reaches_no_gradient() -> None:
    spec = BankSpec(2, 8, 4)
    down_bias = torch.tensor([[0.0] * 8, [math.inf] * 8])
    weights = BankWeights(torch.randn(2, 8, 8), torch.randn(2, 8, 4), torch.zeros(2, 8), down_bias)
    weights_TK = torch.ones(3, 2, requires_grad=True)
    routing = TokenChoice(torch.tensor([[0, -1]] * 3), weights_TK, 2)
    fused(spec, weights, torch.randn(3, 8), routing).sum().backward()
    assert weights_TK.grad is not None
    assert weights_TK.grad.isfinite().all() and weights_TK.grad[:, 1].eq(0).all()
