"""The fused bank's kernels against the loop over experts in fp64."""

from __future__ import annotations

from dataclasses import astuple, replace
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from moetk.errors import BackendError
from moetk.experts import Activation, BankSpec, BankWeights, ClampedGated, Gated, GptOssGated, Plain
from moetk.experts.fused import form_of
from moetk.experts.reference import reference
from moetk.kernels import fused_mlp
from moetk.kernels.sort_plan import sort_plan
from tests.gpu.calls import BF16, Call, drawn, on_kernels
from tests.gpu.device import DEVICE, needs_kernels, normal
from tests.gpu.judged import assert_bitwise, assert_passes

SEEDS = range(3)
GPT_OSS = GptOssGated(1.7, 0.6)
ACTIVATIONS: dict[str, Activation] = {
    "silu": Gated(),
    "gpt_oss": GPT_OSS,
    "gelu": Gated(F.gelu),
    "gelu_tanh": Gated(partial(F.gelu, approximate="tanh")),
    "relu": Gated(F.relu),
    "clamped": ClampedGated(0.5),
    "plain relu": Plain(),
    "plain gelu": Plain(F.gelu),
}
LAYOUTS = list(product((False, True), repeat=3))  # transposed, interleaved, bias
FORMS = [
    (name, layout)
    for n, name in enumerate(ACTIVATIONS)
    # Two activations in every layout; of the others each in one, and in its opposite.
    for layout in (LAYOUTS if n < 2 else (LAYOUTS[n % 4], LAYOUTS[7 - n % 4]))
]
ODD = BankSpec(5, 72, 40)  # no multiple of any tile
OSS = BankSpec(8, 64, 48, GPT_OSS, transposed=True, interleaved=True)


def assert_right(calls: list[Call]) -> None:
    """As near to fp64 as eager is, and twice the same to the bit."""
    draws = []
    for call in calls:
        ours = call.run(on_kernels)
        assert_bitwise(call.run(on_kernels), ours)
        draws.append((ours, call.run(reference), call.run(reference, torch.float64)))
    spec = calls[0].spec
    rows = calls[0].experts_TK.numel()
    assert_passes(draws, reduction=max(spec.hidden_size, spec.up_width, rows))


@pytest.mark.parametrize(
    ("activation", "layout"),
    FORMS,
    ids=[f"{n}-{''.join('tib'[i] * f for i, f in enumerate(fs))}" for n, fs in FORMS],
)
@pytest.mark.parametrize("pattern", ["random", "dropped"])
def test_forms_and_layouts(activation, layout, pattern):
    transposed, interleaved, bias = layout
    spec = replace(
        ODD,
        activation=ACTIVATIONS[activation],
        transposed=transposed,
        interleaved=interleaved and not activation.startswith("plain"),
    )
    assert_right([drawn(spec, 29, 3, bias=bias, pattern=pattern, seed=seed) for seed in SEEDS])


@pytest.mark.parametrize("pattern", ["random", "skewed", "duplicates", "unused", "dropped"])
@pytest.mark.parametrize("tokens", [1, 7, 256])
@pytest.mark.parametrize(
    "spec", [BankSpec(16, 64, 32), BankSpec(4, 64, 32), OSS], ids=["E=16", "K=E", "gpt_oss"]
)
def test_few_tokens(spec, tokens, pattern):
    """Most experts are empty, or (skewed) all but four; with K = E none is."""
    bias = spec is OSS
    assert_right([drawn(spec, tokens, 4, bias=bias, pattern=pattern, seed=s) for s in SEEDS])


@pytest.mark.parametrize(
    ("spec", "tokens", "k"),
    [
        (BankSpec(4, 256, 512), 8000, 2),
        (BankSpec(8, 576, 576, GPT_OSS, transposed=True, interleaved=True), 2000, 4),
        (BankSpec(512, 64, 32), 1500, 10),
    ],
    ids=["long", "gpt_oss", "512 experts"],
)
@pytest.mark.parametrize("pattern", ["random", "skewed", "dropped"])
def test_many_rows(spec, tokens, k, pattern):
    bias = spec.activation == GPT_OSS
    assert_right([drawn(spec, tokens, k, bias=bias, pattern=pattern)])


@pytest.mark.parametrize(("dtype", "weight_dtype"), [(BF16, torch.float32), (torch.float16, None)])
def test_dtypes(dtype, weight_dtype):
    made = partial(drawn, OSS, 64, 4, bias=True, dtype=dtype, weight_dtype=weight_dtype)
    assert_right([made(seed=seed) for seed in SEEDS])


