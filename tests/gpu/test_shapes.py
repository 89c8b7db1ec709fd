"""The bank at the sizes that are measured: 16,384 tokens, each load, against fp64 computed by a few
experts at a time.

Letters: T tokens, H hidden, I expert width, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moetk.bench.loads import LOADS
from moetk.bench.shapes import LAYERS
from moetk.context import RouterContext
from moetk.experts import BankSpec
from moetk.experts.reference import reference
from moetk.routers import MixtralRouter
from moetk.routers.fused import choose_fused
from moetk.routing import TokenChoice
from tests.gpu.calls import BF16, Call, on_kernels
from tests.gpu.device import DEVICE, KERNELS, normal
from tests.gpu.judged import assert_bitwise, assert_passes

pytestmark = pytest.mark.large
AT_ONCE = 4  # experts of one part: Mixtral's are 1.4 GiB each in fp64
TOKENS = 16_384 if KERNELS else 64
SHAPES = {
    name: shape
    if KERNELS
    else replace(shape, hidden_size=32, intermediate_size=16, num_experts=8, top_k=2)
    for name, shape in LAYERS.items()
}


@pytest.fixture(autouse=True)
def memory_for_the_next(device: torch.device) -> Iterator[None]:
    yield
    if KERNELS:
        torch.cuda.empty_cache()


def in_parts(call: Call, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What `call.run(reference, dtype)` computes, a few experts at a time: their outputs and
    gradients are added up, or lie behind each other."""
    total: dict[str, Tensor] = {}
    stacked: dict[str, list[Tensor]] = {"dup": [], "ddown": []}
    for first in range(0, call.spec.num_experts, AT_ONCE):
        part = slice(first, first + AT_ONCE)
        weights = {name: call.leaves[name][part] for name in ("up", "down")}
        ids_TK = call.experts_TK - first
        here_TK = (ids_TK >= 0) & (ids_TK < AT_ONCE)
        few = replace(
            call.with_leaves(**weights),
            spec=replace(call.spec, num_experts=len(weights["up"])),
            experts_TK=ids_TK.masked_fill(~here_TK, -1),
        )
        found = few.run(reference, dtype)
        for name, tensors in stacked.items():
            tensors.append(found.pop(name))
        total = {name: total.get(name, 0) + tensor for name, tensor in found.items()}
    return {**total, **{name: torch.cat(tensors) for name, tensors in stacked.items()}}


def routed(name: str, load: str) -> tuple[Tensor, TokenChoice]:
    """Rows and the choice of a router of that size, under a load of the benchmarks."""
    shape, seed = SHAPES[name], 10 * list(LOADS).index(load)
    router = MixtralRouter(shape.hidden_size, shape.num_experts, shape.top_k).to(DEVICE, BF16)
    weight_EH = normal(seed, *router.weight.shape, dtype=BF16, std=shape.hidden_size**-0.5)
    x_TH = normal(seed + 1, TOKENS, shape.hidden_size, dtype=BF16)
    LOADS[load](weight_EH, x_TH, shape.top_k, torch.Generator(DEVICE).manual_seed(seed))
    with torch.no_grad():
        router.weight.copy_(weight_EH)
    return x_TH, choose_fused(router, x_TH, RouterContext(), BF16)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_bank_of_real_size(name, load):
    shape = SHAPES[name]
    E, I, H = shape.num_experts, shape.intermediate_size, shape.hidden_size
    x_TH, routing = routed(name, load)
    counts_E = routing.experts_TK.flatten().bincount(minlength=E)
    if load == "same":
        assert int((counts_E == TOKENS).sum()) == shape.top_k
    else:
        assert (counts_E > 0).sum() > shape.top_k
    leaves = {
        "x": x_TH,
        "weights_TK": routing.weights_TK.detach(),
        "up": normal(7, E, 2 * I, H, dtype=BF16, std=H**-0.5),
        "down": normal(8, E, H, I, dtype=BF16, std=I**-0.5),
    }
    dy_TH = normal(9, TOKENS, H, dtype=BF16)
    call = Call(BankSpec(E, H, I), leaves, routing.experts_TK, None, dy_TH)
    ours = call.run(on_kernels)
    assert_bitwise(call.run(on_kernels), ours)
    eager, truth = in_parts(call, None), in_parts(call, torch.float64)
    assert_passes([(ours, eager, truth)], reduction=TOKENS)


def test_the_parts_make_the_whole():
    """The truth of this file is the reference's, in fp64."""
    torch.manual_seed(0)
    leaves = {
        "x": normal(0, 20, 16),
        "weights_TK": normal(1, 20, 3),
        "up": normal(2, 10, 16, 16),
        "down": normal(3, 10, 16, 8),
    }
    experts_TK = torch.rand(20, 10).topk(3).indices.to(DEVICE)
    call = Call(BankSpec(10, 16, 8), leaves, experts_TK, None, normal(4, 20, 16))
    want = call.run(reference, torch.float64)
    for name, tensor in in_parts(call, torch.float64).items():
        assert (tensor - want[name]).norm() <= 1e-12 * want[name].norm(), name


def test_all_of_deepseek_v3s_experts_on_one_device():
    """More elements than an int32 counts: those of the last expert, which alone is chosen."""
    E, H, I = (256, 7168, 2048) if KERNELS else (20, 16, 8)
    up, down = (torch.zeros(E, *shape, device=DEVICE, dtype=BF16) for shape in ((2 * I, H), (H, I)))
    assert not KERNELS or up.numel() > 2**32 > down.numel() > 2**31
    up[-1], down[-1] = normal(0, 2 * I, H, std=H**-0.5), normal(1, H, I, std=I**-0.5)
    x_TH, dy_TH = normal(2, 100, H, dtype=BF16), normal(3, 100, H, dtype=BF16)
    one_T1 = torch.ones(100, 1, device=DEVICE, dtype=BF16)

    def call(up: Tensor, down: Tensor) -> Call:
        leaves = {"x": x_TH, "weights_TK": one_T1, "up": up, "down": down}
        ids_T1 = torch.full((100, 1), len(up) - 1, device=DEVICE)
        return Call(BankSpec(len(up), H, I), leaves, ids_T1, None, dy_TH)

    found, alone = call(up, down).run(on_kernels), call(up[-1:], down[-1:])
    for name in ("dup", "ddown"):
        assert not found[name][:-1].any()
        found[name] = found[name][-1:]
    assert_passes([(found, alone.run(reference), alone.run(reference, torch.float64))], reduction=H)
