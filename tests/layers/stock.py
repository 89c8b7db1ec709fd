"""Pairs of models to compare, a stock one and a replaced copy of it, and what stock cannot do."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
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


# What stock transformers cannot do, row by row, proven in test_stock_limits.py.


def _asks_for_router_logits(model: Any) -> None:
    out = model(input_ids=ids(), labels=ids(), output_router_logits=True)
    out.aux_loss.backward()


def _generates_with_router_logits(model: Any) -> None:
    model.config.output_router_logits = True
    prompt = ids(2, 4)
    mask = torch.ones_like(prompt)
    model.generate(prompt, attention_mask=mask, max_new_tokens=2, eos_token_id=None, pad_token_id=0)


def _embeds(model: Any) -> None:
    model(inputs_embeds=model.get_input_embeddings()(ids()))


def _pads_left_in_float64(model: Any) -> None:
    mask = torch.ones_like(ids())
    mask[0, :4] = 0
    logits = model(input_ids=ids(), attention_mask=mask).logits
    if not bool(logits.isfinite().all()):
        raise FloatingPointError("logits hold NaN")


def _compiles(model: Any) -> None:
    model.set_experts_implementation("grouped_mm")
    model = model.float()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=ids(), labels=ids())


def _compiles_with_router_logits(model: Any) -> None:
    model.set_experts_implementation("grouped_mm")
    model = model.float()
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    run(input_ids=ids(), labels=ids(), output_router_logits=True)


def always() -> bool:
    return True


def without_expert_dispatch() -> bool:
    """transformers 5.17: the module of 5.23's expert parallelism is not there yet."""
    return importlib.util.find_spec("transformers.distributed.expert_parallel") is None


@dataclass(frozen=True)
class Limit:
    """Stock models of these families fail in `attempt`, where `where` holds, saying `says`."""

    attempt: Callable[[Any], None]
    families: tuple[str, ...]
    says: str
    where: Callable[[], bool] = always
