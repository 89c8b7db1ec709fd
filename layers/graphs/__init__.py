"""Blocks of few tokens, replayed from CUDA graphs: `replace_moe(model, graphs=...)`."""

from moetk.layers.graphs.block import GRAPHS, UNASKED, Graphs, asked, put_in, take_out
from moetk.layers.graphs.watch import Parts

__all__ = ["GRAPHS", "UNASKED", "Graphs", "Parts", "asked", "put_in", "take_out"]
