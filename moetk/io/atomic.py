"""Write a file or a folder so that a reader sees all of it or none of it, even after a power cut.

Everything is written under a temporary name, flushed to the disk, and then renamed; the rename is
flushed too. What was there before stays until the rename.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from moetk.errors import SaveFailedError
from moetk.io.paths import inside

TEMPORARY = ".moetk-"


def write_file(path: Path, data: bytes) -> None:
    """Replace the file `path` by `data`. Raises SaveFailedError, which keeps errno."""
    temporary = _temporary(path)
    with _named_failure(path):
        try:
            _write_through(temporary, data)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Create the folder `path` with these files. It must not hold anything yet.

    Raises SaveFailedError, which keeps errno, and UnsafePathError for a name that leads out.
    """
    temporary = _temporary(path)
    with _named_failure(path):
        try:
            temporary.mkdir()
            for name, data in files.items():
                target = inside(temporary, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                _write_through(target, data)
            for folder, _, _ in os.walk(temporary, topdown=False):
                sync_folder(Path(folder))
            os.rename(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed writer left under temporary names; the caller holds the lock."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync_folder(path: Path) -> None:
    """Flush a folder's entries: a rename is on the disk only after this."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _named_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveFailedError(
            error.errno, f"{path} was not written ({error.strerror}); what stood there still stands"
        ) from error


def _temporary(path: Path) -> Path:
    return path.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"


def _write_through(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
