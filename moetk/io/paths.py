"""Names that come from files stay inside the folder they were found in."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from moetk.errors import UnsafePathError


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, for a name that was read from a file.

    Links are followed, so a link inside the folder that leads out of it is refused as well.
    Raises UnsafePathError before anything is opened.
    """
    fix = "Stored names are relative and stay inside their folder."
    if not name or "\0" in name:
        raise UnsafePathError(f"{folder}: the stored name {name!r} is empty or holds a NUL. {fix}")
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.is_absolute() or windows.drive or windows.root:
        raise UnsafePathError(f"{folder}: the stored name {name!r} is absolute. {fix}")
    if ".." in PurePosixPath(name).parts or ".." in windows.parts:
        raise UnsafePathError(f"{folder}: the stored name {name!r} climbs out with '..'. {fix}")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UnsafePathError(f"{folder}: the stored name {name!r} is a link that leads out. {fix}")
    return path
