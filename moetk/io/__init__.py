"""The safe store: atomic writes, checksums, contained names, rows that survive a kill."""

from moetk.io.atomic import remove_temporaries, write_file, write_folder
from moetk.io.digest import canonical, seal, sha256, sha256_file, unseal
from moetk.io.lock import FileLock, Locked
from moetk.io.paths import inside
from moetk.io.rows import RowFile, read_rows

__all__ = [
    "FileLock",
    "Locked",
    "RowFile",
    "canonical",
    "inside",
    "read_rows",
    "remove_temporaries",
    "seal",
    "sha256",
    "sha256_file",
    "unseal",
    "write_file",
    "write_folder",
]
