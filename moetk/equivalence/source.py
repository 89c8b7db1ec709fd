"""Where a part comes from: something that can be made now, and written into a test that makes it
again."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from moetk.errors import ConfigError

DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Source:
    """make() gives the part; `expression` is Python that gives it too, after the line `imports`."""

    name: str
    make: Callable[[], Any]
    imports: str
    expression: str

    def submodule(self, name: str) -> Source:
        """The module of this name in the model that is made."""
        return replace(
            self,
            name=f"{self.name}, {name}",
            make=lambda: self.make().get_submodule(name),
            expression=f'{self.expression}.get_submodule("{name}")',
        )


def source_of(builder: Any, dtype: str | None = None) -> Source:
    """Read "module:function", a function that can be imported, or the folder of a checkpoint; a
    Source stays as it is.

    A function without required parameters builds and returns the part; one with a parameter is the
    part itself, x_TH -> {stage: array}. dtype: what a checkpoint is loaded in, None = as stored.

    Raises ConfigError, naming what cannot be found or imported.
    """
    if isinstance(builder, Source):
        return builder
    if isinstance(builder, str) and ":" in builder and not Path(builder).exists():
        return _function(builder, _imported(builder))
    if isinstance(builder, str | Path):
        return _checkpoint(Path(builder), dtype)
    module, name = getattr(builder, "__module__", ""), getattr(builder, "__qualname__", "")
    found = getattr(sys.modules.get(module), name, None) if "." not in name else None
    if found is not builder or module == "__main__":
        raise ConfigError(
            f"{builder!r} has no name that a test can import. Give a function at the top of a "
            'module, or "module:function".'
        )
    return _function(f"{module}:{name}", builder)


def _function(text: str, function: Any) -> Source:
    module, _, name = text.partition(":")
    imports = f"from {module} import {name}"
    if _takes_nothing(function):
        return Source(text, function, imports, f"{name}()")
    return Source(text, lambda: function, imports, name)


def _takes_nothing(function: Any) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    return True


def _imported(text: str) -> Any:
    module, _, name = text.partition(":")
    try:
        found = getattr(import_module(module), name)
    except ImportError as error:
        raise ConfigError(f"{text!r} cannot be imported: {error}.") from error
    except AttributeError:
        raise ConfigError(f"{text!r}: module {module!r} has no {name!r}.") from None
    if not callable(found):
        raise ConfigError(f"{text!r} is a {type(found).__name__}, not a function.")
    return found


def _checkpoint(folder: Path, dtype: str | None) -> Source:
    if not folder.is_dir():
        raise ConfigError(
            f'{folder} is not a folder. Name a checkpoint\'s folder, or a "module:function".'
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no config.json, so it is no checkpoint.")

    def make() -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True
        )

    return Source(
        str(folder),
        make,
        "from transformers import AutoModelForCausalLM",
        f'AutoModelForCausalLM.from_pretrained("{folder.resolve()}", dtype="{dtype or "auto"}")',
    )
