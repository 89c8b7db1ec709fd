"""CUDA graphs, torch.compile and generate: nothing waits, nothing breaks the graph, and what comes
out is what eager calls give, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from moetk import replace_moe
from moetk.context import RouterContext
from moetk.equivalence.judge import relative_error
from moetk.experts import BankSpec, ExpertBank, GptOssGated
from moetk.routers import DeepSeekV3Router, GptOssRouter, LinearRouter, MixtralRouter
from moetk.routers.fused import choose_fused
from moetk.routing import TokenChoice
from tests.gpu.calls import BF16, drawn, on_kernels
from tests.gpu.device import DEVICE, needs_kernels, normal
from tests.gpu.judged import assert_bitwise, grown
from tests.tiny import FAMILIES, generated, tiny

CTX = RouterContext()
H, E, I, TOKENS = 64, 16, 48, 100
OSS = BankSpec(E, H, I, GptOssGated(1.7, 0.6), transposed=True, interleaved=True)


class Layer(nn.Module):
    """A router by its kernels, and a bank."""

    def __init__(self, router: LinearRouter, spec: BankSpec, *, bias: bool = False) -> None:
        super().__init__()
        self.router = router
        self.experts = ExpertBank(H, E, I, spec=spec, bias=bias, backend="fused")
        with torch.no_grad():
            for n, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(n, *parameter.shape, std=parameter.shape[-1] ** -0.5))

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.experts(x_TH, choose_fused(self.router, x_TH, CTX, BF16))


LAYERS: dict[str, Callable[[], Layer]] = {
    "qwen3": lambda: Layer(MixtralRouter(H, E, 4), BankSpec(E, H, I)),
    "fp32 logits": lambda: Layer(MixtralRouter(H, E, 4, gemm_dtype=torch.float32), OSS, bias=True),
    "deepseek_v3": lambda: Layer(
        DeepSeekV3Router(H, E, 4, groups=4, top_groups=2, scale=2.5), BankSpec(E, H, I)
    ),
    "gpt_oss": lambda: Layer(GptOssRouter(H, E, 4), OSS, bias=True),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def made(name: str) -> tuple[Layer, Tensor, Tensor]:
    layer = LAYERS[name]().to(DEVICE, BF16)
    return layer, normal(50, TOKENS, H, dtype=BF16), normal(51, TOKENS, H, dtype=BF16)


def stepped(layer: Layer, x_TH: Tensor, dy_TH: Tensor) -> dict[str, Tensor]:
    """Forward and backward on leaves of this call alone: a graph cannot be captured over leaves
    that another stream has used while their graph lives."""
    tensors = {"x": x_TH, **dict(layer.named_parameters())}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    held = {name: leaf for name, leaf in leaves.items() if name != "x"}
    return grown(leaves, {"y": functional_call(layer, held, (leaves["x"],))}, [dy_TH])


def captured(
    run: Callable[[], dict[str, Tensor]],
) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """The graph of one run, and the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@each_layer
def test_the_same_twice(name):
    layer, x_TH, dy_TH = made(name)
    assert_bitwise(stepped(layer, x_TH, dy_TH), stepped(layer, x_TH, dy_TH))


@needs_kernels
@each_layer
def test_the_host_waits_for_nothing(name):
    layer, x_TH, dy_TH = made(name)
    want = stepped(layer, x_TH, dy_TH)
    torch.cuda.set_sync_debug_mode("error")
    found = stepped(layer, x_TH, dy_TH)
    torch.cuda.set_sync_debug_mode("default")
    assert_bitwise(found, want)


@needs_kernels
@each_layer
def test_a_captured_layer(name):
    """Forward and backward; a replay reads what its input holds then."""
    layer, x_TH, dy_TH = made(name)
    graph, out = captured(lambda: stepped(layer, x_TH, dy_TH))
    for seed in (60, 61):
        x_TH.copy_(normal(seed, TOKENS, H))
        graph.replay()
        found = {key: tensor.clone() for key, tensor in out.items()}
        assert_bitwise(found, stepped(layer, x_TH, dy_TH))


