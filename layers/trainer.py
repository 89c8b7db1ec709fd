"""The callback that moves controllers under transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from moetk.layers.attach import Reduce


class ControllerCallback(TrainerCallback):  # type: ignore[misc]
    """Steps after each optimizer step; on resume, takes the controllers' state from the folder."""

    def __init__(self, replacement: Any, reduce: Reduce | None) -> None:
        self.replacement, self.reduce = replacement, reduce

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.replacement.step(self.reduce)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = args.resume_from_checkpoint
        if not folder or state.global_step == 0:
            return
        from pathlib import Path

        from transformers.trainer_utils import get_last_checkpoint

        from moetk.layers.saving import load_state

        path = get_last_checkpoint(args.output_dir) if folder is True else folder
        saved = load_state(Path(path))
        if saved is not None:
            self.replacement.load_state_dict(saved)


def controller_callback(replacement: Any, reduce: Reduce | None) -> ControllerCallback:
    return ControllerCallback(replacement, reduce)
