"""Write results into a reproduction's README: `python papers/table.py papers/loss_free_balance`.

The block between the two marks is made from results.csv alone, so no number is typed by hand.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from statistics import mean

BEGIN, END = "<!-- from results.csv -->", "<!-- end -->"
COLUMNS = {
    "train_max_violation": "MaxVio, last quarter of training",
    "max_violation": "MaxVio, held-out",
    "initial_loss": "held-out loss before",
    "final_loss": "after",
}


def results_block(rows: list[dict[str, str]]) -> str:
    """A Markdown table with a line an arm, mean and range over seeds, and where it ran."""
    lines = [
        "| arm | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (1 + len(COLUMNS)) + "|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = [row for row in rows if row["arm"] == arm]
        lines.append(f"| {arm} | " + " | ".join(_spread(cells, name) for name in COLUMNS) + " |")
    first, seconds = rows[0], sum(float(row["seconds"]) for row in rows)
    seeds = len({row["seed"] for row in rows})
    lines += [
        "",
        f"Mean (smallest to largest) over {seeds} seeds. {len(rows)} cells of {first['steps']} "
        f"steps, {seconds:.0f} s of them together, {first['threads']} thread each, "
        f"{first['processor']}; torch {first['torch']}, transformers {first['transformers']}, "
        f"moetk {first['moetk']} at {first['commit']}, {first['date'][:10]}.",
    ]
    return "\n".join(lines)


def write_block(folder: Path) -> None:
    """Replace the block in the folder's README."""
    with open(folder / "results.csv", newline="", encoding="utf-8") as stream:
        block = results_block(list(csv.DictReader(stream)))
    readme = folder / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{block}\n{END}{after}", encoding="utf-8")


def _spread(cells: list[dict[str, str]], column: str) -> str:
    values = [float(cell[column]) for cell in cells]
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    write_block(Path(sys.argv[1]))
