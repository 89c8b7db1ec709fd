"""What a router is told beside its input: sequences, positions, padding, token ids, a seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VOCABULARY = 8
"""Drawn token ids are below this: a table of a handful of rows is enough."""

Mask = Callable[[torch.Generator, int, int], Tensor]


def right_padding(g: torch.Generator, batch: int, length: int) -> Tensor:
    """Real tokens first, at least one a sequence."""
    real_B1 = torch.randint(1, max(length, 1) + 1, (batch, 1), generator=g)
    return torch.arange(length) < real_B1


def left_padding(g: torch.Generator, batch: int, length: int) -> Tensor:
    """Real tokens last."""
    return right_padding(g, batch, length).flip(1)


def scattered_padding(g: torch.Generator, batch: int, length: int) -> Tensor:
    """Padding anywhere, about every third token."""
    return torch.rand(batch, length, generator=g) > 0.3


def one_empty_sequence(g: torch.Generator, batch: int, length: int) -> Tensor:
    """The first sequence is padding alone, the others are whole."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[:1] = False
    return mask


def only_padding(g: torch.Generator, batch: int, length: int) -> Tensor:
    """No real token at all."""
    return torch.zeros(batch, length, dtype=torch.bool)


MASKS: dict[str, Mask] = {
    one.__name__: one
    for one in (
        right_padding,
        left_padding,
        scattered_padding,
        one_empty_sequence,
        only_padding,
    )
}


def mask_of_kind(kind: str, seed: int, batch: int, length: int) -> Tensor:
    """token_mask (T,) bool, True = a real token."""
    return MASKS[kind](torch.Generator().manual_seed(seed), batch, length).flatten()


def token_ids(seed: int, num_tokens: int) -> Tensor:
    """(T,) int64 below VOCABULARY, so that ids repeat."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (num_tokens,), generator=generator)


def positions(batch: int, length: int) -> Tensor:
    """(T,) int64, from 0 in each sequence."""
    return torch.arange(length).repeat(batch)


def packed(seed: int, num_tokens: int, num_sequences: int) -> tuple[Tensor, Tensor]:
    """sequence_ids (T,) and positions (T,), int64: at most num_sequences runs of drawn lengths."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(num_tokens + 1, (num_sequences - 1,), generator=generator)
    token_T = torch.arange(num_tokens)
    sequence_T = (token_T[:, None] >= cuts).sum(1)
    first_T = torch.searchsorted(sequence_T, sequence_T)
    return sequence_T, token_T - first_T
