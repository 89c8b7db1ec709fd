"""`doctor` finds what is missing, says what follows, and ends with the right exit code."""

import io
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

import moetk
from moetk import doctor as room
from moetk.doctor import CORE, GUESTS, LATER, PYTHON, doctor, found_version, supports
from moetk.layers.families import FAMILIES

ROOT = Path(__file__).parent.parent


def examine() -> tuple[int, str]:
    """The exit code, and the text without colours."""
    console = Console(file=io.StringIO(), width=200)
    code = doctor(console)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def pretend(patch: pytest.MonkeyPatch, package: str, found: str | None) -> None:
    patch.setattr(
        room,
        "found_version",
        lambda name, module=None: found if name == package else found_version(name, module),
    )


def test_requirements_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # What pip installs but nothing imports yet is no reason to call a machine unfit.
    unused = {guest.name for guest in GUESTS if guest.gives.startswith(LATER)}
    needed = [line for line in project["dependencies"] if line.partition(">=")[0] not in unused]
    assert list(CORE) == needed
    assert project["requires-python"] == PYTHON
    extra = {line.partition(">=")[0] for line in project["optional-dependencies"]["sweep"]}
    assert extra == {guest.name for guest in GUESTS if "moetk[sweep]" in guest.install}


def test_a_working_machine() -> None:
    code, text = examine()
    assert code == 0
    assert text.startswith(f"moetk {moetk.__version__} on ")
    assert text.endswith("moetk runs here.\n")
    tried = [line.split() for line in text.splitlines() if line.startswith("cpu ")]
    assert tried[:2] == [["cpu", name, "runs", "runs"] for name in ("reference", "grouped")]
    refused = [line[:3] for line in tried[2:]]
    assert refused == [["cpu", name, "no:"] for name in ("fused", "te")]
    assert "no: device cpu, needs cuda\n" in text
    assert {family.model_type for family in FAMILIES} <= set(text.split())
    assert "problem" not in text


@pytest.mark.v5
def test_every_family_row_is_in_this_transformers() -> None:
    _, text = examine()
    rows = [line.split() for line in text.splitlines()]
    for family in FAMILIES:
        assert [family.model_type, family.block, "yes"] in rows


def test_a_family_that_transformers_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_modelling_source", lambda model_type: "\nclass GptOssMLP(nn.Module")
    code, text = examine()
    assert code == 0
    assert "no GptOssTopKRouter" in text
    assert "no MixtralSparseMoeBlock, MixtralTopKRouter" in text


@pytest.mark.parametrize("found", [None, "2.9.1"])
def test_a_torch_that_will_not_do(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    pretend(monkeypatch, "torch", found)
    code, text = examine()
    assert code == 1
    said = f'torch {found or "is missing"}, needs >=2.10: pip install "torch>=2.10"'
    assert f"problem {said}" in text
    assert text.endswith("moetk cannot run here.\n")
    assert "experts backend" not in text  # nothing is tried on a core that is not there


def test_a_transformers_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "transformers", "6.0.1")
    code, text = examine()
    assert code == 1
    assert 'transformers 6.0.1, needs >=5.17,<6: pip install "transformers>=5.17,<6"' in text


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.10.12")
    code, text = examine()
    assert code == 1
    assert "python 3.10.12, needs >=3.11: start moetk with Python >=3.11" in text


@pytest.mark.parametrize("guest", GUESTS, ids=lambda guest: guest.name)
def test_a_missing_guest_says_what_it_gives(
    monkeypatch: pytest.MonkeyPatch, guest: room.Guest
) -> None:
    pretend(monkeypatch, guest.name, None)
    code, text = examine()
    assert code == 0
    (line,) = [line for line in text.splitlines() if line.startswith(guest.name + " ")]
    assert line.split()[1] == "missing"
    assert guest.gives in line
    assert line.rstrip().endswith(guest.install)


def test_what_moetk_does_not_use_yet_is_imported_nowhere() -> None:
    rooms = [ROOT / name for name in ("moetk", "layers", "parallel")]
    sources = [path.read_text() for folder in rooms for path in folder.rglob("*.py")]
    for guest in GUESTS:
        if guest.gives.startswith(LATER):
            assert not any(
                f"import {guest.module}" in text or f"from {guest.module}" in text
                for text in sources
            ), guest.name


def test_what_is_called_needed_is_imported_somewhere() -> None:
    rooms = [ROOT / name for name in ("moetk", "layers", "parallel")]
    sources = "\n".join(path.read_text() for folder in rooms for path in folder.rglob("*.py"))
    for requirement in CORE:
        name = requirement.partition(">=")[0]
        used = re.search(rf"^\s*(import|from) {name}\b", sources, re.MULTILINE)
        assert used or name == "numpy", name  # numpy is Transformers' own need


@pytest.mark.parametrize(("backend", "code"), [("reference", 1), ("grouped", 0)])
def test_a_backend_that_fails(monkeypatch: pytest.MonkeyPatch, backend: str, code: int) -> None:
    forward = moetk.ExpertBank.forward

    def broken(self, x_TH, routing):  # type: ignore[no-untyped-def]
        if self.backend == backend:
            raise RuntimeError("no such kernel [sm_12]\nmore")
        return forward(self, x_TH, routing)

    monkeypatch.setattr(moetk.ExpertBank, "forward", broken)
    found, text = examine()
    assert found == code
    (line,) = [line for line in text.splitlines() if line.split()[1:2] == [backend]]
    assert line.count("RuntimeError: no such kernel [sm_12]") == 2
    assert ("the reference backend fails on cpu" in text) == (code == 1)


@pytest.mark.parametrize(
    ("bounds", "found", "fits"),
    [
        (">=2.10", "2.10", True),
        (">=2.10", "2.9.1", False),
        (">=2.10", "2.13.0+cpu", True),
        (">=5.17,<6", "5.17.0.dev0", True),
        (">=5.17,<6", "5.16.9", False),
        (">=5.17,<6", "6.0.0", False),
        (">=5.17,<6", "version unknown", True),
    ],
)
def test_supports(bounds: str, found: str, fits: bool) -> None:
    assert supports(bounds, found) is fits


def test_found_version() -> None:
    assert found_version("torch") == __import__("torch").__version__
    assert found_version("moetk-no-such", "moetk_no_such") is None
    assert found_version("moetk-no-such", "json") == "version unknown"


def test_guests_are_found_without_importing_them() -> None:
    code = (
        "import io, sys; from rich.console import Console; from moetk.doctor import doctor;"
        "doctor(Console(file=io.StringIO())); print(*sys.modules)"
    )
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert not {guest.module for guest in GUESTS} & set(loaded)
