"""Writes the README's table from scripts/results/cpu_step.csv, so that no number there is typed.

    python scripts/readme_table.py [--check]

--check writes nothing and exits 1 when the README differs from the rows.
"""

from __future__ import annotations

import csv
import sys

from readme_part import ROOT, write_part

BEGIN, END = "<!-- scripts/readme_table.py -->", "<!-- end -->"
COLUMNS = ("one training step, forward to AdamW", "ms", "ratio", "p20 to p80")


def table() -> str:
    with (ROOT / "scripts" / "results" / "cpu_step.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|---|"]
    lines += [
        f"| {row['what']} | {float(row['value_ms']):.1f} | {float(row['ratio']):.3f} "
        f"| {float(row['ratio_p20']):.3f} to {float(row['ratio_p80']):.3f} |"
        for row in rows
    ]
    row = rows[0]
    shape = row["shape"].replace("=", " ").replace("_", " ")
    lines += [
        "",
        f"Against the faster of Transformers' experts, {row['pairs']} interleaved pairs on "
        f"{row['threads']} core; Qwen3-MoE with {shape}; "
        f"torch {row['torch']}, Transformers {row['transformers']}, moetk at {row['commit']}.",
    ]
    return "\n".join(lines)


def main() -> int:
    return write_part(__doc__, BEGIN, END, lambda _: table())


if __name__ == "__main__":
    sys.exit(main())
