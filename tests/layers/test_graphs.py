"""Blocks that are replayed from CUDA graphs compute what Python computes, and run as Python where
somebody else has a part in a call. A recording of torch's operators stands in for the graphs."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moetk
from moetk import replace_moe
from moetk.errors import BackendError, SecondOrderError
from moetk.layers import shells
from moetk.layers.graphs import GRAPHS
from moetk.losses import RouterZLoss
from tests.driver import Graph
from tests.layers.graphed import drawn, pair, recorded, same, stepped
from tests.layers.parts import cosine
from tests.tiny import FAMILIES, generated, ids, tiny

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_third_call_of_a_size_is_replayed_and_so_are_those_after_it(mode: Any) -> None:
    plain, mine, replacement = pair()
    outputs = []
    for seed in range(6):
        with mode():
            outputs.append((mine(drawn(seed)), plain(drawn(seed))))
        assert Graph.replays == max(0, seed - 1)
    for found, want in outputs:  # nobody's output changes later
        assert torch.equal(found, want)
    assert "up to 64 tokens: sizes recorded: 1" in replacement.explain()


def test_what_was_recorded_in_inference_mode_serves_outside_it() -> None:
    plain, mine, _ = pair()
    with torch.inference_mode():
        for seed in range(3):
            mine(drawn(seed))
    with torch.no_grad():
        assert torch.equal(mine(drawn(7)), plain(drawn(7)))
    assert Graph.replays == 2


def test_gradients_of_replays_are_those_of_python() -> None:
    plain, mine, _ = pair()
    for seed in range(6):
        call = drawn(seed), drawn(seed + 50)
        assert same(stepped(mine, *call), stepped(plain, *call))
        assert Graph.replays == max(0, 2 * (seed - 1))


@pytest.mark.parametrize("grad", [True, False])
def test_an_input_that_lies_in_one_place_is_read_there_until_it_does_not(grad: bool) -> None:
    plain, mine, _ = pair()
    place, elsewhere = drawn(0), drawn(0)
    assert place.data_ptr() != elsewhere.data_ptr()
    dy, graphs = drawn(50), []
    for seed, x in enumerate([place] * 5 + [elsewhere] * 2 + [place]):
        x.copy_(drawn(seed))
        if grad:
            found = []
            for block in (mine, plain):
                block.zero_grad()
                leaf = x.detach().requires_grad_()
                y = block(leaf)
                y.backward(dy)
                found.append([y.detach(), leaf.grad, block.gate.weight.grad])
            assert same(*found)
        else:
            with torch.no_grad():
                assert torch.equal(mine(x), plain(x))
        graphs.append(next(iter(vars(mine)[GRAPHS]._sizes.values())).graph)
    assert graphs[1] is None and len({id(graph) for graph in graphs[2:5]}) == 1
    assert graphs[2].input.address == place.data_ptr()
    assert len({id(graph) for graph in graphs[5:]}) == 1 and graphs[5].input.address is None


def test_a_gradient_of_the_output_that_lies_elsewhere() -> None:
    plain, mine, _ = pair()
    x, dy, kinds = drawn(0), drawn(50), []
    for n in range(8):
        call = x, dy if n < 5 else drawn(50 + n)
        assert same(stepped(mine, *call), stepped(plain, *call))
        graph = next(iter(vars(mine)[GRAPHS]._sizes.values())).graph
        kinds.append(None if graph is None else (graph._dy.address == dy.data_ptr(), graph.moved))
    read_there, copied = (True, False), (False, False)
    # The sixth backward runs as Python; then both are recorded again.
    assert kinds == [None, None, *[read_there] * 3, (True, True), copied, copied]
    assert Graph.replays == 2 * 3 + 1 + 2 * 2


def test_a_backward_that_cannot_be_recorded_runs_as_python(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, mine, replacement = pair()
    grad = torch.autograd.grad

    def refused(*args: Any, **kwargs: Any) -> Any:
        if gpu.recording:
            raise RuntimeError("the host waits")
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", refused)
    for seed in range(12):
        call = drawn(seed), drawn(seed + 50)
        assert same(stepped(mine, *call), stepped(plain, *call))
    assert "RuntimeError: the host waits" in replacement.explain()
    assert Graph.replays == 3  # forwards of three recordings
    assert gpu.stream == "default" and not gpu.recording


def test_parameters_alone_are_trained() -> None:
    """The input wants no gradient, as below the first trainable layer."""
    plain, mine, _ = pair()
    for seed in range(5):
        for block in (plain, mine):
            block.zero_grad()
            block(drawn(seed)).backward(drawn(seed + 50))
        assert torch.equal(mine.gate.weight.grad, plain.gate.weight.grad)
    assert Graph.replays == 6


def test_gradients_accumulate() -> None:
    plain, mine, _ = pair()
    for seed in range(5):
        for block in (plain, mine):
            block(drawn(seed).requires_grad_()).backward(drawn(seed + 50))
    assert torch.equal(mine.gate.weight.grad, plain.gate.weight.grad)


def test_several_forwards_before_a_backward() -> None:
    plain, mine, _ = pair()
    recorded(mine)
    xs = [[drawn(seed).requires_grad_() for seed in (10, 11, 12)] for _ in range(2)]
    for block, leaves in zip((plain, mine), xs, strict=True):
        ys = [block(leaf) for leaf in leaves]
        for n in (1, 0, 2):
            ys[n].backward(drawn(60 + n))
    for want, found in zip(*xs, strict=True):
        assert torch.equal(found.grad, want.grad)
    assert Graph.replays == 4 + 2  # the first of the three


def test_a_forward_that_nobody_goes_back_through_blocks_nothing() -> None:
    _, mine, _ = pair()
    recorded(mine)
    y = mine(drawn(10).requires_grad_())
    assert Graph.replays == 5
    mine(drawn(11).requires_grad_())
    assert Graph.replays == 5  # y may still be asked
    del y
    mine(drawn(12).requires_grad_())
    assert Graph.replays == 6


def test_backward_twice() -> None:
    plain, mine, _ = pair()
    recorded(mine)
    x, dy = drawn(10).requires_grad_(), drawn(60)
    y = mine(x)
    first = torch.autograd.grad(y, [x, mine.gate.weight], dy, retain_graph=True)
    mine(drawn(11).requires_grad_()).backward(dy)  # overwrites what the first one kept
    again = torch.autograd.grad(y, [x, mine.gate.weight], 2 * dy)
    for one, two in zip(first, again, strict=True):
        assert torch.allclose(2 * one, two, rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y, [x], dy)


def test_second_derivatives_are_refused() -> None:
    _, mine, _ = pair()
    recorded(mine)
    x = drawn(10).requires_grad_()
    with pytest.raises(SecondOrderError, match="graphs=0"):
        torch.autograd.grad(mine(x).sum(), x, create_graph=True)


def test_an_input_that_was_written_to_is_refused() -> None:
    _, mine, _ = pair()
    recorded(mine)
    x = (drawn(10).requires_grad_() * 1).contiguous()
    y = mine(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_weights_written_to_are_read_and_weights_that_moved_are_recorded_anew() -> None:
    plain, mine, _ = pair()
    recorded(mine)
    for block in (plain, mine):
        block.gate.weight.data.mul_(-1)
    call = drawn(10), drawn(60)
    assert same(stepped(mine, *call), stepped(plain, *call)) and Graph.replays == 6
    mine.experts.down_proj.data = mine.experts.down_proj.data.clone()
    for seed in range(3):
        assert same(stepped(mine, *call), stepped(plain, *call))
        assert Graph.replays == (6 if seed < 2 else 8)


def test_weights_that_move_time_and_again_are_left_to_python() -> None:
    plain, mine, replacement = pair()
    for _ in range(4):
        mine.gate.weight.data = mine.gate.weight.data.clone()
        for seed in range(3):
            call = drawn(seed), drawn(seed + 50)
            assert same(stepped(mine, *call), stepped(plain, *call))
    assert Graph.replays == 6
    assert "lie elsewhere time and again" in replacement.explain()


def test_weights_that_move_between_forward_and_backward() -> None:
    plain, mine, _ = pair()
    recorded(mine)
    x, dy = drawn(10).requires_grad_(), drawn(60)
    y = mine(x)
    mine.experts.down_proj.data = mine.experts.down_proj.data.clone()
    y.backward(dy)
    assert torch.equal(x.grad, stepped(plain, drawn(10), dy)[1])
    assert Graph.replays == 5


def test_a_hook_within_the_block_runs() -> None:
    _, mine, replacement = pair()
    recorded(mine)
    stepped(mine, drawn(9), drawn(59))
    seen: list[Any] = []
    handle = mine.gate.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        stepped(mine, drawn(10), drawn(60))
    assert seen == [1, 1] and Graph.replays == 7  # once in vain, before it asked
    assert "a hook within the block" in replacement.explain()
    handle.remove()
    stepped(mine, drawn(10), drawn(60))
    assert seen == [1, 1] and Graph.replays == 9


def test_a_hook_on_the_block_is_no_part_of_what_is_replayed() -> None:
    plain, mine, _ = pair()
    for block in (plain, mine):
        block.register_forward_hook(lambda _, __, y: 2 * y)
    for seed in range(5):
        call = drawn(seed), drawn(seed + 50)
        assert same(stepped(mine, *call), stepped(plain, *call))
    assert Graph.replays == 6


def test_another_module_within_the_block_is_noticed() -> None:
    plain, mine, replacement = pair()
    recorded(mine, grad=False)
    for block in (plain, mine):
        block.experts.act_fn = nn.Tanh()
    with torch.no_grad():
        for seed in range(4):
            assert torch.equal(mine(drawn(seed)), plain(drawn(seed)))
        for block in (plain, mine):
            block.experts.act_fn = Ours()
        mine(drawn(9))
    assert "Ours runs Python of tests.layers.test_graphs" in replacement.explain()


class Ours(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def test_recordings_and_replays_of_routings_run_as_python() -> None:
    model = tiny("qwen3_moe").eval()
    replace_moe(model, graphs=64)
    with torch.no_grad():
        for _ in range(3):
            want = model(ids()).logits
        before = Graph.replays
        assert before
        with moetk.record(model) as recording:
            model(ids())
        assert len(recording[0]) == 1
        after = Graph.replays
        assert before <= after <= before + 2  # at most once in vain, before it asked
        with moetk.replay(model, recording):
            assert torch.equal(model(ids()).logits, want)
        assert Graph.replays == after
        model(ids())
    assert Graph.replays > after


def test_losses_act_in_training_and_blocks_are_replayed_in_evaluation() -> None:
    models = [tiny("qwen3_moe") for _ in range(2)]
    for model, graphs in zip(models, (0, 64), strict=True):
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.mlp.gate.requires_grad_(True)
        replace_moe(model, losses=[RouterZLoss(1.0)], graphs=graphs)
        model.train()
        for _ in range(4):
            model(input_ids=ids(), labels=ids()).loss.backward()
    assert Graph.replays == 0
    plain, mine = ([p.grad for p in model.parameters()] for model in models)
    assert same(mine, plain)
    models[1].eval()
    with torch.no_grad():
        for _ in range(3):
            models[1](ids())
    assert Graph.replays == len(models[1].model.layers)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(reentrant: bool) -> None:
    plain, mine, _ = pair()
    recorded(mine)
    with torch.no_grad():
        for seed in range(4):  # what a reentrant forward replays
            mine(drawn(seed))
    before, found = Graph.replays, []
    for block in (plain, mine):
        block.zero_grad()
        x = drawn(10).requires_grad_()
        y = checkpoint(block, x, use_reentrant=reentrant)
        y.backward(drawn(60))
        found.append([y.detach(), x.grad, block.gate.weight.grad])
    assert same(*found)
    assert Graph.replays == before + reentrant


def test_a_checkpointed_model() -> None:
    models = [tiny("qwen3_moe") for _ in range(2)]
    for model, graphs in zip(models, (0, 64), strict=True):
        for layer in model.model.layers:
            layer.mlp.experts.requires_grad_(False)
        replace_moe(model, graphs=graphs)
        for checkpointed in (False, False, False, True, False):
            switch = "enable" if checkpointed else "disable"
            getattr(model.train(), f"gradient_checkpointing_{switch}")()
            before = Graph.replays
            model(input_ids=ids(), labels=ids()).loss.backward()
            if graphs:
                assert (Graph.replays > before) == (before > 0 and not checkpointed) or not before
    assert Graph.replays
    plain, mine = ([p.grad for p in model.parameters()] for model in models)
    assert same(mine, plain)


def test_a_router_of_ones_own_runs_as_python() -> None:
    _, mine, replacement = pair(router=cosine)
    with torch.no_grad():
        for seed in range(4):
            mine(drawn(seed))
    assert Graph.replays == 0
    assert "CosineRouter runs as Python" in replacement.explain()


def test_experts_that_train_without_add_to_grad_run_as_python() -> None:
    _, mine, _ = pair()
    mine.experts.requires_grad_(True)
    for seed in range(4):
        stepped(mine, drawn(seed), drawn(seed + 50))
    assert Graph.replays == 0


def test_more_tokens_than_asked_for_and_other_streams(gpu: Any) -> None:
    plain, mine, _ = pair(tokens=6)
    with torch.no_grad():
        for seed in range(4):
            mine(drawn(seed, 7))
        assert Graph.replays == 0
        recorded(mine, grad=False)
        gpu.streams["now"] = 1
        for seed in range(4):
            assert torch.equal(mine(drawn(seed)), plain(drawn(seed)))
            assert Graph.replays == 2 + max(0, seed - 1)  # with memory of its own
    assert len(gpu.pools) == 2


def test_only_so_many_sizes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetk.layers.graphs.block.SIZES", 2)
    monkeypatch.setattr("moetk.layers.graphs.block._SEEN", 4)
    plain, mine, replacement = pair()
    with torch.no_grad():
        for tokens in [*range(1, 9), 8, 8, 9, 9, 9, 10, 10, 10, 9]:
            assert torch.equal(mine(drawn(0, tokens)), plain(drawn(0, tokens)))
    # 8, 9, and 10 in the place of 8; then 9 again.
    assert Graph.replays == 4 and "sizes recorded: 2" in replacement.explain()
    assert len(vars(mine)[GRAPHS]._sizes) <= 4


def test_what_cannot_be_recorded_says_why_and_runs_as_python(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, mine, replacement = pair()
    inner = shells.bank_forward

    def bank_forward(*args: Any, **kwargs: Any) -> Tensor:
        if gpu.recording:
            raise RuntimeError("the host\nwaits")
        return inner(*args, **kwargs)

    monkeypatch.setattr(shells, "bank_forward", bank_forward)
    for seed in range(5):
        call = drawn(seed), drawn(seed + 50)
        assert same(stepped(mine, *call), stepped(plain, *call))
    assert Graph.replays == 0 and "RuntimeError: the host waits" in replacement.explain()
    assert gpu.stream == "default" and not gpu.recording


def test_a_copy_records_its_own_and_restore_takes_it_out() -> None:
    plain, mine, replacement = pair()
    recorded(mine, grad=False)
    for again in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert vars(again)[GRAPHS].parts.block is again
        again.experts.down_proj.data.mul_(-1)
        with torch.no_grad():
            for seed in range(4):
                assert torch.equal(again(drawn(seed)), -plain(drawn(seed)))
    before = Graph.replays
    replacement.restore()
    assert GRAPHS not in vars(mine) and type(mine).__mro__[0].__module__.startswith("transformers")
    with torch.no_grad():
        mine(drawn(1))
    replacement.install()
    assert Graph.replays == before and GRAPHS in vars(mine)


def test_blocks_and_graphs_go_with_the_model() -> None:
    _, mine, replacement = pair()
    recorded(mine)
    import weakref

    alive = weakref.ref(mine)
    del mine, replacement
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_the_same_tokens(family: str) -> None:
    models = [tiny(family).eval() for _ in range(2)]
    found = []
    for model, graphs in zip(models, (0, 64), strict=True):
        replace_moe(model, graphs=graphs)
        made = generated(model, ids())
        found.append([made.sequences, *made.logits])
    assert same(*found)
    if family == "deepseek_v4":  # its blocks are called with token ids
        assert Graph.replays == 0
    else:
        assert Graph.replays >= 5


def test_a_model_that_is_on_no_gpu_says_so() -> None:
    assert "none: device cpu, needs cuda" in replace_moe(tiny("qwen3_moe"), graphs=64).explain()
    assert "CUDA graphs" not in replace_moe(tiny("qwen3_moe")).explain()


def test_no_number_of_tokens() -> None:
    with pytest.raises(BackendError, match="graphs=-1 is no number of tokens"):
        replace_moe(tiny("qwen3_moe"), graphs=-1)


def test_compiled_blocks_are_left_alone() -> None:
    plain, mine, _ = pair()
    torch.compiler.reset()
    compiled: Callable[[Tensor], Tensor] = torch.compile(mine, backend="eager", fullgraph=True)
    with torch.no_grad():
        for seed in range(4):
            assert torch.equal(compiled(drawn(seed)), plain(drawn(seed)))
    assert Graph.replays == 0
