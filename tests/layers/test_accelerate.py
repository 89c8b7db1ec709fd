"""accelerate keeps forwards on instances: ours is called all the same, or replacement refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor

import moetk
from moetk import replace_moe
from moetk.errors import ReplaceError
from moetk.layers.replacement import replacement_of
from tests.layers.parts import Tally, cosine
from tests.layers.stock import assert_bitwise, assert_equal, stock
from tests.tiny import FAMILIES, ids


def logits(model: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"logits": model(input_ids=ids()).logits}


def hook_everything(model: Any) -> None:
    for module in model.modules():
        add_hook_to_module(module, ModelHook())


def on_the_cpu(model: Any) -> None:
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def offloaded(model: Any) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


HOOKS = [hook_everything, on_the_cpu, offloaded]
hooks = pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)


@hooks
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_then_replace(hook: Callable[[Any], None], family: str) -> None:
    model = stock(family)
    want = logits(model)
    hook(model)
    assert_bitwise(logits(model), want)
    replacement = replace_moe(model)
    with moetk.record(model) as recording:
        assert_equal(logits(model), want)
    assert len(recording) == 2  # ours ran, in every layer
    assert "grouped" in replacement.explain() and "meta" not in replacement.explain()
    replacement.restore()
    assert_bitwise(logits(model), want)


@hooks
@pytest.mark.parametrize("factory", [None, cosine])
def test_either_order_and_a_custom_router(hook: Callable[[Any], None], factory: Any) -> None:
    plain, before, after = (stock("qwen3_moe") for _ in range(3))
    replace_moe(plain, factory)
    hook(before)
    replace_moe(before, factory)
    replace_moe(after, factory)
    hook(after)
    for model in (before, after):
        with moetk.record(model) as recording:
            assert_bitwise(logits(model), logits(plain))
        assert len(recording) == 2
        replacement_of(model).restore()
        assert_bitwise(logits(model), logits(stock("qwen3_moe")))


def test_hooks_removed_leave_nothing_behind() -> None:
    """accelerate, removing a hook, leaves a bound forward on the instance."""
    model = stock("qwen3_moe")
    want = logits(model)
    hook_everything(model)
    replacement = replace_moe(model)
    remove_hook_from_module(model, recurse=True)
    with moetk.record(model) as recording:
        assert_equal(logits(model), want)
    assert len(recording) == 2
    replacement.restore()
    assert_bitwise(logits(model), want)

    hook_everything(model)
    remove_hook_from_module(model, recurse=True)
    replace_moe(model)
    with moetk.record(model) as recording:
        assert_equal(logits(model), want)
    assert len(recording) == 2


@pytest.mark.parametrize("leaf", ["gate", "experts"])
def test_a_forward_that_someone_else_put_on_an_instance_raises(leaf: str) -> None:
    """As transformers' expert parallelism does: the model stays as it was."""
    model = stock("qwen3_moe")
    module = getattr(model.model.layers[1].mlp, leaf)
    stock_forward = module.forward
    module.forward = lambda *args, **kwargs: stock_forward(*args, **kwargs)
    classes = [type(m) for m in model.modules()]
    want = logits(model)
    with pytest.raises(ReplaceError, match=r"has a forward of its own on the instance \(expert"):
        replace_moe(model, cosine)
    assert [type(m) for m in model.modules()] == classes
    assert not any(".moetk." in name for name in model.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert getattr(model.config, "moetk", None) is None
    assert not model._forward_pre_hooks and not model.model._forward_pre_hooks
    assert_bitwise(logits(model), want)


def test_a_model_on_the_meta_device_raises() -> None:
    with torch.device("meta"):
        model = stock("qwen3_moe").to("meta")
    with pytest.raises(ReplaceError, match=r"mlp is on the meta device: replace after the weights"):
        replace_moe(model)


def test_accelerator_prepares_steps_and_saves(tmp_path: Path) -> None:
    """`prepare` wraps the model's own forward and the optimizer; counts come once a step."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = stock("qwen3_moe", torch.float32).train()
    replacement = replace_moe(model, cosine, controllers=[Tally()])
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, inner)
    replacement.step_after(inner)
    for seed in range(4):
        with accelerator.accumulate(model):
            batch = ids(seed=seed)
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    for one in replacement.steered:
        assert [int(counts_E.sum()) for counts_E in one.controller.given] == [
            2 * ids().numel() * 4
        ] * 2
    accelerator.unwrap_model(model).save_pretrained(tmp_path)
    loaded = moetk.AutoModelForCausalLM.from_pretrained(
        tmp_path, router=cosine, attn_implementation="eager"
    )
    assert_bitwise(logits(loaded.eval()), logits(model.eval()))
