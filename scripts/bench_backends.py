"""Which backend `auto` should take on a CPU: every backend on one bank, forward and backward.

Times are of this process on one core, so that a busy machine distorts them little. The outcome is
moetk/experts/auto_table.csv, whose rows name this file.

    python scripts/bench_backends.py --out scripts/results/backends_cpu.csv
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from itertools import product
from pathlib import Path
from statistics import median, quantiles

import torch
import transformers
from torch import Tensor

from moetk import TokenChoice
from moetk.experts import BankSpec, BankWeights, backends, bank_forward

WIDTH = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
BANKS = ((8, 2), (64, 8))
TOKENS = (1, 4, 16, 64, 256, 1024)


def microseconds(call: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """The median, p20 and p80."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time_ns()
        call()
        times.append(time.process_time_ns() - start)
    low, *_, high = quantiles(times, n=5)
    return median(times) / 1e3, low / 1e3, high / 1e3


def one_bank(dtype: torch.dtype, num_experts: int, top_k: int, num_tokens: int) -> list[Tensor]:
    torch.manual_seed(0)
    ids_TK = torch.rand(num_tokens, num_experts).topk(top_k).indices
    tensors = [
        torch.randn(num_tokens, WIDTH, dtype=dtype),
        torch.rand(num_tokens, top_k).to(dtype),
        torch.randn(num_experts, 2 * WIDTH, WIDTH, dtype=dtype),
        torch.randn(num_experts, WIDTH, WIDTH, dtype=dtype),
    ]
    return [ids_TK, *(tensor.requires_grad_() for tensor in tensors)]


def commit() -> str:
    out = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return out.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = {
        "threads": 1,
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "command": f"python scripts/bench_backends.py --out {options.out}",
        "seed": 0,
        "date": date.today().isoformat(),
    }
    rows = []
    for dtype, (num_experts, top_k), num_tokens in product(DTYPES, BANKS, TOKENS):
        ids_TK, x_TH, weights_TK, up, down = one_bank(dtype, num_experts, top_k, num_tokens)
        spec, weights = BankSpec(num_experts, WIDTH, WIDTH), BankWeights(up, down)
        routing = TokenChoice(ids_TK, weights_TK, num_experts)
        for backend in backends():

            def forward(name: str = backend.name) -> Tensor:
                return bank_forward(spec, weights, x_TH, routing, name)  # noqa: B023

            with torch.no_grad():
                inference, *_ = microseconds(forward, 40)
            training, low, high = microseconds(lambda: forward().sum().backward(), 16)
            shape = f"E={num_experts} K={top_k} T={num_tokens} H=I={WIDTH}"
            dtype_name = str(dtype).removeprefix("torch.")
            print(
                f"{dtype_name:9s} {shape:26s} {backend.name:10s} {inference:8.0f} {training:8.0f}"
            )
            rows.append(
                {
                    "backend": backend.name,
                    "dtype": dtype_name,
                    "shape": shape,
                    "forward_us": round(inference),
                    "forward_backward_us": round(training),
                    "p20_us": round(low),
                    "p80_us": round(high),
                    **world,
                }
            )
    with options.out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
