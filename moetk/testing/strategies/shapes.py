"""Sizes: how many sequences, tokens, experts and choices, and how much room there is for them.

Small on purpose: a law that breaks on a large shape nearly always breaks on a small one, and the
smallest case is what a person will read.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

LENGTHS = (0, 1, 2, 3, 5, 8, 13)
EXPERTS = (1, 2, 3, 8, 16)
ROOM = (0.25, 0.5, 1.0, 1.25, 2.0)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def seeds() -> SearchStrategy[int]:
    """What tensors are made from; shrinks to 0."""
    return st.integers(0, 2**16)


def batch_shapes(
    *, sequences: int = 3, least_sequences: int = 1, least_length: int = 0
) -> SearchStrategy[tuple[int, int]]:
    """(B, S): B from least_sequences to `sequences`, S of 0, 1, 2, 3, 5, 8, 13 from least_length
    on. T = B * S."""
    lengths = [length for length in LENGTHS if length >= least_length]
    return st.tuples(st.integers(least_sequences, sequences), st.sampled_from(lengths))


def expert_counts() -> SearchStrategy[tuple[int, int]]:
    """(E, K): E of 1, 2, 3, 8, 16 and K from 1 to E, K = E included."""
    return st.sampled_from(EXPERTS).flatmap(
        lambda num_experts: st.tuples(st.just(num_experts), st.integers(1, num_experts))
    )


def capacity_factors() -> SearchStrategy[float]:
    """From a quarter of an even share, where most choices are dropped, to twice that."""
    return st.sampled_from(ROOM)


def float_dtypes() -> SearchStrategy[torch.dtype]:
    """float64, float32, bfloat16, float16."""
    return st.sampled_from(FLOATS)
