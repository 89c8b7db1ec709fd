"""A sweep as a flat table, one line a cell: CSV for papers/, parquet for the curves as well."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from moetk.errors import ConfigError
from moetk.io import write_file
from moetk.sweep.summary import Summary

RESULT = (
    "status",
    "initial_loss",
    "final_loss",
    "train_max_violation",
    "max_violation",
    "drop_fraction",
    "causal",
)
RUN = ("seconds", "threads", "backend", "processor", "moetk", "commit", "date")
CURVES = ("train_loss", "batch_max_violation")


def cell_records(summary: Summary) -> list[dict[str, Any]]:
    """One flat record a cell: its numbers, and the world they were made in."""
    versions = summary.plan["code"]["versions"]
    return [
        {
            "sweep": summary.plan["settings"]["sweep"]["name"],
            "arm": row["arm"],
            "seed": row["seed"],
            "steps": row["config"]["steps"],
            **{name: row["result"].get(name) for name in RESULT},
            **{name: row["run"].get(name) for name in RUN},
            **versions,
            "command": summary.plan["command"],
            "data_sha256": row["data"]["sha256"],
            "key": row["key"],
        }
        for row in summary.rows
    ]


def write_csv(summary: Summary, path: Path) -> None:
    """Losses in nats per byte, seconds of wall time. Raises SaveFailedError."""
    records = cell_records(summary)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_file(path, out.getvalue().encode())


def write_parquet(summary: Summary, path: Path) -> None:
    """The same columns, and the curves over steps as lists. Raises ConfigError without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "--parquet needs pyarrow; install it with  pip install 'moetk[sweep]'."
        ) from None
    records = [
        {**record, **{name: row["result"].get(name) for name in CURVES}}
        for record, row in zip(cell_records(summary), summary.rows, strict=True)
    ]
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), out)
    write_file(path, out.getvalue())
