"""Which calls are replayed where nobody asked for it, and what a recording holds for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from moetk import replace_moe
from moetk.experts.backends import FUSED
from moetk.layers.graphs import GRAPHS
from moetk.layers.graphs import block as graphs_block
from moetk.layers.graphs.block import DECODED
from tests.driver import Graph
from tests.layers.graphed import block_of, drawn, pair, recorded, same, stepped
from tests.tiny import tiny

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
            for many in (DECODED, DECODED + 1):
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
    "setting", ["fp32_precision", "allow_bf16_reduced_precision_reduction", "deterministic"]
)
def test_a_setting_of_the_process_is_that_of_the_recording(setting: str) -> None:
    _, mine, _ = pair()
    recorded(mine, grad=False)
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    try:
        if setting == "deterministic":
            torch.use_deterministic_algorithms(True)
        else:
            setattr(settings, setting, "tf32" if setting == "fp32_precision" else not before)
        with torch.no_grad():
            mine(drawn(9))
        assert Graph.replays == 2
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fp32_precision = "none"
        settings.allow_bf16_reduced_precision_reduction = before
    with torch.no_grad():
        mine(drawn(9))
    assert Graph.replays == 3


def test_a_forward_on_the_instance_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_block, "runs_on", lambda module: torch.device("cuda"))
    model = tiny("qwen3_moe").eval()
    blocks = [layer.mlp for layer in model.model.layers]
    for block in blocks:
        block.forward = lambda x: 2 * x
    replacement = replace_moe(model)
    with torch.no_grad():
        assert torch.equal(blocks[0](drawn(0)), 2 * drawn(0))
    assert "has a forward of its own" in replacement.explain()
    replacement.restore()
    assert "forward" in vars(blocks[0]) and GRAPHS not in vars(blocks[0])


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
