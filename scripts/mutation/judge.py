"""What the tests say, in a process of its own: of the code as it is, and of one mutant.

Both functions end in a forked child. Its parent has imported torch and pytest but nothing of the
tree under test, so a mutant is simply the first version of its module that is ever imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import resource
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

MEMORY = 12 << 30  # bytes a mutant may ask for: a wrong size must not take the machine along


@dataclass
class Survey:
    """The tests on the unchanged tree. seconds: of each test. lines: file -> line -> the tests
    that ran it. modules: what they imported from outside the tree."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    lines: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def order(self, file: str, line: int) -> list[str]:
        """Every test: first those that run the line, then those that run its file; fast ones first.

        All of them, because a line also acts without being run by the test that sees it: at import,
        under torch.compile, through something cached.
        """
        near = set(self.lines[file].get(line, ()))
        far = {test for tests in self.lines[file].values() for test in tests}
        return sorted(self.seconds, key=lambda t: (t not in near, t not in far, self.seconds[t]))


@dataclass(frozen=True)
class Verdict:
    """status: killed, survived, import error, crash or timeout. by: the test or error behind it."""

    status: str
    by: str = ""


def survey(root: Path, files: Sequence[str], tests: Sequence[str]) -> Survey:
    """Run all tests under coverage, one context a test."""
    import coverage

    _enter(root)
    found = Survey()
    measured = coverage.Coverage(data_file=None, include=[str(root / file) for file in files])

    class Watch:
        def pytest_runtest_logstart(self, nodeid: str) -> None:
            measured.switch_context(nodeid)

        def pytest_runtest_logreport(self, report: Any) -> None:
            found.seconds[report.nodeid] += report.duration
            if report.failed:
                found.failed.append(report.nodeid)

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                found.failed.append(report.nodeid)

    measured.start()
    _pytest(tests, Watch())
    measured.stop()
    data = measured.get_data()
    for file in files:
        contexts = data.contexts_by_lineno(str(root / file))
        # The empty context is the import, before the first test.
        found.lines[file] = {n: [test for test in by if test] for n, by in contexts.items()}
    found.modules = [name for name, module in sys.modules.items() if _outside(module, root)]
    return found


def judge(root: Path, file: str, source: str, order: Sequence[str]) -> Verdict:
    """Run the tests in `order`, with `source` in place of `file`, until one fails."""
    import pytest

    _enter(root)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    module = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    sys.meta_path.insert(0, Mutated(module, root / file, source))
    try:
        importlib.import_module(module)
    except BaseException as error:
        return Verdict("import error", f"{type(error).__name__}: {error}")

    rank = {test: place for place, test in enumerate(order)}
    failed: list[str] = []
    uncollected: list[str] = []

    class Watch:
        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            items.sort(key=lambda item: rank.get(item.nodeid, len(rank)))

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                uncollected.append(report.nodeid)

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                failed.append(report.nodeid)

        def pytest_runtest_logfinish(self) -> None:
            if failed:
                pytest.exit("one failure is enough")

    # A file of tests that cannot even be imported kills nobody; the other files may.
    files = sorted({test.partition("::")[0] for test in order})
    code = _pytest(files, Watch(), "--continue-on-collection-errors")
    if failed:
        return Verdict("killed", failed[0])
    if uncollected:
        return Verdict("import error", uncollected[0])
    return Verdict("survived") if code == 0 else Verdict("crash", f"pytest ended with {code}")


class Mutated(importlib.abc.MetaPathFinder):
    """Imports one module from a text instead of its file. The file on disk stays as it is."""

    def __init__(self, module: str, path: Path, source: str) -> None:
        self.module, self.path = module, path

        class Loader(importlib.machinery.SourceFileLoader):
            def get_data(self, _: Any) -> bytes:
                return source.encode()

            def path_stats(self, _: Any) -> Mapping[str, Any]:
                raise OSError("compiled anew each time, never written as bytecode")

        self.loader = Loader(module, str(path))

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self.loader)


class Lean:
    """What takes time and tells nothing about a mutant is left out."""

    def pytest_sessionstart(self) -> None:
        from hypothesis import Phase, settings

        # One failing example says enough; the smallest is not looked for.
        settings.register_profile(
            "mutation", max_examples=15, derandomize=True, phases=[Phase.explicit, Phase.generate]
        )
        settings.load_profile("mutation")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        # Of the laws' tests, those that hold moetk's own parts to them; the others test the laws.
        laws = "tests/testing/"
        items[:] = [i for i in items if laws not in i.nodeid or "keep" in i.nodeid]


def _enter(root: Path) -> None:
    os.chdir(root)
    sys.path.insert(0, str(root))
    with tempfile.TemporaryFile() as log:  # what the tests and a dying interpreter print
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def _pytest(tests: Sequence[str], watch: object, *options: str) -> int:
    import pytest

    # A test's own time limit would call an endless mutant killed.
    fixed = ["-q", "-p", "no:cacheprovider", "-o", "timeout=0"]
    return int(pytest.main([*tests, *fixed, *options], plugins=[Lean(), watch]))


def _outside(module: ModuleType, root: Path) -> bool:
    spec = getattr(module, "__spec__", None)
    origin = getattr(spec, "origin", None)
    return isinstance(origin, str) and not origin.startswith(str(root))
