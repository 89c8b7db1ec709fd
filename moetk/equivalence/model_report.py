"""What a comparison of two models found: a report a layer, what lies between, and the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from moetk.equivalence.cause import deviation
from moetk.equivalence.report import Report
from moetk.equivalence.rows import PARITY
from moetk.errors import EquivalenceError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class LayerReport:
    """One mixture-of-experts layer.

    name, other_name: the block in a and in b. report: the two blocks at the hidden states that a's
    saw. around: relative error in fp64, at a's values, of what b has outside of its blocks, from
    the end of the last decoder layer with a block to the end of this one; None = not judged.
    entering, leaving: relative difference of the hidden states, each model left to itself.
    """

    index: int
    name: str
    other_name: str
    report: Report
    around: float | None
    entering: float
    leaving: float

    @property
    def ok(self) -> bool:
        return agree(self.around) and self.report.ok


def agree(error: float | None) -> bool:
    """Whether two functions in fp64 are one; what was not judged is noted, and no difference."""
    return error is None or error <= PARITY


@dataclass(frozen=True)
class TensorApart:
    """A parameter or buffer that is not the same in both. shape, other_shape: None = not there.
    error: relative to a's, None where the shapes differ. equal: share that is bitwise equal."""

    name: str
    shape: tuple[int, ...] | None
    other_shape: tuple[int, ...] | None
    error: float | None
    equal: float


def tensors_apart(a: nn.Module, b: nn.Module) -> tuple[TensorApart, ...]:
    """Every tensor of the two state dicts that differs, by name."""
    ours, theirs = a.state_dict(), b.state_dict()
    found = []
    for name in dict.fromkeys((*ours, *theirs)):
        one, other = ours.get(name), theirs.get(name)
        shape, other_shape = (None if t is None else tuple(t.shape) for t in (one, other))
        if one is None or other is None or shape != other_shape:
            found.append(TensorApart(name, shape, other_shape, None, 0.0))
        elif (equal := _equal(one, other)) < 1.0:
            found.append(TensorApart(name, shape, other_shape, deviation(other, one), equal))
    return tuple(found)


def _equal(a: Tensor, b: Tensor) -> float:
    same = (a == b) | ((a != a) & (b != b))
    return float(same.double().mean()) if same.numel() else 1.0


@dataclass(frozen=True, eq=False)
class ModelReport:
    """b against a, layer by layer.

    after: relative error in fp64 from the last layer to the logits, at a's values. logits: relative
    difference of the logits, each model left to itself. tensors: those that are not the same.
    notes: what a reader should know besides.
    """

    a: str
    b: str
    layers: tuple[LayerReport, ...]
    after: float | None
    logits: float
    tensors: tuple[TensorApart, ...]
    ids: Tensor = field(repr=False)
    notes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.first is None and agree(self.after)

    @property
    def first(self) -> LayerReport | None:
        """The first layer that differs, in its block or in what stands around it."""
        return next((layer for layer in self.layers if not layer.ok), None)

    @property
    def cause(self) -> str:
        """ "" where nothing differs; else of the first layer's report, or "unknown"."""
        if self.ok:
            return ""
        first = self.first
        return "unknown" if first is None or not agree(first.around) else first.report.cause

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Every layer in a line, then what `explain` says; at most 120 columns wide."""
        from moetk.equivalence.model_table import table

        return table(self)

    def explain(self) -> str:
        """Where the two first differ, why, and what to look at."""
        from moetk.equivalence.model_table import explain

        return explain(self)

    def plot(self, path: Path | str | None = None) -> Figure:
        """The error of every layer. Written to `path` (.svg, .png, .pdf) where there is one.
        Raises ConfigError without matplotlib, SaveFailedError."""
        from moetk.equivalence.plot import plot_layers, save

        return save(plot_layers(self), path)

    def to_json(self, path: Path | str | None = None) -> str:
        """All of it but the tensors' values, as JSON, written to `path` where there is one. Raises
        SaveFailedError."""
        from moetk.equivalence.as_json import environment, report_fields, to_json

        first = self.first
        fields = {
            "ok": self.ok,
            "a": self.a,
            "b": self.b,
            "first": None if first is None else first.index,
            "cause": self.cause,
            "layers": [
                {
                    "index": layer.index,
                    "name": layer.name,
                    "other_name": layer.other_name,
                    "ok": layer.ok,
                    "around": layer.around,
                    "entering": layer.entering,
                    "leaving": layer.leaving,
                    "report": report_fields(layer.report),
                }
                for layer in self.layers
            ],
            "after": self.after,
            "logits": self.logits,
            "notes": list(self.notes),
            "tensors": [asdict(one) for one in self.tensors],
            "ids": {"shape": list(self.ids.shape)},
            "environment": environment(self.environment),
        }
        return to_json(fields, path)

    def repro(self, folder: Path | str, build_a: Any = None, build_b: Any = None) -> Path:
        """The test of the first layer whose block differs, as Report.repro writes it; the builders
        make the models. Raises EquivalenceError where no block differs, ConfigError for a builder
        that cannot be named in a file, SaveFailedError."""
        from moetk.equivalence.repro import write_from
        from moetk.equivalence.source import source_of

        found = next((layer for layer in self.layers if not layer.report.ok), None)
        if found is None:
            where = " What differs lies outside of them." if not self.ok else ""
            raise EquivalenceError(f"No mixture-of-experts block differs.{where}")
        a = None if build_a is None else source_of(build_a).submodule(found.name)
        b = None if build_b is None else source_of(build_b).submodule(found.other_name)
        return write_from(found.report, Path(folder), a, b)