@needs_kernels
@each_layer
def test_a_captured_step_with_gradients_on_parameters(name):
    """As a training loop captures it: warm-up on a side stream, gradients left on the modules."""
    layer, x_TH, dy_TH = made(name)
    want = stepped(copy.deepcopy(layer), x_TH, dy_TH)

    def step() -> dict[str, Tensor]:
        layer.zero_grad(set_to_none=True)
        layer(x_TH).backward(dy_TH)
        return {f"d{key}": parameter.grad for key, parameter in layer.named_parameters()}

    graph, out = captured(step)
    graph.replay()
    assert_bitwise(out, {key: want[key] for key in out})


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("pattern", ["random", "skewed", "dropped"])
def test_a_captured_bank(tokens, pattern):
    call = drawn(OSS, tokens, 4, bias=True, pattern=pattern)
    graph, out = captured(lambda: call.run(on_kernels))
    graph.replay()
    assert_bitwise(out, call.run(on_kernels))


@each_layer
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_kernels)])
def test_a_compiled_layer_is_one_graph(name, backend):
    if backend == "inductor" and name not in ("qwen3", "gpt_oss"):
        pytest.skip("two of the layers stand for all: compiling takes seconds")
    layer, x_TH, dy_TH = made(name)
    want = stepped(layer, x_TH, dy_TH)
    leaves = {"x": x_TH.requires_grad_(), **dict(layer.named_parameters())}
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    found = grown(leaves, {"y": compiled(x_TH)}, [dy_TH])
    if backend == "aot_eager":
        ours = [key for key in want if key == "y" or key.startswith("dexperts")]
        assert_bitwise({key: found[key] for key in ours}, {key: want[key] for key in ours})
    for key, tensor in want.items():  # a compiler may order and fuse what stands between the ops
        assert relative_error(found[key], tensor) <= torch.finfo(tensor.dtype).eps, key


@needs_kernels
@pytest.mark.parametrize("tokens", [5, 300])
def test_a_bank_captured_apart_from_its_router_reads_the_choice_of_each_replay(tokens):
    """What the router knows of its own choice is no part of a graph that did not make it."""
    layer, _, _ = made("qwen3")
    x_TH = normal(52, tokens, H, dtype=BF16)
    with torch.no_grad():
        routing = choose_fused(layer.router, x_TH, CTX, BF16)
        graph, out = captured(lambda: {"y": layer.experts(x_TH, routing)})
        for seed in (60, 61):
            other = choose_fused(layer.router, normal(seed, tokens, H, dtype=BF16), CTX, BF16)
            routing.experts_TK.copy_(other.experts_TK)
            graph.replay()
            again = TokenChoice(other.experts_TK, routing.weights_TK, E)
            assert torch.equal(out["y"], layer.experts(x_TH, again))


@needs_kernels
def test_a_choice_that_was_written_to_is_sorted_anew():
    layer, _, _ = made("qwen3")
    x_TH, other_TH = (normal(seed, 300, H, dtype=BF16) for seed in (52, 53))
    with torch.no_grad():
        routing, other = (choose_fused(layer.router, x, CTX, BF16) for x in (x_TH, other_TH))
        routing.experts_TK.copy_(other.experts_TK)
        want = layer.experts(x_TH, TokenChoice(other.experts_TK, routing.weights_TK, E))
        assert torch.equal(layer.experts(x_TH, routing), want)


@needs_kernels
def test_a_choice_is_planned_on_the_stream_that_asks():
    layer, x_TH, _ = made("qwen3")
    with torch.no_grad():
        routing = choose_fused(layer.router, x_TH, CTX, BF16)
        want, side = layer.experts(x_TH, routing), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            assert routing.known is not None and not routing.known.holds_for(
                routing.experts_TK, None, E
            )
            found = layer.experts(x_TH, routing)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(found, want)


