"""Every backend computes the bank that a dense sum over all experts defines, gradients included."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetk import ExpertBank, MoELayer, RouterContext, TokenChoice
from moetk.equivalence.judge import judge, relative_error
from moetk.errors import (
    BackendError,
    MoeShapeError,
    NonFiniteRoutingError,
    RouterConfigError,
    SecondOrderError,
)
from moetk.experts import (
    BankSpec,
    BankWeights,
    ClampedGated,
    Gated,
    GptOssGated,
    Plain,
    auto_row,
    auto_table,
    backends,
    bank_forward,
    pick_backend,
)
from moetk.experts.fused import why_not_fused
from moetk.routers import MixtralRouter
from moetk.routing import Routing
from tests.banks import (
    PATTERNS,
    banks,
    dense,
    expert_choice,
    gradients,
    make_weights,
    rows,
    soft_choice,
    token_choice,
)

BACKENDS = [backend.name for backend in backends() if "cpu" in backend.device_types]
EXACT = 1e-12


def assert_same(spec: BankSpec, weights: BankWeights, x_TH: Tensor, routing: Routing) -> None:
    """Each backend against the twin: values and every gradient."""
    want = gradients(dense(spec, weights, x_TH, routing), weights, x_TH, routing)
    for backend in BACKENDS:
        y_TH = bank_forward(spec, weights, x_TH, routing, backend)
        found = gradients(y_TH, weights, x_TH, routing)
        assert found.keys() == want.keys()
        for name, tensor in want.items():
            assert found[name].dtype == tensor.dtype
            error = (found[name] - tensor).norm() / tensor.norm().clamp(min=1)
            assert error <= EXACT, (backend, name, float(error))


@given(banks(), st.sampled_from([0, 1, 2, 9]), st.integers(1, 8), st.sampled_from(PATTERNS))
@settings(max_examples=120)
def test_token_choice(
    bank: tuple[BankSpec, BankWeights], tokens: int, k: int, pattern: str
) -> None:
    spec, weights = bank
    routing = token_choice(tokens, spec.num_experts, min(k, spec.num_experts), pattern)
    assert_same(spec, weights, rows(tokens, spec.hidden_size), routing)


@given(banks(), st.sampled_from([0, 1, 5]), st.integers(1, 4))
@settings(max_examples=40)
def test_expert_choice(bank: tuple[BankSpec, BankWeights], tokens: int, capacity: int) -> None:
    spec, weights = bank
    routing = expert_choice(tokens, spec.num_experts, capacity)
    assert_same(spec, weights, rows(tokens, spec.hidden_size), routing)


@given(banks(scale="output"), st.integers(1, 3), st.sampled_from([0, 1, 4]), st.integers(1, 2))
@settings(max_examples=40)
def test_soft_choice(
    bank: tuple[BankSpec, BankWeights], batch: int, length: int, slots: int
) -> None:
    spec, weights = bank
    routing = soft_choice(batch, length, spec.num_experts, slots)
    assert_same(spec, weights, rows(batch * length, spec.hidden_size), routing)


@given(banks(special=("zero", "copy", "copy")), st.sampled_from([0, 1, 9]), st.integers(1, 4))
@settings(max_examples=40)
def test_special_experts(bank: tuple[BankSpec, BankWeights], tokens: int, k: int) -> None:
    """Ids behind the real ones add nothing, or the token itself, never scaled twice."""
    spec, weights = bank
    if spec.scale == "input":
        spec = replace(spec, scale="output")
    k = min(k, spec.num_ids)
    routing = token_choice(tokens, spec.num_ids, k, "random")
    assert_same(spec, weights, rows(tokens, spec.hidden_size), routing)


LAYOUTS = [
    BankSpec(5, 32, 24),
    BankSpec(5, 32, 24, ClampedGated(0.4)),
    BankSpec(5, 32, 24, GptOssGated(1.7, 0.5), transposed=True, interleaved=True),
    BankSpec(5, 32, 24, Plain()),
    BankSpec(5, 32, 24, scale="input"),
]


@pytest.mark.parametrize("spec", LAYOUTS, ids=lambda s: type(s.activation).__name__ + s.scale)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["fp32_weights", "own"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_pass_rule(
    spec: BankSpec, dtype: torch.dtype, weight_dtype: torch.dtype | None, bias: bool
) -> None:
    """Grouped against the truth in fp64 at the same rounded inputs; reference is the eager one."""
    torch.manual_seed(0)
    weights = make_weights(spec, bias, dtype)
    x_TH = torch.randn(96, 32).to(dtype).requires_grad_()
    drawn = token_choice(96, 5, 3, "random")
    weights_TK = drawn.weights_TK.detach().to(weight_dtype or dtype).requires_grad_()
    routing = replace(drawn, weights_TK=weights_TK)
    found = {}
    for backend in BACKENDS:
        y_TH = bank_forward(spec, weights, x_TH, routing, backend)
        assert y_TH.dtype == dtype
        found[backend] = gradients(y_TH, weights, x_TH, routing)

    def raised(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_()

    held = {name: t for name, t in vars(weights).items() if isinstance(t, Tensor)}
    exact = replace(weights, **{name: raised(tensor) for name, tensor in held.items()})
    x_exact = raised(x_TH)
    routing_exact = replace(routing, weights_TK=raised(weights_TK))
    y_exact = dense(spec, exact, x_exact, routing_exact)
    truth = gradients(y_exact, exact, x_exact, routing_exact)
    for name, tensor in truth.items():
        verdict = judge(
            name, found["grouped"][name], found["reference"][name], tensor, reduction=96
        )
        assert verdict.ok, verdict


# Laws.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_nan_stays_alone(backend: str, dtype: torch.dtype) -> None:
    """Every other row, and every other row's gradient, is bitwise what it was."""
    torch.manual_seed(0)
    spec = BankSpec(4, 16, 8)
    weights = make_weights(spec, True, dtype)
    routing = token_choice(12, 4, 2, "random")
    x_TH = torch.randn(12, 16).to(dtype)
    spoiled_TH = x_TH.clone()
    spoiled_TH[5] = float("nan")
    others = torch.arange(12) != 5
    found = []
    for x in (x_TH, spoiled_TH):
        x.requires_grad_()
        y_TH = bank_forward(spec, weights, x, routing, backend)
        (dx_TH,) = torch.autograd.grad(y_TH[others].float().sum(), x)
        found.append((y_TH.detach(), dx_TH))
    (y_TH, dx_TH), (y_spoiled_TH, dx_spoiled_TH) = found
    assert y_spoiled_TH[5].isnan().all()
    assert torch.equal(y_spoiled_TH[others], y_TH[others])
    assert torch.equal(dx_spoiled_TH[others], dx_TH[others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_that_does_not_check_lets_a_row_of_nan_through(backend: str) -> None:
    torch.manual_seed(0)
    parts = MixtralRouter(16, 4, 2), ExpertBank(16, 4, 8, backend=backend)
    x_TH = torch.randn(12, 16)
    want, _ = MoELayer(*parts)(x_TH)
    x_TH[5] = float("nan")
    found, routing = MoELayer(*parts, check=False)(x_TH)
    others = torch.arange(12) != 5
    assert found[5].isnan().all() and torch.equal(found[others], want[others])
    assert ((routing.experts_TK >= 0) & (routing.experts_TK < 4)).all()
    with pytest.raises(NonFiniteRoutingError, match="at token 5, column 0"):
        MoELayer(*parts)(x_TH)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_duplicate_counts_twice(backend: str) -> None:
    torch.manual_seed(0)
    spec = BankSpec(3, 8, 4)
    weights, x_TH = make_weights(spec, True), rows(6, 8)
    once = TokenChoice(torch.full((6, 1), 2), torch.full((6, 1), 0.7).double(), 3)
    twice = TokenChoice(torch.full((6, 2), 2), torch.tensor([[0.5, 0.2]]).double().expand(6, 2), 3)
    found = [bank_forward(spec, weights, x_TH, routing, backend) for routing in (once, twice)]
    assert relative_error(found[1], found[0]) < 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_that_nobody_chose_has_gradient_zero(backend: str) -> None:
    torch.manual_seed(0)
    spec = BankSpec(4, 8, 4)
    weights, x_TH = make_weights(spec, True), rows(6, 8)
    routing = token_choice(6, 4, 2, "skewed")
    found = gradients(bank_forward(spec, weights, x_TH, routing, backend), weights, x_TH, routing)
    for name in ("up", "down", "up_bias", "down_bias"):
        assert (found[name][:2] != 0).any() and (found[name][2:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", ["x", "weights_TK", "up", "down", "up_bias", "down_bias"])
def test_one_gradient_alone(backend: str, trained: str) -> None:
    """Frozen banks and detached routers: what is asked for comes, and nothing else is needed."""
    torch.manual_seed(0)
    spec = BankSpec(3, 8, 4)
    weights, x_TH, routing = make_weights(spec, True), rows(6, 8), token_choice(6, 3, 2, "random")
    whole = gradients(bank_forward(spec, weights, x_TH, routing, backend), weights, x_TH, routing)

    def only(owner: Any, name: str) -> Any:
        values = {n: getattr(owner, n) for n in vars(owner)}
        return replace(
            owner,
            **{
                n: v.detach().requires_grad_(n == name)
                for n, v in values.items()
                if isinstance(v, Tensor) and v.is_floating_point()
            },
        )

    weights, routing = only(weights, trained), only(routing, trained)
    x_TH = x_TH.detach().requires_grad_(trained == "x")
    y_TH = bank_forward(spec, weights, x_TH, routing, backend)
    leaf = next(
        t
        for t in (x_TH, *vars(weights).values(), routing.weights_TK)
        if isinstance(t, Tensor) and t.requires_grad
    )
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(y_TH.shape, generator=generator, dtype=torch.float64)
    (found,) = torch.autograd.grad(y_TH, leaf, cotangent)
    assert relative_error(found, whole[trained]) < EXACT


def test_a_second_derivative_is_refused() -> None:
    torch.manual_seed(0)
    spec = BankSpec(2, 4, 4)
    weights, x_TH, routing = make_weights(spec, False), rows(3, 4), token_choice(3, 2, 1, "random")
    y_TH = bank_forward(spec, weights, x_TH, routing, "grouped")
    with pytest.raises(SecondOrderError, match='backend="grouped": create_graph=True asks'):
        torch.autograd.grad(y_TH.sum(), x_TH, create_graph=True)


def test_a_compiled_bank_equals_an_eager_one() -> None:
    torch.manual_seed(0)
    spec = BankSpec(4, 8, 4)
    weights, x_TH = make_weights(spec, True), rows(6, 8)
    routing = token_choice(6, 4, 2, "unused")
    torch._dynamo.reset()
    run = torch.compile(bank_forward, fullgraph=True, backend="aot_eager")
    found = gradients(run(spec, weights, x_TH, routing), weights, x_TH, routing)
    want = gradients(bank_forward(spec, weights, x_TH, routing), weights, x_TH, routing)
    for name, tensor in want.items():
        assert relative_error(found[name], tensor) < EXACT
    with pytest.raises(Exception, match="its loop over the rows of each expert cannot be compiled"):
        run(spec, weights, x_TH, routing, "reference")


# The module and the settings.


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_expert_bank(transposed: bool, bias: bool) -> None:
    spec = BankSpec(1, 1, 1, transposed=transposed)
    bank = ExpertBank(16, 4, 9, spec=spec, bias=bias)
    shapes = {name: tuple(p.shape) for name, p in bank.named_parameters()}
    want = {"gate_up_proj": (4, 18, 16), "down_proj": (4, 16, 9)}
    if transposed:
        want = {"gate_up_proj": (4, 16, 18), "down_proj": (4, 9, 16)}
    if bias:
        want |= {"gate_up_proj_bias": (4, 18), "down_proj_bias": (4, 16)}
    assert shapes == want
    bank.spec.check(bank.weights())
    assert bank.num_experts == 4 and "H=16, E=4, I=9, auto" in repr(bank)
    for name, bound in (("gate_up_proj", 16**-0.5), ("down_proj", 9**-0.5)):
        largest = bank.get_parameter(name).abs().max()
        assert 0.9 * bound < largest <= bound
    x_TH, routing = torch.randn(5, 16), token_choice(5, 4, 2, "random")
    assert torch.equal(bank(x_TH, routing), bank_forward(bank.spec, bank.weights(), x_TH, routing))


SPEC_ERRORS = [
    (lambda: BankSpec(0, 4, 4), "num_experts=0; need an integer >= 1"),
    (lambda: BankSpec(2, True, 4), "hidden_size=True; need an integer >= 1"),
    (lambda: BankSpec(2, 4, 1.5), "intermediate_size=1.5; need an integer >= 1"),  # type: ignore[arg-type]
    (lambda: BankSpec(2, 4, 4, special=("skip",)), "special=['skip']; each is one of ('zero', 'c"),
    (lambda: BankSpec(2, 4, 4, scale="both"), "scale='both'; 'output' or 'input'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("build", "says"), SPEC_ERRORS)
def test_specs_that_cannot_work(build: Callable[[], Any], says: str) -> None:
    with pytest.raises(RouterConfigError, match=re.escape(f"BankSpec: {says}")):
        build()


def test_weights_of_another_shape() -> None:
    weights = make_weights(BankSpec(2, 4, 4), bias=True)
    BankSpec(2, 4, 4).check(weights)
    message = "bank weight up is (2, 8, 4), expected (2, 4, 8) for E=2, H=4, I=4, transposed=True."
    with pytest.raises(MoeShapeError, match=re.escape(message)):
        BankSpec(2, 4, 4, transposed=True).check(weights)
    with pytest.raises(MoeShapeError, match=re.escape("bank weight down_bias is (2, 3), expected")):
        BankSpec(2, 4, 4).check(replace(weights, down_bias=torch.zeros(2, 3)))


def test_rows_of_another_width() -> None:
    bank, routing = ExpertBank(8, 2, 4), token_choice(3, 2, 1, "random")
    for shape in ((3, 7), (3, 2, 8)):
        message = f"the bank: x_TH is {shape}, expected (T, H=8)."
        with pytest.raises(MoeShapeError, match=re.escape(message)):
            bank(torch.randn(shape), routing)


def test_backends_that_cannot_run() -> None:
    with pytest.raises(BackendError, match="backend='fast' is not one of this version"):
        ExpertBank(4, 2, 4, backend="fast")
    message = (
        'backend="grouped" cannot run here: dtype int64, needs float64 or float32 or bfloat16 or '
        'float16. Use backend="auto" (here: "grouped") or see Replacement.explain().'
    )
    with pytest.raises(BackendError, match=re.escape(message)):
        pick_backend("grouped", torch.int64, torch.device("cpu"), 1, "here")
    with pytest.raises(BackendError, match="device xpu, needs cpu or cuda"):
        pick_backend("reference", torch.float32, torch.device("xpu"), 1)


def test_auto_follows_the_shipped_table(monkeypatch: pytest.MonkeyPatch) -> None:
    room = importlib.import_module("moetk.experts.backends")  # its package hides it
    monkeypatch.setattr(room, "_lacks", lambda device: None)  # a device that runs them all
    known = {backend.name for backend in backends()}
    assert all(row.backend in known and row.measured for row in auto_table())
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for device in ("cpu", "cuda"):
            for num_rows in (0, 1, 2**10, 2**30):
                row = auto_row(device, dtype, num_rows)
                assert num_rows <= row.max_rows
                picked = pick_backend("auto", dtype, torch.device(device), num_rows)
                assert picked.name == row.backend


def test_activations_are_compared_by_value() -> None:
    """Equal layers have equal specs, and share compiled code."""
    assert BankSpec(2, 4, 4) == BankSpec(2, 4, 4) and hash(Gated()) == hash(Gated())
    assert GptOssGated(1.7, 7.0) != GptOssGated(1.7, 6.0)
    context = RouterContext()
    assert context != RouterContext()  # values with tensors are compared by identity


def test_a_spec_without_a_hash_is_told_why_not_all_the_same() -> None:
    """An activation may be any callable, also one that cannot be looked up."""

    @dataclass
    class Act:
        def __call__(self, z: torch.Tensor) -> torch.Tensor:
            return z.relu()

    spec = BankSpec(2, 8, 4, activation=Gated(Act()))
    with pytest.raises(TypeError, match="unhashable"):
        hash(spec)
    assert "it has no kernel for" in str(why_not_fused(spec, torch.bfloat16))
