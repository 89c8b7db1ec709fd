"""Answers that are worked out once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Answer = TypeVar("Answer")


def remembered(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """`functools.cache`, which torch.compile does not get to see: it would warn of every one.
    Arguments that have no hash are answered each time."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def call(*args: object) -> Answer:
        if torch.compiler.is_compiling():
            return function(*args)
        try:
            return cached(*args)
        except TypeError:  # no hash; or the function's own, which then raises it again
            return function(*args)

    return call