@each_layer
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer(name, reentrant):
    layer, x_TH, dy_TH = made(name)
    want = stepped(layer, x_TH, dy_TH)
    leaves = {"x": x_TH.requires_grad_(), **dict(layer.named_parameters())}
    y_TH = checkpoint(layer, leaves["x"], use_reentrant=reentrant)
    y_TH.backward(dy_TH)
    found = {"y": y_TH, **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}
    assert_bitwise({key: found[key] for key in want}, want)


@needs_kernels
def test_compiled_with_cuda_graphs_by_torch():
    """mode="reduce-overhead", which transformers takes for a static cache."""
    layer, x_TH, _ = made("qwen3")
    torch.compiler.reset()
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in range(5):
            x_TH = normal(seed, TOKENS, H, dtype=BF16)
            torch.compiler.cudagraph_mark_step_begin()
            error = relative_error(compiled(x_TH).clone(), layer(x_TH))
            assert error <= torch.finfo(BF16).eps


def prompted() -> tuple[Tensor, Tensor]:
    """Two prompts, one padded on the left."""
    prompt = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(prompt)
    prompt[0, :2], mask[0, :2] = 0, 0
    return prompt, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_stocks_tokens(family):
    """Greedy, with a cache, in fp32: the router's op, and the bank that auto takes there."""
    model = tiny(family).to(DEVICE).eval()
    model.set_experts_implementation("eager")
    prompt, mask = prompted()
    want = generated(model, prompt, mask)
    replace_moe(model)
    found = generated(model, prompt, mask)
    assert torch.equal(found.sequences, want.sequences)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_generates_the_same_twice_in_bf16_on_the_fused_bank(family):
    """One token at a time, a prompt's rows, and padding."""
    model = tiny(family).to(DEVICE, BF16).eval()
    replacement = replace_moe(model, backend="fused")
    assert "fused" in replacement.explain()
    prompt, mask = prompted()
    first, second = (generated(model, prompt, mask) for _ in range(2))
    assert torch.equal(first.sequences, second.sequences)
    assert torch.equal(torch.stack(first.logits), torch.stack(second.logits))
    assert torch.stack(first.logits).isfinite().all()


@needs_kernels
@each_layer
def test_a_layer_as_torchs_graphed_callables(name):
    """Forward and backward are a CUDA graph each, replayed wherever Python calls the layer."""
    layer, x_TH, dy_TH = made(name)
    graphed = copy.deepcopy(layer)
    torch.cuda.make_graphed_callables(graphed, (x_TH.clone().requires_grad_(),))
    for seed in (70, 71):
        x_TH = normal(seed, TOKENS, H, dtype=BF16)
        leaves = {"x": x_TH.requires_grad_(), **dict(graphed.named_parameters())}
        found = grown(leaves, {"y": graphed(leaves["x"])}, [dy_TH])
        assert_bitwise(found, stepped(layer, x_TH, dy_TH))


@needs_kernels
def test_launches_go_below_triton_where_it_is_known():
    """Below 3.6's; any other one launches by itself."""
    import triton

    from moetk.kernels.gpu import launch

    layer, x_TH, dy_TH = made("qwen3")
    stepped(layer, x_TH, dy_TH)
    known = triton.__version__.startswith("3.6.")
    assert launch._compiled
    assert {one.call is not None for one in launch._compiled.values()} == {known}


@needs_kernels
def test_what_starts_between_multiples_of_16_bytes_is_left_to_triton():
    call = drawn(OSS, 300, 4, bias=True)
    weights_N = torch.empty(call.leaves["weights_TK"].numel() + 1, device=DEVICE, dtype=BF16)
    shifted = weights_N[1:].view_as(call.leaves["weights_TK"])
    shifted.copy_(call.leaves["weights_TK"])
    assert shifted.data_ptr() % 16
    moved = call.with_leaves(weights_TK=shifted)
    assert_bitwise(moved.run(on_kernels), call.run(on_kernels))
