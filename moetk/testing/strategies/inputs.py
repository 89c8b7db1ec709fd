"""Rows of numbers in the patterns that break routers, as inputs (T, H) or as logits (T, E).

A pattern and a seed make a tensor, so that hypothesis shrinks two small things instead of T * H
numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

Pattern = Callable[[torch.Generator, int, int], Tensor]


def gaussian(g: torch.Generator, rows: int, columns: int) -> Tensor:
    """Independent standard normal numbers: no ties, no extremes."""
    return torch.randn(rows, columns, generator=g, dtype=torch.float64)


def zeros(g: torch.Generator, rows: int, columns: int) -> Tensor:
    """Every number 0: each row is a tie of all."""
    return torch.zeros(rows, columns, dtype=torch.float64)


def one_hot(g: torch.Generator, rows: int, columns: int) -> Tensor:
    """A one and zeros: as input, logits are the router's own weights, without rounding; as logits,
    one expert for each token and a tie of the others."""
    x = torch.zeros(rows, columns, dtype=torch.float64)
    return x.scatter_(1, torch.randint(columns, (rows, 1), generator=g), 1.0)


def tied_pairs(g: torch.Generator, rows: int, columns: int) -> Tensor:
    """Every second column repeats its neighbour: pairwise ties."""
    x = gaussian(g, rows, columns)
    return x[:, torch.arange(columns) // 2 * 2]


def signed_zeros(g: torch.Generator, rows: int, columns: int) -> Tensor:
    """+0 and -0, equal in value and not in bits: a radix select or a bit trick tells them apart."""
    signs = torch.randint(2, (rows, columns), generator=g, dtype=torch.float64)
    return (2 * signs - 1) * 0.0


def collapsed(g: torch.Generator, rows: int, columns: int) -> Tensor:
    """The same row for every token: all of them want the same experts."""
    return gaussian(g, 1, columns).expand(rows, columns).clone()


def starved(g: torch.Generator, rows: int, columns: int) -> Tensor:
    """As logits: all columns from the second on are far below the first, and get no token first."""
    x = gaussian(g, rows, columns)
    x[:, 1:] -= 20.0
    return x


def ascending(g: torch.Generator, rows: int, columns: int) -> Tensor:
    """Rows sorted in ascending order: what a selection that keeps its first finds gets wrong."""
    return gaussian(g, rows, columns).sort(-1).values


def huge(g: torch.Generator, rows: int, columns: int) -> Tensor:
    """Of size 10000: exp overflows, a softmax is one-hot."""
    return gaussian(g, rows, columns) * 1e4


def tiny(g: torch.Generator, rows: int, columns: int) -> Tensor:
    """Of size 1e-30: products vanish beside anything added to them."""
    return gaussian(g, rows, columns) * 1e-30


def one_ulp(g: torch.Generator, rows: int, columns: int) -> Tensor:
    """Around 1, neighbours one step of float32 apart: the smallest true margin."""
    order = torch.rand(rows, columns, generator=g).argsort(-1)
    return 1.0 + order.double() * torch.finfo(torch.float32).eps


PATTERNS: dict[str, Pattern] = {
    one.__name__: one
    for one in (
        gaussian,
        zeros,
        one_hot,
        tied_pairs,
        signed_zeros,
        collapsed,
        starved,
        ascending,
        huge,
        tiny,
        one_ulp,
    )
}
"""All of finite numbers; `not_finite` makes rows that are not."""

MODERATE = ("gaussian", "one_hot", "collapsed", "ascending")
"""Patterns on which rounding is small and, between experts that differ, nothing ties."""

BAD_VALUES = (float("nan"), float("inf"), -float("inf"))


def rows_of(
    pattern: str, seed: int, rows: int, columns: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """(rows, columns) in `dtype`, which only the arguments decide."""
    generator = torch.Generator().manual_seed(seed)
    return PATTERNS[pattern](generator, rows, columns).to(dtype)


def pattern_names(*names: str) -> SearchStrategy[str]:
    """One of `names`, or of all patterns. Shrinks to the first."""
    return st.sampled_from(names or tuple(PATTERNS))


def not_finite(x: Tensor, row: int, value: float, *, whole: bool) -> Tensor:
    """A copy of x (rows, columns) with `value` in that row: in all of it, or in its first place."""
    bad = x.clone()
    bad[row, slice(None) if whole else slice(1)] = value
    return bad


def transposed(x: Tensor) -> Tensor:
    """The same numbers, column by column in memory."""
    return x.t().contiguous().t()


def sliced(x: Tensor) -> Tensor:
    """The same numbers, every second row and column of a larger tensor of other ones."""
    larger = torch.full((2 * x.shape[0], 2 * x.shape[1]), 7.0, dtype=x.dtype)
    larger[::2, ::2] = x
    return larger[::2, ::2]


def shifted(x: Tensor) -> Tensor:
    """The same numbers, off the alignment that an allocation has."""
    larger = torch.full((x.numel() + 1,), 7.0, dtype=x.dtype)
    larger[1:] = x.flatten()
    return larger[1:].view(x.shape)


def repeated(x: Tensor) -> Tensor:
    """The first row for every token, one row in memory (stride 0)."""
    return x[:1].expand(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    one.__name__: one for one in (transposed, sliced, shifted, repeated)
}
