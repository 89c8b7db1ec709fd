"""The import swap: `from moetk import AutoModelForCausalLM`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from moetk.layers.attach import Controller, Loss
from moetk.layers.factory import Factory
from moetk.layers.replace import replace_moe
from moetk.layers.saving import check_mark, load_custom, load_state, stored_mark


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):  # type: ignore[misc]
    """transformers' class of this name, whose models come with moetk's parts in place.

    Returns the stock model class; logits, parameter names and checkpoints are unchanged within the
    stated tolerance. A dense model loads as stock. Beside transformers' arguments:

    router, losses, controllers, backend, graphs: as in `moetk.replace_moe`.

    Raises UnsupportedModelError for a mixture-of-experts family without a row (backend="stock"
    loads it as it is), RouterConfigError for a folder that was saved with a custom router when no
    `router` is given.
    """

    # transformers looks a model's remote code up by the name of this class.

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        router: Factory | None = None,
        losses: Sequence[Loss] = (),
        controllers: Sequence[Controller] = (),
        backend: str = "auto",
        graphs: int | None = None,
        **kwargs: Any,
    ) -> Any:
        out = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = out[0] if isinstance(out, tuple) else out
        name = str(pretrained_model_name_or_path)
        stored = stored_mark(model.config, router, name)
        if _leave(router, losses, controllers, backend):
            return out
        replacement = replace_moe(
            model,
            router,
            losses=losses,
            controllers=controllers,
            backend=backend,
            graphs=graphs,
        )
        folder = _folder(pretrained_model_name_or_path, kwargs)
        if stored is not None:
            load_custom(model, folder)
            check_mark(stored, model.config, name)
            if isinstance(out, tuple):
                out[1]["unexpected_keys"] = type(out[1]["unexpected_keys"])(
                    key for key in out[1]["unexpected_keys"] if ".moetk." not in key
                )
        state = load_state(folder)
        if state is not None:
            # A bias lies in its router's buffer as well: without controllers, the noise goes on.
            own = replacement.state_dict().keys() if not controllers else state.keys()
            replacement.load_state_dict({key: state[key] for key in own})
        return out

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        router: Factory | None = None,
        losses: Sequence[Loss] = (),
        controllers: Sequence[Controller] = (),
        backend: str = "auto",
        graphs: int | None = None,
        **kwargs: Any,
    ) -> Any:
        model = super().from_config(config, **kwargs)
        if not _leave(router, losses, controllers, backend):
            replace_moe(
                model,
                router,
                losses=losses,
                controllers=controllers,
                backend=backend,
                graphs=graphs,
            )
        return model


def _leave(router: Any, losses: Sequence[Any], controllers: Sequence[Any], backend: str) -> bool:
    return backend == "stock" and router is None and not losses and not controllers


def _folder(name: Any, kwargs: dict[str, Any]) -> Path:
    """Where the files are: the given folder, or the hub's snapshot of it."""
    if Path(name).is_dir():
        return Path(name, kwargs.get("subfolder", ""))
    from transformers.utils import cached_file

    passed = {
        key: kwargs[key]
        for key in ("cache_dir", "revision", "token", "local_files_only", "subfolder")
        if key in kwargs
    }
    return Path(cached_file(name, "config.json", **passed)).parent
