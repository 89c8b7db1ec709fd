"""What the gloo processes of test_ddp.py and test_fsdp.py run: importable by name, no test."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moetk import record, replace_moe
from moetk.controllers import BiasUpdate
from moetk.errors import ReplaceError, TopologyError
from moetk.layers.replacement import replacement_of
from moetk.losses import LoadBalancingLoss, RouterZLoss
from moetk.parallel import shard, sum_over_ranks
from tests.layers.parts import Tally, cosine, data, predicting
from tests.layers.stock import assert_bitwise, assert_equal, checkpointed, gradients, stock

RANKS = 2


def own_rows(rank: int, tensor: Tensor) -> Tensor:
    return tensor.chunk(RANKS)[rank]


def batches(rank: int | None, micro_batches: int = 1) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Ids, labels and the whole batch's number of labels; rank None = all ranks' rows at once."""
    ids_BS, labels_BS = data()
    total = int(predicting(labels_BS).sum())
    if rank is not None:
        ids_BS, labels_BS = own_rows(rank, ids_BS), own_rows(rank, labels_BS)
    for chunk in zip(ids_BS.chunk(micro_batches), labels_BS.chunk(micro_batches), strict=True):
        yield *chunk, total


def already_whole(tensor: Tensor) -> Tensor:
    """The reduction of a process that has seen every row."""
    return tensor


# DistributedDataParallel


def data_parallel(rank: int) -> None:
    losses_over_the_global_batch(rank)
    controllers_move_alike(rank)
    without_a_reduction_it_raises()
    an_unused_gate_is_frozen(rank)
    a_router_after_the_wrapper_is_refused()


def losses_over_the_global_batch(rank: int) -> None:
    """Ranks with unequal labels, their losses weighed as Trainer does: one process's gradients."""
    z, coefficient = RouterZLoss(0.2), 0.5
    whole, mine = (stock("qwen3_moe", torch.float32).train() for _ in range(2))
    replace_moe(whole, cosine, losses=[z, LoadBalancingLoss(coefficient)])
    ((ids, labels, total),) = batches(None)
    whole(input_ids=ids, labels=labels, num_items_in_batch=total).loss.backward()

    over_ranks = LoadBalancingLoss(coefficient, scope="global_batch", reduce=sum_over_ranks)
    replace_moe(mine, cosine, losses=[z, over_ranks])
    wrapped = DistributedDataParallel(mine)
    ((ids, labels, total),) = batches(rank)
    assert int(predicting(labels).sum()) != total // 2
    # DDP takes the mean over ranks, so Trainer multiplies by their number.
    loss = wrapped(input_ids=ids, labels=labels, num_items_in_batch=total).loss * RANKS
    loss.backward()
    assert_equal(gradients(mine), gradients(whole), 1e-5)

    alone = stock("qwen3_moe", torch.float32).train()
    replace_moe(alone, cosine, losses=[z, LoadBalancingLoss(coefficient)])
    wrapped = DistributedDataParallel(alone)
    (wrapped(input_ids=ids, labels=labels, num_items_in_batch=total).loss * RANKS).backward()
    with pytest.raises(AssertionError):  # each rank's own counts are another loss
        assert_equal(gradients(alone), gradients(whole), 1e-5)


def controllers_move_alike(rank: int) -> None:
    """Four micro-batches on each rank: no count is lost to DDP, which broadcasts rank 0's buffers
    in every forward."""
    parts = [BiasUpdate(0.01), Tally()]
    whole, mine = (stock("deepseek_v3", torch.float32).train() for _ in range(2))
    one = replace_moe(whole, controllers=parts)
    for ids, labels, _ in batches(None):
        whole(input_ids=ids, labels=labels).loss.backward()
    one.step(reduce=already_whole)

    replacement = replace_moe(mine, controllers=parts)
    wrapped = DistributedDataParallel(mine)
    for ids, labels, _ in batches(rank, micro_batches=4):
        wrapped(input_ids=ids, labels=labels).loss.backward()
    replacement.step(sum_over_ranks)
    assert_bitwise(dict(mine.named_buffers()), dict(whole.named_buffers()))
    for got, want in zip(replacement.steered, one.steered, strict=True):
        if isinstance(got.controller, Tally):
            assert [c.tolist() for c in got.controller.given] == [
                c.tolist() for c in want.controller.given
            ]
            assert int(got.controller.given[0].sum()) == 8 * 12 * 4


def without_a_reduction_it_raises() -> None:
    model = stock("deepseek_v3", torch.float32).train()
    replacement = replace_moe(model, controllers=[BiasUpdate(0.01)])
    message = r"2 ranks, and the controllers were not told how to sum.*moetk.parallel.sum_over_rank"
    with pytest.raises(TopologyError, match=message):
        replacement.step()


