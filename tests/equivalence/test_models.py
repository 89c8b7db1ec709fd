"""Whole models: which layer differs, what lies between the layers, and what cannot be compared."""

import copy
import json
import runpy

import pytest
import torch
from torch import nn

import moetk
from moetk.equivalence import compare_models
from moetk.equivalence.model_settings import settings_apart
from moetk.equivalence.models import moe_blocks
from moetk.equivalence.page import render
from moetk.errors import EquivalenceError
from tests.tiny import FAMILIES, ids, tiny

pytestmark = pytest.mark.v5


@pytest.fixture(scope="module")
def stock():
    return tiny("qwen3_moe")


@torch.no_grad()
def swap_gate_and_up(model, index):
    weight = model.model.layers[index].mlp.experts.gate_up_proj
    weight.copy_(weight.roll(weight.shape[1] // 2, 1))
    return model


@pytest.fixture(scope="module")
def planted(stock):
    return compare_models(stock, swap_gate_and_up(copy.deepcopy(stock), 1), ids())


def test_a_replaced_model_is_the_stock_one(stock):
    ours = copy.deepcopy(stock)
    moetk.replace_moe(ours)
    done = []
    report = compare_models(stock, ours, ids(), progress=lambda *what: done.append(what))
    assert report.ok and report.first is None and report.cause == ""
    assert "verdict   no layer differs, and nothing between them" in str(report)
    assert report.tensors == () and "all bitwise equal" in report.explain()
    assert done[0] == ("own runs", 0, 5) and done[2] == ("model.layers.0.mlp", 2, 5)
    assert "No layer differs" in render(report)


def test_a_fault_is_found_in_its_layer_and_not_in_the_next(planted):
    assert not planted.ok and planted.first.index == 1
    assert planted.first.report.first.stage == "up"
    assert planted.cause == "gate and up swapped"
    assert planted.layers[0].ok and planted.after <= 1e-10
    assert planted.layers[0].leaving < 1e-5 < planted.layers[1].leaving
    assert planted.logits > 1e-5
    (apart,) = planted.tensors
    assert apart.name == "model.layers.1.mlp.experts.gate_up_proj" and apart.error > 0.1


def test_a_fault_in_an_earlier_layer_does_not_show_in_a_later_one(stock):
    report = compare_models(stock, swap_gate_and_up(copy.deepcopy(stock), 0), ids())
    assert report.first.index == 0 and report.layers[1].ok
    assert report.layers[1].entering > 1e-3


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", 0),
        ("model.layers.1.self_attn.v_proj.weight", 1),
        ("model.layers.1.post_attention_layernorm.weight", 1),
        ("lm_head.weight", None),
    ],
)
def test_what_differs_between_the_layers_is_named_there(stock, name, place):
    ours = copy.deepcopy(stock)
    with torch.no_grad():
        ours.get_parameter(name).mul_(1.001)
    report = compare_models(stock, ours, ids())
    assert not report.ok and report.cause == "unknown"
    assert all(layer.report.ok for layer in report.layers)
    if place is None:
        assert report.first is None and report.after > 1e-6
        assert "between the last mixture-of-experts layer and the logits" in report.explain()
        assert "between the last layer and the logits" in render(report)
    else:
        assert report.first.index == place and report.first.around > 1e-6
        assert [layer.ok for layer in report.layers].count(False) == 1 and report.after <= 1e-10
        assert f"around model.layers.{place}.mlp" in report.explain()
        assert f"They first differ around model.layers.{place}.mlp" in render(report)
    with pytest.raises(EquivalenceError, match="No .* block differs. What differs lies outside"):
        report.repro("nowhere")


