"""Where a transformers model keeps its mixture-of-experts blocks, with wrappers looked through."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moetk.errors import ReplaceError, UnsupportedModelError
from moetk.layers.families import FAMILIES, Family, family_of
from moetk.layers.swap import own_class


@dataclass(frozen=True, eq=False)
class BlockSpec:
    """What a router factory is told about the layer it builds for.

    name: the block's name in the model. layer: index of its decoder layer. moe_index: its place
    among the num_moe_layers mixture-of-experts layers. gate: transformers' router; a factory may
    start from its weights. config: the model's. module: the block.
    """

    name: str
    layer: int
    moe_index: int
    num_moe_layers: int
    hidden_size: int
    num_experts: int
    top_k: int
    intermediate_size: int
    gate: nn.Module
    config: Any
    module: nn.Module


@dataclass(frozen=True, eq=False)
class Found:
    """One block of the model, with wrappers looked through."""

    name: str
    block: nn.Module
    layer_name: str
    layer: nn.Module
    family: Family
    gate: nn.Module
    experts: nn.Module


def root_of(model: nn.Module) -> Any:
    """The transformers model below wrappers."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UnsupportedModelError(
        f"{type(model).__name__} is not, and does not hold, a transformers model. Compose a "
        "moetk.MoELayer from parts instead."
    )


def unwrapped(module: nn.Module) -> nn.Module:
    """Below PEFT's wrappers, which keep the module they wrap as `base_layer`."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer  # type: ignore[assignment]
    return module


def runs_on(module: nn.Module) -> Any:
    """Where a module computes; between calls, one that accelerate has offloaded is on meta."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hook = vars(module)["_hf_hook"]
    hooks = getattr(hook, "hooks", (hook,))
    return torch.device(next(h.execution_device for h in hooks if hasattr(h, "execution_device")))


def find_blocks(root: nn.Module) -> Iterator[Found]:
    """Every block that has a row; raises UnsupportedModelError at one that should have."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules = dict(root.named_modules())
    for name, block in modules.items():
        family = family_of(block)
        if family is None:
            _refuse_unknown(name, block)
            continue
        gate = unwrapped(getattr(block, family.router))
        experts = unwrapped(getattr(block, family.experts))
        if own_class(gate).__name__ not in family.gates:
            raise UnsupportedModelError(
                f"{name}: {type(gate).__name__} is not a router moetk knows for "
                f"{family.model_type} ({', '.join(family.gates)})."
            )
        if _unloaded(gate) or _unloaded(experts):
            raise ReplaceError(
                f"{name} is on the meta device: replace after the weights are loaded."
            )
        layer_name = name
        while not isinstance(modules[layer_name], GradientCheckpointingLayer):
            if "." not in layer_name:
                raise UnsupportedModelError(f"{name} does not lie in a decoder layer.")
            layer_name = layer_name.rsplit(".", 1)[0]
        yield Found(name, block, layer_name, modules[layer_name], family, gate, experts)


def _unloaded(module: nn.Module) -> bool:
    """On the meta device, and no hook of accelerate's brings the weights in before a forward."""
    return "_hf_hook" not in vars(module) and any(p.is_meta for p in module.parameters())


def _refuse_unknown(name: str, block: nn.Module) -> None:
    cls = own_class(block)
    if not cls.__module__.startswith("transformers.models."):
        return
    experts = block._modules.get("experts")
    if experts is None or not (hasattr(block, "gate") or hasattr(block, "router")):
        return
    known = ", ".join(sorted({family.model_type for family in FAMILIES}))
    raise UnsupportedModelError(
        f"{name}: {cls.__name__} is a mixture-of-experts block without a row in "
        f'moetk.layers.families ({known}). Load the model with backend="stock" to use it as it '
        "is; it was left untouched."
    )


def expects_experts(root: Any) -> bool:
    """The config speaks of several experts, wherever its blocks may be."""
    config = root.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(isinstance(n := getattr(config, name, None), int) and n > 1 for name in names)


def specs_of(found: Sequence[Found], root: Any) -> Iterator[BlockSpec]:
    """What each block's router factory is told."""
    for index, item in enumerate(found):
        spec = item.family.spec(item.experts)
        yield BlockSpec(
            name=item.name,
            layer=layer_index(item.layer_name, index),
            moe_index=index,
            num_moe_layers=len(found),
            hidden_size=spec.hidden_size,
            num_experts=spec.num_experts,
            top_k=int(item.gate.top_k),  # type: ignore[arg-type]
            intermediate_size=spec.intermediate_size,
            gate=item.gate,
            config=root.config,
            module=item.block,
        )


def layer_index(layer_name: str, default: int) -> int:
    """The number of a decoder layer, read off its name."""
    numbers = re.findall(r"\.(\d+)(?=\.|$)", layer_name)
    return int(numbers[-1]) if numbers else default