def an_unused_gate_is_frozen(rank: int) -> None:
    """DDP waits for every parameter's gradient: the stock gate below a custom router has none."""
    for frozen in (True, False):
        model = stock("qwen3_moe", torch.float32).train()
        replace_moe(model, cosine)
        if not frozen:
            model.requires_grad_(True)
        wrapped = DistributedDataParallel(model)
        ((ids, labels, _),) = batches(rank)
        wrapped(input_ids=ids, labels=labels).loss.backward()
        if frozen:
            wrapped(input_ids=ids, labels=labels).loss.backward()
        else:
            with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
                wrapped(input_ids=ids, labels=labels)


def a_router_after_the_wrapper_is_refused() -> None:
    wrapped = DistributedDataParallel(stock("qwen3_moe", torch.float32))
    with pytest.raises(ReplaceError, match=r"under DistributedDataParallel already.*Replace first"):
        replace_moe(wrapped, cosine)
    replace_moe(wrapped)
    with record(wrapped) as recording:
        ids, *_ = next(batches(0))
        wrapped(input_ids=ids)
    assert len(recording) == 2


# FSDP2


def by_layer(model: Any) -> Any:
    """Units of a layer each, the experts inside: another wrapping than `shard`'s."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def fully_sharded(rank: int) -> None:
    for family in ("qwen3_moe", "deepseek_v3", "gpt_oss"):
        model = stock(family).train()
        want = whole_batch(model)
        for checkpoint in (None, False, True):
            for sharding in (shard, by_layer):
                replaced_then_sharded = copy.deepcopy(model)
                replacement = replace_moe(replaced_then_sharded)
                sharding(replaced_then_sharded)
                equals_stock(rank, replaced_then_sharded, want, checkpoint)
                restored_is_stock(rank, replaced_then_sharded, replacement, model)

                sharded_then_replaced = sharding(copy.deepcopy(model))
                replacement = replace_moe(sharded_then_replaced)
                equals_stock(rank, sharded_then_replaced, want, checkpoint)
                restored_is_stock(rank, sharded_then_replaced, replacement, model)
    router_logits_are_recorded(rank)
    custom_router_with_losses_and_controllers(rank)
    a_router_after_sharding_is_refused()


def whole_batch(model: Any) -> dict[str, Tensor]:
    """Loss and gradients of one unmodified process over the rows of every rank."""
    model = copy.deepcopy(model)
    ids, _ = data()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def one_step(rank: int, model: Any) -> dict[str, Tensor]:
    """The mean over ranks of the loss on each one's rows, and the gradients."""
    ids = own_rows(rank, data()[0])
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": sum_over_ranks(loss) / RANKS, **full(gradients(model))}


def equals_stock(rank: int, model: Any, want: dict[str, Tensor], checkpoint: bool | None) -> None:
    if checkpoint is not None:
        checkpointed(model, reentrant=checkpoint)
    with record(model) as recording:
        got = one_step(rank, model)
    assert len(recording) == 2 and recording.num_forwards == 1  # ours ran, counted once
    # The model's own loss is float32, a mean of two here.
    assert_equal(got, want, 1e-6)


def restored_is_stock(rank: int, model: Any, replacement: Any, want: Any) -> None:
    replacement.restore()
    assert isinstance(model, FSDPModule) and isinstance(model.model.layers[-1], FSDPModule)
    ids = own_rows(rank, data()[0])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, want(input_ids=ids).logits)


def router_logits_are_recorded(rank: int) -> None:
    ids = own_rows(rank, data()[0])
    model = stock("qwen3_moe").train()
    ours = copy.deepcopy(model)
    replace_moe(ours)
    shard(ours)
    got, want = (m(input_ids=ids, labels=ids, output_router_logits=True) for m in (ours, model))
    logits = [dict(enumerate(out.router_logits)) for out in (got, want)]
    assert len(logits[1]) == 2
    assert_equal(logits[0], logits[1])  # type: ignore[arg-type]
    torch.testing.assert_close(got.aux_loss, want.aux_loss)
    got.loss.backward()


def custom_router_with_losses_and_controllers(rank: int) -> None:
    losses = [RouterZLoss(0.2), LoadBalancingLoss(0.5, scope="sequence")]
    parts = [BiasUpdate(0.01), Tally()]
    whole = stock("qwen3_moe", torch.float32).train()
    ours = copy.deepcopy(whole)
    one = replace_moe(whole, cosine, losses=losses, controllers=parts)
    replacement = replace_moe(ours, cosine, losses=losses, controllers=parts)
    shard(ours)
    want = whole_batch(whole)
    assert_equal(one_step(rank, ours), want, 1e-5)

    ids, _ = data()
    whole(input_ids=ids, labels=ids).loss.backward()
    one.step(reduce=already_whole)
    replacement.step(sum_over_ranks)
    assert_bitwise(biases(ours), biases(whole))
    assert len(biases(ours)) == 2 and all(bool(b.any()) for b in biases(ours).values())
    assert replacement_of(ours) is replacement


def biases(model: nn.Module) -> dict[str, Tensor]:
    return {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}


def a_router_after_sharding_is_refused() -> None:
    model = shard(stock("qwen3_moe", torch.float32))
    with pytest.raises(ReplaceError, match=r"is under fully_shard already.*Replace first, then"):
        replace_moe(model, cosine)
