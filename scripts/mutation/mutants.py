"""The mutants of a source file: every change of one place that cosmic-ray's operators make."""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

Span = tuple[tuple[int, int], tuple[int, int]]  # (line, column) of the first and behind the last


@dataclass(frozen=True)
class Mutant:
    """One change. digest: of the file it was found in; with operator and occurrence it is a name
    that holds for as long as that file stays as it is. line: where the change begins."""

    file: str
    digest: str
    line: int
    operator: str
    occurrence: int

    @property
    def key(self) -> tuple[str, ...]:
        """The columns of a row that name the mutant."""
        return self.file, self.digest, self.operator, str(self.occurrence)

    def lot(self, seed: int) -> str:
        """What is drawn: as good as a random number, and nothing but this mutant decides it."""
        name = f"{seed} {self.file} {self.operator} {self.occurrence}"
        return hashlib.sha256(name.encode()).hexdigest()

    def apply(self, source: str) -> str:
        changed: str = mutate_code(source, get_operator(self.operator)(), self.occurrence)
        return changed

    def parses(self, source: str) -> bool:
        """False where an operator took the * of a signature for a product, and the like."""
        try:
            ast.parse(self.apply(source))
        except SyntaxError:
            return False
        return True


def mutants(root: Path, file: str) -> Iterator[Mutant]:
    """Every mutant of `root / file` that is Python. Annotations stay: nothing runs them."""
    source = (root / file).read_text(encoding="utf-8")
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    silent = list(_annotations(source))
    tree = get_ast(source)
    for name in sorted(operator_names()):
        if get_operator(name).arguments():
            continue  # replaces variables that somebody would have to name
        operator = get_operator(name)()
        places = (place for node in ast_nodes(tree) for place in operator.mutation_positions(node))
        for occurrence, (begin, _) in enumerate(places):
            mutant = Mutant(file, digest, begin[0], name, occurrence)
            if not any(first <= begin < last for first, last in silent) and mutant.parses(source):
                yield mutant


def difference(before: str, after: str) -> tuple[str, str]:
    """The lines that a change takes away and those it puts there, each joined by " / "."""
    lines = list(difflib.ndiff(before.splitlines(), after.splitlines()))

    def with_mark(mark: str) -> str:
        return " / ".join(line[2:].strip() for line in lines if line.startswith(mark))

    return with_mark("- "), with_mark("+ ")


def _annotations(source: str) -> Iterator[Span]:
    for node in ast.walk(ast.parse(source)):
        for part in _annotations_of(node):
            if part is not None and part.end_lineno is not None:
                end = part.end_lineno, part.end_col_offset or 0
                yield (part.lineno, part.col_offset), end


def _annotations_of(node: ast.AST) -> Iterable[ast.expr | None]:
    if isinstance(node, ast.AnnAssign | ast.arg):
        return (node.annotation,)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return (node.returns,)
    return ()
