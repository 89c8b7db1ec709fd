"""Contenders get the same weights, each in its own layout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetk.bench.contenders import (
    block_of,
    contenders,
    contenders_here,
    contenders_named,
    graphed,
    in_fp8,
    ours,
    peer,
    stock,
)
from moetk.bench.layer import layer_cases, measure_layer
from moetk.errors import ConfigError
from tests.test_bench_layer import CPU, METER, built, case, model


def test_contenders_by_name() -> None:
    assert [one.name for one in contenders_named("v5,liger,v5")] == ["v5", "liger"]
    assert next(iter(contenders())) == "v5"
    here = [one.name for one in contenders_here(CPU, torch.float32)]
    assert here == ["v5", "moetk-grouped"]
    with pytest.raises(ConfigError, match="contender 'v6' is not one of v5, v5-eager, moetk-auto"):
        contenders_named("v6")


def test_contenders_of_transformer_engine() -> None:
    names = "moetk-te,moetk-te-adds,moetk-te-fp8,moetk-te-fp8-block"
    found = contenders_named(names)
    assert ",".join(one.name for one in found) == names
    narrow = [None, None, torch.float8_e4m3fn, torch.float8_e4m3fn]
    assert [one.operands for one in found] == narrow


def test_fp8_is_an_autocast_around_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The te backend is stood in for by transformers' own experts, and by noise of one rounding."""
    inside: list[Any] = []

    @contextmanager
    def autocast(enabled: bool, recipe: Any) -> Iterator[None]:
        assert enabled
        inside.append(recipe)
        yield
        inside.append("left")

    te = module("transformer_engine.pytorch", autocast=autocast)
    recipes = module("transformer_engine.common.recipe", Mine=lambda: "mine")
    for made in (
        module("transformer_engine", pytorch=te),
        module("transformer_engine.common", recipe=recipes),
        te,
        recipes,
    ):
        monkeypatch.setitem(sys.modules, made.__name__, made)

    def noisy(block: Any) -> None:
        block.experts.down_proj.data *= 1.04

    monkeypatch.setattr("moetk.bench.contenders.ours", lambda name: built(noisy))
    mine = in_fp8("mine", "Mine")
    report = measure_layer(case(), [stock(), mine, built(noisy)], METER, rounds=1)
    fp8, held_to_stock = report.results[1:]
    assert (
        fp8.error is None and fp8.wrong is None and fp8.errors["y"] == pytest.approx(0.04, rel=1e-4)
    )
    assert "dexperts.down_proj" in fp8.errors  # parameters keep their names
    assert str(held_to_stock.wrong).startswith("WRONG")
    assert set(inside) == {"mine", "left"} and inside[:2] == ["mine", "left"]


def test_a_graphed_layer_is_recorded_once_and_keeps_its_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The graphs are stood in for by the layer itself, after runs that leave gradients behind."""
    recorded: list[torch.Size] = []

    def make_graphed_callables(layer: Any, args: Any, *, allow_unused_input: bool) -> None:
        assert allow_unused_input and args[0].requires_grad and torch.is_grad_enabled()
        recorded.append(args[0].shape)
        plain = layer.forward
        layer(args[0]).sum().backward()
        layer.forward = lambda x: plain(x)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    mine = graphed(stock())
    assert mine.name == "v5-graphed" and not mine.allocates
    report = measure_layer(case(), [stock(), mine], METER, rounds=2)
    first, second = report.results
    assert second.error is None and second.wrong is None and second.saved is None
    assert second.errors == first.errors and len(recorded) == 1
    [_, fresh] = measure_layer(case(grads="fresh"), [stock(), mine], METER, rounds=1).results
    assert "adds to the gradients it was recorded with" in str(fresh.error)


def test_contenders_have_copies_of_the_same_weights() -> None:
    stocked = model()
    for contender in (stock(), stock("eager"), ours("auto")):
        layer = contender.build(stocked)
        for name, parameter in block_of(stocked).named_parameters():
            twin = layer.get_parameter(name)
            assert torch.equal(twin, parameter) and twin.data_ptr() != parameter.data_ptr()


def test_cases_are_every_combination() -> None:
    found = layer_cases("qwen3-30b-a3b,H=32 I=16 E=4 K=2", "1,8", "balanced,same", "fresh",
                        torch.float32, 0)  # fmt: skip
    assert len(found) == 8 and len({one.words() for one in found}) == 8
    for words, message in [
        (("qwen3-30b-a3b", "0", "same", "fresh"), "tokens '0' is no number of tokens"),
        (("qwen3-30b-a3b", "8", "even", "fresh"), "routing 'even' is not one of balanced, zipf"),
        (("qwen3-30b-a3b", "8", "same", "kept"), "grads 'kept' is not one of accumulate, fresh"),
    ]:
        with pytest.raises(ConfigError, match=message):
            layer_cases(*words, torch.float32, 0)


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(contents)
    return made


def experts(x_TH: Tensor, up: Tensor, down: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Gate half first, as transformers has it."""
    pairs = torch.einsum("th,tknh->tkn", x_TH, up[ids_TK.long()])
    gate, value = pairs.chunk(2, dim=-1)
    y = torch.einsum("tki,tkhi->tkh", nn.functional.silu(gate) * value, down[ids_TK.long()])
    return (y * weights_TK[..., None]).sum(1)


