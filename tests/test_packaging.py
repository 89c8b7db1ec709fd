"""What a user installs is this tree: every package, every data file, nothing else."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKS = {"moetk/layers": "../layers", "moetk/parallel": "../parallel"}


def setuptools_table(root: Path) -> dict[str, dict[str, str]]:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    table: dict[str, dict[str, str]] = project["tool"]["setuptools"]
    return table


def shipped_files(root: Path) -> set[str]:
    """What a wheel of a clean `root` must hold: all of moetk/, with layers/ and parallel/ in it."""
    return {
        str(Path(package.replace(".", "/")) / path.relative_to(root / folder))
        for package, folder in setuptools_table(root)["package-dir"].items()
        for path in (root / folder).rglob("*")
        if path.is_file() and not any(parent.is_symlink() for parent in path.parents)
    }


def build(root: Path, kind: str, out: Path) -> Path:
    """A wheel or an sdist of `root`, by the backend that pip itself would call."""
    out.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last commit, alone: a build/ left over in a checkout ships modules long deleted."""
    folder = tmp_path_factory.mktemp("export")
    archive = folder / "head.tar"
    subprocess.run(["git", "archive", "-o", archive, "HEAD"], cwd=ROOT, check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "moetk", filter="data")
    return folder / "moetk"


def test_every_package_is_declared() -> None:
    table = setuptools_table(ROOT)
    found = {
        str(Path(package.replace(".", "/")) / init.parent.relative_to(ROOT / folder))
        for package, folder in table["package-dir"].items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert sorted(table["packages"]) == sorted(name.replace("/", ".") for name in found)


@pytest.mark.parametrize(("link", "target"), LINKS.items())
def test_links_are_relative_and_lead_home(link: str, target: str) -> None:
    path = ROOT / link
    assert path.is_symlink()
    assert str(path.readlink()) == target
    assert path.resolve() == ROOT / path.name


def test_git_keeps_the_links_as_links() -> None:
    listing = subprocess.run(
        ["git", "ls-tree", "HEAD", *LINKS], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert [line.split()[0] for line in listing.stdout.splitlines()] == ["120000"] * len(LINKS)


def test_wheel_and_sdist_hold_the_tree(export: Path) -> None:
    expected = shipped_files(export)
    assert {"moetk/py.typed", "moetk/layers/__init__.py", "moetk/parallel/__init__.py"} <= expected
    assert any(name.startswith("moetk/sweep/") and name.endswith(".html") for name in expected)

    sdist = build(export, "sdist", export.parent / "sdist")
    wheel = build(export, "wheel", export.parent / "wheel")
    assert wheel_files(wheel) == expected

    with tarfile.open(sdist) as tar:
        assert not [member.name for member in tar if member.issym() or member.islnk()]
        tar.extractall(export.parent / "unpacked", filter="data")
    (unpacked,) = (export.parent / "unpacked").iterdir()
    assert (unpacked / "layers/__init__.py").is_file()
    rebuilt = build(unpacked, "wheel", export.parent / "rebuilt")
    assert wheel_files(rebuilt) == expected
