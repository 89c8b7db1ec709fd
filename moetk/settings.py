"""What a setting may be. Raised when a part is built, so that the message names the setting."""

from __future__ import annotations

import math
from numbers import Real
from typing import TypeGuard

import torch

from moetk.errors import RouterConfigError


def is_number(value: object) -> TypeGuard[float]:
    """A finite real number. No bool, no string, no tensor."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_number(
    who: str, name: str, value: object, *, least: float = -math.inf, below: float = math.inf
) -> None:
    """Raise RouterConfigError unless least <= value < below, and it is a finite number."""
    if not (is_number(value) and least <= value < below):
        bounds = [f">= {least}"] * (least > -math.inf) + [f"< {below}"] * (below < math.inf)
        need = " ".join(["a finite number", " and ".join(bounds)]).strip()
        raise RouterConfigError(f"{who}: {name}={value!r}; need {need}.")


def check_whole(who: str, **settings: object) -> None:
    """Raise RouterConfigError unless every setting is a whole number from 1 on."""
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RouterConfigError(f"{who}: {name}={value!r}; need a whole number from 1 on.")


def check_float_dtype(who: str, **settings: object) -> None:
    """Raise RouterConfigError unless every setting is a floating torch.dtype or None."""
    for name, value in settings.items():
        if value is None or (isinstance(value, torch.dtype) and value.is_floating_point):
            continue
        raise RouterConfigError(
            f"{who}: {name}={value!r}; need a floating torch.dtype, such as torch.float32, or None."
        )
