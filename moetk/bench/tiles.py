"""The tuner of the fused bank's products: `moetk bench layer --tune moetk.bench.tiles:tuner`.

What it writes is a table like `moetk/kernels/gpu/tiles.csv`; the environment variable MOETK_TILES
names one that is read instead.

Letters: T tokens, N = T * K rows in expert order, E experts, H hidden, I expert width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moetk.bench.shapes import LayerShape
from moetk.kernels.form import Form
from moetk.kernels.sort_plan import SortPlan, sort_plan

if TYPE_CHECKING:
    from moetk.kernels.gpu.tiles import Tile

KERNELS = (
    "up",
    "down",
    "da",
    "dx",
    "dup",
    "dup_add",
    "dup_gather",
    "dup_gather_add",
    "ddown_gather",
    "ddown_gather_add",
)
_WARM_UP_CYCLES = 500_000  # the GPU waits until the host has launched


@dataclass(frozen=True)
class TileCandidate:
    """A tile for a kernel; rows an expert has, columns and reduction of its product."""

    kernel: str
    shape: LayerShape
    tokens: int
    rows: float
    columns: int
    reduction: int
    tile: Tile

    def row(self) -> Mapping[str, Any]:
        where = {"rows": self.rows, "columns": self.columns, "reduction": self.reduction}
        return {**where, **asdict(self.tile)}


class TileTuner:
    """Tiles worth trying, by how many rows an expert has."""

    kernels: Sequence[str] = KERNELS

    def candidates(self, kernel: str, shape: LayerShape, tokens: int) -> Sequence[TileCandidate]:
        rows = tokens * shape.top_k / shape.num_experts
        columns, reduction = _product(kernel, shape)
        return [
            TileCandidate(kernel, shape, tokens, rows, columns, reduction, tile)
            for tile in tiles_to_try(kernel, rows)
        ]

    def time(self, candidate: TileCandidate) -> float:
        """Milliseconds of the second of two runs: the first may compile."""
        run = _runs(candidate.shape, candidate.tokens)[candidate.kernel]
        run(candidate.tile)
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_WARM_UP_CYCLES)
        start.record()
        run(candidate.tile)
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))


tuner = TileTuner()


def tiles_to_try(kernel: str, rows: float) -> list[Tile]:
    """The tiles worth trying where an expert has about that many rows."""
    from moetk.kernels.gpu.tiles import Tile

    family = "up" if kernel == "up" else "rows" if kernel in ("down", "da", "dx") else "outer"
    size = "many" if rows >= 128 else "some" if rows >= 32 else "few"
    tiles = [Tile(*numbers) for numbers in _TRY[family, size]]
    return tiles if kernel.endswith("_add") else [tile for tile in tiles if not tile.reduces]


def _product(kernel: str, shape: LayerShape) -> tuple[int, int]:
    """Columns and reduction of a kernel's product, as `tile_for` is asked for them."""
    hidden, width = shape.hidden_size, shape.intermediate_size
    return {
        "up": (width, hidden),
        "down": (hidden, width),
        "da": (width, hidden),
        "dx": (hidden, 2 * width),
        "dup": (hidden, 2 * width),
        "ddown": (width, hidden),
    }[kernel.split("_")[0]]


@functools.lru_cache(maxsize=1)
def _runs(shape: LayerShape, tokens: int) -> dict[str, Callable[[Tile], object]]:
    """Each kernel on random operands of the layer, with an even routing."""
    from moetk.kernels.gpu.combine import spread
    from moetk.kernels.gpu.outer import outer
    from moetk.kernels.gpu.rows import rows_times
    from moetk.kernels.gpu.up import up_activate

    hidden, width, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    torch.manual_seed(0)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)

    chosen_TK = torch.rand(tokens, experts, device="cuda").topk(shape.top_k).indices
    plan: SortPlan = sort_plan(chosen_TK, None, experts)
    source, offsets, num_rows = plan.source_N, plan.offsets_E, len(plan.source_N)
    x, dh, a = drawn(tokens, hidden), drawn(num_rows, 2 * width), drawn(num_rows, width)
    up = drawn(experts, 2 * width, hidden) * hidden**-0.5
    down = drawn(experts, hidden, width) * width**-0.5
    dup, ddown = torch.zeros_like(up), torch.zeros_like(down)
    rows = spread(x, plan.slot_TK, offsets)

    def product(
        left: Tensor, right: Tensor, gather: str, into: Tensor | None = None
    ) -> Callable[[Tile], object]:
        at = None if gather == "none" else source
        return lambda tile: outer(
            "", left, right, offsets, source_N=at, gather=gather, into_EAB=into, tile=tile
        )

    return {
        "up": lambda tile: up_activate(x, source, up, None, offsets, Form(), keep=True, tile=tile),
        "down": lambda tile: rows_times("", a, down, offsets, columns_first=True, tile=tile),
        "da": lambda tile: rows_times(
            "", x, down, offsets, columns_first=False, source_N=source, tile=tile
        ),
        "dx": lambda tile: rows_times("", dh, up, offsets, columns_first=False, tile=tile),
        "dup": product(dh, rows, "none"),
        "dup_add": product(dh, rows, "none", dup),
        "dup_gather": product(dh, x, "right"),
        "dup_gather_add": product(dh, x, "right", dup),
        "ddown_gather": product(x, a, "left"),
        "ddown_gather_add": product(x, a, "left", ddown),
    }


