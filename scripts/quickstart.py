"""moetk's main job in four steps, on two CPU cores in under four minutes.

1. A router of one's own in a stock Transformers v5 model.
2. Proof that the rest is unchanged: the composed stock router against v5, every tensor.
3. An ablation on real text (papers/loss_free_balance): four arms, two seeds.
4. A report.

    python scripts/quickstart.py [--break router] [--out runs/loss_free_balance]

Exits 1 when a tensor differs by more than the pass rule allows, or a cell does not learn.
`--break router` plants a fault (the weights are not rescaled) to show that step 2 sees it.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import normalize
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

import moetk
from moetk.equivalence.stock import Equivalence, against_stock, parity

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ROOT / "papers" / "loss_free_balance" / "sweep.toml"
LEAST_GAIN = 0.5  # nats on held-out files
console = Console(width=110 if not sys.stdout.isatty() else None, highlight=False)


class CosineRouter(nn.Module):
    def __init__(self, hidden_size: int, num_experts: int, k: int) -> None:
        super().__init__()
        self.weight, self.k = nn.Parameter(torch.randn(num_experts, hidden_size)), k

    def forward(self, x_TH: torch.Tensor, ctx: moetk.RouterContext) -> moetk.TokenChoice:
        scores_TE = 10 * normalize(x_TH.float(), dim=-1) @ normalize(self.weight.float(), dim=-1).T
        best_TK, experts_TK = scores_TE.topk(self.k)
        return moetk.TokenChoice(experts_TK, best_TK.softmax(-1), len(self.weight))


def tiny_qwen3() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, moe_intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, use_cache=False,
        initializer_range=0.2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def batches(count: int = 3) -> list[torch.Tensor]:
    """Real bytes: this script's own."""
    data = torch.tensor(list(Path(__file__).read_bytes()))
    return [data[n * 256 : (n + 1) * 256].view(4, 64) for n in range(count)]


def swap_a_router() -> None:
    model, (ids, *_) = tiny_qwen3(), batches(1)
    before = model(input_ids=ids, labels=ids).loss
    moe = moetk.replace_moe(
        model, router=lambda spec: CosineRouter(spec.hidden_size, spec.num_experts, spec.top_k)
    )
    console.print(moe.explain(), markup=False)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    moved = model.get_submodule("model.layers.0.mlp.gate.moetk")
    assert isinstance(moved, CosineRouter)
    console.print(
        f"stock router: loss {before.item():.3f}; CosineRouter: {losses[0]:.3f} -> "
        f"{losses[-1]:.3f} after 20 steps on one batch"
    )
    moe.restore()


def prove_the_rest(broken: str | None) -> bool:
    stock = tiny_qwen3()
    ours = copy.deepcopy(stock)
    moe = moetk.replace_moe(ours)
    if broken == "router":
        for site in moe.sites:
            gate = ours.get_submodule(f"{site.name}.gate")
            gate.renormalise = False
    exact = parity(stock, ours, batches())
    name, error = exact.worst
    console.print(
        f"fp64: largest relative error {error:.1e} ({name}); bound 1e-10: "
        + ("[green]equal[/]" if exact.ok else "[red]DIFFERENT[/]")
    )
    low = [
        against_stock(stock, ours, batches(), dtype) for dtype in (torch.float32, torch.bfloat16)
    ]
    console.print(table_of(low))
    for result in low:
        choices = result.choices
        console.print(
            f"{dtype_name(result)}: {choices.total} choices, {choices.same} the same, "
            f"{choices.permuted} the same set, {choices.tied} differ on a tie, "
            f"{choices.flipped} differ; tie share {choices.tie_share:.2%}"
        )
    equal = exact.ok and all(result.ok for result in low)
    console.print("[green]equal[/]" if equal else "[red]NOT EQUAL: see the tensors marked above[/]")
    return equal


def dtype_name(result: Equivalence) -> str:
    return "fp32" if result.dtype == torch.float32 else "bf16"


def table_of(results: list[Equivalence]) -> Table:
    table = Table(
        title="composed stock router against v5: relative error to fp64, v5's own, their ratio",
        box=None,
    )
    table.add_column("tensor")
    for result in results:
        for column in (dtype_name(result), "v5", "ratio"):
            table.add_column(column, justify="right")
    for verdicts in zip(*(result.verdicts for result in results), strict=True):
        cells = []
        for verdict in verdicts:
            mark = f"{verdict.ratio:.2f}" if verdict.ok else f"[red]{verdict.ratio:.2f} ![/]"
            cells += [f"{verdict.error:.1e}", f"{verdict.eager_error:.1e}", mark]
        table.add_row(verdicts[0].name.removeprefix("grad ").replace("model.", ""), *cells)
    return table


def sweep(out: Path) -> bool:
    from moetk.sweep import read_sweep

    command = [sys.executable, "-m", "moetk.cli", "sweep", str(SWEEP), "--out", str(out)]
    if subprocess.run(command, check=False).returncode:
        return False
    learned = True
    for row in read_sweep(out)[1]:
        first, last = row["result"]["initial_loss"], row["result"]["final_loss"]
        fine = first - last >= LEAST_GAIN
        learned = learned and fine
        console.print(
            f"{row['arm']:14s} seed {row['seed']}: held-out loss {first:.3f} -> {last:.3f} nats"
            + ("" if fine else f"  [red]less than {LEAST_GAIN} gained[/]")
        )
    return learned


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--break", dest="broken", choices=["router"], help="plant a fault")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "loss_free_balance")
    options = parser.parse_args()
    logging.set_verbosity_error()

    console.rule("1  a router of your own in a stock model")
    swap_a_router()
    console.rule("2  proof that the rest is unchanged")
    if not prove_the_rest(options.broken):
        return 1
    console.rule("3  an ablation on real text: Python's standard library, byte by byte")
    if not sweep(options.out):
        return 1
    console.rule("4  the report")
    report = options.out / "report.html"
    command = [sys.executable, "-m", "moetk.cli", "report", str(options.out), "--out", str(report)]
    if subprocess.run(command, check=False).returncode:
        return 1
    console.print(f"open {report.resolve()}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
