"""What a block consists of, and where that lies: what a recorded graph holds for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moetk.dispatch import Local
from moetk.kernels.direct import PLAIN
from moetk.kernels.fused_mlp import addable
from moetk.layers.families import bank_weights
from moetk.layers.shells import CUSTOM, Site


class Parts(NamedTuple):
    block: nn.Module
    gate: nn.Module
    experts: nn.Module


class Watch:
    """What a block consists of, for the questions of every call.

    reason: why it is never replayed as long as it consists of that. names: of its parameters, each
    once. added: those whose gradients its backward adds to itself.
    """

    def __init__(self, parts: Parts, site: Site) -> None:
        self.modules = list(parts.block.modules())
        inside = self.modules[1:]
        self._kinds = [type(module) for module in self.modules]
        facts = [*_facts(vars(site), _OF_A_SITE), *_of_modules(self.modules)]
        facts += [fact for kind in dict.fromkeys(self._kinds) for fact in _of_a_class(kind)]
        self._facts = [(held.get, name) for held, name, _ in facts]
        self._were = [value for _, _, value in facts]
        self._dicts = [held for module in self.modules for held in _dicts(module)]
        self._lengths = [len(held) for held in self._dicts]
        self._hooks = [*_GLOBAL_HOOKS, *(held for module in inside for held in _hooks(module))]
        self.names = [name for name, _ in parts.block.named_parameters()]
        self._parameters = [_slot(parts.block, name) for name in self.names]
        everywhere = (
            one for module in self.modules for one in (module._parameters, module._buffers)
        )
        # A parameter that is shared comes at each of its places: one of them may change alone.
        self._slots = [(one, n) for one in everywhere for n, t in one.items() if t is not None]
        self._buffers = [(m._buffers, name) for m in self.modules for name in m._buffers]
        self._adds = site.add_to_grad
        weights = bank_weights(parts.experts)
        matrices = {id(matrix) for matrix in (weights.up, weights.down)}
        self._experts = [n for n, p in enumerate(self.parameters()) if id(p) in matrices]
        self.added = [self.names[n] for n in self._experts] if self._adds else []
        self.reason = _reason(parts, site, self.modules)
        if self.reason is None and len(self._experts) != len(matrices):
            self.reason = "the experts' weights are no parameters"

    def changed(self) -> bool:
        """Whether the block is another now: modules, classes, forwards, plain attributes."""
        now = [get(name) for get, name in self._facts]
        return (
            not all(map(is_, now, self._were))
            or any(held.get(name) is None for held, name in self._slots)
            or list(map(type, self.modules)) != self._kinds
            or [len(held) for held in self._dicts] != self._lengths
        )

    def hooked(self) -> bool:
        """Whether a hook within the block would act on this call."""
        hooked = [held for held in self._hooks if held]
        return any(_acts(hook) for held in hooked for hook in held.values())

    def parameters(self) -> list[Any]:
        """Those of `names`, None where one is gone."""
        return [held.get(name) for held, name in self._parameters]

    def buffers(self) -> list[Tensor]:
        return [buffer for held, name in self._buffers if (buffer := held.get(name)) is not None]

    def state(self, with_grad: bool) -> object | None:
        """Where everything lies that a graph has been recorded with; None where none can be: with
        gradients, the experts' have to be there, and to be added to, or not be wanted."""
        tensors = [t for held, name in self._slots if (t := held.get(name)) is not None]
        lie = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]
        if not with_grad:
            return lie
        parameters, into = self.parameters(), []
        for n in self._experts:
            matrix = parameters[n]
            if matrix is None:
                return None
            if matrix.requires_grad:
                grad = addable(matrix) if self._adds and _silent(matrix) else None
                if grad is None:
                    return None
                into.append(grad.data_ptr())
        return lie, into, [p is not None and p.requires_grad for p in parameters]


def _silent(matrix: Tensor) -> bool:
    """Nobody waits for its gradient; who does gets moetk's refusal, by Python."""
    return matrix.is_leaf and not (matrix._backward_hooks or matrix._post_accumulate_grad_hooks)


Fact = tuple[Mapping[str, Any], str, Any]
_OF_A_SITE = ("dispatcher", "check", "function", "backend", "attachment", "add_to_grad")
_STATE = ("_parameters", "_buffers", "_modules")
# Whether or not they are there yet.
_OF_A_MODULE = ("forward", "_hf_hook", *_STATE)


