"""A report as JSON: all of it but the tensors, under keys that stay."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moetk._version import __version__
from moetk.equivalence.judge import Verdict
from moetk.equivalence.report import Report, Row
from moetk.io import write_file

FORMAT = 1  # counts up when a key changes its meaning or goes away


def report_fields(report: Report) -> dict[str, Any]:
    """A report's verdict, rows, choices, causes and notes, and what it was made with."""
    first, choices = report.first, report.choices
    return {
        "format": FORMAT,
        "ok": report.ok,
        "a": report.a,
        "b": report.b,
        "first": None if first is None else first.stage,
        "cause": report.cause,
        "causes": [{"name": one.name, "fix": one.fix} for one in report.causes],
        "choices": None if choices is None else asdict(choices),
        "rows": [_row(row) for row in report.rows],
        "notes": list(report.notes),
        "x": {"shape": list(report.question.x.shape), "dtype": _dtype(report.question.x.dtype)},
        "seed": report.question.seed,
        "environment": environment(report.environment),
    }


def environment(found: Mapping[str, str]) -> dict[str, str]:
    """The versions that the comparison ran on, moetk's own first."""
    return {"moetk": __version__, **found}


def to_json(fields: Mapping[str, Any], path: Path | str | None) -> str:
    """The text, written to `path` where there is one. Raises SaveFailedError."""
    text = json.dumps(_finite(fields), indent=2, allow_nan=False)
    if path is not None:
        write_file(Path(path), text.encode())
    return text


def _row(row: Row) -> dict[str, Any]:
    return {
        "stage": row.stage,
        "ok": row.ok,
        "why": row.why,
        "shape": list(row.shape),
        "other_shape": list(row.other_shape),
        "dtype": _dtype(row.dtype),
        "other_dtype": _dtype(row.other_dtype),
        "function": row.function,
        "local": _verdict(row.local),
        "accumulated": _verdict(row.accumulated),
        "equal": row.equal,
        "largest": row.largest,
        "worst": None if row.worst is None else list(row.worst),
        "ulp": row.ulp,
        "alike": row.alike,
        "differing": row.differing,
    }


def _verdict(judged: Verdict | None) -> dict[str, Any] | None:
    if judged is None:
        return None
    return {**asdict(judged), "ratio": judged.ratio, "ok": judged.ok}


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
