"""Pairs of models to compare, a stock one and a replaced copy of it, and what stock cannot do."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from moetk import replace_moe
from moetk.equivalence.judge import relative_error
from tests.tiny import ids, tiny

PARITY = 1e-10


@functools.cache
def _template(family: str, changes: tuple[tuple[str, Any], ...]) -> Any:
    return tiny(family, **dict(changes))


def stock(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A tiny stock model with eager experts, the one implementation that takes float64."""
    model = copy.deepcopy(_template(family, tuple(sorted(changes.items())))).to(dtype)
    model.set_experts_implementation("eager")
    return model


def replaced(model: Any, *args: Any, **settings: Any) -> Any:
    """A replaced copy of a stock model."""
    model = copy.deepcopy(model)
    replace_moe(model, *args, **settings)
    return model


def checkpointed(model: Any, *, reentrant: bool) -> Any:
    """The model in training mode, with every decoder layer run again in backward."""
    model.train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def step(model: Any, token_ids: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """Loss, logits and every gradient of one forward and backward, by name."""
    token_ids = ids() if token_ids is None else token_ids
    model.zero_grad()
    out = model(input_ids=token_ids, labels=token_ids, **kwargs)
    out.loss.backward()
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **gradients(model)}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float = PARITY) -> None:
    """The same names, and each tensor within `bound` of the other, relative (Frobenius)."""
    assert ours.keys() == theirs.keys()
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= bound, f"{worst}: {errors[worst]:.3g}"


def assert_bitwise(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