def _facts(held: Mapping[str, Any], names: Iterable[str]) -> list[Fact]:
    return [(held, name, held.get(name)) for name in names]


def _of_a_class(kind: type) -> list[Fact]:
    """Its forward, and those below: a shell of ours lies on top, the stock class is what others
    patch."""
    return [fact for cls in kind.__mro__ for fact in _facts(vars(cls), ("forward",))]


def _of_modules(modules: Sequence[nn.Module]) -> list[Fact]:
    """Their children, the parameters and buffers that are None, and their plain attributes."""
    facts: list[Fact] = []
    for module in modules:
        held = vars(module)
        plain = [name for name in held if not name.startswith("_") and name != "training"]
        # Tensors are not kept: a block that holds one is never replayed.
        plain = [name for name in plain if not isinstance(held[name], Tensor)]
        facts += _facts(held, dict.fromkeys((*_OF_A_MODULE, *plain)))
        for tensors in (module._parameters, module._buffers):
            facts += _facts(tensors, [name for name, tensor in tensors.items() if tensor is None])
        facts += _facts(module._modules, list(module._modules))
    return facts


def _slot(block: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    path, _, last = name.rpartition(".")
    return block.get_submodule(path)._parameters, last


def _dicts(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return vars(module), module._parameters, module._buffers, module._modules


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


_CAPTURING = "transformers.utils.output_capturing"


def _acts(hook: Any) -> bool:
    """transformers hooks each gate at the first output_hidden_states=True, and never unhooks it:
    that hook acts while somebody collects."""
    if getattr(hook, "__module__", None) != _CAPTURING:
        return True
    collector = getattr(sys.modules[_CAPTURING], "_active_collector", None)
    return collector is None or bool(collector.get())


_IN_TRAINING = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
_KNOWN = ("moetk.", "transformers.", "torch.")


def is_custom(parts: Parts, site: Site) -> bool:
    """Whether its router is the user's."""
    return site.function is not None or CUSTOM in parts.gate._modules


def _reason(parts: Parts, site: Site, modules: Sequence[nn.Module]) -> str | None:
    if is_custom(parts, site):
        return f"{site.label} runs as Python"
    if site.carrier.keeps_previous:
        return "a router reads the routing of the layer before"
    if site.check:
        return "check=True looks at values in every call"
    if site.backend in ("stock", "te"):
        return f'backend="{site.backend}" is left to Python'
    if type(site.dispatcher) is not Local or site.dispatcher.capacity is not None:
        return f"{type(site.dispatcher).__name__} moves or drops rows as Python"
    for module in modules:
        reason = _reason_of(module)
        if reason is not None:
            return f"{type(module).__name__} {reason}"
    return None


def _homes(forward: Any) -> Iterator[str]:
    """Where it was written, and what it wraps: a wrapper says that it was written elsewhere."""
    while forward is not None:
        yield getattr(forward, "__globals__", {}).get("__name__") or type(forward).__module__
        yield getattr(forward, "__module__", None) or type(forward).__module__
        forward = getattr(forward, "__wrapped__", None)


def _reason_of(module: nn.Module) -> str | None:
    for cls in type(module).__mro__[:-1]:
        for home in (cls.__module__, *_homes(vars(cls).get("forward"))):
            if not f"{home}.".startswith(_KNOWN):
                return f"runs Python of {home}"
    if isinstance(module, _IN_TRAINING):
        return "does something else in training"
    if vars(module).get("_compiled_call_impl") is not None:
        return "is compiled"
    if "parametrizations" in module._modules:
        return "is parametrized"
    if "forward" in vars(module) or "_hf_hook" in vars(module):
        return "has a forward of its own"
    if any(isinstance(value, Tensor) for value in vars(module).values()):
        return "holds a tensor as a plain attribute"
    for name, tensor in module._parameters.items():
        if tensor is not None and type(tensor) not in PLAIN:
            return f"holds {name}, a {type(tensor).__name__}"
    if any(buffer is not None and buffer.requires_grad for buffer in module._buffers.values()):
        return "holds a buffer that requires a gradient"
    return None