@pytest.mark.parametrize("spec", [ODD, OSS], ids=["silu", "gpt_oss"])
def test_no_tokens(spec):
    found = drawn(spec, 0, 3, bias=True).run(on_kernels)
    want = drawn(spec, 0, 3, bias=True).run(reference)
    assert_bitwise(found, want)


@pytest.mark.parametrize("pattern", ["all dropped", "all unused"])
def test_nothing_to_compute_is_zero(pattern):
    call = drawn(OSS, 40, 4, bias=True)
    call = call.with_leaves(weights_TK=torch.zeros_like(call.leaves["weights_TK"]))
    if pattern == "all dropped":
        call = replace(call, kept_TK=torch.zeros_like(call.experts_TK, dtype=torch.bool))
    else:
        call = replace(call, experts_TK=torch.full_like(call.experts_TK, -1))
    assert_bitwise(call.run(on_kernels), call.run(reference))


@pytest.mark.parametrize("trained", ["x", "weights_TK", "up", "down", "up_bias", "down_bias"])
@pytest.mark.parametrize("spec", [ODD, OSS], ids=["silu", "gpt_oss"])
def test_one_gradient_alone_is_that_gradient(spec, trained):
    call = drawn(spec, 40, 3, bias=True, pattern="dropped")
    alone, every = call.run(on_kernels, trained=trained), call.run(on_kernels)
    assert_bitwise(alone, {name: every[name] for name in ("y", f"d{trained}")})


def test_nothing_is_kept_without_gradients():
    call = drawn(OSS, 40, 4, bias=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.no_grad():
            y_TH = call.forward(on_kernels, call.leaves)
        assert not kept
    assert torch.equal(y_TH, call.run(on_kernels)["y"])


@pytest.mark.parametrize("gap", [8, pytest.param(1, marks=needs_kernels)])
def test_views_are_what_they_show(gap):
    """Strided; with a gap of 1 (which torch's grouped product refuses) also starting between
    multiples of 16 bytes."""
    call = drawn(OSS, 40, 4, bias=True)

    def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
        inner = tensor.shape[1:]
        holder = tensor.new_full((len(tensor), *(n + 2 * gap for n in inner)), torch.nan)
        inside = holder[(slice(None), *(slice(gap, n + gap) for n in inner))]
        return inside.copy_(tensor)

    views = {name: elsewhere(leaf) for name, leaf in call.leaves.items()}
    assert not any(view.is_contiguous() for view in views.values())
    strange = replace(call.with_leaves(**views), dy_TH=elsewhere(call.dy_TH))
    assert_bitwise(strange.run(on_kernels), call.run(on_kernels))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("spec", [ODD, OSS], ids=["silu", "gpt_oss"])
def test_a_row_that_is_not_finite_stays_alone(spec, value):
    call = drawn(spec, 40, 3, bias=True)
    spoiled_TH = call.leaves["x"].clone()
    spoiled_TH[5] = value
    clean, dirty = call.run(on_kernels), call.with_leaves(x=spoiled_TH).run(on_kernels)
    others = torch.arange(40, device=spoiled_TH.device) != 5
    for name in ("y", "dx", "dweights_TK"):
        assert torch.equal(dirty[name][others], clean[name][others]), name
    # Nothing of it where nobody computes it.
    unused_TK, none_TK = call.experts_TK.clone(), call.leaves["weights_TK"].clone()
    unused_TK[5], none_TK[5] = -1, 0
    absent = replace(call.with_leaves(x=spoiled_TH, weights_TK=none_TK), experts_TK=unused_TK)
    found = absent.run(on_kernels)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert not any(found[name][5].any() for name in ("y", "dx", "dweights_TK"))


@needs_kernels
@pytest.mark.parametrize("spec", [ODD, OSS], ids=["silu", "gpt_oss"])
def test_add_to_grad_adds(spec):
    """Into a .grad that is there; a first gradient is returned as ever."""
    call = drawn(spec, 300, 3, bias=True)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in call.leaves.items()}

    def adds(spec: BankSpec, weights: BankWeights, *rest: object) -> torch.Tensor:
        return on_kernels(spec, replace(weights, add_to_grad=True), *rest)

    returned = call.run(on_kernels)
    call.forward(adds, leaves).backward(call.dy_TH)
    assert_bitwise({f"d{n}": leaf.grad for n, leaf in leaves.items()}, _gradients(returned))
    memory = {name: leaves[name].grad.data_ptr() for name in ("up", "down")}
    call.forward(adds, leaves).backward(call.dy_TH)
    for name, pointer in memory.items():
        assert leaves[name].grad.data_ptr() == pointer
        truth = 2 * call.run(reference, torch.float64)[f"d{name}"]
        twice = returned[f"d{name}"] + returned[f"d{name}"]
        assert_passes(
            [({name: leaves[name].grad}, {name: twice}, {name: truth})], reduction=2 * 300
        )


