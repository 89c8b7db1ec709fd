"""Writes the README's comparison: runs its code as it stands there, and puts below it what the
report prints and draws.

    python scripts/readme_compare.py [--check]

--check writes nothing and exits 1 when the README's words differ from the report's; numbers may,
since rounding is a processor's own.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from readme_part import ROOT, write_part

import moetk

FIGURE = ROOT / "scripts" / "results" / "compare.svg"
BEGIN, END = "<!-- scripts/readme_compare.py -->", "<!-- end -->"


def compared(code: str) -> Any:
    """The report that the README's code makes; a bank is there already where a reader gets to."""
    torch.manual_seed(0)
    bank = moetk.ExpertBank(hidden_size=64, num_experts=8, intermediate_size=128)
    names: dict[str, Any] = {"moetk": moetk, "torch": torch, "bank": bank}
    exec(compile(code.replace("print(report)", ""), "README.md", "exec"), names)
    return names["report"]


def words(text: str) -> list[str]:
    """Without numbers, rules and spaces, which follow from them."""
    return re.sub(r"[\d.]+(e[-+]\d+)?%?|-{2,}", "", text).split()


def main() -> int:
    reports: list[Any] = []

    def made(before: str) -> str:
        report = compared(before.rpartition("```python\n")[2].partition("```")[0])
        reports.append(report)
        printed = (
            f"<details><summary>what it prints</summary>\n\n```text\n{report}\n```\n</details>"
        )
        return f"{printed}\n\n![Error of every stage]({FIGURE.relative_to(ROOT)})"

    return write_part(__doc__, BEGIN, END, made, words, lambda: reports[0].plot(FIGURE))


if __name__ == "__main__":
    sys.exit(main())
