"""A mixture-of-experts block of a Transformers v5 model as a side: its call, and its two parts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.equivalence.sides.bank_view import experts_leaves, own_leaves
from moetk.equivalence.sides.base import ModuleSide
from moetk.equivalence.trace import Leaf
from moetk.errors import EquivalenceError
from moetk.layers.families import family_of
from moetk.layers.find import unwrapped
from moetk.layers.shells import CUSTOM
from moetk.layers.swap import own_class

GATES = ("gate", "router")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def is_block(module: object) -> bool:
    """A module with experts, and a gate or router beside them."""
    if not isinstance(module, nn.Module):
        return False
    children = module._modules
    return "experts" in children and any(name in children for name in GATES)


def gate_of(block: nn.Module) -> nn.Module:
    family = family_of(block)
    names = GATES if family is None else (family.router,)
    return unwrapped(next(block._modules[name] for name in names if name in block._modules))  # type: ignore[arg-type]


def experts_of(block: nn.Module) -> nn.Module:
    return unwrapped(block._modules["experts"])  # type: ignore[arg-type]


def call_block(block: nn.Module, x_TH: Tensor, ctx: RouterContext, name: str) -> Tensor:
    """The block's own forward: (T, H) -> (T, H). It reads (B, S, H), and ids where it asks.

    Raises EquivalenceError where it needs token ids that ctx does not hold, or anything else.
    """
    shape = ctx.batch_shape or (1, len(x_TH))
    inputs: dict[str, Tensor] = {}
    for parameter in _parameters(block)[1:]:
        if parameter.name == "input_ids" and ctx.token_ids is not None:
            inputs["input_ids"] = ctx.token_ids.reshape(shape)
        elif (
            parameter.default is parameter.empty
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ):
            raise EquivalenceError(
                f"{name}.forward needs {parameter.name}, which compare does not know. Compare the "
                "gate and the experts on their own."
            )
    if "input_ids" not in inputs and _chooses_by_id(block):
        raise EquivalenceError(
            f"{name} chooses experts by token id: pass ctx=RouterContext(token_ids=...), (T,) "
            "int64."
        )
    output: Any = block(x_TH.reshape(*shape, x_TH.shape[-1]), **inputs)
    output = output[0] if isinstance(output, tuple) else output
    return output.reshape(x_TH.shape)  # type: ignore[no-any-return]


def _chooses_by_id(block: nn.Module) -> bool:
    gate = gate_of(block)
    asks = any(parameter.name == "input_ids" for parameter in _parameters(gate))
    return asks and CUSTOM not in gate._modules


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    """What a module's forward takes besides itself, as its author wrote it."""
    author: Any = own_class(module)
    return list(inspect.signature(author.forward).parameters.values())[1:]


def block_leaves(block: nn.Module, bank: Any) -> dict[str, Leaf]:
    """Gate, experts and the rest. Behind a custom router the stock gate does nothing."""
    gate, experts = gate_of(block), experts_of(block)
    router = gate._modules.get(CUSTOM) or gate
    return {
        **experts_leaves(experts, bank),
        **own_leaves(router, rename="router.{}".format),
        **own_leaves(block, skip=(gate, experts)),
    }


class BlockSide(ModuleSide):
    """A block, stock or replaced by moetk."""

    @property
    def _gate(self) -> nn.Module:
        return gate_of(self.module)

    @property
    def _experts(self) -> nn.Module:
        return experts_of(self.module)


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Hooks that are removed at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
