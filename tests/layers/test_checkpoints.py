"""Custom routers and controllers: saved beside the stock weights, brought back whole or not."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moetk
from moetk import BlockSpec, replace_moe
from moetk.controllers import BiasUpdate
from moetk.errors import (
    MissingTensorError,
    MoeShapeError,
    RouterConfigError,
    UnexpectedTensorError,
    UnsafePathError,
)
from moetk.layers.replacement import replacement_of
from moetk.layers.saving import STATE_FILE, load_state
from moetk.losses import LoadBalancingLoss, RouterZLoss
from moetk.routers import LinearRouter, MixtralRouter
from tests.layers.parts import CosineRouter, cosine, noisy
from tests.layers.stock import assert_bitwise
from tests.tiny import FAMILIES, H, ids, tiny

families = pytest.mark.parametrize("family", FAMILIES)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=ids()).logits
    return out


def load(folder: Path, router: Any = None, **kwargs: Any) -> Any:
    return moetk.AutoModelForCausalLM.from_pretrained(
        folder, router=router, attn_implementation="eager", **kwargs
    )


def train(model: Any, steps: int, optimizer: Any = None) -> Any:
    """AdamW on the same batches each time it starts from the same step."""
    model.train()
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        done = optimizer.state[next(model.parameters())].get("step", torch.zeros(()))
        batch = ids(seed=int(done))
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@families
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_train_save_reload(family: str, shards: str, tmp_path: Path) -> None:
    model = tiny(family)
    replace_moe(model, cosine)
    before = {n: p.clone() for n, p in model.named_parameters() if ".moetk." in n}
    train(model, 2)
    after = dict(model.named_parameters())
    assert before and not any(torch.equal(after[name], old) for name, old in before.items())
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "20KB")

    loaded = load(tmp_path, cosine)
    assert torch.equal(logits(loaded), logits(model))
    assert_bitwise(loaded.state_dict(), model.state_dict())
    assert replacement_of(loaded).label == "CosineRouter"
    with pytest.raises(RouterConfigError, match=r"was saved with the router 'CosineRouter'.*pass"):
        load(tmp_path)


def test_loading_info_of_a_custom_router(tmp_path: Path) -> None:
    model = tiny("mixtral")
    replace_moe(model, cosine)
    model.save_pretrained(tmp_path)
    loaded, info = load(tmp_path, cosine, output_loading_info=True)
    assert torch.equal(logits(loaded), logits(model))
    assert not info["unexpected_keys"] and not info["missing_keys"]


def test_plain_transformers_loads_the_stock_part(tmp_path: Path) -> None:
    """The stock gate is still there, as it was before the custom router took its place."""
    model = tiny("qwen3_moe")
    want = logits(model)
    replacement = replace_moe(model, cosine)
    model.save_pretrained(tmp_path)
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert info["unexpected_keys"] and all(".moetk." in key for key in info["unexpected_keys"])
    assert torch.equal(logits(plain), want)
    replacement.restore()
    assert torch.equal(logits(model), want)


def test_only_some_layers_custom(tmp_path: Path) -> None:
    def second(spec: BlockSpec) -> CosineRouter | None:
        return cosine(spec) if spec.moe_index == 1 else None

    model = tiny("qwen3_moe")
    replace_moe(model, second)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, second)), logits(model))
    with pytest.raises(MissingTensorError, match=r"lacks model.layers.0.mlp.gate.moetk"):
        load(tmp_path, cosine)


class Biased(CosineRouter):
    def __init__(self, spec: BlockSpec) -> None:
        super().__init__(spec.hidden_size, spec.num_experts, spec.top_k)
        self.offset = nn.Parameter(torch.zeros(spec.num_experts))


def mixtral(spec: BlockSpec) -> LinearRouter:
    return MixtralRouter(spec.hidden_size, spec.num_experts, spec.top_k)


def wide(spec: BlockSpec) -> CosineRouter:
    return CosineRouter(spec.hidden_size + 1, spec.num_experts, spec.top_k)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_wrong_factory_raises_and_names_tensors(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    replace_moe(model, cosine)
    model.save_pretrained(tmp_path)
    fix = r"Pass the factory that built it when it was saved\."
    with pytest.raises(MissingTensorError, match=rf"lacks .*gate.moetk.offset, .*{fix}"):
        load(tmp_path, Biased)
    with pytest.raises(UnexpectedTensorError, match=rf"also holds .*moetk.sharpness.*{fix}"):
        load(tmp_path, mixtral)
    shapes = rf"gate.moetk.weight is \(8, {H}\), the factory's router has \(8, {H + 1}\)"
    with pytest.raises(MoeShapeError, match=shapes):
        load(tmp_path, wide)


def test_a_function_without_tensors_is_named_in_the_config_too(tmp_path: Path) -> None:
    def factory(spec: BlockSpec) -> Any:
        return mixtral(spec).eval().requires_grad_(False).forward

    model = tiny("qwen3_moe")
    replace_moe(model, factory)
    model.save_pretrained(tmp_path)
    mark = json.loads((tmp_path / "config.json").read_text())["moetk"]
    assert mark["router"] == "MixtralRouter.forward"
    load(tmp_path, factory)
    with pytest.raises(RouterConfigError, match=r"pass router=<your factory> to from_pretrained"):
        load(tmp_path)


def test_a_planted_index_cannot_point_outside(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    replace_moe(model, cosine)
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(key for key in index["weight_map"] if ".moetk." in key)
    shard = folder / index["weight_map"][name]
    save_file(load_file(shard), tmp_path / "planted.safetensors", metadata={"format": "pt"})
    index["weight_map"][name] = "../planted.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafePathError, match=r"\.\./planted.safetensors"):
        load(folder, cosine)


def test_a_router_is_not_taken_from_a_pickle(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    replace_moe(model, cosine)
    model.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MissingTensorError, match=r"the saved router lacks"):
        load(tmp_path, cosine)


# Training goes on.

ATTACHED = {
    "losses": (RouterZLoss(0.2), LoadBalancingLoss(0.5, scope="sequence")),
    "controllers": (BiasUpdate(0.01),),
}


def steered(family: str) -> tuple[Any, Any]:
    """A model and its factory: deepseek_v3 with its own router, the others with a noisy one."""
    model = tiny(family)
    factory = None if family == "deepseek_v3" else noisy
    replace_moe(model, factory, seed=11, **ATTACHED)
    return model, factory


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_resume_is_exact(family: str, tmp_path: Path) -> None:
    """Parameters, bias and noise after 4 steps = after 2, a save, a reload and 2 more, bit for
    bit."""
    straight, factory = steered(family)
    replacement = replacement_of(straight)
    optimizer = torch.optim.AdamW(straight.parameters(), lr=0.01)
    replacement.step_after(optimizer)
    train(straight, 4, optimizer)

    first, _ = steered(family)
    optimizer = torch.optim.AdamW(first.parameters(), lr=0.01)
    replacement_of(first).step_after(optimizer)
    train(first, 2, optimizer)
    first.save_pretrained(tmp_path)
    memory = optimizer.state_dict()

    second = load(tmp_path, factory, **ATTACHED)
    optimizer = torch.optim.AdamW(second.parameters(), lr=0.01)
    optimizer.load_state_dict(memory)
    replacement_of(second).step_after(optimizer)
    train(second, 2, optimizer)

    assert_bitwise(second.state_dict(), straight.state_dict())
    want, got = replacement.state_dict(), replacement_of(second).state_dict()
    assert got.keys() == want.keys() and len(want) == 4
    assert got["forwards"] == want["forwards"] == 4 and got["seed"] == want["seed"] == 11
    for key in want.keys() - {"forwards", "seed"}:
        assert_bitwise(got[key], want[key])
        assert int(want[key]["steps"]) == 4


def test_noise_goes_on_without_controllers(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    replace_moe(model, noisy, seed=11)
    optimizer = train(model, 2)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, noisy)
    assert replacement_of(loaded).state_dict() == {"forwards": 2, "seed": 11}
    again = torch.optim.AdamW(loaded.parameters(), lr=0.01)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, 1, optimizer)
    train(loaded, 1, again)
    assert_bitwise(loaded.state_dict(), model.state_dict())


def test_a_steered_checkpoint_loads_without_controllers_and_keeps_its_bias(tmp_path: Path) -> None:
    model, _ = steered("qwen3_moe")
    train(model, 2)
    replacement_of(model).step()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, noisy)
    bias = "model.layers.0.mlp.gate.moetk.e_score_correction_bias"
    assert torch.equal(loaded.state_dict()[bias], model.state_dict()[bias])
    assert bool(model.state_dict()[bias].any())
    assert torch.equal(logits(loaded), logits(model))


def test_controller_state_of_another_model_raises(tmp_path: Path) -> None:
    model, _ = steered("qwen3_moe")
    model.save_pretrained(tmp_path)
    with pytest.raises(RouterConfigError, match=r"holds nothing that this model lacks, and lacks"):
        load(tmp_path, noisy, controllers=(BiasUpdate(0.01), BiasUpdate(0.1)))
    saved = load_state(tmp_path)
    assert saved is not None and (tmp_path / STATE_FILE).exists()
    del saved["model.layers.1.mlp.0"]
    with pytest.raises(RouterConfigError, match=r"lacks \['model.layers.1.mlp.0'\] that it has"):
        replacement_of(model).load_state_dict(saved)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_steers_its_own_routers(family: str, how: str) -> None:
    model, _ = steered(family)
    train(model, 1)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))

    def biases(of: Any) -> list[Tensor]:
        return [b for n, b in of.named_buffers() if n.endswith("e_score_correction_bias")]

    original = [bias.clone() for bias in biases(model)]
    assert len(original) == 2
    counted = replacement_of(model).carrier.count
    train(twin, 1)
    replacement_of(twin).step()
    for before, here, there in zip(original, biases(model), biases(twin), strict=True):
        assert torch.equal(here, before)
        assert not torch.equal(there, before)
    assert replacement_of(model).carrier.count == counted
    assert replacement_of(twin).carrier.count == counted + 1
    replacement_of(model).step()
    assert all(not torch.equal(a, b) for a, b in zip(original, biases(model), strict=True))
