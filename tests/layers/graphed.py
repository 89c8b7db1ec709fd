"""Blocks by Python and their twins by graphs, and what is asked of both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moetk import replace_moe
from tests.driver import Graph
from tests.tiny import H, tiny


def block_of(model: Any) -> Any:
    return model.model.layers[-1].mlp


def pair(
    family: str = "qwen3_moe", tokens: int | None = 64, **changes: Any
) -> tuple[Any, Any, Any]:
    """A block by Python and its twin by graphs, both of replaced models, the experts frozen; and
    the Replacement of the latter."""
    plain = tiny(family).eval()
    for layer in plain.model.layers:
        experts = getattr(layer.mlp, "experts", nn.Module())
        experts.requires_grad_(False)
    mine = copy.deepcopy(plain)
    replace_moe(plain, graphs=0, **changes)
    replacement = replace_moe(mine, graphs=tokens, **changes)
    return block_of(plain), block_of(mine), replacement


def drawn(seed: int, tokens: int = 6) -> Tensor:
    """Each in a place of its own."""
    x = torch.randn(1, tokens, H, generator=torch.Generator().manual_seed(seed))
    ALIVE.append(x)
    return x.detach()


ALIVE: list[Tensor] = []


def stepped(block: Any, x: Tensor, dy: Tensor) -> list[Tensor | None]:
    block.zero_grad()
    leaf = x.detach().requires_grad_()
    y = block(leaf)
    y.backward(dy)
    return [y.detach(), leaf.grad, *(parameter.grad for parameter in block.parameters())]


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return len(a) == len(b) and all(
        x is y if x is None or y is None else torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def recorded(mine: Any, tokens: int = 6, grad: bool = True) -> None:
    """The third call is recorded and replayed, the fourth again, as its input lies elsewhere: then
    inputs and gradients may lie anywhere."""
    for seed in range(4):
        if grad:
            stepped(mine, drawn(seed, tokens), drawn(seed + 50, tokens))
        else:
            with torch.no_grad():
                mine(drawn(seed, tokens))
    assert Graph.replays == (4 if grad else 2)


def set_(name: str, value: Any) -> Callable[[Any], None]:
    """block.`name` = value; a callable is called with what is there."""

    def change(block: Any) -> None:
        path, _, last = name.rpartition(".")
        owner = block.get_submodule(path)
        setattr(owner, last, value(getattr(owner, last)) if callable(value) else value)

    return change
