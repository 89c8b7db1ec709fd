"""Checkpoints of replaced models: stock names and bytes, a router's own keys beside them.

A custom router's tensors lie at `<gate>.moetk.<name>` among the model's, `config.moetk` names the
router, and controllers' state is `moetk_state.safetensors` beside the weights. A router is never
imported by a name that was found in a file: whoever loads passes the factory.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from moetk.errors import (
    MissingTensorError,
    MoeShapeError,
    RouterConfigError,
    UnexpectedTensorError,
)
from moetk.io.atomic import write_file
from moetk.io.paths import inside

STATE_FILE = "moetk_state.safetensors"
MARK = ".moetk."


class SavingShell:
    """In front of a model with a custom router or controllers: saves their state with it."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        from moetk.layers.replacement import replacement_of

        replacement = replacement_of(self)  # type: ignore[arg-type]
        if replacement.label:
            self.config.moetk = mark(self, replacement.label)  # type: ignore[attr-defined]
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            save_state(replacement.state_dict(), Path(save_directory))


def custom_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of custom routers, by their name in the model."""
    return {name: tensor for name, tensor in model.state_dict().items() if MARK in name}


def mark(model: Any, label: str) -> dict[str, Any]:
    """What `config.moetk` says: routers' names, and a hash of their tensors' names and shapes."""
    shapes = {name: list(tensor.shape) for name, tensor in custom_tensors(model).items()}
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16]
    return {"router": label, "spec": digest, "format": 1}


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Write a Replacement's state_dict: tensors as tensors, the rest as JSON in the header."""
    tensors, plain = {}, {}
    for key, value in state.items():
        if isinstance(value, dict):
            for name, item in value.items():
                if isinstance(item, Tensor):
                    tensors[f"{key}|{name}"] = item.detach().cpu().contiguous()
                else:
                    plain[f"{key}|{name}"] = item
            plain.setdefault(f"{key}|", None)
        else:
            plain[key] = value
    data = to_bytes(tensors, metadata={"format": "pt", "moetk": json.dumps(plain)})
    write_file(folder / STATE_FILE, data)


def load_state(folder: Path) -> dict[str, Any] | None:
    """What `save_state` wrote, or None where nothing was written."""
    path = folder / STATE_FILE
    if not path.exists():
        return None
    with safe_open(path, "pt") as stream:
        plain = json.loads(stream.metadata()["moetk"])
        flat = {**plain, **{key: stream.get_tensor(key) for key in stream.offset_keys()}}
    state: dict[str, Any] = {}
    for key, value in flat.items():
        owner, bar, name = key.partition("|")
        if not bar:
            state[key] = value
        else:
            entry = state.setdefault(owner, {})
            if name:
                entry[name] = value
    return state


def disk_names(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Name in the model -> name on disk: some families rename their blocks when saving."""
    from transformers.core_model_loading import revert_weight_conversion

    out = {}
    for name in names:
        # One at a time, and a marked tensor: the function returns names without their origin.
        (disk,) = revert_weight_conversion(model, {name: torch.empty(1)})
        out[name] = disk
    return out


def load_custom(model: nn.Module, folder: Path) -> None:
    """Fill the custom routers of a replaced model from a saved folder.

    Raises MissingTensorError, UnexpectedTensorError, MoeShapeError: a router is loaded whole or
    not at all.
    """
    own = custom_tensors(model)
    names = disk_names(model, list(own))
    stored = stored_custom(folder)
    missing = [name for name, disk in names.items() if disk not in stored]
    if missing:
        raise MissingTensorError(_some("the saved router lacks", missing, folder))
    foreign = sorted(set(stored) - set(names.values()))
    if foreign:
        raise UnexpectedTensorError(_some("the saved router also holds", foreign, folder))
    loaded = {}
    for name, disk in names.items():
        with safe_open(stored[disk], "pt") as stream:
            loaded[name] = stream.get_tensor(disk)
        if loaded[name].shape != own[name].shape:
            raise MoeShapeError(
                f"{folder}: {disk} is {tuple(loaded[name].shape)}, the factory's router has "
                f"{tuple(own[name].shape)}."
            )
    with torch.no_grad():
        for name, tensor in loaded.items():
            own[name].copy_(tensor)


def stored_mark(config: Any, router: Any, folder: str) -> dict[str, Any] | None:
    """What a folder says of its custom routers, or None where it was saved without.

    Raises RouterConfigError when it was saved with one and no factory is given.
    """
    stored = getattr(config, "moetk", None)
    if stored and router is None:
        raise RouterConfigError(
            f"{folder} was saved with the router {stored.get('router')!r}. Its code is not in the "
            "folder and moetk imports none by name: pass router=<your factory> to from_pretrained."
        )
    return dict(stored) if stored else None


def check_mark(stored: dict[str, Any], config: Any, folder: str) -> None:
    """Raise RouterConfigError when the factory built another router than the one saved."""
    built = getattr(config, "moetk", None) or {}
    if (stored.get("router"), stored.get("spec")) != (built.get("router"), built.get("spec")):
        raise RouterConfigError(
            f"{folder} was saved with the router {stored.get('router')!r} "
            f"(tensors {stored.get('spec')}); the factory built {built.get('router')!r} "
            f"({built.get('spec')}). Pass the factory that built it when it was saved."
        )


def stored_custom(folder: Path) -> dict[str, Path]:
    """Disk name -> file, of every custom tensor in a folder."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        return {key: inside(folder, file) for key, file in weight_map.items() if MARK in key}
    path = folder / "model.safetensors"
    if not path.exists():
        return {}
    with safe_open(path, "pt") as stream:
        return {key: path for key in stream.offset_keys() if MARK in key}


def _some(what: str, names: list[str], folder: Path) -> str:
    shown = ", ".join(names[:10])
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{folder}: {what} {shown}{more}. Pass the factory that built it when it was saved."
