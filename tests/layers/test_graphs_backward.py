"""A backward belongs to its forward, whatever happens between the two: it is that forward's, or
Python refuses it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from moetk import replace_moe
from moetk.layers.graphs import GRAPHS
from tests.driver import Graph
from tests.layers.graphed import block_of, drawn, pair, recorded, same, set_, stepped
from tests.tiny import H, tiny

pytestmark = pytest.mark.usefixtures("gpu")


def replayed_then(change: Callable[[Any], None], family: str = "qwen3_moe") -> list[list[Any]]:
    """A forward, a change, its backward; by Python and by a replay."""
    plain, mine, _ = pair(family)
    recorded(mine)
    found = []
    for block in (plain, mine):
        block.zero_grad()
        x = drawn(10).requires_grad_()
        before = Graph.replays
        y = block(x)
        assert (Graph.replays == before + 1) == (block is mine)
        gate = block.gate.weight
        change(block)
        y.backward(drawn(60))
        found.append([x.grad, gate.grad])
    return found


BETWEEN: dict[str, Callable[[Any], None]] = {
    "another weight": set_("experts.down_proj", lambda old: nn.Parameter(-old.detach())),
    "a gate that is frozen": lambda block: block.gate.requires_grad_(False),
    "experts that thaw": lambda block: block.experts.requires_grad_(True),
    "an activation": set_("experts.act_fn", lambda _: nn.Tanh()),
    "training": lambda block: block.train(),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_backward_is_that_of_its_forward(name: str) -> None:
    assert same(*replayed_then(BETWEEN[name]))


def test_weights_of_functional_call() -> None:
    plain, mine, _ = pair()
    kept = {}
    for block in (plain, mine):
        kept[block] = {name: p.detach() * 1.5 for name, p in block.named_parameters()}
        kept[block]["gate.weight"].requires_grad_()
    for seed in range(5):
        found = []
        for block, weights in kept.items():
            x = drawn(seed).requires_grad_()
            functional_call(block, weights, (x,)).backward(drawn(seed + 50))
            found.append([x.grad, weights["gate.weight"].grad])
        assert same(*found)
    assert Graph.replays


def test_a_frozen_weight_that_was_written_to_is_refused() -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        replayed_then(lambda block: block.experts.down_proj.mul_(2))


def test_a_second_backward_needs_the_buffers_of_its_forward() -> None:
    plain, mine, _ = pair("deepseek_v3")
    recorded(mine)
    x = drawn(10).requires_grad_()
    y = mine(x)
    first = torch.autograd.grad(y, x, drawn(60), retain_graph=True)
    again = torch.autograd.grad(y, x, drawn(60), retain_graph=True)
    assert torch.allclose(first[0], again[0], atol=1e-6)
    mine.gate.e_score_correction_bias.add_(drawn(3, 1)[0, 0, :8])
    with pytest.raises(RuntimeError, match="a buffer has been modified"):
        torch.autograd.grad(y, x, drawn(60))


def test_a_second_backward_in_training_with_noise_and_losses() -> None:
    models = [tiny("mixtral", router_jitter_noise=0.1) for _ in range(2)]
    for model, graphs in zip(models, (0, 64), strict=True):
        for layer in model.model.layers:
            layer.mlp.experts.requires_grad_(False)
        replace_moe(model.eval(), graphs=graphs)
    recorded(block_of(models[1]))
    found = []
    for model in models:
        x = drawn(10).requires_grad_()
        y = block_of(model)(x)
        torch.autograd.grad(y, x, drawn(60), retain_graph=True)
        model.train()
        found.append([*torch.autograd.grad(y, x, drawn(60))])
        assert all(module.training for module in block_of(model).modules())
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)


def test_several_gradients_at_once() -> None:
    plain, mine, _ = pair()
    found = []
    for block in (plain, mine):
        for seed in range(4):
            stepped(block, drawn(seed), drawn(seed + 50))
        x, dys = drawn(10).requires_grad_(), torch.stack([drawn(1), drawn(2)])
        found.append(torch.autograd.grad(block(x), x, dys, is_grads_batched=True)[0])
    assert Graph.replays and torch.allclose(*found, atol=1e-6)


def test_an_input_that_lies_elsewhere_when_backward_comes() -> None:
    plain, mine, _ = pair()
    x, dy = drawn(0), drawn(50)
    for _ in range(4):
        stepped(mine, x, dy)
    leaf = x.detach().requires_grad_()
    y = mine(leaf)
    leaf.data = leaf.data.clone()
    x.data.zero_()
    y.backward(dy)
    assert same([leaf.grad], [stepped(plain, drawn(0), dy)[1]])


@pytest.mark.parametrize(
    "change",
    [
        set_("gate.top_k", 1),
        set_("experts.act_fn", lambda _: nn.Tanh()),
        lambda block: block.experts.register_forward_hook(lambda _, __, y: 2 * y),
    ],
    ids=["a setting", "an activation", "a hook"],
)
def test_a_second_backward_needs_the_block_of_its_forward(change: Callable[[Any], None]) -> None:
    _, mine, _ = pair()
    recorded(mine)
    x = drawn(10).requires_grad_()
    y = mine(x)
    torch.autograd.grad(y, x, drawn(60), retain_graph=True)
    change(mine)
    with pytest.raises(RuntimeError, match="and it changed since"):
        torch.autograd.grad(y, x, drawn(60))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_parameter_that_goes(frozen: bool) -> None:
    plain, mine, _ = pair("deepseek_v3")
    for block in (plain, mine):
        block.shared_experts.down_proj.bias = nn.Parameter(torch.ones(H))
        block.requires_grad_(not frozen)
        block.experts.requires_grad_(False)
    recorded(mine)
    for block in (plain, mine):
        block.shared_experts.down_proj.bias = None
    for seed in range(4):
        call = drawn(seed), drawn(seed + 50)
        assert same(stepped(mine, *call), stepped(plain, *call))
    assert Graph.replays > 4


def test_a_backward_that_is_interrupted_while_it_is_recorded(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, mine, _ = pair()
    grad = torch.autograd.grad

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if gpu.recording:
            raise KeyboardInterrupt
        return grad(*args, **kwargs)

    for seed in range(2):
        stepped(mine, drawn(seed), drawn(seed + 50))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.autograd, "grad", interrupted)
        stepped(mine, drawn(2), drawn(52))
    for seed in range(6):
        call = drawn(seed), drawn(seed + 50)
        assert same(stepped(mine, *call), stepped(plain, *call))
    assert Graph.replays > 3


def test_a_backward_within_an_outer_capture_runs_as_python(gpu: Any) -> None:
    plain, mine, _ = pair()
    recorded(mine)
    x, dy, before = drawn(10).requires_grad_(), drawn(60), Graph.replays
    y = mine(x)
    gpu.recording.add("the user's")
    y.backward(dy)
    gpu.recording.clear()
    assert Graph.replays == before + 1
    assert same([x.grad], [stepped(plain, drawn(10), dy)[1]])


@pytest.mark.parametrize("calls", [2, 4])
def test_a_backward_in_inference_mode(calls: int) -> None:
    plain, mine, _ = pair()
    for seed in range(calls):
        stepped(mine, drawn(seed), drawn(seed + 50))
    for _ in range(3):
        x, dy = drawn(10).requires_grad_(), drawn(60)
        y = mine(x)
        with torch.inference_mode():
            y.backward(dy)
        assert torch.equal(x.grad, stepped(plain, drawn(10), dy)[1])  # type: ignore[arg-type]
    call = drawn(11), drawn(61)
    assert same(stepped(mine, *call), stepped(plain, *call))


def test_a_forward_that_is_dropped_before_its_backward_was_recorded_holds_nothing() -> None:
    plain, mine, _ = pair()
    for seed in range(2):
        stepped(mine, drawn(seed), drawn(seed + 50))
    y = mine(drawn(2).requires_grad_())
    graph = next(iter(vars(mine)[GRAPHS]._sizes.values())).graph
    assert Graph.replays == 1 and graph._unrecorded is not None
    del y
    assert graph._unrecorded is None and graph.spent
    for seed in range(5):
        call = drawn(seed), drawn(seed + 50)
        assert same(stepped(mine, *call), stepped(plain, *call))
    assert Graph.replays > 3


def test_a_recording_that_ends_takes_no_memory_from_the_others() -> None:
    """cuBLAS's, which the first product of a stream takes, and a graph that ends has it give back:
    a forward's own pool must not be where the others find it."""
    model = tiny("qwen3_moe").eval()
    model.requires_grad_(False)
    replace_moe(model, graphs=64)
    first, second = (layer.mlp for layer in model.model.layers)
    for block in (first, second):
        for seed in range(5):  # recorded twice: the first recording, of an x in one place, ends
            stepped(block, drawn(seed), drawn(seed + 50))
    vars(first)[GRAPHS]._sizes.clear()
    vars(first)[GRAPHS]._last = None
    gc.collect()
    before = Graph.replays
    stepped(second, drawn(9), drawn(59))
    assert Graph.replays == before + 2
