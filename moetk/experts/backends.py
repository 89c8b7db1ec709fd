"""The ways to compute a bank, and which one `auto` takes.

`auto` follows a shipped table of measurements, never a race at run time: the same call takes the
same backend today and tomorrow, and `explain` can say why.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar

import torch
from torch import Tensor

from moetk.errors import BackendError
from moetk.experts.fused import fused, why_not_fused
from moetk.experts.grouped import grouped
from moetk.experts.reference import reference
from moetk.experts.spec import BankSpec, BankWeights
from moetk.experts.te import te, why_not_te, why_not_unasked
from moetk.routing import Routing, TokenChoice

Run = Callable[[BankSpec, BankWeights, Tensor, Routing], Tensor]
F = TypeVar("F", bound=Callable[..., Any])


def _one_answer(function: F) -> F:
    """torch.compile calls it once and keeps the result: it reads files, or asks the device.

    What torch.compiler.assume_constant_result does, which would import the whole compiler (and
    with it Triton) wherever a bank is imported.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Backend:
    """One way to compute a bank; `why_not` is None where it runs."""

    name: str
    run: Run
    about: str
    dtypes: tuple[torch.dtype, ...]
    device_types: tuple[str, ...] = ("cpu", "cuda")

    def why_not(
        self,
        dtype: torch.dtype,
        device: torch.device,
        spec: BankSpec | None = None,
        routing: type = TokenChoice,
    ) -> str | None:
        if dtype in self.dtypes and device.type in self.device_types:
            return self.also_needs(dtype, device, spec, routing)
        reasons = []
        if dtype not in self.dtypes:
            needs = " or ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            reasons.append(f"dtype {str(dtype).removeprefix('torch.')}, needs {needs}")
        if device.type not in self.device_types:
            reasons.append(f"device {device.type}, needs {' or '.join(self.device_types)}")
        return "; ".join(reasons)

    def also_needs(
        self, dtype: torch.dtype, device: torch.device, spec: BankSpec | None, routing: type
    ) -> str | None:
        """What else keeps it from running, on a dtype and device that it takes."""
        return None

    def why_not_unasked(self, device: torch.device) -> str | None:
        """Why `auto` leaves it to who asks for it by name, here and now, where it runs."""
        return None


class _Reference(Backend):
    def also_needs(self, *_: object) -> str | None:
        if torch.compiler.is_compiling():
            return "its loop over the rows of each expert cannot be compiled"
        return None


class _Fused(Backend):
    def also_needs(
        self, dtype: torch.dtype, device: torch.device, spec: BankSpec | None, routing: type
    ) -> str | None:
        unread = None
        if routing is not TokenChoice:
            unread = f"it reads a TokenChoice, the router returns a {routing.__name__}"
        reasons = (_lacks_hopper(device), unread, self.why_not_spec(spec, dtype))
        return "; ".join([reason for reason in reasons if reason]) or None

    def why_not_spec(self, spec: BankSpec | None, dtype: torch.dtype) -> str | None:
        return None if spec is None else why_not_fused(spec, dtype)


class _Te(_Fused):
    def why_not_spec(self, spec: BankSpec | None, dtype: torch.dtype) -> str | None:
        return why_not_te(spec, dtype)

    def why_not_unasked(self, device: torch.device) -> str | None:
        return why_not_unasked(device)


# With the copy engine that the kernels read weights with, and 227 KiB of shared memory a block, of
# which the largest of the shipped tiles takes 208; consumer GPUs of later generations have 99.
_MAJORS = (9, 10)


@_one_answer
def _lacks_hopper(device: torch.device) -> str | None:
    return _lacks(device)


