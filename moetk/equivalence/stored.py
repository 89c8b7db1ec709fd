"""A trace as a file: what one version of a library computed, to be compared where another runs.

safetensors with the facts as JSON in its header; nothing in it can run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moetk.equivalence.trace import Trace
from moetk.errors import EquivalenceError, UnsafeFormatError
from moetk.io.atomic import write_file

_FORMAT = "moetk.trace.1"


@dataclass(frozen=True, eq=False, repr=False)
class StoredTrace(Trace):
    """A trace and what was said of it when it was saved."""

    facts: Mapping[str, Any] = field(default_factory=dict)


def save_trace(trace: Trace, path: str | Path, **facts: Any) -> None:
    """Write a trace; a file of that name is replaced only once the new one is whole.

    facts: what a reader should know, e.g. transformers="5.17.0", scale=2.5; numbers, text, lists
    of them, None, or tensors. Raises EquivalenceError for another fact, SaveFailedError.
    """
    tensors = {f"value {name}": tensor for name, tensor in trace.values.items()}
    tensors |= {f"grad {name}": tensor for name, tensor in trace.grads.items()}
    plain: dict[str, Any] = {}
    for name, fact in facts.items():
        if isinstance(fact, torch.Tensor):
            tensors[f"fact {name}"] = fact
        else:
            plain[name] = fact
    try:
        header = json.dumps(plain)
    except TypeError as error:
        raise EquivalenceError(
            f"facts cannot be stored: {error}. They are numbers, text, lists of them, None, or "
            "tensors."
        ) from error
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_file(Path(path), save(stored, {"format": _FORMAT, "facts": header}))


def load_trace(path: str | Path) -> StoredTrace:
    """Read what `save_trace` wrote. Raises UnsafeFormatError for a file that is none."""
    parts: dict[str, dict[str, Any]] = {"value": {}, "grad": {}, "fact": {}}
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise UnsafeFormatError(
                    f"{path} is no stored trace: its header says {header.get('format')!r}, not "
                    f"{_FORMAT!r}. Write it with save_trace."
                )
            for key in file.keys():  # noqa: SIM118
                kind, name = key.split(" ", 1)
                parts[kind][name] = file.get_tensor(key)
    except SafetensorError as error:
        raise UnsafeFormatError(f"{path} is no stored trace: {error}.") from error
    facts = {**json.loads(header["facts"]), **parts["fact"]}
    return StoredTrace(parts["value"], parts["grad"], facts)
