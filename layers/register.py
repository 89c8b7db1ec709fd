"""moetk's bank as an experts implementation of transformers: the stock router, our experts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moetk.errors import UnsupportedModelError
from moetk.experts import BankSpec, bank_forward
from moetk.layers.families import FAMILIES, bank_weights
from moetk.layers.swap import own_class
from moetk.routing import TokenChoice

NAME = "moetk"


def register() -> None:
    """After this, `experts_implementation="moetk"` works in from_pretrained and from_config.

    Only the bank is moetk's; router, losses and records stay the library's. Nothing registers on
    import; calling it twice changes nothing.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The function transformers calls with its experts module as `self`.

    Under its expert parallelism ids >= num_experts belong to other ranks and carry weight 0: the
    sort plan leaves them uncomputed.
    """
    spec = _spec_of(self)
    routing = TokenChoice(top_k_index, top_k_weights, spec.num_experts)
    return bank_forward(
        spec, bank_weights(self), hidden_states, routing, "auto", where=type(self).__name__
    )


def _spec_of(experts: Any) -> BankSpec:
    spec = vars(experts).get("_moetk_spec")
    if spec is None:
        name = own_class(experts).__name__
        prefix = name.removesuffix("Experts")
        family = next((row for row in FAMILIES if prefix and row.block.startswith(prefix)), None)
        if family is None:
            known = ", ".join(row.model_type for row in FAMILIES)
            raise UnsupportedModelError(
                f'experts_implementation="moetk": no row for {name}; moetk knows {known}. '
                'Use experts_implementation="grouped_mm".'
            )
        spec = family.spec(experts)
        vars(experts)["_moetk_spec"] = spec
    return spec  # type: ignore[no-any-return]
