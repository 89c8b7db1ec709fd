"""Real text without a download: the source files of the running interpreter's standard library."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetk.errors import ConfigError
from moetk.io import sha256
from moetk.sweep.config import DataSettings

# Tests would be half of it; the others are not the same bytes on every machine.
LEFT_OUT = ("test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__")
MACHINE_MADE = ("config-", "_sysconfigdata")
END_OF_FILE = b"\0"


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes of other files to judge by; both (N,) uint8.

    about: plain JSON values, with the "sha256" of everything that was read.
    """

    train: Tensor
    held_out: Tensor
    about: dict[str, Any]

    def batches(self, batch_size: int, length: int, seed: int) -> Iterator[Tensor]:
        """Endless (batch_size, length) int64 pieces at random places; the same for the same seed.

        Raises ConfigError when the text is shorter than one sequence.
        """
        _long_enough(self.train, length, "train")
        generator = torch.Generator().manual_seed(seed)
        places_S = torch.arange(length)
        while True:
            last = len(self.train) - length + 1
            starts_B = torch.randint(last, (batch_size,), generator=generator)
            yield self.train[starts_B[:, None] + places_S].long()

    def held_out_batches(self, batches: int, batch_size: int, length: int) -> Tensor:
        """(batches, batch_size, length) int64 at even distances: the same for every cell."""
        _long_enough(self.held_out, length, "held-out")
        count = batches * batch_size
        starts_N = torch.linspace(0, len(self.held_out) - length, count, dtype=torch.float64).long()
        pieces_NS = self.held_out[starts_N[:, None] + torch.arange(length)].long()
        return pieces_NS.view(batches, batch_size, length)


def load_corpus(settings: DataSettings) -> Corpus:
    """The corpus that [data] names. Raises ConfigError when one side of the split is empty."""
    return python_stdlib(settings, Path(sysconfig.get_path("stdlib")))


def python_stdlib(settings: DataSettings, root: Path) -> Corpus:
    """Every .py file below `root`, without tests and installed packages.

    A file is held out by a hash of its relative path, so that the split never cuts a file and
    does not change when another file comes or goes. Where max_bytes ends the corpus is decided by
    a second hash, which favours neither side nor any package.
    """
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    digest = hashlib.sha256()
    files = total = 0
    for name in sorted(_sources(root), key=lambda name: sha256(f"order {name}".encode())):
        text = (root / name).read_bytes()
        total += len(text)
        if total > settings.max_bytes:
            break
        files += 1
        digest.update(f"{name}\0{len(text)}\0".encode() + text)
        parts[_held_out(name, settings.held_out)].append(text + END_OF_FILE)
    train, held_out = (b"".join(parts[side]) for side in (False, True))
    for side, text in (("train", train), ("held-out", held_out)):
        if not text:
            raise ConfigError(
                f"[data] max_bytes = {settings.max_bytes} and held_out = {settings.held_out} leave "
                f"no {side} file of {files}; raise max_bytes, or move held_out to the middle."
            )
    about = {
        "kind": "python_stdlib",
        "sha256": digest.hexdigest(),
        "files": files,
        "train_bytes": len(train),
        "held_out_bytes": len(held_out),
    }
    return Corpus(_tensor(train), _tensor(held_out), about)


def _sources(root: Path) -> Iterator[str]:
    for folder, below, names in os.walk(root):
        below[:] = [n for n in below if n not in LEFT_OUT and not n.startswith(MACHINE_MADE)]
        for name in names:
            if name.endswith(".py") and not name.startswith(MACHINE_MADE):
                yield Path(folder, name).relative_to(root).as_posix()


def _held_out(name: str, share: float) -> bool:
    return int(sha256(f"split {name}".encode())[:12], 16) < share * 16**12


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _long_enough(text_N: Tensor, length: int, side: str) -> None:
    if len(text_N) < length:
        raise ConfigError(
            f"[train] sequence_length = {length}, but the {side} text has {len(text_N)} bytes; "
            "raise [data] max_bytes."
        )
