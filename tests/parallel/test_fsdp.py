"""Sharding over two gloo ranks: the same loss and gradients as one process on both batches."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from moetk.errors import TopologyError, UnsupportedModelError
from moetk.parallel import shard
from moetk.parallel.fsdp import decoder_layers, expert_banks
from tests.parallel.ranks import run_on_ranks
from tests.tiny import ids, tiny


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3, 3))


class Layer(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


def test_units_of_models_without_checkpointing_layers():
    inner = Layer(Bank())
    outer = Layer(Bank())
    outer.inner = inner
    model = nn.Sequential(outer, Layer(nn.ModuleList([nn.Linear(2, 2)])), nn.Linear(2, 2))
    assert expert_banks(model) == [outer.experts, inner.experts]
    assert decoder_layers(model) == [inner, outer]
    assert decoder_layers(inner) == [] and expert_banks(inner) == [inner.experts]


def test_units_of_a_transformers_model():
    model = tiny("qwen3_moe")
    layers = list(model.model.layers)
    assert decoder_layers(model) == layers[::-1]
    assert expert_banks(model) == [layer.mlp.experts for layer in layers]


def test_without_a_process_group_it_raises():
    with pytest.raises(TopologyError, match=r"there is no process group. Start with torchrun"):
        shard(tiny("qwen3_moe"))


def test_two_ranks():
    run_on_ranks(two_ranks)


def two_ranks(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    equals_one_process(rank, mesh)
    keeps_the_bias_and_the_routing_weights_in_fp32(mesh)
    with pytest.raises(UnsupportedModelError, match=r"Linear has no decoder layer"):
        shard(nn.Linear(2, 2), mesh)


def equals_one_process(rank: int, mesh) -> None:
    tokens = ids(4, 10)
    whole = tiny("qwen3_moe")
    want = whole(input_ids=tokens, labels=tokens).loss
    want.backward()

    model = tiny("qwen3_moe")
    assert shard(model, mesh, reshard_after_forward=True) is model
    for unit in (model, *model.model.layers, *expert_banks(model)):
        assert isinstance(unit, FSDPModule)
    mine = tokens[2 * rank : 2 * rank + 2]
    loss = model(input_ids=mine, labels=mine).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, want.detach())
    wanted = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted[name].grad, msg=name)
    with pytest.raises(TopologyError, match=r"is sharded already; shard a model once"):
        shard(model, mesh)


def keeps_the_bias_and_the_routing_weights_in_fp32(mesh) -> None:
    model = tiny("deepseek_v3")
    before = {name: b.clone() for name, b in model.named_buffers() if name.endswith("_bias")}
    assert len(before) == 2
    shard(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))

    seen = []
    for bank in expert_banks(model):
        record = SimpleNamespace(dtypes=None)
        seen.append(record)

        def note(module, args, kwargs, record=record):
            every = (*args, *kwargs.values())
            record.dtypes = {t.dtype for t in every if t.is_floating_point()}

        bank.register_forward_pre_hook(note, with_kwargs=True)
    model(input_ids=ids(1, 6)).logits.sum().backward()
    assert [record.dtypes for record in seen] == [{torch.bfloat16, torch.float32}] * 2
    for name, bias in model.named_buffers():
        if name in before:
            assert bias.dtype == torch.float32 and not isinstance(bias, DTensor)
            assert torch.equal(bias, before[name])