@needs_kernels
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("gather", ["none", "left", "right"])
def test_a_sum_that_the_copy_engine_adds_to(gather, dtype):
    """Of 128 x 128 tiles the last reaches over the edge; experts of few and of many rows, and of
    none, whose sums stay as they were; behind them rows of nobody."""
    from moetk.kernels.gpu.outer import outer
    from moetk.kernels.gpu.tiles import Tile

    counts, tokens, a, b = (0, 3, 500, 64, 0, 130), 300, 256, 200
    ends, used = torch.tensor(counts, device=DEVICE).cumsum(0).int(), sum(counts)
    source_N = torch.randint(tokens, (used + 9,), device=DEVICE, dtype=torch.int32)
    left = normal(1, tokens if gather == "left" else used + 9, a, dtype=dtype)
    right = normal(2, tokens if gather == "right" else used + 9, b, dtype=dtype)
    for side, operand in (("left", left), ("right", right)):
        if gather != side:
            operand[used:] = float("nan")
    before_EAB = normal(3, len(counts), a, b, dtype=dtype)
    at = source_N.long()[:used]
    rows_NA = left[at] if gather == "left" else left[:used]
    rows_NB = right[at] if gather == "right" else right[:used]
    pairs = list(zip(rows_NA.split(counts), rows_NB.split(counts), strict=True))
    sums_EAB = torch.stack([x.T @ y for x, y in pairs])
    true_EAB = torch.stack([x.double().T @ y.double() for x, y in pairs])
    found = []
    for _ in range(2):
        into = before_EAB.clone()
        at_N = None if gather == "none" else source_N
        tile = Tile(128, 128, 32, 4, 5, 4, reduces=1)
        outer("", left, right, ends, source_N=at_N, gather=gather, into_EAB=into, tile=tile)
        found.append({"sum": into})
    assert_bitwise(*found)
    assert torch.equal(found[0]["sum"][0], before_EAB[0])
    eager, truth = before_EAB + sums_EAB, before_EAB.double() + true_EAB
    assert_passes([(found[0], {"sum": eager}, {"sum": truth})], reduction=max(counts))


def _gradients(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in results.items() if name != "y"}


@needs_kernels
def test_add_to_grad_refuses_who_waits_for_the_gradient():
    call = drawn(ODD, 30, 3)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in call.leaves.items()}
    leaves["up"].register_post_accumulate_grad_hook(lambda _: None)
    weights = BankWeights(leaves["up"], leaves["down"], add_to_grad=True)
    with pytest.raises(BackendError, match="add_to_grad=True: up has gradient hooks"):
        call.forward(lambda spec, _, *rest: on_kernels(spec, weights, *rest), leaves)


@pytest.mark.parametrize("spec", [ODD, OSS], ids=["silu", "gpt_oss"])
def test_the_operators_are_operators(spec):
    call = drawn(spec, 12, 3, bias=True, pattern="dropped")
    plan, form = sort_plan(call.experts_TK, call.kept_TK, spec.num_experts), form_of(spec)
    names = ("x", "weights_TK", "up", "down", "up_bias", "down_bias")
    fields = (plan.choice_N, plan.source_N, plan.slot_TK, plan.offsets_E, *astuple(form))
    plain = tuple(call.leaves[name] for name in names)
    trained = tuple(leaf.detach().requires_grad_() for leaf in plain)
    # What the two hold behind the last offset is nobody's, so outputs are compared above.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.moetk.moe_mlp.default, (*trained, *fields, True), test_utils=checks)
    _, h_NJ = fused_mlp.moe_mlp(*plain, *fields, True)
    given = (call.dy_TH, h_NJ, *plain, *fields, [True] * 6)
    opcheck(torch.ops.moetk.moe_mlp_backward.default, given, test_utils=checks)
    y_TH, _ = fused_mlp.moe_mlp(*plain, *fields, False)
    assert torch.equal(y_TH, call.run(on_kernels)["y"])
