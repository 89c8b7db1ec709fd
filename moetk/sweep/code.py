"""Which code a process runs: moetk's files, the user's modules, and the versions below them."""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import moetk
from moetk.io import sha256_file

PACKAGES = ("torch", "transformers", "numpy")
DECIDE = (".py", ".csv")  # a table picks the experts' backend


def running_code(folder: Path, named: Iterable[str] = ()) -> dict[str, Any]:
    """The code of this process, as plain JSON values.

    folder: every module loaded from it is listed. named: modules that are listed wherever they
    lie, together with all that is loaded of their top-level packages, PACKAGES excepted: those
    have a version. Returns {"moetk": {file: sha256}, "modules": {file or module: sha256},
    "versions": {package: version}}. Raises nothing on a module without a file: there is nothing
    to hash.
    """
    return {
        "moetk": _package_files(Path(moetk.__file__).parent),
        "modules": _loaded_modules(folder.resolve(), {_top(name) for name in named}),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
    }


def _package_files(package: Path) -> dict[str, str]:
    files = {}
    # layers and parallel are links in a checkout and folders in an installation.
    for folder, _, names in os.walk(package, followlinks=True):
        for name in names:
            if name.endswith(DECIDE):
                path = Path(folder, name)
                files[path.relative_to(package).as_posix()] = sha256_file(path)
    return dict(sorted(files.items()))


def _loaded_modules(folder: Path, packages: set[str]) -> dict[str, str]:
    # Resolved as the modules are: an environment may be reached through a link.
    places = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    installed = [place.resolve() for place in (*places, Path(moetk.__file__).parent)]
    found = {}
    for name, module in list(sys.modules.items()):
        path = source_of(module)
        if path is None or _top(name) == "moetk":
            continue
        beside = path.is_relative_to(folder) and not any(map(path.is_relative_to, installed))
        if beside:
            found[path.relative_to(folder).as_posix()] = sha256_file(path)
        elif _top(name) in packages.difference(PACKAGES):
            found[name] = sha256_file(path)
    return dict(sorted(found.items()))


def _top(name: str) -> str:
    return name.partition(".")[0]


def source_of(module: ModuleType) -> Path | None:
    """The file a module was loaded from, None for one without."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str):
        return None
    path = Path(file).resolve()
    return path if path.is_file() else None
