"""What an import may load. Each case is a fresh interpreter: this one has loaded everything."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ["io", "kernels", "routers", "experts", "dispatch", "losses", "controllers", "metrics"]
GUESTS = {"accelerate", "jax", "liger_kernel", "matplotlib", "peft", "transformer_engine"}

IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(package, "__path__", []), name + "."):
        importlib.import_module(found.name)
"""
NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError("an import opened a socket")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""
REPORT = "print(*{name.partition('.')[0] for name in sys.modules})"


def loaded_by(code: str, *arguments: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    command = [sys.executable, "-c", f"{code}\nimport sys\n{REPORT}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_import_moetk_loads_neither_torch_nor_transformers() -> None:
    assert not loaded_by("import moetk; moetk.__version__; dir(moetk)") & {
        "torch", "transformers", "numpy", "rich", "typer", *GUESTS
    }  # fmt: skip


def test_core_rooms_load_neither_transformers_nor_a_guest() -> None:
    rooms = [f"moetk.{room}" for room in CORE]
    loaded = loaded_by(IMPORT_ALL, "moetk.routing", "moetk.context", "moetk.errors", *rooms)
    assert "torch" in loaded
    assert not loaded & {"transformers", *GUESTS}


@pytest.mark.parametrize("package", ["moetk", "moetk.layers", "moetk.parallel"])
def test_every_module_imports_without_a_network(package: str) -> None:
    loaded_by(NO_NETWORK + IMPORT_ALL, package)


def test_the_top_level_folders_have_one_identity() -> None:
    """From the root `import layers` would work, and give every class of moetk.layers a twin."""
    assert not loaded_by(IMPORT_ALL, "moetk") & {"layers", "parallel"}
    assert not sys.modules.keys() & {"layers", "parallel"}
