"""The tiles that are tried, the table that they are written to and read from."""

from __future__ import annotations

import csv
from importlib.resources import files

import pytest

from moetk.bench.meter import Spread
from moetk.bench.rows import World
from moetk.bench.shapes import LAYERS
from moetk.bench.tiles import KERNELS, tiles_to_try, tuner
from moetk.bench.tune import Choice, write_choices
from moetk.errors import BackendError

pytest.importorskip("triton")

QWEN3 = LAYERS["qwen3-30b-a3b"]


def shipped():
    with (files("moetk.kernels.gpu") / "tiles.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_every_kernel_has_tiles_to_try_and_a_row_in_the_table():
    named = {row["kernel"] for row in shipped()}
    assert named == set(KERNELS)
    for kernel in KERNELS:
        for rows in (0.5, 16, 64, 1024):
            assert len(set(tiles_to_try(kernel, rows))) >= 6


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_candidate_tells_the_columns_of_the_table(kernel):
    candidates = tuner.candidates(kernel, QWEN3, 16384)
    columns = [name for name in shipped()[0] if name != "kernel"]
    assert all(list(candidate.row()) == columns for candidate in candidates)
    assert candidates[0].rows == 1024
    of_table = {(r["kernel"], int(r["columns"]), int(r["reduction"])) for r in shipped()}
    assert (kernel, candidates[0].columns, candidates[0].reduction) in of_table


def test_a_tuned_table_is_read_back(tmp_path, monkeypatch):
    from moetk.kernels.gpu import tiles

    candidate = tuner.candidates("up", QWEN3, 16384)[3]
    choice = Choice("up", candidate.row(), Spread(1.0, 0.9, 1.1), 1.2, 0)
    written = tmp_path / "tiles.csv"
    write_choices(written, [choice], World(*[""] * len(World.__dataclass_fields__)))
    monkeypatch.setenv("MOETK_TILES", str(written))
    tiles.tile_table.cache_clear()
    tiles.tile_for.cache_clear()
    try:
        assert tiles.tile_for("up", 131072, 128, 768, 2048) == candidate.tile
        with pytest.raises(BackendError, match="no row for the kernel 'down'"):
            tiles.tile_for("down", 131072, 128, 2048, 768)
    finally:
        tiles.tile_table.cache_clear()
        tiles.tile_for.cache_clear()


def test_an_older_table_is_refused_by_name(tmp_path, monkeypatch):
    from moetk.kernels.gpu import tiles

    written = tmp_path / "old.csv"
    written.write_text("kernel,rows,columns,reduction,m,n,k,warps,stages,group,per_sm,tail\n")
    monkeypatch.setenv("MOETK_TILES", str(written))
    tiles.tile_table.cache_clear()
    try:
        with pytest.raises(BackendError, match="old.csv lacks the column 'reduces'.*--tune"):
            tiles.tile_table()
    finally:
        tiles.tile_table.cache_clear()
