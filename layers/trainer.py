"""The callback that moves controllers under transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from moetk.errors import RouterConfigError
from moetk.layers.attach import Reduce
from moetk.layers.saving import STATE_FILE, load_custom, load_state, stored_custom


class ControllerCallback(TrainerCallback):  # type: ignore[misc]
    """Steps after each optimizer step; on resume, takes the custom routers' tensors and the
    controllers' state from the checkpoint.

    Raises RouterConfigError when it cannot find them and the controllers have seen nothing yet.
    """

    def __init__(self, replacement: Any, reduce: Reduce | None) -> None:
        self.replacement, self.reduce = replacement, reduce

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.replacement.step(self.reduce)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            return
        folder = _resumed_from(args, state.global_step)
        if stored_custom(folder):
            # Trainer loads by the names on disk and misses what a family renames when saved.
            load_custom(self.replacement.model, folder)
        saved = load_state(folder)
        if saved is not None:
            self.replacement.load_state_dict(saved)
        elif self.replacement.steered and self.replacement.carrier.count == 0:
            raise RouterConfigError(
                f"Training goes on at step {state.global_step}, but {folder} holds no "
                f"{STATE_FILE} and these controllers are new. Load the model with "
                "moetk.AutoModelForCausalLM.from_pretrained(<checkpoint>, controllers=...), or set "
                "TrainingArguments.resume_from_checkpoint to the checkpoint."
            )


def controller_callback(replacement: Any, reduce: Reduce | None) -> ControllerCallback:
    return ControllerCallback(replacement, reduce)


def _resumed_from(args: Any, step: int) -> Path:
    """The checkpoint: Trainer.train does not tell its callbacks the folder it was given."""
    given = args.resume_from_checkpoint
    if given is not None and (Path(given) / STATE_FILE).exists():
        return Path(given)
    return Path(args.output_dir) / f"checkpoint-{step}"
