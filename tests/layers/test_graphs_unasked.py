"""Which calls are replayed where nobody asked for it, and what a recording holds for."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

from moetk import replace_moe
from moetk.experts.backends import FUSED
from moetk.layers.find import find_blocks
from moetk.layers.graphs import GRAPHS
from moetk.layers.graphs import block as graphs_block
from moetk.layers.graphs.block import UNASKED
from moetk.layers.swap import is_extended
from tests.driver import Graph
from tests.layers.graphed import ALIVE, block_of, drawn, pair, recorded, same, stepped
from tests.layers.parts import cosine
from tests.tiny import FAMILIES, tiny

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were a device on which `auto` takes it."""
    monkeypatch.setattr(graphs_block, "pick_backend", lambda *args, **kwargs: FUSED)


def test_few_tokens_without_gradients_are_replayed_unless_told_otherwise(fused: None) -> None:
    plain, mine, replacement = pair(tokens=None)
    for seed in range(4):
        with torch.no_grad():
            assert torch.equal(mine(drawn(seed)), plain(drawn(seed)))
            for many in (UNASKED.tokens, UNASKED.tokens + 1):
                assert torch.equal(mine(drawn(seed, many)), plain(drawn(seed, many)))
        call = drawn(seed), drawn(seed + 50)
        assert same(stepped(mine, *call), stepped(plain, *call))
    assert Graph.replays == 4  # the third and fourth of two sizes
    assert "up to 64 tokens without gradients: sizes recorded: 2" in replacement.explain()
    assert "the last call ran as Python: it was none of these" in replacement.explain()


def test_only_fused_is_recorded_unasked() -> None:
    plain, mine, replacement = pair(tokens=None)
    with torch.no_grad():
        for seed in range(4):
            assert torch.equal(mine(drawn(seed)), plain(drawn(seed)))
    assert Graph.replays == 0
    assert "grouped may wait for the host" in replacement.explain()


def test_a_tuple_is_handed_out_as_one_and_is_python_in_training() -> None:
    plain, mine, replacement = pair("gpt_oss")
    outputs = []
    for seed in range(5):
        with torch.no_grad():
            outputs.append((mine(drawn(seed)), plain(drawn(seed))))
    assert Graph.replays == 3
    for found, want in outputs:
        assert type(found) is tuple and same(list(found), list(want))
    for seed in range(4):
        x = drawn(seed)
        assert same(list(mine(x)), list(plain(x)))
    assert Graph.replays == 3 and "returns a tuple" in replacement.explain()


