"""Writes the README's tables of one H200 from scripts/results/{layer,step,generate}.csv.

    python scripts/readme_h200.py [--check]

--check writes nothing and exits 1 when the README differs from the rows.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator

from readme_part import ROOT, write_part

from moetk.bench.report import BOTH, GENERATE, PEAK, SAVED, STEP, STEP_PEAK

BEGIN, END = "<!-- scripts/readme_h200.py -->", "<!-- end of the H200's tables -->"
Rows = list[dict[str, str]]

# A line of the table: its words, the layer and its tokens, who stands for moetk, and what the
# command that measured it names, where several did.
LAYERS = (
    ("Qwen3-30B-A3B, 16,384 tokens", "qwen3-30b-a3b", 16384, "moetk-fused-adds", "graphed"),
    ("Qwen3-30B-A3B, 4,096", "qwen3-30b-a3b", 4096, "moetk-fused-adds", "graphed"),
    ("Qwen3-30B-A3B, 256", "qwen3-30b-a3b", 256, "moetk-fused-adds", "graphed"),
    ("OLMoE-1B-7B, 16,384", "olmoe-1b-7b", 16384, "moetk-fused-adds", "adds-graphs"),
    ("Mixtral-8x7B, 16,384, `te`", "mixtral-8x7b", 16384, "moetk-te-adds", "moetk-te"),
    ("DeepSeek-V3, 32 of its experts, 16,384", "dsv3-ep8", 16384, "moetk-fused-adds", ""),
)
PEERS = (("Qwen3-30B-A3B", "qwen3-30b-a3b"), ("OLMoE-1B-7B", "olmoe-1b-7b"))
STEPS = (
    ("8 layers, 4 x 4,096 tokens", "layers=8 batch=4 length=4096"),
    ("12 layers, 4 x 4,096", "layers=12 batch=4 length=4096"),
    ("8 layers, 1 x 4,096", "layers=8 batch=1 length=4096"),
)
GENERATIONS = (
    ("1 prompt of 128 tokens", "layers=8 batch=1 length=128"),
    ("32 prompts of 128", "layers=8 batch=32 length=128"),
)


def read(name: str) -> Rows:
    with (ROOT / "scripts" / "results" / name).open(newline="") as stream:
        return list(csv.DictReader(stream))


def value(rows: Rows, what: str, who: str) -> float | None:
    """Of the one row that tells it; None where there is none."""
    found = [row for row in rows if (row["what"], row["who"]) == (what, who) and row["value"]]
    return float(found[0]["value"]) if found else None


def layer_lines(rows: Rows) -> Iterator[str]:
    columns = "Transformers | moetk | ratio | moetk with `graphs` | ratio | Transformers graphed"
    yield f"| layer, forward + backward | {columns} | saved MiB | peak MiB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for words, layer, tokens, who, command in LAYERS:
        mine = [
            row
            for row in rows
            if row["shape"].startswith(f"layer={layer} ")
            and f" T={tokens} routing=balanced grads=accumulate " in row["shape"]
            and row["launch"] == "eager"
            and command in row["command"]
        ]
        theirs, ours = value(mine, BOTH, "v5"), value(mine, BOTH, who)
        ratio = value(mine, f"{BOTH} ratio", who)
        graphs = value(mine, BOTH, f"{who}-graphs")
        against = value(mine, f"{BOTH} ratio", f"{who}-graphs")
        graphed = value(mine, BOTH, "v5-graphed")
        cells = [f"{theirs:.2f} ms", f"{ours:.2f} ms", f"{ratio:.3f}"]
        cells += [f"{graphs:.2f} ms", f"{against:.3f}"] if graphs else ["", ""]
        cells.append(f"{graphed:.2f} ms" if graphed else "")
        for what in (SAVED, PEAK):
            pair = value(mine, what, "v5"), value(mine, what, who)
            cells.append(" to ".join(f"{mib:,.0f}" for mib in pair if mib is not None))
        yield f"| {words} | {' | '.join(cells)} |"


def peer_lines(rows: Rows) -> Iterator[str]:
    yield "| 16,384 tokens, beside peers | Transformers | Liger | SonicMoE | moetk | peak MiB |"
    yield "|---|---|---|---|---|---|"
    for words, layer in PEERS:
        raced = [row for row in rows if "sonicmoe" in row["command"]]
        mine = [row for row in raced if row["shape"].startswith(f"layer={layer} ")]
        who = ("v5", "liger", "sonicmoe", "moetk-fused-adds")
        times, peaks = ([value(mine, what, one) for one in who] for what in (BOTH, PEAK))
        cells = [f"{time:.2f} ms" if time else "-" for time in times]
        cells.append(", ".join(f"{mib:,.0f}" if mib else "-" for mib in peaks))
        yield f"| {words} | {' | '.join(cells)} |"


def step_lines(rows: Rows) -> Iterator[str]:
    yield "| step: forward, loss, backward, AdamW | Transformers | moetk | ratio | peak GiB |"
    yield "|---|---|---|---|---|"
    for words, shape in STEPS:
        mine = [row for row in rows if row["shape"].startswith(f"{shape} ")]
        mine = [row for row in mine if "v5," in row["command"]]
        cells = [f"{value(mine, STEP, who):.3f} s" for who in ("v5", "moetk-step-adamw")]
        cells.append(f"{value(mine, 'step ratio', 'moetk-step-adamw'):.3f}")
        peaks = (value(mine, STEP_PEAK, who) for who in ("v5", "moetk-step-adamw"))
        cells.append(" to ".join(f"{gib:.1f}" for gib in peaks if gib is not None))
        yield f"| {words} | {' | '.join(cells)} |"


def generate_lines(rows: Rows) -> Iterator[str]:
    ours = "`replace_moe` | `graphs=0` | and `speed_up` | `graphs=0`"
    yield f"| generate(), a token, 8 layers | Transformers | {ours} |"
    yield "|---|---|---|---|---|---|"
    for words, shape in GENERATIONS:
        mine = [row for row in rows if row["shape"].startswith(f"{shape} ")]
        cells = [f"{value(mine, GENERATE, 'v5'):.1f} ms"]
        for who in ("moetk", "moetk-eager", "moetk-step", "moetk-step-eager"):
            ratio = value(mine, f"{GENERATE} ratio", who)
            cells.append(f"{value(mine, GENERATE, who):.1f} ms, {ratio:.2f}")
        yield f"| {words} | {' | '.join(cells)} |"


def tables() -> str:
    layers, steps, tokens = read("layer.csv"), read("step.csv"), read("generate.csv")
    row = layers[0]
    peers = next(row for row in layers if "sonic-moe" in row["versions"])
    raced = ", ".join(v for v in peers["versions"].split(", ") if v.startswith(("liger", "sonic")))
    commits = ", ".join(sorted({row["commit"] for row in (*layers, *steps, *tokens)}))
    return "\n".join(
        [
            *layer_lines(layers),
            "",
            *peer_lines(layers),
            "",
            *step_lines(steps),
            "",
            *generate_lines(tokens),
            "",
            f"One {row['gpu']}, bf16; {row['versions'].partition(', liger')[0]}, {raced}; at the "
            f"commits {commits}, each row at the one it names; medians, the contenders in turn, "
            "the ratio that of a round's times. Saved: what the graph keeps; peak: "
            "over parameters and gradients for a layer, in all for a step. moetk's layers add to "
            "gradients in place; its step has `speed_up` and `moetk.train.AdamW`. Transformers "
            "graphed: by torch.cuda.make_graphed_callables.",
        ]
    )


def main() -> int:
    return write_part(__doc__, BEGIN, END, lambda _: tables())


if __name__ == "__main__":
    sys.exit(main())
