"""How rows grouped by expert are cut into tiles, and which tile each product takes.

Letters: N rows in expert order, E experts, BM x BN an output tile, BK the step along the reduction.
"""

from __future__ import annotations

import csv
import functools
import math
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
import triton
import triton.language as tl

from moetk.errors import BackendError
from moetk.kernels.gpu.launch import power_of_two


@triton.jit
def find_tile(offsets_ptr, pid, num_n, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """The expert of a tile of rows, the tile's number there, the expert's rows, its row tiles.

    The grid is as large as any split of N rows over E experts may need, so that no count has to
    come to the host; a program behind the last tile gets expert >= E.
    """
    e = tl.arange(0, EP)
    ends = tl.load(offsets_ptr + e, mask=e < E, other=0)
    starts = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    row_tiles = tl.where(e < E, (ends - starts + BM - 1) // BM, 0)
    tiles = row_tiles * num_n
    expert = tl.sum((tl.cumsum(tiles, 0) <= pid).to(tl.int32), 0)
    here = e == expert
    first = tl.sum(tl.where(e < expert, tiles, 0), 0)
    start = tl.sum(tl.where(here, starts, 0), 0)
    end = tl.sum(tl.where(here, ends, 0), 0)
    count = tl.sum(tl.where(here, row_tiles, 0), 0)
    return expert, pid - first, start, end, count


@triton.jit
def count_tiles(offsets_ptr, num_n, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """The tiles of all experts together."""
    e = tl.arange(0, EP)
    ends = tl.load(offsets_ptr + e, mask=e < E, other=0)
    starts = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    return tl.sum(tl.where(e < E, (ends - starts + BM - 1) // BM, 0)) * num_n


@triton.jit
def in_groups(tile, num_m, num_n, GM: tl.constexpr):
    """Tile number to (row, column): GM rows of tiles side by side, so that both operands of
    neighbouring programs meet in the cache."""
    width = GM * num_n
    group = tile // width
    rows = tl.minimum(num_m - group * GM, GM)
    return group * GM + (tile % width) % rows, (tile % width) // rows


@dataclass(frozen=True)
class Tile:
    """One way to run a product: output tile m x n, reduction step k, and the pipeline.

    group: rows of tiles side by side. per_sm: programs on each multiprocessor that walk over the
    tiles, where the kernel can; 0 = one program for each tile. A sum of outer products knows only
    whether: its programs walk along a row of tiles each. tail: rows of the smaller tile that an
    expert's last rows take where they fit into it; 0 = none. reduces: of a sum that is added to by
    one program for each tile, whether the copy engine adds it where the sum lies, in the L2 cache.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    per_sm: int = 0
    tail: int = 0
    reduces: int = 0


_COLUMNS = ("m", "n", "k", "warps", "stages", "group", "per_sm", "tail", "reduces")


@functools.cache
def tile_table() -> dict[str, list[tuple[float, int, int, Tile]]]:
    """kernel -> [(rows of an expert, columns, reduction, tile)], as measured on an H200; or, where
    the environment variable MOETK_TILES names a file of `moetk bench layer --tune`, from there."""
    table: dict[str, list[tuple[float, int, int, Tile]]] = {}
    own = os.environ.get("MOETK_TILES")
    shipped = files("moetk.kernels.gpu") / "tiles.csv"
    with Path(own).open() if own else shipped.open() as stream:
        rows = csv.DictReader(stream)
        lacking = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
        if lacking:
            raise BackendError(
                f"the table of tiles {own} lacks the column {lacking[0]!r} (MOETK_TILES): write it "
                "anew with  moetk bench layer --tune moetk.bench.tiles:tuner"
            )
        for row in rows:
            tile = Tile(*(int(row[name]) for name in _COLUMNS))
            where = float(row["rows"]), int(row["columns"]), int(row["reduction"])
            table.setdefault(row["kernel"], []).append((*where, tile))
    return table


def _nearest(kernel: str, rows: float, columns: int, reduction: int) -> Tile:
    def distance(entry: tuple[float, int, int, Tile]) -> float:
        of_rows = abs(math.log2(entry[0] / rows))
        of_shape = abs(math.log2(entry[1] / columns)) + abs(math.log2(entry[2] / reduction))
        return 4 * of_rows + of_shape  # the rows decide how full a tile is

    if kernel not in tile_table():
        raise BackendError(
            f"the table of tiles has no row for the kernel {kernel!r} (MOETK_TILES)."
        )
    return min(tile_table()[kernel], key=distance)[3]


@functools.lru_cache(maxsize=4096)
def tile_for(kernel: str, num_rows: int, num_experts: int, columns: int, reduction: int) -> Tile:
    """The tile measured nearest to this shape. Rows are taken to the next power of two of an even
    split, so that a handful of tiles serves every batch size and nothing compiles in the middle of
    a run."""
    rows = 2.0 ** round(math.log2(max(num_rows / num_experts, 1)))
    return _nearest(kernel, rows, columns, reduction)


def grid_rows(num_rows: int, num_experts: int, block: int) -> int:
    """Row tiles that any split of the rows over the experts fits into."""
    return num_rows // block + min(num_experts, num_rows)


def programs(tiles: int, tile: Tile, device: torch.device) -> int:
    """How many programs to start for at most that many tiles."""
    return min(tiles, tile.per_sm * _multiprocessors(device)) if tile.per_sm else tiles


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def padded(num_experts: int) -> int:
    """E as a power of two: what a program holds of the offsets."""
    return power_of_two(num_experts)