def test_the_models_stay_as_they_were(stock):
    ours = copy.deepcopy(stock).train()
    ours.model.layers[0].eval()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    modes = [module.training for module in ours.modules()]
    compare_models(stock, ours, ids())
    assert modes == [module.training for module in ours.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    assert all(parameter.grad is None for parameter in ours.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ours.modules())


def test_two_families_are_compared(stock):
    theirs = tiny("deepseek_v3")
    report = compare_models(stock, theirs, ids())
    assert not report.ok and len(report.layers) == 2
    assert any(one.shape is None for one in report.tensors)
    assert any(one.other_shape is None for one in report.tensors)
    lines = report.table().splitlines()
    assert max(map(len, lines)) <= 120 and any("only in a" in line for line in lines)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_its_replacement(family):
    theirs = tiny(family)
    ours = copy.deepcopy(theirs)
    moetk.replace_moe(ours)
    report = compare_models(theirs, ours, ids(1, 8))
    assert report.ok and report.notes == () and report.after <= 1e-10, report.table()


def test_settings_of_training_are_noted(stock):
    ours = copy.deepcopy(stock)
    ours.config.output_router_logits = not stock.config.output_router_logits
    ours.router_aux_loss_coef = 0.5
    report = compare_models(stock, ours, ids())
    now, then = (model.config.output_router_logits for model in (stock, ours))
    assert report.ok and report.notes == tuple(
        f"training is not compared, and the two differ in it: {what}"
        for what in (
            f"config.output_router_logits is {now} in a, {then} in b",
            f"model.router_aux_loss_coef is {stock.router_aux_loss_coef} in a, 0.5 in b",
        )
    )
    assert "Not compared: the loss" in " ".join(report.table().split())
    assert "model.router_aux_loss_coef" in render(report)
    assert "absent in b" in " ".join(settings_apart(stock, tiny("deepseek_v3")))


def test_a_model_that_keeps_and_draws_is_left_as_it_was(stock):
    theirs, ours = copy.deepcopy(stock), copy.deepcopy(stock)
    seen = ours.model.layers[0].seen = []
    ours.model.layers[0].register_forward_pre_hook(lambda layer, args: layer.seen.append(1))
    ours.aux_loss = (ours.lm_head.weight * 2).sum()  # a tensor with a graph
    before = torch.get_rng_state()
    for model in (theirs, ours):
        model.lm_head.register_forward_hook(lambda head, args, out: out + torch.rand(1).double())
    report = compare_models(theirs, ours, ids())
    assert report.ok and report.notes == (), report.table()
    assert torch.equal(torch.get_rng_state(), before) and seen == []


class Single(nn.Module):
    """A head whose code takes no fp64."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        if x.dtype == torch.float64:
            raise RuntimeError("this kernel takes float32")
        return self.head(x)


def test_what_does_not_run_in_fp64_is_said_and_not_judged(stock):
    ours = copy.deepcopy(stock)
    ours.lm_head = Single(ours.lm_head)
    report = compare_models(stock, ours, ids())
    assert report.ok and report.after is None
    assert [layer.around for layer in report.layers] == [None, None]
    assert "does not run in fp64: RuntimeError: this kernel takes float32" in " ".join(
        report.table().split()
    )
    assert json.loads(report.to_json())["notes"] == list(report.notes)
    assert "this kernel takes float32" in render(report)


def test_blocks_are_found_by_what_they_hold(stock):
    assert [block.name for block in moe_blocks(stock)] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]
    assert [block.name for block in moe_blocks(tiny("deepseek_v3"))] == [
        "model.layers.1.mlp",
        "model.layers.2.mlp",
    ]


def test_what_a_report_says_and_writes(planted, tmp_path):
    lines = planted.table().splitlines()
    assert lines[0].split()[0] == "layer" and max(map(len, lines)) <= 120
    assert any("differs at up: gate and up swapped" in line for line in lines)
    found = json.loads(planted.to_json(tmp_path / "report.json"))
    assert found["first"] == 1 and found["cause"] == "gate and up swapped"
    assert [layer["report"]["ok"] for layer in found["layers"]] == [True, False]
    assert found["tensors"][0]["name"].endswith("gate_up_proj")
    (axes,) = planted.plot(tmp_path / "plot.png").axes
    assert [label.get_text() for label in axes.get_xticklabels()][-1] == "logits"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "<b>gate and up swapped</b>" in render(planted)


def test_the_test_it_writes_loads_both_checkpoints(stock, planted, tmp_path):
    stock.save_pretrained(tmp_path / "a")
    bad = swap_gate_and_up(copy.deepcopy(stock), 1)
    bad.save_pretrained(tmp_path / "b")
    path = planted.repro(tmp_path / "repro", tmp_path / "a", tmp_path / "b")
    assert path.read_text().count('.get_submodule("model.layers.1.mlp")') == 2
    with pytest.raises(AssertionError, match="gate and up swapped"):
        runpy.run_path(str(path))["test_up"]()
    stock.save_pretrained(tmp_path / "b")
    runpy.run_path(str(path))["test_up"]()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "mixture-of-experts layers: 2 in a .*, 3 in b"),
        ({"vocab_size": 64}, "vocabulary: 96 in a .*, 64 in b"),
        ({"hidden_size": 48}, "hidden size: 32 in a .*, 48 in b"),
    ],
)
def test_models_of_other_sizes_are_refused(stock, changes, message):
    with pytest.raises(EquivalenceError, match=message):
        compare_models(stock, tiny("qwen3_moe", **changes), ids())


def test_models_of_other_dtypes_are_refused(stock):
    with pytest.raises(EquivalenceError, match="in torch.float32, b .* in torch.bfloat16"):
        compare_models(stock, copy.deepcopy(stock).bfloat16(), ids())


def test_a_dense_model_is_refused(stock):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    dense = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=96, hidden_size=32, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        )
    )  # fmt: skip
    with pytest.raises(EquivalenceError, match="b, a Qwen3ForCausalLM, holds no mixture-of-exp"):
        compare_models(stock, dense, ids())