@pytest.mark.parametrize(
    "setting",
    [
        "fp32_precision",
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_reduced_precision_reduction",
        "allow_fp16_accumulation",
        "deterministic",
        "library",
    ],
)
def test_a_setting_of_the_process_is_that_of_the_recording(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, mine, _ = pair()
    recorded(mine, grad=False)
    products: Any = torch.backends.cuda.matmul
    was = getattr(products, setting, None)
    with torch.no_grad():
        if setting == "deterministic":
            monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        elif setting == "library":
            monkeypatch.setattr(torch._C, "_get_blas_preferred_backend", lambda: "another")
        else:
            setattr(products, setting, "tf32" if setting == "fp32_precision" else not was)
        try:
            mine(drawn(9))
            assert Graph.replays == 2
        finally:
            monkeypatch.undo()
            if was is not None:
                setattr(products, setting, was)


def test_a_forward_on_the_instance_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3_moe").eval()
    block = block_of(model)
    block.forward = lambda x: 2 * x
    replacement = replace_moe(model)
    with torch.no_grad():
        assert torch.equal(block(drawn(0)), 2 * drawn(0))
    assert not is_extended(block)
    replacement.restore()
    assert "forward" in vars(block) and GRAPHS not in vars(block)
    monkeypatch.setattr(graphs_block, "runs_on", lambda module: torch.device("cuda"))
    assert "has a forward of its own" in replace_moe(model, graphs=64).explain()


@pytest.mark.parametrize("hooked", ["before", "after"])
def test_so_is_one_below_a_hook_of_accelerates(hooked: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny("qwen3_moe").eval()
    block = block_of(model)
    replacement = replace_moe(model) if hooked == "after" else None
    block.forward = MethodType(lambda self, x: 2 * x, block)
    hooks.add_hook_to_module(block, hooks.ModelHook())
    with torch.no_grad():
        replacement = replacement or replace_moe(model)
        assert torch.equal(block(drawn(0)), 2 * drawn(0))
        replace_moe(model)
        assert torch.equal(block(drawn(0)), 2 * drawn(0))
        replacement.restore()
        hooks.remove_hook_from_module(block)
        assert torch.equal(block(drawn(0)), 2 * drawn(0))


@pytest.mark.parametrize("part", ["mlp.gate", "mlp.experts", "mlp", ""])
def test_a_class_that_was_patched_below_a_hook_is_replaced(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny("qwen3_moe").eval()
    module: Any = model.model.layers[-1].get_submodule(part)
    hooks.add_hook_to_module(module, hooks.ModelHook())
    cls, was = type(module), type(module).forward
    monkeypatch.setattr(cls, "forward", lambda *args, **kwargs: was(*args, **kwargs))
    replacement = replace_moe(model)
    assert is_extended(module) and vars(module)["_old_forward"].__func__ is type(module).forward
    replacement.restore()
    assert vars(module)["_old_forward"].__func__ is cls.forward


@pytest.mark.parametrize("then", ["restored", "replaced again", "installed again"])
def test_a_forward_that_was_kept_outlives_the_replacement(then: str) -> None:
    model = tiny("qwen3_moe").eval()
    block, x = block_of(model), drawn(0)
    replacement = replace_moe(model)
    with torch.no_grad():
        want, kept = 2 * block(x), block.forward
        block.forward = lambda x: 2 * kept(x)
        if then == "replaced again":
            replace_moe(model)
        else:
            replacement.restore()
        if then == "installed again":
            replacement.install()
        torch.testing.assert_close(block(x), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_block_takes_can_be_read_off_it(family: str) -> None:
    model = tiny(family)
    block = next(iter(find_blocks(model))).block
    want = inspect.signature(block.forward)
    replace_moe(model, graphs=64)
    assert is_extended(block) and inspect.signature(block.forward) == want


def test_a_block_is_exported_by_the_names_of_its_inputs_and_traced() -> None:
    model = tiny("qwen3_moe").eval()
    replace_moe(model)
    block, sizes = block_of(model), {1: torch.export.Dim("tokens", min=2, max=4096)}
    exported = torch.export.export(
        block, (drawn(0),), dynamic_shapes={"hidden_states": sizes}, strict=False
    )
    assert list(exported.graph_signature.user_inputs) == ["hidden_states"]

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: Any, name: str) -> bool:
            return module is not block

    assert next(iter(Tracer().trace(block).nodes)).name == "hidden_states"


def test_unasked_only_where_fused_could_run() -> None:
    for changes in ({"backend": "stock"}, {"backend": "grouped"}, {"router": cosine}):
        model = tiny("qwen3_moe")
        replace_moe(model, **changes)
        assert GRAPHS not in vars(block_of(model))


def test_a_device_without_fused_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, mine, _ = pair(tokens=None)
    with torch.no_grad():
        for seed in range(3):
            mine(drawn(seed))
        monkeypatch.setattr(graphs_block, "key_of", None)
        mine(drawn(3))


def test_recordings_have_an_end(fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    few = UNASKED._replace(recordings=5)
    monkeypatch.setattr(graphs_block, "UNASKED", few)
    monkeypatch.setattr("moetk.layers.replacement.UNASKED", few)
    monkeypatch.setattr(graphs_block, "SIZES", 2)
    plain, mine, replacement = pair(tokens=None)
    with torch.no_grad():
        for seed in range(60):
            for tokens in (1 + seed % 7, 1 + seed % 5):
                x = drawn(seed, tokens)
                assert torch.equal(mine(x), plain(x))
    assert vars(mine)[GRAPHS]._recordings == 5
    assert "its block has been recorded 5 times" in replacement.explain()


def test_who_asked_for_them_has_as_many_recordings_as_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs_block, "SIZES", 2)
    _, mine, _ = pair()
    with torch.no_grad():
        for tokens in range(1, 36):
            for seed in range(3):
                mine(drawn(seed, tokens))
    assert Graph.replays == 35


def test_a_tensor_on_a_module_is_not_kept() -> None:
    _, mine, replacement = pair()
    mine.seen = drawn(0)
    kept = weakref.ref(mine.seen)
    ALIVE.clear()
    with torch.no_grad():
        mine(drawn(1))
    assert "a tensor as a plain attribute" in replacement.explain()
    del mine.seen
    gc.collect()
    assert kept() is None


def test_a_copy_keeps_a_class_that_lies_on_top() -> None:
    model = tiny("qwen3_moe").eval()
    replacement = replace_moe(model)
    block: Any = block_of(model)
    kind: Any = type(block)

    class Twice(kind):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)  # type: ignore[no-any-return]

    block.__class__ = Twice
    twin, x = copy.deepcopy(block), drawn(0)
    block.__class__ = kind
    assert type(twin) is Twice
    with torch.no_grad():
        assert torch.equal(twin(x), 2 * block(x))
    replacement.restore()