@functools.cache
def _lacks(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    if torch.version.hip is not None:
        return "needs CUDA, this torch is built for ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in _MAJORS:
        return f"compute capability {major}.{minor}, needs 9 or 10"
    return None


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REFERENCE = _Reference("reference", reference, "a loop over experts in plain torch", _FLOATS)
GROUPED = Backend("grouped", grouped, "two grouped matrix products over sorted rows", _FLOATS)
FUSED = _Fused(
    "fused",
    fused,
    "one operator that keeps its input and the up product",
    (torch.bfloat16, torch.float16),
    ("cuda",),
)
TE = _Te(
    "te",
    te,
    "Transformer Engine's products, for which each forward copies the number of rows of each "
    "expert to the host and waits for it",
    (torch.bfloat16, torch.float16),
    ("cuda",),
)
_BACKENDS = {backend.name: backend for backend in (REFERENCE, GROUPED, FUSED, TE)}


def backends() -> tuple[Backend, ...]:
    """Every backend this version has."""
    return tuple(_BACKENDS.values())


@dataclass(frozen=True)
class TableRow:
    """On `device` in `dtype`, for up to `max_rows` = T*K assignments, take `backend`, where there
    are `min_rows_per_expert` and each expert's matrices are (H, I) with H*I >= `min_expert_size`.
    """

    device: str
    dtype: str
    max_rows: float
    backend: str
    measured: str
    min_rows_per_expert: int = 0
    min_expert_size: int = 0

    @property
    def bounds(self) -> str:
        """For whom it is, in words."""
        words = f"up to {self.max_rows:g} rows"
        if self.min_rows_per_expert:
            words += f", at least {self.min_rows_per_expert} an expert"
        if self.min_expert_size:
            words += f", experts of H*I >= {self.min_expert_size}"
        return words


def _fits(
    row: TableRow, device_type: str, dtype: torch.dtype, num_rows: int, spec: BankSpec | None
) -> bool:
    """spec None: of a bank of which nothing is known. (torch.compile reads the fields of a value
    that it holds as a constant, and calls no method of it.)"""
    if row.device not in (device_type, "any"):
        return False
    if row.dtype not in (str(dtype).removeprefix("torch."), "any"):
        return False
    if row.min_expert_size or row.min_rows_per_expert:
        if spec is None or spec.hidden_size * spec.intermediate_size < row.min_expert_size:
            return False
        if num_rows < row.min_rows_per_expert * spec.num_experts:
            return False
    return num_rows <= row.max_rows


@_one_answer
def auto_table() -> tuple[TableRow, ...]:
    """The shipped choices, in the order in which they are asked."""
    return _read_table()


@functools.cache
def _read_table() -> tuple[TableRow, ...]:
    with (files("moetk.experts") / "auto_table.csv").open() as stream:
        return tuple(
            TableRow(
                row["device"],
                row["dtype"],
                float(row["max_rows"]),
                row["backend"],
                row["measured"],
                int(row["min_rows_per_expert"]),
                int(row["min_expert_size"]),
            )
            for row in csv.DictReader(stream)
        )


def auto_row(
    device_type: str, dtype: torch.dtype, num_rows: int, spec: BankSpec | None = None
) -> TableRow:
    """The table's first row for a call; its last row takes everything."""
    for row in auto_table():
        if _fits(row, device_type, dtype, num_rows, spec):
            return row
    raise BackendError(f"auto_table.csv has no row for {device_type}, {dtype}, {num_rows} rows.")


def check_backend_name(name: str) -> None:
    """Raise BackendError unless `name` is auto or a backend of this version."""
    if name not in ("auto", *_BACKENDS):
        raise BackendError(
            f'backend={name!r} is not one of this version: "auto", "stock" (in a model), '
            + ", ".join(f'"{known}"' for known in _BACKENDS)
            + "."
        )


def pick_backend(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    num_rows: int,
    where: object = "the bank",
    spec: BankSpec | None = None,
    routing: type = TokenChoice,
) -> Backend:
    """The backend of that name; for "auto" that of the table's first row for this call which can
    compute it here, and otherwise `grouped`.

    Raises BackendError when the one asked for by name cannot run here: nothing falls back silently.
    """
    if name == "auto":
        for row in auto_table():
            if _fits(row, device.type, dtype, num_rows, spec):
                backend = _BACKENDS[row.backend]
                # The loop of `reference` cannot be traced, whatever the table says.
                refused = backend.why_not(dtype, device, spec, routing)
                if not refused and not backend.why_not_unasked(device):
                    return backend
        return GROUPED
    check_backend_name(name)
    backend = _BACKENDS[name]
    reason = backend.why_not(dtype, device, spec, routing)
    if reason is not None:
        here = pick_backend("auto", dtype, device, num_rows, spec=spec, routing=routing).name
        raise BackendError(
            f'backend="{name}" cannot run {where}: {reason}. Use backend="auto" (here: "{here}") '
            "or see Replacement.explain()."
        )
    return backend
