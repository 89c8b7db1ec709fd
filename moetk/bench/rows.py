"""A number and its world: what was measured, where, from which code."""

from __future__ import annotations

import csv
import io
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moetk._version import __version__
from moetk.bench.meter import Meter, Spread
from moetk.errors import ConfigError

COMMIT = "MOETK_COMMIT"
PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "liger-kernel",
    "transformer-engine",
    "sonic-moe",
    "quack-kernels",
)


@dataclass(frozen=True)
class Row:
    """One measured quantity. shape: words such as "T=4096 routing=zipf". value: the median, None
    where there is none and `note` says why. launch: the name of the Launch that it was measured
    with."""

    what: str
    who: str
    shape: str
    value: float | None
    unit: str
    p20: float | None = None
    p80: float | None = None
    note: str = ""
    launch: str = "eager"

    @classmethod
    def of(cls, what: str, who: str, shape: str, values: Spread, unit: str, note: str = "") -> Row:
        return cls(what, who, shape, values.median, unit, values.low, values.high, note)


@dataclass(frozen=True)
class World:
    """What every row of a run shares."""

    gpu: str
    cpu: str
    versions: str
    commit: str
    command: str
    seed: int
    date: str

    @classmethod
    def here(cls, meter: Meter, command: str, seed: int) -> World:
        """This machine, this code, today. The commit is git's; where there is no checkout, the
        environment variable MOETK_COMMIT tells it."""
        return cls(
            gpu=meter.name,
            cpu=platform.processor() or platform.machine(),
            versions=_versions(),
            commit=_commit(),
            command=command,
            seed=seed,
            date=date.today().isoformat(),
        )


COLUMNS = tuple(f.name for f in (*fields(Row), *fields(World)))


def append_rows(path: Path, rows: Sequence[Row], world: World) -> None:
    """Add rows to a CSV, in one write. Raises ConfigError where the file has other columns."""
    append_table(path, COLUMNS, [{**asdict(row), **asdict(world)} for row in rows])


def append_table(path: Path, columns: Sequence[str], table: Sequence[dict[str, object]]) -> None:
    """Add lines to a CSV with these columns, in one write; a new file gets them as its head.

    Raises ConfigError where the file there has others: a line in the wrong columns is worse than
    none.
    """
    head = path.read_text(encoding="utf-8").partition("\n")[0] if path.exists() else ""
    if head and head.split(",") != list(columns):
        raise ConfigError(f"{path} has other columns ({head}); name another --out, or move it.")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not head:
        writer.writeheader()
    for line in table:
        writer.writerow({name: _written(value) for name, value in line.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as stream:
        stream.write(text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV, without their worlds."""
    names = [f.name for f in fields(Row)]
    with path.open(encoding="utf-8", newline="") as stream:
        return [_row({name: line[name] for name in names}) for line in csv.DictReader(stream)]


def _row(line: dict[str, str]) -> Row:
    value, p20, p80 = (float(line[key]) if line[key] else None for key in ("value", "p20", "p80"))
    words = (line["what"], line["who"], line["shape"])
    return Row(*words, value, line["unit"], p20, p80, line["note"], line["launch"])


def _written(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    # One line a row, whatever an error's text holds.
    return " ".join(value.split()) if isinstance(value, str) else value


def _versions() -> str:
    found = [f"python {platform.python_version()}", f"moetk {__version__}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _commit() -> str:
    told = os.environ.get(COMMIT)
    if told:
        return told
    here = Path(__file__).parent
    asked = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
