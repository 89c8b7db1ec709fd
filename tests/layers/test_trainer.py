"""transformers' Trainer: it trains, saves and resumes a replaced model as it does a stock one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import moetk
from moetk import replace_moe
from moetk.controllers import BiasUpdate
from moetk.errors import RouterConfigError
from moetk.layers.replacement import replacement_of
from moetk.layers.saving import STATE_FILE
from moetk.losses import LoadBalancingLoss, RouterZLoss
from tests.layers.parts import Tally, cosine, data, noisy
from tests.layers.stock import assert_bitwise, assert_equal, gradients
from tests.tiny import FAMILIES, tiny

# Its configuration, as stock saves it, is not one that stock's Trainer reads back.
RESUMABLE = tuple(family for family in FAMILIES if family != "deepseek_v4")


def trainer(model: Any, folder: Path, *, accumulate: int = 1, steps: int = 2, **more: Any) -> Any:
    """Eight rows an optimizer step, in `accumulate` micro-batches; a checkpoint each step."""
    settings = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
        save_strategy="steps",
        save_steps=1,
        logging_steps=1,
        learning_rate=1e-2,
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": i, "labels": t} for i, t in zip(*data(), strict=True)]
    return Trainer(model, settings, train_dataset=rows * 2, **more)


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained(model: Any, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    run = trainer(model, folder)
    run.train()
    return losses(run), state(model)


def resumed(model: Any, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    run = trainer(model, folder)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    return losses(run), state(model)


@pytest.mark.parametrize("family", RESUMABLE)
def test_two_steps_and_resume_equal_stock(family: str, tmp_path: Path) -> None:
    """Trained, then resumed by a fresh model: with stock's experts all bits, with ours the losses
    (AdamW's first steps are signs of gradients, which leave parameters little to compare)."""
    for go in (trained, resumed):
        want_losses, want = go(tiny(family), tmp_path / "stock")
        assert len(want_losses) == 2
        for backend in ("stock", "auto"):
            model = tiny(family)
            replace_moe(model, backend=backend)
            got_losses, got = go(model, tmp_path / backend)
            assert got_losses == pytest.approx(want_losses, rel=1e-6)
            # deepseek_v3's unsorted columns are summed in another order than our sorted ones.
            if backend == "stock" and family != "deepseek_v3":
                assert_bitwise(got, want)


def experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".experts." in name}


@pytest.mark.parametrize("family", RESUMABLE)
def test_stock_itself_resumes_without_its_experts(family: str, tmp_path: Path) -> None:
    """Trainer loads a checkpoint by the names on disk, and takes no notice of those it misses:
    whatever a family renames when it is saved stays as the fresh model had it. Loading the model
    from the checkpoint before resuming is the way around it."""
    _, want = trained(tiny(family), tmp_path)
    with safe_open(tmp_path / "checkpoint-1" / "model.safetensors", "pt") as stream:
        renamed = not set(stream.keys()) >= experts(want).keys()
    run = trainer(fresh := tiny(family), tmp_path)
    before = experts(state(fresh))
    run._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    kept = {
        name for name, tensor in experts(state(fresh)).items() if torch.equal(tensor, before[name])
    }
    assert kept == (before.keys() if renamed else set())


def test_stock_itself_cannot_resume_deepseek_v4(tmp_path: Path) -> None:
    for replace in (False, True):
        model, folder = tiny("deepseek_v4"), tmp_path / str(replace)
        if replace:
            replace_moe(model)
        trained(model, folder)
        with pytest.raises(Exception, match="mlp_layer_types"):
            resumed(model, folder)


ATTACHED = (RouterZLoss(0.2), LoadBalancingLoss(0.5, scope="sequence"))


