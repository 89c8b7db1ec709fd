"""What a training step of the quickstart's model costs with moetk's layers, against transformers'.

One step = forward, backward, AdamW. Stock runs with the faster of its `grouped_mm` and `eager`. The
pairs are interleaved in one process, one thread: what slows the machine slows both sides.

    python scripts/bench_cpu_step.py [--pairs 7] [--steps 20] [--out scripts/results/cpu_step.csv]
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moetk
from moetk.losses import LoadBalancingLoss, RouterZLoss

SHAPE = {
    "layers": 2,
    "hidden": 64,
    "experts": 8,
    "top_k": 2,
    "width": 64,
    "batch": 8,
    "length": 128,
}


def build(experts: str = "grouped_mm", losses: tuple[Any, ...] | None = None) -> Any:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=256,
            hidden_size=SHAPE["hidden"],
            intermediate_size=SHAPE["width"],
            moe_intermediate_size=SHAPE["width"],
            num_hidden_layers=SHAPE["layers"],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=SHAPE["experts"],
            num_experts_per_tok=SHAPE["top_k"],
            norm_topk_prob=True,
            use_cache=False,
        )
    ).train()
    model.set_experts_implementation(experts)
    if losses is not None:
        moetk.replace_moe(model, losses=losses)
    return model


def stepper(model: Any) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (SHAPE["batch"], SHAPE["length"]), generator=generator)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def alternate(sides: dict[str, Callable[[], None]], steps: int) -> dict[str, float]:
    """Seconds a step of each side, the median of `steps`. The sides take turns step by step, and
    time is this process's: what else the machine does hardly counts, and counts for all alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(steps):
        for name, step in sides.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()

    sides = {
        "stock grouped_mm": stepper(build("grouped_mm")),
        "stock eager": stepper(build("eager")),
        "moetk": stepper(build(losses=())),
        "moetk with losses": stepper(build(losses=(LoadBalancingLoss(1e-2), RouterZLoss(1e-3)))),
    }
    alternate(sides, 5)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.pairs):
        for name, value in alternate(sides, options.steps).items():
            times[name].append(value)

    stock = min(("stock grouped_mm", "stock eager"), key=lambda name: median(times[name]))
    rows = []
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times[stock], strict=True)]
        low, high = (quantiles(ratios, n=5)[i] for i in (0, -1))
        print(
            f"{name:18s} {median(values) * 1e3:7.2f} ms   {median(ratios):.3f} of {stock}   "
            f"p20 {low:.3f}  p80 {high:.3f}"
        )
        rows.append(
            {
                "what": name,
                "shape": " ".join(f"{key}={value}" for key, value in SHAPE.items()),
                "value_ms": f"{median(values) * 1e3:.3f}",
                "ratio": f"{median(ratios):.4f}",
                "ratio_p20": f"{low:.4f}",
                "ratio_p80": f"{high:.4f}",
                "baseline": stock,
                "pairs": options.pairs,
                "threads": 1,
                "cpu": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "commit": _commit(),
                "command": "python scripts/bench_cpu_step.py",
                "seed": 0,
                "date": date.today().isoformat(),
            }
        )
    if options.out is not None:
        with options.out.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def _commit() -> str:
    out = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return out.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
