"""A report as a test: a file for pytest and its tensors, to be handed to whoever repairs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetk.equivalence.cause import read
from moetk.equivalence.double import InDouble
from moetk.equivalence.fewest import narrowed
from moetk.equivalence.passes import NO_TWIN
from moetk.equivalence.report import Report
from moetk.equivalence.sides.pick import side_of
from moetk.equivalence.source import Source, source_of
from moetk.equivalence.trace import EXACT, GIVEN, ROOTS, STAGES, Trace, cotangent, observe
from moetk.errors import ConfigError, EquivalenceError
from moetk.io import write_folder

TEST, TENSORS = "test_repro.py", "tensors.safetensors"
PARTS = '''"""{title}

{story}
"""

from pathlib import Path

from safetensors.torch import load_file

import moetk
{imports}

T = load_file(Path(__file__).with_name("{tensors}"))


def test_{name}():
    report = moetk.compare(
        {a},
        {b},
        T["x"],
        ctx={ctx},
        routing={routing},
        seed={seed},
    )
    assert report.ok, "\\n" + str(report)
'''
VALUES = '''"""{title}

{story}
"""

from pathlib import Path

from safetensors.torch import load_file

from moetk.equivalence.cause import deviation

T = load_file(Path(__file__).with_name("{tensors}"))


def {name}():
    """{stage}, {shape}. In place of the stored value, return what your code
    computes{precision} from

        {inputs}
    """
    return T["b"]


def test_{name}():
    found, expected = {name}(){order}, T["expected"]{order}
    assert deviation(found, expected) <= {tolerance}
'''


def write_repro(report: Report, folder: Path, build_a: Any, build_b: Any) -> Path:
    """See Report.repro."""
    sources = _source(build_a, report.question.a), _source(build_b, report.question.b)
    return write_from(report, folder, *sources)


def write_from(report: Report, folder: Path, a: Source | None, b: Source | None) -> Path:
    """Write the test of the fewest tokens. It makes the parts where both have a source, else it
    judges stored values. Raises EquivalenceError where nothing differs, SaveFailedError."""
    if report.ok:
        raise EquivalenceError(f"{report.b} does what {report.a} does: there is nothing to show.")
    report = narrowed(report)
    tensors = {"x": report.question.x}
    text = _of_values(report, tensors) if not (a and b) else _of_parts(report, a, b, tensors)
    from safetensors.torch import save

    stored = save({name: tensor.detach().cpu().contiguous().clone()
                   for name, tensor in tensors.items()})  # fmt: skip
    write_folder(folder, {TEST: text.encode(), TENSORS: stored})
    return folder / TEST


def _source(builder: Any, made: Any) -> Source | None:
    """What the caller gave; else a function that was compared, where a test can import it."""
    if builder is not None:
        return source_of(builder)
    if not callable(made) or isinstance(made, torch.nn.Module):
        return None
    try:
        return source_of(made)
    except ConfigError:
        return None


def _of_parts(report: Report, a: Source, b: Source, tensors: dict[str, Tensor]) -> str:
    question = report.question
    ctx, routing = (
        _as_code(value, name, tensors)
        for name, value in (("ctx", question.ctx), ("routing", question.routing))
    )
    return PARTS.format(
        **_story(report),
        imports="\n".join(sorted({a.imports, b.imports})),
        tensors=TENSORS,
        a=a.expression,
        b=b.expression,
        ctx=ctx,
        routing=routing,
        seed=question.seed,
    )


def _of_values(report: Report, tensors: dict[str, Tensor]) -> str:
    evidence = report.evidence
    assert evidence is not None
    given = {name: evidence.a.values[name] for name in _before(evidence.stage, evidence.a)}
    if evidence.stage.startswith("grad ") and evidence.stage != "grad losses":
        root = next(name for name in ROOTS if name in evidence.a.values)
        given[f"grad {root}"] = cotangent(evidence.a.values[root], report.question.seed)
    tensors |= {f"given.{name}": value for name, value in given.items()}
    tensors |= {"a": evidence.wanted, "b": evidence.found, "expected": expected(report)}
    words = ['x: T["x"]', *(f'{name}: T["given.{name}"]' for name in given)]
    exact = evidence.stage in EXACT
    precision = "" if exact or evidence.found.dtype != torch.float64 else ", in float64,"
    return VALUES.format(
        **_story(report),
        stage=evidence.stage,
        shape=tuple(evidence.found.shape),
        precision=precision,
        inputs="\n        ".join(words),
        order=".sort(-1).values" if evidence.stage == "indices" else "",
        tolerance=0.0 if exact else f"{evidence.tolerance:.3g}",
        tensors=TENSORS,
    )


def _before(stage: str, a: Trace) -> list[str]:
    """The given stages that this one is computed from."""
    place = STAGES.index(stage) if stage in STAGES else len(STAGES)
    return [name for name in GIVEN if name in a.values and STAGES.index(name) < place]


def expected(report: Report) -> Tensor:
    """The stage as it should read: in fp64 at the reference's choices and weights, where it can be
    run so; else as the reference has it."""
    evidence, question = report.evidence, report.question
    assert evidence is not None
    if evidence.stage in EXACT or evidence.wanted.dtype == torch.float64:
        return evidence.wanted
    given = {name: evidence.a.values[name] for name in GIVEN if name in evidence.a.values}
    upstream = {name: evidence.a.grads[name] for name in given if name in evidence.a.grads}
    side = side_of(question.a, question.x, question.ctx, question.routing)
    try:
        with InDouble(question.x.dtype):
            truth = observe(
                side.in_double(),
                evidence.x_TH.double(),
                given=given,
                upstream=upstream,
                seed=question.seed,
            )
    except NO_TWIN:
        return evidence.wanted
    return read(truth, evidence.stage)


def _story(report: Report) -> dict[str, str]:
    first = report.first
    assert first is not None
    name = first.stage.replace(" ", "_").replace(".", "_")
    title = f"{report.b} against {report.a}: {first.stage} differs."
    return {"title": _quotable(title), "story": _quotable(report.explain()), "name": name}


def _quotable(text: str) -> str:
    """Safe between triple quotes."""
    return text.replace("\\", "\\\\").replace('"""', "'''")


def _as_code(value: Any, name: str, tensors: dict[str, Tensor]) -> str:
    """Python that makes the value again; its tensors are put beside x."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return f'T["{name}"]'
    if is_dataclass(value):
        given = {one.name: getattr(value, one.name) for one in fields(value)}
        inner = ", ".join(
            f"{key}={_as_code(one, f'{name}.{key}', tensors)}"
            for key, one in given.items()
            if isinstance(one, Tensor) or one  # all else has a default that is empty
        )
        return f"moetk.{type(value).__name__}({inner})"
    if isinstance(value, Mapping):
        inner = ", ".join(
            f"{key!r}: {_as_code(one, f'{name}.{key}', tensors)}" for key, one in value.items()
        )
        return f"{{{inner}}}"
    return repr(value)
