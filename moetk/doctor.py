"""What is installed, what is missing and what follows from it, found by looking and by trying.

Only torch is imported, and only once its version is known to fit; all else is found by name.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moetk._version import __version__

if TYPE_CHECKING:
    import torch

PYTHON = ">=3.11"
CORE = (
    "torch>=2.10",
    "transformers>=5.17,<6",
    "numpy>=1.26",  # Transformers imports it, moetk does not
    "safetensors>=0.6",
    "typer>=0.15",
    "rich>=13.9",
)


@dataclass(frozen=True)
class Guest:
    """A package moetk runs without. `gives`: what it adds; `install`: how to get it."""

    name: str
    module: str
    gives: str
    install: str


LATER = "not used by this moetk; "
GUESTS = (
    Guest("peft", "peft", "LoRA on routers, attention and experts", "pip install peft"),
    Guest("accelerate", "accelerate", "Trainer, device_map", "pip install accelerate"),
    Guest(
        "matplotlib",
        "matplotlib",
        "figures of sweeps, laws and comparisons",
        'pip install "moetk[sweep]"',
    ),
    Guest("jinja2", "jinja2", "pages of sweeps and comparisons", 'pip install "moetk[sweep]"'),
    Guest(
        "pyarrow", "pyarrow", "a sweep's cells and curves as parquet", 'pip install "moetk[sweep]"'
    ),
    Guest("einops", "einops", LATER + "tensor layouts by name", "pip install einops"),
    Guest(
        "triton",
        "triton",
        "moetk's own kernels on CUDA; 3.6 starts them with least work on the host",
        "comes with torch's CUDA builds",
    ),
    Guest("jax", "jax", LATER + "JAX functions and checkpoints", "pip install jax"),
    Guest("liger-kernel", "liger_kernel", "a peer to measure against", "pip install liger-kernel"),
    Guest(
        "transformer-engine",
        "transformer_engine",
        "the te backend, FP8; a peer to measure against",
        'pip install --no-build-isolation "transformer-engine[pytorch]"',
    ),
    Guest(
        "deep_ep",
        "deep_ep",
        LATER + "expert parallelism over NVLink and RDMA",
        "build github.com/deepseek-ai/DeepEP; it has no wheel",
    ),
)


def doctor(console: Console) -> int:
    """Print what is here. Returns 0 when the core works, 1 when something it needs is missing."""
    console.print(f"moetk {__version__} on {platform.platform()}", highlight=False)
    core, problems = check_core()
    console.print(core)
    console.print(check_guests())
    if not problems:
        backends, problems = check_backends()
        console.print(backends)
        console.print(check_families())
    for problem in problems:
        console.print(f"[red]problem[/] {escape(problem)}", highlight=False)
    console.print("moetk cannot run here." if problems else "moetk runs here.")
    return 1 if problems else 0


def check_core() -> tuple[Table, list[str]]:
    """Python and the packages moetk cannot do without, against the versions it supports."""
    table = _table("needed", "found", "supported")
    problems = []
    for requirement in (f"python{PYTHON}", *CORE):
        name, bounds = _split(requirement)
        found = platform.python_version() if name == "python" else found_version(name)
        if found is not None and supports(bounds, found):
            table.add_row(name, found, bounds)
            continue
        table.add_row(name, f"[red]{found or 'missing'}[/]", bounds)
        fix = (
            f"start moetk with Python {bounds}"
            if name == "python"
            else f'pip install "{requirement}"'
        )
        problems.append(f"{name} {found or 'is missing'}, needs {bounds}: {fix}")
    return table, problems


def check_guests() -> Table:
    """The optional packages, and what each would add."""
    table = _table("optional", "found", "for", "how to get it")
    for guest in GUESTS:
        found = found_version(guest.name, guest.module)
        if found is None:
            table.add_row(guest.name, "[yellow]missing[/]", guest.gives, escape(guest.install))
        else:
            table.add_row(guest.name, found, guest.gives, "")
    return table


def check_backends() -> tuple[Table, list[str]]:
    """Each expert backend, tried on each device with a tiny bank, forward and backward."""
    import torch

    from moetk.experts import backends

    devices = {"cpu": torch.device("cpu")}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index} {torch.cuda.get_device_name(index)}"] = torch.device("cuda", index)
    table = _table("device", "experts backend", "float32", "bfloat16")
    problems = []
    for place, device in devices.items():
        for backend in backends():
            cells = []
            for dtype in (torch.float32, torch.bfloat16):
                why_not = backend.why_not(dtype, device)
                error = None if why_not else _try(backend.name, device, dtype)
                cells.append(f"no: {why_not}" if why_not else "runs")
                if error is not None:
                    cells[-1] = f"[red]{escape(error)}[/]"
                    if backend.name == "reference" and dtype == torch.float32:
                        problems.append(f"the reference backend fails on {place}: {error}")
            table.add_row(place, backend.name, *cells)
    return table, problems


def _try(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where a bank of two experts runs, else the error in one line."""
    import torch

    from moetk.experts import ExpertBank
    from moetk.routing import TokenChoice

    try:
        bank = ExpertBank(16, 2, 16, backend=backend).to(device, dtype)
        x_TH = torch.ones(4, 16, device=device, dtype=dtype)
        experts_TK = torch.arange(4, device=x_TH.device).view(4, 1) % 2
        y_TH = bank(x_TH, TokenChoice(experts_TK, torch.ones_like(x_TH[:, :1]), 2))
        y_TH.sum().backward()
        if not y_TH.isfinite().all():
            return "not finite"
    except Exception as error:  # whatever it is, it belongs in the table
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def check_families() -> Table:
    """Each model family moetk replaces: are its classes in the Transformers installed here?"""
    from moetk.layers.families import FAMILIES

    table = _table("model family", "block", "in transformers " + str(found_version("transformers")))
    for family in FAMILIES:
        source = _modelling_source(family.model_type)
        missing = [
            name for name in (family.block, *family.gates) if f"\nclass {name}(" not in source
        ]
        state = f"[yellow]no {', '.join(missing)}[/]" if missing else "yes"
        table.add_row(family.model_type, family.block, state)
    return table


def _modelling_source(model_type: str) -> str:
    """Read, not imported: a modelling file costs a second. Empty where there is none."""
    spec = find_spec("transformers")
    roots = (spec.submodule_search_locations if spec else None) or []
    paths = (Path(root) / f"models/{model_type}/modeling_{model_type}.py" for root in roots)
    return "".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())


def found_version(name: str, module: str | None = None) -> str | None:
    """The version of an installed package; None where Python does not find its module."""
    if find_spec(module or name) is None:
        return None
    try:
        return version(name)
    except PackageNotFoundError:
        return "version unknown"  # built in place, without metadata


def supports(bounds: str, found: str) -> bool:
    """Whether `found` lies in `bounds`, such as ">=5.17,<6"; an unknown version does."""
    numbers = _numbers(found)
    return not numbers or all(
        numbers >= _numbers(bound) if bound.startswith(">=") else numbers < _numbers(bound)
        for bound in bounds.split(",")
    )


def _numbers(text: str) -> tuple[int, ...]:
    """(5, 17, 0) of "5.17.0+cpu" or ">=5.17.0"."""
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0]))


def _split(requirement: str) -> tuple[str, str]:
    start = requirement.index(">=")
    return requirement[:start], requirement[start:]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
