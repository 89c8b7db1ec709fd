"""Blocks that are replayed from CUDA graphs: to the bit what Python computes, gradients that are
added to, memory that several layers share."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from moetk import replace_moe
from moetk.layers.find import find_blocks
from moetk.layers.graphs import GRAPHS
from tests.gpu.device import DEVICE, needs_kernels, normal
from tests.tiny import FAMILIES, VOCAB, H, generated, ids, tiny

pytestmark = needs_kernels
BF16 = torch.bfloat16
# deepseek_v4's blocks are called with token ids; gpt_oss's return tuples, replayed where no
# gradient is wanted.
WITHOUT_GRADIENTS = [name for name in FAMILIES if name != "deepseek_v4"]
REPLAYED = [name for name in WITHOUT_GRADIENTS if name != "gpt_oss"]


def twins(family: str, **changes: Any) -> list[Any]:
    """The same model twice, the second with graphs; every gradient is there."""
    first = tiny(family, **changes).to(DEVICE, BF16).train()
    first.set_attn_implementation("eager")  # whose sums repeat to the bit
    models = [first, copy.deepcopy(first)]
    for model, graphs in zip(models, (0, 4096), strict=True):
        replace_moe(model, backend="fused", add_to_grad=True, graphs=graphs)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    return models


def blocks(models: list[Any]) -> list[Any]:
    """The last of each."""
    return [list(find_blocks(model))[-1].block for model in models]


def states(model: Any) -> list[Any]:
    held = [vars(module).get(GRAPHS) for module in model.modules()]
    return [size for graphs in held if graphs is not None for size in graphs._sizes.values()]


def replays(model: Any) -> int:
    return sum(size.graph is not None for size in states(model))


def stepped(block: Any, x: Tensor, dy: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = block(leaf)
    y.backward(dy)
    assert leaf.grad is not None
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters())]


def assert_same(found: list[Tensor], want: list[Tensor]) -> None:
    assert len(found) == len(want)
    for one, two in zip(found, want, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("family", REPLAYED)
@pytest.mark.parametrize("tokens", [1, 7, 256])
def test_a_block(family, tokens):
    models = twins(family)
    plain, mine = blocks(models)
    for seed in range(6):
        x, dy = (normal(seed + n, 1, tokens, H, dtype=BF16) for n in (0, 50))
        assert_same(stepped(mine, x, dy), stepped(plain, x, dy))
    assert replays(models[1]) == 1
    with torch.no_grad():
        for seed in range(5):
            x = normal(seed, 1, tokens, H, dtype=BF16)
            assert torch.equal(mine(x), plain(x))
    assert replays(models[1]) == 2


@pytest.mark.parametrize("grad", [True, False])
def test_an_input_that_lies_in_one_place_is_read_there_until_it_does_not(grad):
    models = twins("qwen3_moe")
    plain, mine = blocks(models)
    place, elsewhere = (normal(seed, 1, 40, H, dtype=BF16) for seed in (0, 1))
    kinds = []
    for seed, x in enumerate([place] * 6 + [elsewhere] * 2 + [place]):
        x.copy_(normal(seed + 10, 1, 40, H))
        found = []
        for block in (mine, plain):
            if grad:
                leaf = x.detach().requires_grad_()
                y = block(leaf)
                y.backward(normal(seed + 50, 1, 40, H, dtype=BF16))
                found.append([y.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters())])
            else:
                with torch.no_grad():
                    found.append([block(x)])
        assert_same(*found)
        [graph] = [size.graph for size in states(models[1])]
        kinds.append(None if graph is None else graph.input.address == place.data_ptr())
    assert kinds == [None, None, True, True, True, True, False, False, False]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_layers_of_a_model_share_memory(family):
    """Each layer's graphs run between another's forward and backward."""
    models = twins(family, num_hidden_layers=4)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        length = (24, 24, 24, 24, 17, 24)[seed]
        ids = torch.randint(3, VOCAB, (2, length), generator=generator).to(DEVICE)
        losses = []
        for model in models:
            model.zero_grad(set_to_none=False)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.detach())
        assert_same([losses[1]], [losses[0]])
        found, want = (
            [p.grad for n, p in model.named_parameters() if "layers" in n] for model in models
        )
        assert_same(found, want)
        with torch.no_grad():
            assert_same(*[[model(input_ids=ids).logits] for model in models])
    assert replays(models[1]) >= 6


def test_gradients_that_are_gone_or_elsewhere_when_backward_comes():
    models = twins("qwen3_moe")
    plain, mine = blocks(models)
    x, dy = (normal(seed, 1, 40, H, dtype=BF16) for seed in (1, 2))
    for _ in range(4):
        stepped(plain, x, dy)
        stepped(mine, x, dy)
    assert replays(models[1]) == 1
    for change in (lambda p: None, torch.zeros_like):
        for block in (plain, mine):
            leaf = x.clone().requires_grad_()
            y = block(leaf)
            for parameter in block.parameters():
                parameter.grad = change(parameter)
            y.backward(dy)
        assert_same([p.grad for p in mine.parameters()], [p.grad for p in plain.parameters()])


def test_several_forwards_before_a_backward():
    models = twins("qwen3_moe")
    plain, mine = blocks(models)
    dy = normal(3, 1, 40, H, dtype=BF16)
    for round_ in range(6):
        found = []
        for block in (plain, mine):
            leaves = [
                normal(10 * round_ + n, 1, 40, H, dtype=BF16).requires_grad_() for n in range(3)
            ]
            ys = [block(leaf) for leaf in leaves]
            for y in ys:
                y.backward(dy)
            found.append([*(leaf.grad for leaf in leaves), *(p.grad for p in block.parameters())])
        assert_same(found[1], found[0])
    assert replays(models[1]) == 1


@pytest.fixture(params=[True, False], ids=["in one place", "moving"])
def calls(request):
    """A block that replays, and a call of it whose input lies where it lay, or elsewhere."""
    models = twins("qwen3_moe")
    mine, dy = blocks(models)[1], normal(2, 1, 40, H, dtype=BF16)
    places = [normal(seed, 1, 40, H, dtype=BF16) for seed in range(5)]
    turn = iter(range(10**6))

    def call() -> None:
        x = places[0 if request.param else next(turn) % len(places)]
        mine(x.detach().requires_grad_()).backward(dy)

    for _ in range(6):
        call()
    [graph] = [size.graph for size in states(models[1])]
    assert (graph.input.address is not None) == request.param
    return call


def test_replays_allocate_nothing_that_stays(calls):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(6):
        calls()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_the_host_waits_for_nothing(calls):
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_within_an_outer_capture_and_on_another_stream():
    models = twins("qwen3_moe")
    plain, mine = blocks(models)
    x = normal(1, 1, 40, H, dtype=BF16)
    with torch.no_grad():
        for _ in range(4):
            mine(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = mine(x)
        x.copy_(normal(2, 1, 40, H, dtype=BF16))
        graph.replay()
        assert torch.equal(y, plain(x))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(4):
                found = mine(x)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(found, plain(x))
    assert replays(models[1]) == 2


def test_who_waits_for_the_host_is_left_to_python():
    """The loop over experts asks how many rows each has."""
    model = tiny("qwen3_moe").to(DEVICE).eval()
    want = copy.deepcopy(model)
    replacement = replace_moe(model, backend="reference", graphs=64)
    replace_moe(want, backend="reference")
    x = normal(1, 1, 9, H)
    with torch.no_grad():
        for _ in range(5):
            assert_same(*[[block(x)] for block in blocks([model, want])])
    assert replays(model) == 0
    assert "captur" in replacement.explain()


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_the_same(family):
    first = tiny(family).to(DEVICE, BF16).eval()
    models = [first, copy.deepcopy(first)]
    found = []
    for model, graphs in zip(models, (0, None), strict=True):
        replace_moe(model, backend="fused", graphs=graphs)
        made = generated(model, ids(2, 6).to(DEVICE))
        found.append([made.sequences, *made.logits])
    assert_same(*found)
    assert (replays(models[1]) > 0) == (family in WITHOUT_GRADIENTS)


def test_what_is_replayed_unasked():
    """64 tokens without gradients, by `fused`; fp32, which `grouped` computes, is not tried."""
    first = tiny("qwen3_moe").to(DEVICE, BF16).eval()
    models = [first, copy.deepcopy(first), copy.deepcopy(first).float()]
    replacements = [replace_moe(model) for model in models]
    plain, mine, other = blocks(models)
    replace_moe(models[0], graphs=0)
    for tokens in (64, 65):
        for seed in range(4):
            x = normal(seed, 1, tokens, H, dtype=BF16)
            with torch.no_grad():
                assert torch.equal(mine(x), plain(x))
                other(x.float())
            mine(x)
    assert replays(models[1]) == 1 and replays(models[2]) == 0
    assert "sizes recorded: 1" in replacements[1].explain()
    assert "may wait for the host" in replacements[2].explain()
