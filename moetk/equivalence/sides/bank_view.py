"""An experts module as two stacks of matrices, in the layout that it declares.

Letters: E experts, H hidden, J up width, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetk.equivalence.sides.rows import Order
from moetk.equivalence.trace import Leaf
from moetk.experts import Activation, BankSpec, ExpertBank
from moetk.layers.families import Family
from moetk.layers.shells import SITE, Site


@dataclass(frozen=True, eq=False)
class BankView:
    """The module's own tensors, and how they lie.

    transposed: (E, H, J) and (E, I, H) instead of (E, J, H) and (E, H, I). interleaved: gate and up
    columns alternate. scaled: the routing weight multiplies the experts' input. activation: None
    where nobody says. loop_order: how a loop over experts gathers an expert's rows, by token or
    slot by slot.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    transposed: bool
    interleaved: bool
    scaled: bool = False
    activation: Activation | None = None
    loop_order: Order | None = None

    @property
    def up_width(self) -> int:
        return self.up.shape[2 if self.transposed else 1]

    @property
    def width(self) -> int:
        return self.down.shape[1 if self.transposed else 2]

    @property
    def hidden_size(self) -> int:
        return self.down.shape[2 if self.transposed else 1]

    def together(self, x: Tensor, dim: int = -1) -> Tensor:
        """All gate columns before all up columns."""
        if not self.interleaved:
            return x
        even = torch.arange(0, x.shape[dim], 2, device=x.device)
        return torch.cat([x.index_select(dim, even), x.index_select(dim, even + 1)], dim)

    def leaves(self) -> dict[str, Leaf]:
        leaves = {"up_weight": Leaf(self.up, self._common_up)}
        leaves["down_weight"] = Leaf(self.down, self._common_down)
        if self.up_bias is not None:
            leaves["up_bias"] = Leaf(self.up_bias, self.together)
        if self.down_bias is not None:
            leaves["down_bias"] = Leaf(self.down_bias)
        return leaves

    def _common_up(self, weight: Tensor) -> Tensor:
        return self.together(weight.transpose(1, 2) if self.transposed else weight, 1)

    def _common_down(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2) if self.transposed else weight


def bank_view(experts: nn.Module, family: Family | None = None) -> BankView | None:
    """The view of a moetk bank, of a family's experts or of any experts module that transformers
    decorates; None where the matrices are not two stacks under the usual names."""
    gated = _tensor(experts, "gate_up_proj") is not None
    name = "gate_up_proj" if gated else "up_proj"
    up, down = _tensor(experts, name), _tensor(experts, "down_proj")
    if up is None or down is None or up.ndim != 3 or down.ndim != 3:
        return None
    spec, order = _spec(experts, family), _loop_order(experts)
    biases = (_tensor(experts, f"{name}_bias"), _tensor(experts, "down_proj_bias"))
    if spec is not None:
        alternates, scaled = spec.gated and spec.interleaved, spec.scale == "input"
        return BankView(
            up, down, *biases, spec.transposed, alternates, scaled, spec.activation, order
        )
    alternates = gated and not getattr(experts, "is_concatenated", True)
    transposed = bool(getattr(experts, "is_transposed", False))
    return BankView(up, down, *biases, transposed, alternates, loop_order=order)


def _spec(experts: nn.Module, family: Family | None) -> BankSpec | None:
    site = vars(experts).get(SITE)
    if isinstance(site, Site):
        return site.spec
    if isinstance(experts, ExpertBank):
        return experts.spec
    return family.spec(experts) if family is not None and _of_transformers(experts) else None


def _loop_order(experts: nn.Module) -> Order | None:
    site = vars(experts).get(SITE)
    stock = not isinstance(site, Site) or site.backend == "stock"
    if isinstance(experts, ExpertBank) or not stock:
        return "token"
    return "slot" if _of_transformers(experts) else None


def _of_transformers(module: nn.Module) -> bool:
    """Its class, or one that it is derived from, is transformers'."""
    return any(c.__module__.startswith("transformers.models.") for c in type(module).__mro__)


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    value: Any = getattr(module, name, None)
    return value if isinstance(value, Tensor) else None


def own_leaves(
    module: nn.Module, skip: tuple[nn.Module | None, ...] = (), rename: Callable[[str], str] = str
) -> dict[str, Leaf]:
    """The module's parameters under their own names, but for those of the modules in `skip`."""
    left_out = {id(p) for one in skip if one is not None for p in one.parameters()}
    return {
        rename(name): Leaf(parameter)
        for name, parameter in module.named_parameters()
        if id(parameter) not in left_out
    }


def experts_leaves(experts: nn.Module, view: BankView | None) -> dict[str, Leaf]:
    """The two stacks and their biases by common names, and what else the experts hold."""
    leaves = {} if view is None else view.leaves()
    named = {id(leaf.tensor) for leaf in leaves.values()}
    others = own_leaves(experts, rename="experts.{}".format)
    return leaves | {n: leaf for n, leaf in others.items() if id(leaf.tensor) not in named}
