"""What two models do in training alone: their settings for it, which no comparison runs."""

from __future__ import annotations

from typing import Any

from torch import nn

from moetk.layers.find import root_of

# Of the auxiliary losses and the routers' noise, as Transformers' families spell them. A model
# keeps some from when it was made: what is in its config later is not what its loss reads.
_NAMES = (
    "output_router_logits",
    "router_aux_loss_coef",
    "aux_loss_coef",
    "aux_loss_alpha",
    "moe_loss_weight",
    "router_z_loss_coef",
    "z_loss_coefficient",
    "router_jitter_noise",
    "input_jitter_noise",
    "moe_jitter_eps",
)
_ABSENT = "absent"


def settings_apart(a: nn.Module, b: nn.Module) -> list[str]:
    """A note for each setting of training that the two do not share."""
    notes = []
    for where in ("config", "model"):
        ours, theirs = (_settings(model, where) for model in (a, b))
        for name in _NAMES:
            one, other = ours.get(name, _ABSENT), theirs.get(name, _ABSENT)
            if one != other:
                notes.append(
                    f"training is not compared, and the two differ in it: {where}.{name} is {one} "
                    f"in a, {other} in b"
                )
    return notes


def _settings(model: nn.Module, where: str) -> dict[str, Any]:
    root = root_of(model)
    held: dict[str, Any] = vars(root if where == "model" else root.config.get_text_config())
    return held
