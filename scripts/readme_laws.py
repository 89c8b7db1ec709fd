"""Writes the README's report of laws and its picture: nothing there is typed or drawn by hand.

    python scripts/readme_laws.py [--check]

The report is of the README's own router. The picture is of a published one with top_k=1, whose
weight is always 1. --check writes nothing and exits 1 when the README tells another report; times
and numbers of drawn cases may differ.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from readme_part import README, ROOT, write_part

from moetk.errors import LawBrokenError
from moetk.routers import GptOssRouter
from moetk.testing import LawReport, check_router

PICTURE = ROOT / "scripts" / "results" / "router_laws.png"
BEGIN, END = "<!-- scripts/readme_laws.py -->", "<!-- end of the report -->"


def readme_router() -> Any:
    """The CosineRouter that the README's first block defines."""
    first = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[0]
    namespace: dict[str, Any] = {}
    exec(first[: first.index("\nmodel = ")], namespace)
    torch.manual_seed(0)
    return namespace["CosineRouter"](hidden_size=64, num_experts=8, k=2)


def broken_report() -> LawReport:
    torch.manual_seed(0)
    try:
        return check_router(GptOssRouter(64, 8, 1))
    except LawBrokenError as error:
        report: LawReport = error.report
        return report


def untimed(text: str) -> str:
    """The text without times and numbers of cases."""
    return re.sub(r"( +\d+)? +\d+\.\d+( s)?$", "", text, flags=re.MULTILINE)


def main() -> int:
    return write_part(
        __doc__,
        BEGIN,
        END,
        lambda _: f"```\n{check_router(readme_router())}\n```",
        untimed,
        lambda: broken_report().plot(PICTURE),
    )


if __name__ == "__main__":
    sys.exit(main())
