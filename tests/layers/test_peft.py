"""LoRA on expert banks: with PEFT's wrappers in between, replaced models equal stock ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import moetk
from moetk import replace_moe
from moetk.layers.replacement import replacement_of
from tests.layers.parts import ExactZLoss, Tally, cosine
from tests.layers.stock import assert_bitwise, assert_equal, stock
from tests.tiny import FAMILIES, ids

BLOCK = {"gpt_oss": "mlp", "granitemoe": "block_sparse_moe"}


def lora(model: Any, family: str) -> Any:
    """LoRA of rank 2 on both expert tensors, filled so that it changes something."""
    experts = f"{BLOCK.get(family, 'mlp')}.experts"
    settings = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=[],
        target_parameters=[f"{experts}.gate_up_proj", f"{experts}.down_proj"],
    )
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
    return fill(adapted)


@torch.no_grad()
def fill(adapted: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapted


def step(adapted: Any) -> dict[str, Tensor]:
    """Logits and the gradient of every adapter tensor."""
    adapted.zero_grad()
    out = adapted(input_ids=ids(), labels=ids())
    out.loss.backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(grads) == 8 and all("lora_" in name for name in grads)
    assert all(bool(grad.any()) for grad in grads.values())
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **grads}


def replace_then_adapt(model: Any, family: str) -> Any:
    replace_moe(model)
    return lora(model, family)


def adapt_then_replace(model: Any, family: str) -> Any:
    adapted = lora(model, family)
    replace_moe(adapted)
    return adapted


orders = pytest.mark.parametrize("make", [replace_then_adapt, adapt_then_replace])


@orders
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_equal_stock(make: Callable[[Any, str], Any], family: str) -> None:
    model = stock(family)
    theirs, ours = lora(copy.deepcopy(model), family), make(copy.deepcopy(model), family)
    with moetk.record(ours) as recording:
        got = step(ours)
    assert len(recording) == 2  # ours ran, in every layer
    assert_equal(got, step(theirs))


def logits(adapted: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = adapted(input_ids=ids()).logits
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_adapters_then_replaced(family: str, tmp_path: Path) -> None:
    model = stock(family)
    lora(copy.deepcopy(model), family).save_pretrained(tmp_path)
    theirs, ours = (
        PeftModel.from_pretrained(
            copy.deepcopy(model), tmp_path, is_trainable=True, autocast_adapter_dtype=False
        )
        for _ in range(2)
    )
    replace_moe(ours)
    assert_equal(step(ours), step(theirs))
    assert not torch.equal(logits(ours), logits(model))


@orders
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_save_disable_merge(make: Callable[[Any, str], Any], family: str, tmp_path: Path) -> None:
    model = stock(family)
    theirs, ours = lora(copy.deepcopy(model), family), make(copy.deepcopy(model), family)
    for name, adapted in (("theirs", theirs), ("ours", ours)):
        adapted.save_pretrained(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "theirs").glob("adapter*"))
    assert "adapter_model.safetensors" in names
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()

    with ours.disable_adapter(), theirs.disable_adapter():
        assert_equal({"": logits(ours)}, {"": logits(theirs)})
        assert_equal({"": logits(ours)}, {"": logits(model)})

    want = logits(theirs)
    assert_equal({"": logits(ours)}, {"": want})
    merged, merged_theirs = ours.merge_and_unload(), theirs.merge_and_unload()
    assert_bitwise(merged.state_dict(), merged_theirs.state_dict())
    assert_equal({"": logits(merged)}, {"": want})
    merged.save_pretrained(tmp_path / "merged")
    merged_theirs.save_pretrained(tmp_path / "merged_theirs")
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (
        tmp_path / "merged_theirs/model.safetensors"
    ).read_bytes()


@orders
def test_restored_below_peft(make: Callable[[Any, str], Any]) -> None:
    model = stock("qwen3_moe")
    theirs, ours = lora(copy.deepcopy(model), "qwen3_moe"), make(model, "qwen3_moe")
    replacement_of(ours).restore()
    assert_bitwise(step(ours), step(theirs))


def test_a_custom_router_and_losses_below_peft() -> None:
    """The adapters of a custom router's model get the attached loss's gradient through its
    frozen router, as they do when it is added by hand."""
    model = stock("qwen3_moe").train()
    ours, twin = copy.deepcopy(model), copy.deepcopy(model)
    replacement = replace_moe(ours, cosine, losses=[ExactZLoss(0.3)], controllers=[Tally()])
    made: list[Any] = []

    def remembering(spec: moetk.BlockSpec) -> Any:
        router = cosine(spec).double()
        spec.module.add_module("kept", router)  # only so that PEFT freezes it

        def route(x_TH: Tensor, ctx: moetk.RouterContext) -> moetk.TokenChoice:
            made.append(router(x_TH, ctx))
            return made[-1]

        return route

    replace_moe(twin, remembering)
    ours, twin = lora(ours, "qwen3_moe"), lora(twin, "qwen3_moe")
    ours(input_ids=ids(), labels=ids()).loss.backward()
    loss = twin(input_ids=ids(), labels=ids()).loss
    mask = torch.nn.functional.pad(torch.ones(2, 11, dtype=torch.bool), (0, 1)).flatten()
    ctx = moetk.RouterContext(label_mask=mask)
    (loss + sum(ExactZLoss(0.3)(routing, ctx) for routing in made)).backward()

    def grads(adapted: Any) -> dict[str, Tensor]:
        return {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}

    assert len(grads(twin)) == 8
    assert_equal(grads(ours), grads(twin), 1e-7)
    replacement.step()
    for one in replacement.steered:
        assert int(one.controller.given[0].sum()) == ids().numel() * 4
