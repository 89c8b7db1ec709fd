"""What a graph was recorded with can change between calls: then Python computes."""

from __future__ import annotations

import copy
import functools
import gc
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import moetk
from moetk import replace_moe
from moetk.layers.graphs import GRAPHS
from moetk.layers.swap import own_class
from tests.driver import Graph
from tests.layers.graphed import block_of, drawn, pair, same, set_, stepped
from tests.tiny import H, ids, tiny

pytestmark = pytest.mark.usefixtures("gpu")


def settled(mine: Any) -> None:
    """Recorded with a copied input: any further call is replayed."""
    with torch.no_grad():
        for seed in range(5):
            mine(drawn(seed))
    assert Graph.replays == 3


def compiled(block: Any) -> None:
    twice = block.shared_experts
    twice.compile(backend=lambda module, _: lambda *args: [2 * y for y in module(*args)])


def patched_class(block: Any) -> None:
    was = type(block.shared_experts)
    block.shared_experts.__class__ = type("Mine", (was,), {"forward": lambda self, x: x})


def hooked_by_accelerate(block: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubled(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 2

    hooks.add_hook_to_module(block.shared_experts, Doubled())


CHANGES: dict[str, Callable[[Any], None]] = {
    "a hook of accelerate's": hooked_by_accelerate,
    "a forward on the instance": lambda block: setattr(
        block.shared_experts, "forward", lambda x: 2 * x
    ),
    "another class": patched_class,
    "a part that is compiled": compiled,
    "a method on the instance": lambda block: setattr(
        block.gate, "in_score_dtype", lambda logits: -logits
    ),
    "other weights at once": lambda block: setattr(
        block.experts,
        "_parameters",
        {name: nn.Parameter(-p.detach()) for name, p in block.experts.named_parameters()},
    ),
    "a bias where there was none": set_(
        "shared_experts.down_proj.bias", lambda _: nn.Parameter(torch.ones(H))
    ),
    "a setting of the gate": set_("gate.scale", 17.0),
    "fewer experts a token": set_("gate.top_k", 1),
    "another weight": set_("experts.down_proj", lambda old: nn.Parameter(-old.detach())),
    "a slice of a weight": lambda block: setattr(
        block.shared_experts.down_proj.weight,
        "data",
        block.shared_experts.down_proj.weight.data[:, :1].expand(H, 16),
    ),
    "an activation": set_("experts.act_fn", lambda _: nn.Tanh()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str) -> None:
    plain, mine, _ = pair("deepseek_v3")
    settled(mine)
    for block in (plain, mine):
        CHANGES[name](block)
    with torch.no_grad():
        for seed in range(4):
            assert torch.equal(mine(drawn(seed)), plain(drawn(seed)))


def test_a_part_that_is_compiled_is_called() -> None:
    _, mine, replacement = pair("deepseek_v3")
    calls: list[Any] = []
    mine.shared_experts.compile(
        backend=lambda module, _: lambda *args: (calls.append(args), module(*args))[1]
    )
    torch.compiler.reset()
    with torch.no_grad():
        for seed in range(5):
            mine(drawn(seed))
    assert len(calls) == 5 and Graph.replays == 0 and "is compiled" in replacement.explain()


@pytest.mark.parametrize("decorated", [lambda forward: forward, torch.no_grad()])
@pytest.mark.parametrize("part", ["shared_experts", ""])
def test_a_class_that_is_patched_under_the_block(
    part: str, decorated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, mine, replacement = pair("deepseek_v3")
    settled(mine)
    cls: Any = own_class(plain.get_submodule(part))
    was = cls.forward

    @decorated
    @functools.wraps(was)  # says that it was written where `was` was
    def forward(self: Any, x: Tensor) -> Any:
        return 2 * was(self, x)

    monkeypatch.setattr(cls, "forward", forward)
    with torch.no_grad():
        assert torch.equal(mine(drawn(9)), plain(drawn(9)))
    assert "runs Python of tests.layers.test_graphs_watch" in replacement.explain()


def test_a_class_that_was_patched_before(monkeypatch: pytest.MonkeyPatch) -> None:
    cls: Any = own_class(block_of(tiny("qwen3_moe")))
    was, calls = cls.forward, []  # type: ignore[var-annotated]

    @functools.wraps(was)
    def forward(self: Any, hidden_states: Tensor) -> Any:
        calls.append(hidden_states)
        return was(self, hidden_states)

    monkeypatch.setattr(cls, "forward", forward)
    _, mine, replacement = pair()
    with torch.no_grad():
        for seed in range(5):
            mine(drawn(seed))
    assert len(calls) == 5
    assert "runs Python of tests.layers.test_graphs_watch" in replacement.explain()


def test_a_weight_of_two_places_that_changes_at_one() -> None:
    plain, mine, _ = pair("deepseek_v3")
    for block in (plain, mine):
        weight = nn.Parameter(drawn(5, 16)[0])
        block.shared_experts.gate_proj.weight = block.shared_experts.up_proj.weight = weight
    settled(mine)
    for block in (plain, mine):
        shared = block.shared_experts
        shared.gate_proj.weight = nn.Parameter(-shared.up_proj.weight.detach())
    with torch.no_grad():
        assert torch.equal(mine(drawn(9)), plain(drawn(9)))


def test_a_square_weight_that_is_transposed_in_place() -> None:
    plain, mine, _ = pair("deepseek_v3")
    for block in (plain, mine):
        shared = block.shared_experts
        shared.up_proj.weight = nn.Parameter(drawn(3, H)[0])
        shared.gate_proj.weight = nn.Parameter(drawn(4, H)[0])
        shared.down_proj.weight = nn.Parameter(torch.eye(H))
    settled(mine)
    for block in (plain, mine):
        weight = block.shared_experts.up_proj.weight
        weight.data = weight.data.t()
    with torch.no_grad():
        assert torch.equal(mine(drawn(9)), plain(drawn(9)))


def test_parameters_in_another_order_have_their_own_gradients() -> None:
    plain, mine, _ = pair()
    for block in (plain, mine):
        block.gate.register_parameter("alpha", nn.Parameter(torch.zeros(8, H)))
    with torch.no_grad():
        mine(drawn(0))
    for block in (plain, mine):
        block.gate._parameters["weight"] = block.gate._parameters.pop("weight")
    for seed in range(5):
        call = drawn(seed), drawn(seed + 50)
        assert same(stepped(mine, *call), stepped(plain, *call))
    assert Graph.replays


def test_weights_as_plain_attributes() -> None:
    """As FSDP1 has them: views of a parameter that lies elsewhere, made anew for every call."""
    flats, blocks = [], []
    for graphs in (0, 64):
        model = tiny("qwen3_moe").eval()
        replace_moe(model, graphs=graphs)
        experts = block_of(model).experts
        names = ("gate_up_proj", "down_proj")
        flats.append([nn.Parameter(getattr(experts, name).detach().clone()) for name in names])
        for name in names:
            del experts._parameters[name]
        blocks.append(block_of(model))
    for seed in range(5):
        found = []
        for block, flat in zip(blocks, flats, strict=True):
            block.experts.gate_up_proj, block.experts.down_proj = (p.view_as(p) for p in flat)
            x = drawn(seed).requires_grad_()
            block(x).backward(drawn(seed + 50))
            found.append([x.grad, *(p.grad for p in flat)])
        assert same(*found)
    assert Graph.replays == 0
    assert "holds a tensor as a plain attribute" in vars(blocks[1])[GRAPHS].explain()


def test_a_subclass_of_a_users_runs() -> None:
    model, calls = tiny("qwen3_moe").eval(), []
    cls = type(block_of(model))

    class Counting(cls):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(hidden_states)  # type: ignore[no-any-return]

    block_of(model).__class__ = Counting
    replace_moe(model, graphs=64)
    with torch.no_grad():
        for seed in range(6):
            block_of(model)(drawn(seed))
    assert len(calls) == 6


def test_a_function_mode_is_heard_and_a_default_device_is_none() -> None:
    plain, mine, replacement = pair()

    class Doubled(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            return out * 2 if getattr(func, "__name__", "") in ("linear", "softmax") else out

    settled(mine)
    with torch.no_grad():
        with Doubled():
            assert torch.equal(mine(drawn(9)), plain(drawn(9)))
        assert "a mode of torch's was on" in replacement.explain()
        before = Graph.replays
        with torch.device("cpu"):
            mine(drawn(9))
        assert Graph.replays == before + 1


def test_hidden_states_asked_for_once_end_no_replays() -> None:
    """transformers leaves its hooks on the gates."""
    model = tiny("qwen3_moe").eval()
    replacement = replace_moe(model, graphs=64)
    with torch.no_grad():
        for _ in range(4):
            want = model(ids()).logits
        asked = model(ids(), output_hidden_states=True, output_router_logits=True)
        assert len(asked.router_logits) == 2 and torch.equal(asked.logits, want)
        assert block_of(model).gate._forward_hooks
        before = Graph.replays
        assert torch.equal(model(ids()).logits, want)
    assert Graph.replays >= before + 2, replacement.explain()


def test_compare_leaves_replays_on() -> None:
    model, stock = tiny("qwen3_moe").eval(), tiny("qwen3_moe").eval()
    replace_moe(model, graphs=64)
    report = moetk.compare(block_of(stock), block_of(model), drawn(1)[0])
    assert report.ok
    before = Graph.replays
    with torch.no_grad():
        for seed in range(4):
            block_of(model)(drawn(seed))
    assert Graph.replays > before


def test_shallow_copies_run_themselves() -> None:
    plain, mine, _ = pair()
    settled(mine)
    found = []
    for block in (plain, mine):
        twin = copy.copy(block)
        twin._modules = {**block._modules, "experts": copy.deepcopy(block.experts)}
        twin.experts.down_proj.data.mul_(-1)
        with torch.no_grad():
            found.append([twin(drawn(seed)) for seed in range(3)])
    assert same(*found)


def test_threads_do_not_get_each_others_outputs() -> None:
    plain, mine, _ = pair()
    settled(mine)
    wrong, turns = [], sys.getswitchinterval()

    def work(thread: int) -> None:
        with torch.no_grad():
            for n in range(60):
                x = drawn(1000 * thread + n)
                if not torch.allclose(mine(x), plain(x), atol=1e-6):
                    wrong.append((thread, n))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(turns)
    assert not wrong and Graph.replays > 3


def test_an_inputs_graph_is_let_go_of() -> None:
    """Two blocks, one behind the other: what is copied for the second hangs on the first."""
    model = tiny("qwen3_moe").eval()
    model.requires_grad_(False)
    replace_moe(model, graphs=64)
    first, second = (layer.mlp for layer in model.model.layers)
    for seed in range(6):
        second(first(drawn(seed).requires_grad_()) + drawn(seed)).sum().backward()
    graphs = [next(iter(vars(block)[GRAPHS]._sizes.values())).graph for block in (first, second)]
    assert all(graph.input.address is None for graph in graphs)
    y = second(first(drawn(7).requires_grad_()) + drawn(7))
    assert all(graph.pending for graph in graphs)
    del y
    gc.collect()
    assert not any(graph.pending for graph in graphs)
    assert not any(graph.input._buffer.requires_grad for graph in graphs)


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.BatchNorm1d(6)])
def test_what_differs_in_training_runs_as_python(module: nn.Module) -> None:
    model = tiny("deepseek_v3").eval()
    replacement = replace_moe(model, graphs=64)
    shared = block_of(model).shared_experts
    shared.act_fn = nn.Sequential(module, nn.SiLU())
    with torch.no_grad():
        for seed in range(4):
            block_of(model)(drawn(seed))
    assert Graph.replays == 0 and "does something else in training" in replacement.explain()
