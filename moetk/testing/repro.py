"""A broken law as a file that anybody can run: a pytest module beside the smallest case.

The case is a safetensors file: tensors by name, settings as JSON in its header. Nothing in it is
executed on load.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from moetk.errors import LawBrokenError, MoetkError, RouterConfigError
from moetk.io import write_file
from moetk.testing.law import Case, Law, Outcome
from moetk.testing.report import LawReport

SHOWN = "shown."  # prefix of the tensors that show the breach; the case's own have none


def save_case(path: Path, case: Case, shown: Mapping[str, Tensor]) -> None:
    """Write a case, and beside its tensors those that show what broke, as `shown.<name>`."""
    tensors = {**case.tensors, **{SHOWN + name: tensor for name, tensor in shown.items()}}
    whole = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    write_file(path, save(whole, metadata={"settings": json.dumps(dict(case.settings))}))


def load_case(path: str | Path) -> Case:
    """The case that `LawReport.repro` wrote, without what shows the breach."""
    with safe_open(path, framework="pt") as stored:
        names = [name for name in stored.keys() if not name.startswith(SHOWN)]  # noqa: SIM118
        tensors = {name: stored.get_tensor(name) for name in names}
        settings = json.loads((stored.metadata() or {}).get("settings", "{}"))
    return Case(tensors, settings)


def recheck(law: Law[Any], subject: Any, case: Case) -> None:
    """Check one law on one case; raises LawBrokenError where it still breaks."""
    reason = law.unless(subject)
    if reason is not None:
        raise RouterConfigError(f"Law {law.number} does not speak about this part: {reason}")
    try:
        law.judge(subject, case)
    except MoetkError as error:
        raise LawBrokenError(
            f"{law.number} {law.title}: {type(error).__name__}: {error}"
        ) from error
    except AssertionError as error:
        raise LawBrokenError(f"{law.number} {law.title}: {error}") from error


def importable(part: Any) -> str | None:
    """ "module:name" where `part` lies, None where no import finds it."""
    module, name = getattr(part, "__module__", None), getattr(part, "__qualname__", None)
    named = inspect.isroutine(part) or inspect.isclass(part)
    if not named or not module or not name or module == "__main__":
        return None
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return None
    return f"{module}:{name}" if found is part else None


def write_repro(report: LawReport, outcome: Outcome, folder: Path, build: str | None) -> Path:
    """Write `test_<law>.py` and `<law>.safetensors` into `folder`; returns the test's path.

    Raises RouterConfigError when the report does not know how its subject was made, or on a
    `build` that is not "module:function".
    """
    if report.subject_of is None or outcome.case is None:
        raise RouterConfigError(
            f"{report.what}: this report holds no subject_of, so that nothing can be built again; "
            "take the report of check_router, check_expert_bank, check_dispatcher, check_loss or "
            "check_controller."
        )
    if build is not None and build.count(":") != 1:
        raise RouterConfigError(f'build={build!r}; need "module:function".')
    folder.mkdir(parents=True, exist_ok=True)
    number = outcome.law.number.lower()
    save_case(folder / f"{number}.safetensors", outcome.case, outcome.shown)
    path = folder / f"test_{number}.py"
    write_file(path, _test_text(report, outcome, build).encode())
    return path


def _test_text(report: LawReport, outcome: Outcome, build: str | None) -> str:
    law, subject_of = outcome.law, report.subject_of
    assert subject_of is not None
    arguments = "".join(f", {name}={value!r}" for name, value in report.arguments.items())
    return f'''"""{report.what} breaks {law.number}, {law.title}: {law.formula}

Source: {law.source}.
Found: {_one_line(outcome.reason)}
"""

from pathlib import Path

from {law.check.__module__} import LAWS
from {subject_of.__module__} import {subject_of.__name__}
from moetk.testing.repro import load_case, recheck


def part():
{_build_text(report.part, build)}


def test_{law.number.lower()}():
    (law,) = [law for law in LAWS if law.number == "{law.number}"]
    case = load_case(Path(__file__).with_name("{law.number.lower()}.safetensors"))
    recheck(law, {subject_of.__name__}(part(){arguments}), case)
'''


def _build_text(part: Any, build: str | None) -> str:
    if build is not None:
        module, name = build.split(":")
        return f"    from {module} import {name}\n\n    return {name}()"
    pair = isinstance(part, tuple)  # the part, and what was handed to the check with it
    found = [importable(one) for one in part] if pair else [importable(part)]
    if all(found):
        places = [place.split(":") for place in found if place]
        lines = [f"    from {module} import {name.split('.')[0]}" for module, name in places]
        return "\n".join([*lines, "", f"    return {', '.join(name for _, name in places)}"])
    what = "the pair that was checked, the part and what was handed in beside it,"
    what = what if pair else "the part that was checked,"
    return (
        "    raise NotImplementedError(\n"
        f'        "Return here {what} built as it was; or call "\n'
        "        \"report.repro(folder, build='module:function').\"\n"
        "    )"
    )


def _one_line(text: str) -> str:
    """In a docstring that it cannot end, on one line."""
    return " ".join(text.split()).replace("\\", "/").replace('"', "'")
