"""Checksums, and the one JSON text of a value that a checksum can be taken of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetk.errors import ShardCorruptError

SEAL = "sha256"


def sha256(data: bytes) -> str:
    """The sha256 of some bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, read in pieces: the file may be larger than memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes.

    ASCII alone, so that any string fits, a lone surrogate too. Raises ValueError on NaN and
    infinity, which JSON has no word for, and TypeError on anything that is not a dict, list, tuple,
    string, number, bool or None.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def seal(value: Mapping[str, Any]) -> bytes:
    """One line of JSON that carries the checksum of its own content under "sha256".

    Raises ValueError for a value that has such a key itself, and as canonical does.
    """
    if SEAL in value:
        raise ValueError(f"The value has a {SEAL!r} of its own, {value[SEAL]!r}; rename that key.")
    return canonical({**value, SEAL: sha256(canonical(dict(value)))}) + b"\n"


def unseal(line: bytes, source: str) -> dict[str, Any]:
    """The value in a sealed line, without its checksum.

    source: named in the message. Raises ShardCorruptError when the line is not what was sealed.
    """
    try:
        value = json.loads(line)
        if not isinstance(value, dict) or SEAL not in value:
            raise ShardCorruptError(f"{source} carries no {SEAL}: it was not written by moetk.")
        written = value.pop(SEAL)
        found = sha256(canonical(value))
    except (ValueError, RecursionError) as error:  # NaN, or brackets without end, are no JSON here
        raise ShardCorruptError(
            f"{source} is not JSON ({error}): it was cut short or edited."
        ) from None
    if written != found:
        raise ShardCorruptError(
            f"{source} differs from its checksum (written {str(written)[:9]}, found {found[:9]}): "
            "it was changed after it was written."
        )
    return value
