"""A function x_TH -> {stage: array} as a side, in whatever framework it computes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from moetk.equivalence.chance import same_chance
from moetk.equivalence.sides.bank_view import own_leaves
from moetk.equivalence.sides.routed import Given
from moetk.equivalence.sides.untouched import copied, untouched
from moetk.equivalence.trace import EXACT, STAGES, Leaf
from moetk.errors import EquivalenceError


class FunctionSide:
    """`f(x_TH)` or `f(x_TH, given)` returns any of the stages by name, as torch, numpy or JAX
    arrays; the JAX ones are converted without JAX.

    given: a mapping of "indices" and "weights" to take in the place of its own; a function without
    it runs, but is never forced. "grad NAME" are gradients that the function computed itself, of
    (last stage * moetk.equivalence.trace.cotangent(last stage, seed)).sum(); those of torch code
    come from its graph. x_TH requires grad: other frameworks read x_TH.detach(). An nn.Module's
    parameters are compared under their own names.
    """

    facts: Mapping[str, Any] = {}

    def __init__(self, function: Callable[..., Mapping[str, Any]], x: Tensor) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self._example_TH = x.detach().flatten(0, -2)

    def leaves(self) -> Mapping[str, Leaf]:
        return own_leaves(self.function) if isinstance(self.function, nn.Module) else {}

    def run(self, x_TH: Tensor, given: Given) -> dict[str, Tensor]:
        if isinstance(self.function, nn.Module):
            with untouched(self.function):
                return self._run(x_TH, given)
        return self._run(x_TH, given)

    def eager(self) -> Self:
        return self

    def in_double(self) -> Self:
        """Itself, where it computes in float64 what it is given in float64."""
        side = copy.copy(self)
        if isinstance(self.function, nn.Module):
            side.function = copied(self.function).double()
        try:
            with torch.no_grad(), same_chance(self._example_TH):
                stages = side.run(self._example_TH.double(), {})
        except Exception as error:
            raise EquivalenceError(f"{self.name} does not run in float64: {error}") from error
        for name, value in stages.items():
            if value.is_floating_point() and value.dtype != torch.float64:
                raise EquivalenceError(
                    f"{self.name} has no float64 copy: it returns {name} in {value.dtype} for a "
                    "float64 input."
                )
        return side

    def _run(self, x_TH: Tensor, given: Given) -> dict[str, Tensor]:
        if not given:
            returned = (
                self.function(x_TH, {}) if takes_given(self.function) else self.function(x_TH)
            )
        elif takes_given(self.function):
            returned = self.function(x_TH, given)
        else:
            raise EquivalenceError(
                f"{self.name} cannot take given {', '.join(given)}: it has no second parameter "
                "named `given`."
            )
        if not isinstance(returned, Mapping):
            raise EquivalenceError(
                f"{self.name} returned {type(returned).__name__}; a function that is compared "
                "returns a dict of stages."
            )
        unknown = [name for name in returned if name not in STAGES and name[:5] != "grad "]
        if unknown:
            raise EquivalenceError(
                f"{self.name} returned {', '.join(map(repr, unknown))}; stages are "
                f'{", ".join(STAGES)}, and gradients "grad NAME".'
            )
        return {name: _stage(name, value, x_TH.device) for name, value in returned.items()}


def takes_given(function: Callable[..., Any]) -> bool:
    return _second(function) == "given"


def returns_stages(function: Callable[..., Any]) -> bool:
    """Called with x_TH alone, or with (x_TH, given); a router's second parameter is its context."""
    return _second(function) in (None, "given")


def _second(function: Callable[..., Any]) -> str | None:
    """The second parameter that a call must, or could by position, name."""
    signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in signature.parameters.values() if p.kind in positional]
    return names[1] if len(names) > 1 else None


def _stage(name: str, value: Any, device: torch.device) -> Tensor:
    tensor = (value if isinstance(value, Tensor) else _converted(value)).to(device)
    if name == "dispatched":
        return tensor.bool()
    whole = name in EXACT and bool((tensor == tensor.round()).all())
    return tensor.long() if whole else tensor


def _converted(array: Any) -> Tensor:
    """A copy of a numpy or JAX array: what the framework does to its own later does not show."""
    try:
        return from_dlpack(array).clone()
    except (AttributeError, BufferError, RuntimeError, TypeError):
        return torch.from_numpy(np.array(array))
