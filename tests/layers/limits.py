"""What stock transformers itself cannot do, as data. test_stock_limits.py proves every row."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.layers.stock import checkpointed
from tests.tiny import FAMILIES, ids

Attempt = Callable[[Any], None]


def balancing_loss(model: Any) -> None:
    out = model(input_ids=ids(), labels=ids(), output_router_logits=True)
    out.aux_loss.backward()


def balancing_loss_reentrant(model: Any) -> None:
    balancing_loss(checkpointed(model, reentrant=True))


def balancing_loss_in_generate(model: Any) -> None:
    model.config.output_router_logits = True
    prompt = ids(2, 4)
    mask = torch.ones_like(prompt)
    mask[0, 0] = 0
    model.generate(prompt, attention_mask=mask, max_new_tokens=2, eos_token_id=None, pad_token_id=0)


def pickle_after_balancing_loss(model: Any) -> None:
    balancing_loss(model)
    pickle.dumps(model)


def inputs_embeds(model: Any) -> None:
    model(inputs_embeds=model.get_input_embeddings()(ids()))


def left_padding_in_float64(model: Any) -> None:
    """The mask's lowest float64 is minus infinity in the float32 of eager attention's softmax."""
    mask = torch.ones_like(ids())
    mask[0, :4] = 0
    logits = model.double()(input_ids=ids(), attention_mask=mask).logits
    if not bool(logits.isfinite().all()):
        raise FloatingPointError("the logits hold NaN")


def compiled(model: Any, **kwargs: Any) -> None:
    """One graph, forward and backward, on the experts that stock recommends for it."""
    model = model.float()
    model.set_experts_implementation("grouped_mm")
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    run(input_ids=ids(), labels=ids(), use_cache=False, **kwargs).loss.backward()


def compiled_balancing_loss(model: Any) -> None:
    compiled(model, output_router_logits=True)


def always() -> bool:
    return True


def expert_parallelism_is_a_module() -> bool:
    """True from the transformers on that brought it (5.23; not yet in 5.17)."""
    return importlib.util.find_spec("transformers.distributed.expert_parallel") is not None


def older() -> bool:
    return not expert_parallelism_is_a_module()


@dataclass(frozen=True)
class Limit:
    """Stock models of these families fail in `attempt` where `where` holds, saying `says`."""

    attempt: Attempt
    families: tuple[str, ...]
    says: str
    where: Callable[[], bool] = always


def all_but(*families: str) -> tuple[str, ...]:
    return tuple(family for family in FAMILIES if family not in families)


NO_LOSS = "aux_loss|'NoneType' object has no attribute"
WRONG_TUPLE = "'int' object has no attribute 'to'"
NO_GRADIENT = "does not require grad"
LONGER_MASK = "must match the size of tensor"
NEWER = expert_parallelism_is_a_module

LIMITS = (
    # No balancing loss, so nothing that is done with it either.
    *(
        row
        for attempt in (balancing_loss, balancing_loss_reentrant, pickle_after_balancing_loss)
        for row in (
            Limit(attempt, ("deepseek_v3",), NO_LOSS),
            Limit(attempt, ("granitemoe",), WRONG_TUPLE, older),
        )
    ),
    Limit(balancing_loss_reentrant, all_but("deepseek_v3", "granitemoe"), NO_GRADIENT),
    Limit(balancing_loss_reentrant, ("granitemoe",), NO_GRADIENT, NEWER),
    Limit(balancing_loss_in_generate, all_but("deepseek_v3", "granitemoe"), LONGER_MASK),
    Limit(balancing_loss_in_generate, ("granitemoe",), LONGER_MASK, NEWER),
    Limit(pickle_after_balancing_loss, all_but("deepseek_v3", "granitemoe"), "pickle"),
    Limit(pickle_after_balancing_loss, ("granitemoe",), "pickle", NEWER),
    Limit(inputs_embeds, ("deepseek_v4",), "'NoneType' object has no attribute 'reshape'"),
    Limit(left_padding_in_float64, all_but("gpt_oss", "deepseek_v4"), "NaN"),
    Limit(compiled, FAMILIES, "data-dependent", older),
    Limit(compiled, ("qwen3_next",), "view size is not compatible", NEWER),
    Limit(compiled_balancing_loss, all_but("deepseek_v3", "granitemoe"), "context manager"),
)


def able(attempt: Attempt) -> list[str]:
    """The families whose stock models manage `attempt` with the transformers at hand."""
    barred = {f for row in LIMITS if row.attempt is attempt and row.where() for f in row.families}
    return [family for family in FAMILIES if family not in barred]
