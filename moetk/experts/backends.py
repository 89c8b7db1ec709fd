"""The ways to compute a bank, and which one `auto` takes.

`auto` follows a shipped table of measurements, never a race at run time: the same call takes the
same backend today and tomorrow, and `explain` can say why.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor

from moetk.errors import BackendError
from moetk.experts.grouped import grouped
from moetk.experts.reference import reference
from moetk.experts.spec import BankSpec, BankWeights
from moetk.routing import Routing

Run = Callable[[BankSpec, BankWeights, Tensor, Routing], Tensor]


@dataclass(frozen=True)
class Backend:
    """One way to compute a bank; `why_not(dtype, device)` is None where it runs."""

    name: str
    run: Run
    about: str
    dtypes: tuple[torch.dtype, ...]
    device_types: tuple[str, ...] = ("cpu", "cuda")

    def why_not(self, dtype: torch.dtype, device: torch.device) -> str | None:
        reasons = []
        if dtype not in self.dtypes:
            needs = " or ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            reasons.append(f"dtype {str(dtype).removeprefix('torch.')}, needs {needs}")
        if device.type not in self.device_types:
            reasons.append(f"device {device.type}, needs {' or '.join(self.device_types)}")
        if self.name == "reference" and torch.compiler.is_compiling():
            reasons.append("its loop over the rows of each expert cannot be compiled")
        return "; ".join(reasons) or None


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REFERENCE = Backend("reference", reference, "a loop over experts in plain torch", _FLOATS)
GROUPED = Backend("grouped", grouped, "two grouped matrix products over sorted rows", _FLOATS)
_BACKENDS = {backend.name: backend for backend in (REFERENCE, GROUPED)}


def backends() -> tuple[Backend, ...]:
    """Every backend this version has."""
    return tuple(_BACKENDS.values())


@dataclass(frozen=True)
class TableRow:
    """Up to `max_rows` = T*K assignments on `device` in `dtype`, take `backend`."""

    device: str
    dtype: str
    max_rows: float
    backend: str
    measured: str


@functools.cache
def auto_table() -> tuple[TableRow, ...]:
    """The shipped choices, in the order in which they are asked."""
    with (files("moetk.experts") / "auto_table.csv").open() as stream:
        return tuple(
            TableRow(
                row["device"], row["dtype"], float(row["max_rows"]), row["backend"], row["measured"]
            )
            for row in csv.DictReader(stream)
        )


@functools.cache
def auto_row(device_type: str, dtype: torch.dtype, num_rows: int) -> TableRow:
    """The table's row for a call; the last row of the table takes everything."""
    name = str(dtype).removeprefix("torch.")
    for row in auto_table():
        here = row.device in (device_type, "any") and row.dtype in (name, "any")
        if here and num_rows <= row.max_rows:
            return row
    raise BackendError(f"auto_table.csv has no row for {device_type}, {name}, {num_rows} rows.")


def check_backend_name(name: str) -> None:
    """Raise BackendError unless `name` is auto or a backend of this version."""
    if name not in ("auto", *_BACKENDS):
        raise BackendError(
            f'backend={name!r} is not one of this version: "auto", "stock" (in a model), '
            + ", ".join(f'"{known}"' for known in _BACKENDS)
            + "."
        )


def pick_backend(
    name: str, dtype: torch.dtype, device: torch.device, num_rows: int, where: object = "the bank"
) -> Backend:
    """The backend of that name, or the table's for "auto".

    Raises BackendError when the one asked for cannot run here: nothing falls back silently.
    """
    if name == "auto":
        # The loop of `reference` cannot be traced, whatever the table says.
        compiling = torch.compiler.is_compiling()
        return GROUPED if compiling else _BACKENDS[auto_row(device.type, dtype, num_rows).backend]
    check_backend_name(name)
    backend = _BACKENDS[name]
    reason = backend.why_not(dtype, device)
    if reason is not None:
        here = pick_backend("auto", dtype, device, num_rows).name
        raise BackendError(
            f'backend="{name}" cannot run {where}: {reason}. Use backend="auto" (here: "{here}") '
            "or see Replacement.explain()."
        )
    return backend