# (m, n, k, warps, stages, group, programs on a multiprocessor, tail, reduces). For "up", n counts
# columns of the gate alone: the tile of the product is twice as wide.
_TRY: dict[tuple[str, str], list[tuple[int, ...]]] = {
    ("up", "many"): [
        (128, 128, 64, 8, 4, 8),
        (128, 128, 64, 8, 4, 16),
        (128, 128, 64, 8, 4, 16, 0, 64),
        (128, 128, 64, 8, 4, 8, 0, 64),
        (128, 128, 64, 8, 4, 4),
        (128, 128, 64, 8, 3, 8),
        (128, 64, 64, 4, 3, 8),
        (64, 128, 64, 4, 3, 8),
        (64, 128, 64, 8, 4, 8),
        (256, 64, 64, 8, 3, 8),
    ],
    ("up", "some"): [
        (64, 64, 64, 4, 4, 8),
        (64, 128, 64, 4, 3, 8),
        (64, 128, 64, 8, 4, 8),
        (64, 64, 64, 4, 3, 8),
        (32, 64, 64, 4, 4, 8),
        (64, 32, 64, 4, 4, 8),
    ],
    ("up", "few"): [
        (64, 64, 64, 4, 4, 8),
        (32, 64, 64, 4, 4, 8),
        (16, 64, 64, 4, 4, 8),
        (16, 64, 64, 4, 5, 8),
        (32, 64, 128, 4, 3, 8),
        (16, 32, 128, 4, 4, 8),
        (32, 32, 128, 4, 4, 8),
        (64, 32, 128, 4, 4, 8),
    ],
    ("rows", "many"): [
        (128, 256, 64, 8, 3, 4, 1),
        (128, 256, 64, 8, 3, 4, 1, 64),
        (128, 256, 64, 8, 3, 16, 1, 64),
        (128, 256, 64, 8, 3, 32, 1),
        (64, 256, 32, 4, 4, 8, 2),
        (128, 256, 64, 8, 3, 8, 1),
        (128, 256, 64, 8, 3, 16, 1),
        (128, 256, 64, 8, 3, 8),
        (128, 128, 64, 8, 4, 8, 1),
        (128, 128, 64, 4, 3, 8),
        (128, 128, 64, 8, 4, 8),
        (64, 256, 64, 4, 3, 8),
        (256, 128, 64, 8, 3, 8),
    ],
    ("rows", "some"): [
        (64, 128, 64, 4, 4, 8),
        (64, 128, 64, 4, 4, 8, 2),
        (64, 256, 64, 4, 3, 8),
        (64, 256, 64, 8, 3, 8, 1),
        (64, 64, 64, 4, 4, 8),
        (64, 128, 128, 4, 3, 8),
    ],
    ("rows", "few"): [
        (16, 128, 64, 4, 4, 8),
        (16, 128, 64, 4, 6, 8),
        (16, 128, 128, 4, 3, 8),
        (16, 64, 128, 4, 4, 8),
        (32, 64, 128, 4, 3, 8),
        (32, 128, 64, 4, 4, 8),
        (16, 256, 64, 4, 3, 8),
        (16, 64, 64, 4, 6, 8),
        (64, 128, 64, 4, 3, 8),
    ],
    ("outer", "many"): [
        (128, 128, 32, 4, 5, 4, 0, 0, 1),
        (128, 128, 32, 4, 4, 4, 0, 0, 1),
        (128, 128, 32, 4, 4, 16, 0, 0, 1),
        (128, 128, 64, 4, 3, 4, 0, 0, 1),
        (128, 256, 32, 8, 5, 4, 0, 0, 1),
        (256, 128, 64, 8, 4, 8, 0, 0, 1),
        (256, 128, 64, 8, 3, 8),
        (128, 256, 64, 8, 4, 8),
        (128, 128, 32, 4, 5, 4),
        (128, 128, 64, 4, 3, 16),
        (128, 128, 64, 4, 3, 4),
        (128, 128, 32, 4, 4, 8),
        (128, 256, 64, 8, 3, 4),
        (128, 256, 64, 8, 3, 12),
        (128, 256, 32, 8, 5, 4),
        (128, 128, 64, 8, 3, 4),
    ],
    ("outer", "some"): [
        (64, 128, 64, 4, 3, 4, 1),
        (128, 128, 64, 4, 2, 4, 1),
        (64, 128, 128, 4, 2, 4, 1),
        (128, 128, 32, 4, 3, 4),
        (128, 128, 32, 4, 2, 4),
        (128, 128, 64, 4, 2, 4),
        (128, 256, 32, 8, 3, 4),
        (128, 128, 16, 4, 4, 4),
        (64, 128, 32, 4, 3, 4),
        (64, 256, 32, 4, 3, 4),
    ],
    ("outer", "few"): [
        (64, 128, 32, 4, 4, 4, 1),
        (64, 128, 32, 4, 3, 4, 1),
        (128, 128, 32, 4, 3, 4, 1),
        (64, 64, 32, 4, 4, 4, 1),
        (128, 128, 16, 4, 2, 4),
        (64, 256, 16, 4, 2, 4),
        (64, 128, 16, 4, 2, 8),
        (64, 128, 16, 4, 1, 4),
        (128, 128, 32, 4, 2, 4),
        (128, 64, 16, 4, 2, 4),
        (32, 256, 16, 4, 2, 4),
        (32, 128, 16, 4, 2, 4),
        (128, 256, 16, 8, 2, 4),
    ],
}
