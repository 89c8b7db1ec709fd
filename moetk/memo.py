"""Answers that are worked out once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Answer = TypeVar("Answer")


def remembered(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """`functools.cache`, which torch.compile does not get to see: it would warn of every one."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def call(*args: object) -> Answer:
        return function(*args) if torch.compiler.is_compiling() else cached(*args)

    return call
