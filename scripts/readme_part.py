"""What the scripts share that write a part of the README, between two comments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def write_part(
    doc: str | None,
    begin: str,
    end: str,
    make: Callable[[str], str],
    alike: Callable[[str], Any] = str,
    draw: Callable[[], object] = lambda: None,
) -> int:
    """The exit status of such a script. make: from what stands before the part to the part.
    draw: what is written with it. With --check nothing is, and 1 says that the README has another
    part, as far as `alike` looks."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    before, _, rest = README.read_text().partition(begin)
    shown, _, after = rest.partition(end)
    part = f"\n{make(before)}\n"
    if options.check:
        return int(alike(part) != alike(shown))
    README.write_text(f"{before}{begin}{part}{end}{after}")
    draw()
    return 0
