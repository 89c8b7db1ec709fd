"""Fully sharded data parallelism (FSDP2) in the units a mixture-of-experts model wants."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from moetk.errors import TopologyError, UnsupportedModelError

M = TypeVar("M", bound=nn.Module)


def shard(
    model: M,
    mesh: DeviceMesh | None = None,
    *,
    mp_policy: MixedPrecisionPolicy | None = None,
    **options: Any,
) -> M:
    """Shard every expert bank, every decoder layer, then the rest; in place, returns the model.

    A layer's experts are a unit of their own: most of its bytes, which are then gathered while its
    attention computes. The gradient is the mean over the mesh's ranks.

    mesh: None = all ranks. mp_policy: as fully_shard's, except that expert banks never cast their
    inputs: routing weights, which many families compute in fp32, keep their dtype. options:
    reshard_after_forward and the others of `torch.distributed.fsdp.fully_shard`. Buffers, such as a
    router's fp32 bias, are neither sharded nor cast.

    Replace routers first: sharding afterwards sees their parameters too.

    Raises TopologyError without a process group, or when the model is sharded already;
    UnsupportedModelError when there is neither a decoder layer nor an expert bank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise TopologyError(
            "shard: there is no process group. Start with torchrun, and call "
            "torch.distributed.init_process_group first."
        )
    sharded = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    if sharded:
        raise TopologyError(
            f"shard: {sharded[0] or type(model).__name__} is sharded already; shard a model once."
        )
    banks, layers = expert_banks(model), decoder_layers(model)
    if not (banks or layers):
        raise UnsupportedModelError(
            f"shard: {type(model).__name__} has no decoder layer (GradientCheckpointingLayer, or a "
            "module with a child named experts), so it would be gathered whole. Call "
            "torch.distributed.fsdp.fully_shard on the units of your choice."
        )
    policy = MixedPrecisionPolicy() if mp_policy is None else mp_policy
    for bank in banks:
        as_given = dataclasses.replace(policy, cast_forward_inputs=False)
        fully_shard(bank, mesh=mesh, mp_policy=as_given, **options)
    units: list[nn.Module] = [*layers, model]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, **options)
    return model


def expert_banks(model: nn.Module) -> list[nn.Module]:
    """The modules named `experts` that have parameters and a forward of their own."""
    banks = {
        id(bank): bank
        for module in model.modules()
        if isinstance(bank := getattr(module, "experts", None), nn.Module)
        and not isinstance(bank, nn.ModuleList | nn.ModuleDict)
        and next(bank.parameters(), None) is not None
    }
    return list(banks.values())


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Transformers' checkpointing layers, and outside those the modules that hold an expert bank.

    Inner ones first, as fully_shard wants them; without `model` itself.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {id(part) for layer in layers for part in layer.modules()}
    banks = {id(bank) for bank in expert_banks(model)}
    holders = [m for m in model.modules() if id(getattr(m, "experts", None)) in banks]
    units = {id(m) for m in layers} | {id(m) for m in holders if id(m) not in inside}
    return [m for m in reversed(list(model.modules())) if id(m) in units and m is not model]
