"""What a block consists of, and where that lies: what a recorded graph holds for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moetk.dispatch import Local
from moetk.kernels.direct import PLAIN
from moetk.kernels.fused_mlp import addable
from moetk.layers.families import bank_weights
from moetk.layers.shells import CUSTOM, Site
from moetk.layers.swap import own_class


class Parts(NamedTuple):
    block: nn.Module
    gate: nn.Module
    experts: nn.Module


class Watch:
    """What a block consists of, for the questions of every call. reason: why it is never replayed
    as long as it consists of that."""

    def __init__(self, parts: Parts, site: Site) -> None:
        inside = [module for module in parts.block.modules() if module is not parts.block]
        modules = [parts.block, *inside]
        self._children = [module._modules for module in modules]
        self._were = [tuple(children.values()) for children in self._children]
        # In the order of parameters(), where one that is shared comes once.
        slots = {
            id(tensor): (held, name)
            for kept in ("_parameters", "_buffers")
            for module in modules
            for held in [getattr(module, kept)]
            for name, tensor in held.items()
            if tensor is not None
        }
        self._slots = list(slots.values())
        self.hooks = [*_GLOBAL_HOOKS, *(held for module in inside for held in _hooks(module))]
        self._adds = site.add_to_grad
        self.reason = _reason(parts, site, modules)
        weights = bank_weights(parts.experts)
        self._matrices = [slots[id(one)] for one in (weights.up, weights.down) if id(one) in slots]
        added = {id(one) for one in self.matrices()} if self._adds else set()
        self.added = [name for name, p in parts.block.named_parameters() if id(p) in added]

    def changed(self) -> bool:
        now = [tuple(children.values()) for children in self._children]
        return now != self._were

    def matrices(self) -> list[Tensor]:
        """The experts' up and down."""
        return [matrix for held, name in self._matrices if (matrix := held.get(name)) is not None]

    def tensors(self) -> list[Tensor]:
        return [t for held, name in self._slots if (t := held.get(name)) is not None]

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors() if tensor.requires_grad]

    def addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.tensors()]

    def state(self, with_grad: bool) -> object | None:
        """Where everything lies that a graph has been recorded with; None where none can be: with
        gradients, the experts' have to be there, and to be added to, or not be wanted."""
        tensors = self.tensors()
        lie = [(tensor.data_ptr(), tensor.dtype) for tensor in tensors]
        if not with_grad:
            return lie
        into = []
        for matrix in self.matrices():
            if matrix.requires_grad:
                grad = addable(matrix) if self._adds and _silent(matrix) else None
                if grad is None:
                    return None
                into.append(grad.data_ptr())
        return lie, into, [tensor.requires_grad for tensor in tensors]


def _silent(matrix: Tensor) -> bool:
    """Nobody waits for its gradient; who does gets moetk's refusal, by Python."""
    return matrix.is_leaf and not (matrix._backward_hooks or matrix._post_accumulate_grad_hooks)


_GLOBAL_HOOKS = [
    getattr(torch.nn.modules.module, name)
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
]


def _hooks(module: nn.Module) -> list[Any]:
    return [
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ]


def _reason(parts: Parts, site: Site, modules: Sequence[nn.Module]) -> str | None:
    if site.function is not None or CUSTOM in parts.gate._modules:
        return f"{site.label} runs as Python"
    if site.carrier.keeps_previous:
        return "a router reads the routing of the layer before"
    if site.check:
        return "check=True looks at values in every call"
    if type(site.dispatcher) is not Local or site.dispatcher.capacity is not None:
        return f"{type(site.dispatcher).__name__} moves or drops rows as Python"
    for module in modules:
        cls = own_class(module)
        if not cls.__module__.startswith(("transformers.", "torch.nn.")):
            return f"{cls.__name__} runs as Python"
        if "parametrizations" in module._modules:
            return f"{cls.__name__} is parametrized"
        if "forward" in vars(module) or "_hf_hook" in vars(module):
            return f"{cls.__name__} has a forward of its own"
    for name, tensor in parts.block.named_parameters():
        if type(tensor) not in PLAIN:
            return f"{name} is a {type(tensor).__name__}"
    return None
