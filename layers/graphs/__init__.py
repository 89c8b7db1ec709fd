"""Blocks of few tokens, replayed from CUDA graphs: `replace_moe(model, graphs=...)`."""

from moetk.layers.graphs.block import GRAPHS, Graphs, put_in, take_out
from moetk.layers.graphs.watch import Parts

__all__ = ["GRAPHS", "Graphs", "Parts", "put_in", "take_out"]