class Gradients(TrainerCallback):
    """Keeps the routers' gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        if not self.kept:
            self.kept = {
                name: grad.clone() for name, grad in gradients(model).items() if ".moetk." in name
            }


def test_router_gradients_and_counts_at_accumulation(tmp_path: Path) -> None:
    """One optimizer step on the same rows in one, two and four micro-batches of unequal labels."""
    seen, counts = [], []
    for accumulate in (1, 2, 4):
        model = tiny("qwen3_moe")
        replacement = replace_moe(model, cosine, losses=ATTACHED, controllers=[Tally()])
        watch = Gradients()
        callbacks = [watch, replacement.trainer_callback()]
        run = trainer(model, tmp_path, accumulate=accumulate, steps=1, callbacks=callbacks)
        run.train()
        seen.append(watch.kept)
        counts.append([one.controller.given for one in replacement.steered])
    assert_equal(seen[1], seen[0], 1e-5)
    assert_equal(seen[2], seen[0], 1e-5)
    for layers in counts:
        for given, first in zip(layers, counts[0], strict=True):
            assert len(given) == 1 and int(given[0].sum()) == 8 * 12 * 4
            assert torch.equal(given[0], first[0])


def build(model: Any) -> Any:
    return replace_moe(
        model, noisy, losses=ATTACHED, controllers=[BiasUpdate(0.01)], backend="auto", seed=11
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_resume_is_exact(family: str, tmp_path: Path) -> None:
    """Four steps straight, or two, a fresh process's objects, and two more: the same bits, with a
    router that is noisy, a bias that is steered and an optimizer that remembers."""
    straight = tiny(family)
    replacement = build(straight)
    callbacks = [replacement.trainer_callback()]
    trainer(straight, tmp_path / "a", accumulate=2, steps=4, callbacks=callbacks).train()
    want, want_state = state(straight), replacement.state_dict()

    first = tiny(family)
    callbacks = [build(first).trainer_callback()]
    run = trainer(first, tmp_path / "b", accumulate=2, steps=4, callbacks=[*callbacks, StopAt(2)])
    run.train()
    checkpoint = get_last_checkpoint(str(tmp_path / "b"))
    assert checkpoint and checkpoint.endswith("checkpoint-2")
    assert (Path(checkpoint) / STATE_FILE).exists()

    second = moetk.AutoModelForCausalLM.from_pretrained(
        checkpoint,
        router=noisy,
        losses=ATTACHED,
        controllers=[BiasUpdate(0.01)],
        attn_implementation="eager",
    )
    loaded = replacement_of(second)
    run = trainer(
        second, tmp_path / "b", accumulate=2, steps=4, callbacks=[loaded.trainer_callback()]
    )
    run.train(resume_from_checkpoint=True)
    assert_bitwise(state(second), want)
    got_state = loaded.state_dict()
    assert got_state["forwards"] == want_state["forwards"] == 8
    assert got_state["seed"] == want_state["seed"]
    for key in want_state.keys() - {"forwards", "seed"}:
        assert_bitwise(got_state[key], want_state[key])
        assert bool(want_state[key]["bias"].any()) and int(want_state[key]["steps"]) == 4


class StopAt(TrainerCallback):
    """Ends training after some steps, as a kill would, with the schedule of the whole run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


def custom(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".moetk." in name}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_callback_brings_a_custom_router_back(family: str, tmp_path: Path) -> None:
    """Into a model that was not loaded from the checkpoint, mixtral's renamed blocks included."""
    model = tiny(family)
    run = trainer(model, tmp_path, steps=2, callbacks=[build(model).trainer_callback()])
    run.train()
    fresh = tiny(family)
    replacement = build(fresh)
    run = trainer(fresh, tmp_path, steps=2, callbacks=[replacement.trainer_callback()])
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_bitwise(custom(state(fresh)), custom(state(model)))
    saved = replacement_of(model).state_dict()
    for key in saved.keys() - {"forwards", "seed"}:
        assert_bitwise(replacement.state_dict()[key], saved[key])
    assert replacement.state_dict()["forwards"] == saved["forwards"] == 2


def test_controllers_that_find_no_state_raise(tmp_path: Path) -> None:
    trained(tiny("deepseek_v3"), tmp_path)
    model = tiny("deepseek_v3")
    replacement = replace_moe(model, controllers=[BiasUpdate(0.01)])
    run = trainer(model, tmp_path, callbacks=[replacement.trainer_callback()])
    message = r"goes on at step 1, but .*checkpoint-1 holds no moetk_state.safetensors and these"
    with pytest.raises(RouterConfigError, match=message):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_elsewhere_is_named_in_the_arguments(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    trainer(model, tmp_path / "a", callbacks=[build(model).trainer_callback()]).train()
    fresh = tiny("qwen3_moe")
    replacement = build(fresh)
    run = trainer(fresh, tmp_path / "b", callbacks=[replacement.trainer_callback()])
    run.args.resume_from_checkpoint = str(tmp_path / "a" / "checkpoint-2")
    run.train(resume_from_checkpoint=run.args.resume_from_checkpoint)
    assert replacement.state_dict()["forwards"] == 2