class FakeGLUMLP(nn.Module):
    """ScatterMoE's layout: value half first, then the gate's."""

    def __init__(self, hidden_size: int, width: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.experts, self.output_experts = nn.Module(), nn.Module()
        self.experts.weight = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.output_experts.weight = nn.Parameter(torch.empty(num_experts, hidden_size, width))

    def forward(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        value, gate = self.experts.weight.chunk(2, dim=1)
        up = torch.cat([gate, value], dim=1)
        return experts(x_TH, up, self.output_experts.weight, ids_TK, weights_TK)


class FakeSonic(nn.Module):
    """SonicMoE's layout: gate and value rows alternate; its router is its own, its loss too."""

    def __init__(
        self, *, num_experts: int, num_experts_per_tok: int, hidden_size: int,
        intermediate_size: int, activation_function: str, add_bias: bool, std: float,
    ) -> None:  # fmt: skip
        super().__init__()
        assert activation_function == "swiglu" and not add_bias
        self.top_k = num_experts_per_tok
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.c_fc, self.c_proj = nn.Module(), nn.Module()
        up = torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        self.c_fc.weight = nn.Parameter(up)
        self.c_proj.weight = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def _compute_switch_loss(self, *, logits: Tensor) -> Tensor:
        raise AssertionError("no other contender computes it")

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        x_TH = x.view(-1, x.shape[-1])
        best = self.router(x_TH).topk(self.top_k, dim=-1)
        up = torch.cat([self.c_fc.weight[:, ::2], self.c_fc.weight[:, 1::2]], dim=1)
        y = experts(x_TH, up, self.c_proj.weight, best.indices, best.values.softmax(-1))
        return y.view_as(x), self._compute_switch_loss(logits=best.values)


class FakeGroupedLinear(nn.Module):
    def __init__(self, num_gemms: int, inner: int, outer: int, *, bias: bool,
                 params_dtype: torch.dtype, device: torch.device) -> None:  # fmt: skip
        super().__init__()
        for expert in range(num_gemms):
            weight = torch.empty(outer, inner, dtype=params_dtype, device=device)
            self.register_parameter(f"weight{expert}", nn.Parameter(weight))

    def forward(self, x_NH: Tensor, rows: list[int]) -> Tensor:
        parts = x_NH.split(rows)
        return torch.cat([p @ self.get_parameter(f"weight{e}").T for e, p in enumerate(parts)])


def fake_permute(x_TH: Tensor, ids_TK: Tensor, rows: int, map_type: str) -> tuple[Tensor, Tensor]:
    assert ids_TK.dtype is torch.int32 and rows == ids_TK.numel() and map_type == "index"
    order = ids_TK.flatten().sort(stable=True).indices
    return x_TH[order // ids_TK.shape[1]], order


def fake_unpermute(y_NH: Tensor, order: Tensor, weights_TK: Tensor, map_type: str) -> Tensor:
    back = y_NH[order.argsort()].view(*weights_TK.shape, -1)
    return (back * weights_TK[..., None]).sum(1)


class FakeLiger:
    @staticmethod
    def apply(x_TH: Tensor, up: Tensor, down: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        assert ids_TK.dtype is torch.int32
        return experts(x_TH, up, down, ids_TK, weights_TK)


@pytest.mark.parametrize("name", ["liger", "scattermoe", "sonicmoe", "te"])
def test_peers_get_the_weights_in_their_layouts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each library is stood in for by plain torch on the layout its documentation tells."""
    te = module(
        "transformer_engine.pytorch",
        GroupedLinear=FakeGroupedLinear,
        moe_permute=fake_permute,
        moe_unpermute=fake_unpermute,
    )
    swiglu = type("ActivationType", (), {"SWIGLU": "swiglu"})
    for made in (
        module("liger_kernel"),
        module("liger_kernel.ops"),
        module("liger_kernel.ops.fused_moe", LigerFusedMoEFunction=FakeLiger),
        module("scattermoe"),
        module("scattermoe.mlp", GLUMLP=FakeGLUMLP),
        module("sonicmoe", MoE=FakeSonic),
        module("sonicmoe.enums", ActivationType=swiglu),
        module("transformer_engine", pytorch=te),
        te,
    ):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    report = measure_layer(case(), [stock(), peer(name)], METER, rounds=1)
    assert report.results[1].error is None and report.results[1].wrong is None
    assert max(report.results[1].errors.values()) < 1e-6
