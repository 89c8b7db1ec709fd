"""Mutation testing: how many small faults, planted one at a time, do the tests notice?

    pip install -e .[mutation]
    python scripts/mutation [--seed 0] [--sample 400] [--workers 2] [--again survived]

The mutants of ROOMS are enumerated and a sample of them is drawn, each equally likely. The tree at
HEAD is cloned into a temporary folder; the checkout is never changed, and uncommitted work is not
looked at. A mutant meets every test of TESTS in a forked process until one fails; rows go to
scripts/results/mutation.csv as they come. Started again it goes on where it stopped; a mutant of a
file that has changed since is judged anew, and so is one whose status is named with --again.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from judge import Survey, Verdict, judge, survey
from mutants import Mutant, difference, mutants

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "scripts" / "results" / "mutation.csv"
ROOMS = [
    "moetk/routing.py",
    "moetk/routers/*.py",
    "moetk/kernels/selection.py",  # the functions that moetk.routers is made of
    "moetk/kernels/counting.py",  # the counts that losses, controllers and capacity are made of
    "moetk/losses/*.py",
    "moetk/controllers/*.py",
    "moetk/dispatch/*.py",
]
KINDS = ("router", "loss", "controller", "dispatcher")
TESTS = [
    "tests/test_rout*.py",
    "tests/test_check_routing.py",
    "tests/test_catalogue.py",
    "tests/test_edges.py",
    "tests/test_selection.py",
    "tests/test_counting.py",
    "tests/test_controllers.py",
    "tests/test_dispatch.py",
    "tests/test_moe_layer.py",
    "tests/losses/test_*.py",
    "tests/layers/test_attach.py",
    "tests/layers/test_losses_in_models.py",
    *(f"tests/testing/test_{kind}_laws.py" for kind in KINDS),
]
KEY = ("file", "digest", "operator", "occurrence")
COLUMNS = (*KEY, "line", "before", "after", "status", "by", "seconds", "commit")
STATUSES = ["killed", "survived", "timeout", "import error", "crash"]
Row = dict[str, str]


@dataclass
class Child:
    """A forked process that answers once."""

    process: BaseProcess
    answer: Connection
    started: float

    def kill(self) -> None:
        """End it and what it started; it leads a group of its own."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.join()
        self.answer.close()


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; started again it goes on"))
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="moetk-mutation-") as folder:
        tree = Path(folder).resolve() / "tree"
        subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, tree], check=True)
        commit = git(tree, "rev-parse", "--short", "HEAD")
        population = [mutant for file in matching(tree, ROOMS) for mutant in mutants(tree, file)]
        # A larger sample holds the smaller ones, and a change of one file leaves the others' draw.
        sample = sorted(population, key=lambda m: m.lot(options.seed))[: options.sample]
        say(f"{len(sample)} of {len(population)} mutants, seed {options.seed}, at {commit}")

        rows = read(options.out)
        todo = [m for m in sample if rows.get(m.key, {}).get("status", "") in ("", *options.again)]
        if todo:
            known = baseline(tree)
            for mutant, verdict, seconds in judged(todo, tree, known, options.workers):
                row = rows[mutant.key] = as_row(mutant, tree, verdict, seconds, commit)
                done = [rows[m.key] for m in sample if m.key in rows]
                write(options.out, done)
                say(
                    f"{len(done):4d}/{len(sample)} {row['status']:12} {seconds:6.1f} s  "
                    f"{mutant.file}:{mutant.line}  {row['after']}  [{verdict.by}]"
                )
    done = [rows[mutant.key] for mutant in sample]
    summary = summarise(done, options, len(population), commit)
    options.out.with_suffix(".toml").write_text(summary)
    print(summary)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", nargs="*", choices=STATUSES, default=[])
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def git(tree: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", tree, *command], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def matching(tree: Path, patterns: Iterable[str]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        paths = [str(path.relative_to(tree)) for path in tree.glob(pattern)]
        if not paths:
            sys.exit(f"{pattern} matches no file at HEAD; mend ROOMS or TESTS in {__file__}.")
        found += paths
    return sorted(found)


def baseline(tree: Path) -> Survey:
    """The tests without a mutant. What they import is imported here too, for the children."""
    tests = matching(tree, TESTS)
    say(f"{len(tests)} files of tests on the unchanged tree, under coverage")
    child = fork(survey, tree, matching(tree, ROOMS), tests)
    known: Survey = child.answer.recv()
    child.kill()
    if known.failed:
        sys.exit(f"These fail without any mutant: {', '.join(known.failed)}. Mend them first.")
    for name in known.modules:
        with suppress(Exception):
            importlib.import_module(name)
    say(f"{len(known.seconds)} tests, {sum(known.seconds.values()):.0f} s")
    return known


def fork(function: Callable[..., Any], *arguments: Any) -> Child:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        os.setsid()
        theirs.send(function(*arguments))
        os._exit(0)

    process = context.Process(target=work)
    process.start()
    theirs.close()
    return Child(process, ours, time.monotonic())


def judged(
    todo: Iterable[Mutant], tree: Path, known: Survey, workers: int
) -> Iterator[tuple[Mutant, Verdict, float]]:
    """Each mutant with its verdict and seconds, as they come, `workers` at a time."""
    limit = 60 + 4 * sum(known.seconds.values())
    waiting = deque(todo)
    running: dict[Mutant, Child] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                mutant = waiting.popleft()
                source = mutant.apply((tree / mutant.file).read_text(encoding="utf-8"))
                order = known.order(mutant.file, mutant.line)
                running[mutant] = fork(judge, tree, mutant.file, source, order)
            answered = wait([child.answer for child in running.values()], timeout=1)
            for mutant, child in list(running.items()):
                seconds = time.monotonic() - child.started
                if child.answer in answered:
                    verdict = heard_from(child)
                elif seconds > limit:
                    verdict = Verdict("timeout", f"{limit:.0f} s")
                else:
                    continue
                running.pop(mutant).kill()
                yield mutant, verdict, seconds
    finally:
        for child in running.values():
            child.kill()


def heard_from(child: Child) -> Verdict:
    try:
        verdict: Verdict = child.answer.recv()
    except EOFError:  # it died without a word
        child.process.join()
        return Verdict("crash", f"the process ended with {child.process.exitcode}")
    return verdict


def as_row(mutant: Mutant, tree: Path, verdict: Verdict, seconds: float, commit: str) -> Row:
    source = (tree / mutant.file).read_text(encoding="utf-8")
    before, after = difference(source, mutant.apply(source))
    told = {
        "before": before,
        "after": after,
        "status": verdict.status,
        "by": verdict.by,
        "seconds": f"{seconds:.1f}",
        "commit": commit,
    }
    return {name: str(value) for name, value in (asdict(mutant) | told).items()}


def read(path: Path) -> dict[tuple[str, ...], Row]:
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as stream:
        return {tuple(row[name] for name in KEY): row for row in csv.DictReader(stream)}


def write(path: Path, rows: Iterable[Row]) -> None:
    """Whole, beside it, then in its place: a kill leaves the old rows or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    with beside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["file"], int(row["line"]))))
    beside.replace(path)


def room(file: str) -> str:
    return file.removesuffix(".py") if file.count("/") == 1 else str(Path(file).parent)


def summarise(rows: list[Row], options: argparse.Namespace, population: int, commit: str) -> str:
    """TOML: what was drawn, what came of it, the score of the whole and of every room."""
    lines = [
        f'command = "python scripts/mutation --seed {options.seed} --sample {options.sample}"',
        f"seed = {options.seed}",
        f"sample = {len(rows)}",
        f"population = {population}",
        f'commit = "{commit}"',
        f'date = "{date.today()}"',
        f'python = "{platform.python_version()}"',
        *(f'{name} = "{version(name)}"' for name in ("cosmic-ray", "hypothesis", "torch")),
    ]
    rooms = {"all": rows}
    for row in rows:
        rooms.setdefault(room(row["file"]), []).append(row)
    for name, part in sorted(rooms.items()):
        count = Counter(row["status"] for row in part)
        decided = count["killed"] + count["survived"]
        lines += ["", f'["{name}"]', *(f'"{status}" = {count[status]}' for status in STATUSES)]
        # Of the mutants that the tests could decide on, and of all that were drawn.
        lines += [
            f"score = {count['killed'] / max(decided, 1):.3f}",
            f"killed_of_all = {count['killed'] / len(part):.3f}",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
