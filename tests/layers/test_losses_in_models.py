"""Attached losses enter a stock model's training at the scale of its own loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moetk import BlockSpec, RouterContext, replace_moe
from moetk.errors import AuxScaleError
from moetk.layers.attach import Loss
from moetk.losses import LoadBalancingLoss, RouterZLoss
from moetk.routers import MixtralRouter
from tests.layers.parts import ExactZLoss, data, predicting
from tests.layers.stock import assert_equal, checkpointed, gradients, stock

BALANCE = LoadBalancingLoss(0.5, scope="sequence")
LOSSES = (RouterZLoss(0.2), BALANCE)


class Remembering(MixtralRouter):
    """Keeps the routings it made, graph and all, so that a loss can be added by hand."""

    made: list[Any]

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> Any:
        routing = super().forward(x_TH, ctx)
        self.made.append(routing)
        return routing


def remembering(spec: BlockSpec) -> Remembering:
    router = Remembering(spec.hidden_size, spec.num_experts, spec.top_k, score_dtype=None)
    router.load_state_dict(spec.gate.state_dict())
    router.made = []
    return router


def model_with(losses: Sequence[Loss] = (), dtype: torch.dtype = torch.float32, **kw: Any) -> Any:
    model = stock("qwen3_moe", dtype).train()
    replace_moe(model, remembering, losses=losses, **kw)
    return model


def routers(model: Any) -> list[Remembering]:
    return [module for module in model.modules() if isinstance(module, Remembering)]


def by_hand(model: Any, losses: Sequence[Loss], ctx: RouterContext) -> Tensor:
    """The sum of the losses over the layers' last routings."""
    total = sum(loss(router.made[-1], ctx) for router in routers(model) for loss in losses)
    assert isinstance(total, Tensor)
    return total


def router_gradients(model: Any) -> dict[str, Tensor]:
    return {n: g for n, g in gradients(model).items() if ".moetk." in n}


def context(labels_BS: Tensor, mask_BS: Tensor | None = None) -> RouterContext:
    return RouterContext(
        label_mask=predicting(labels_BS),
        token_mask=None if mask_BS is None else mask_BS.flatten().bool(),
        batch_shape=tuple(labels_BS.shape),
    )


@pytest.mark.parametrize("factor", [1.0, 3072.0, 2.0**-14])
@pytest.mark.parametrize("kind", ["plain", "non_reentrant", "reentrant"])
def test_the_gradient_that_reaches_the_loss_is_the_scale(factor: float, kind: str) -> None:
    """A factor on the loss, such as a GradScaler's, is one on the attached losses too."""
    ids_BS, labels_BS = data()
    ours, twin = model_with(LOSSES), model_with()
    if kind != "plain":
        checkpointed(ours, reentrant=kind == "reentrant")
    (factor * ours(input_ids=ids_BS, labels=labels_BS).loss).backward()
    loss = twin(input_ids=ids_BS, labels=labels_BS).loss
    (factor * (loss + by_hand(twin, LOSSES, context(labels_BS)))).backward()
    assert_equal(gradients(ours), gradients(twin), 1e-5)


@pytest.mark.parametrize("items", [64, torch.tensor(64), torch.tensor(256.0)])
def test_num_items_in_batch(items: Any) -> None:
    """Own label tokens over all the batch's: the share of this micro-batch."""
    ids_BS, labels_BS = data()
    own = int(predicting(labels_BS).sum())
    assert own == 64
    ours, twin = model_with(LOSSES), model_with()
    ours(input_ids=ids_BS, labels=labels_BS, num_items_in_batch=items).loss.backward()
    loss = twin(input_ids=ids_BS, labels=labels_BS, num_items_in_batch=items).loss
    (loss + by_hand(twin, LOSSES, context(labels_BS)) * own / float(items)).backward()
    assert_equal(gradients(ours), gradients(twin), 1e-5)


def accumulated(model: Any, micro_batches: int, items: int = 64) -> None:
    ids_BS, labels_BS = data()
    for ids, labels in zip(
        ids_BS.chunk(micro_batches), labels_BS.chunk(micro_batches), strict=True
    ):
        model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(items)).loss.backward()


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_gradient_accumulation_changes_nothing(micro_batches: int) -> None:
    """Unequal label counts: z-loss, and balance within sequences, weigh tokens and not batches."""
    whole, parts = model_with(LOSSES), model_with(LOSSES)
    accumulated(whole, 1)
    accumulated(parts, micro_batches)
    assert_equal(gradients(parts), gradients(whole), 1e-5)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_gradient_accumulation_is_exact_in_float64(micro_batches: int) -> None:
    """No float32 of the model's own loss in the way: its head is zero, only our loss remains."""
    whole, parts = (model_with([ExactZLoss(0.2)], torch.float64) for _ in range(2))
    for model, count in ((whole, 1), (parts, micro_batches)):
        torch.nn.init.zeros_(model.lm_head.weight)
        accumulated(model, count)
    assert_equal(router_gradients(parts), router_gradients(whole))
    assert all(bool(g.any()) for g in router_gradients(whole).values())


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_balance_by_micro_batch_is_their_mean_weighed_by_tokens(micro_batches: int) -> None:
    loss = LoadBalancingLoss(0.5)
    ours, twin = model_with([loss]), model_with()
    accumulated(ours, micro_batches)
    ids_BS, labels_BS = data()
    for ids, labels in zip(
        ids_BS.chunk(micro_batches), labels_BS.chunk(micro_batches), strict=True
    ):
        own = twin(input_ids=ids, labels=labels, num_items_in_batch=64).loss
        share = predicting(labels).sum() / 64
        (own + share * by_hand(twin, [loss], context(labels))).backward()
    assert_equal(gradients(ours), gradients(twin), 1e-5)


def test_two_forwards_before_one_backward_keep_their_own_scales() -> None:
    ids_BS, labels_BS = data()
    ours, twin = model_with(LOSSES), model_with()
    halves = list(zip(ids_BS.chunk(2), labels_BS.chunk(2), (1.0, 7.0), strict=True))
    losses = [f * ours(input_ids=i, labels=t).loss for i, t, f in halves]
    sum(losses).backward()
    for i, t, f in halves:
        loss = twin(input_ids=i, labels=t).loss
        (f * (loss + by_hand(twin, LOSSES, context(t)))).backward()
    assert_equal(gradients(ours), gradients(twin), 1e-5)


def test_shifted_labels() -> None:
    """Labels that the caller has shifted already, as sequence parallelism does."""
    ids_BS, labels_BS = data()
    shifted_BS = torch.nn.functional.pad(labels_BS[:, 1:], (0, 1), value=-100)
    ours, twin = model_with(LOSSES), model_with(LOSSES)
    ours(input_ids=ids_BS, labels=labels_BS, shift_labels=shifted_BS).loss.backward()
    twin(input_ids=ids_BS, labels=labels_BS).loss.backward()
    assert_equal(gradients(ours), gradients(twin), 1e-6)


def test_a_tuple_carries_the_loss_too() -> None:
    ids_BS, labels_BS = data()
    ours, twin = model_with(LOSSES), model_with(LOSSES)
    ours(input_ids=ids_BS, labels=labels_BS, return_dict=False)[0].backward()
    twin(input_ids=ids_BS, labels=labels_BS).loss.backward()
    assert_equal(gradients(ours), gradients(twin), 1e-6)


def outside(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    """A loss that the model does not compute."""
    return torch.nn.functional.cross_entropy(
        logits_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten()
    )


def test_a_loss_outside_the_model_needs_aux_scale() -> None:
    ids_BS, _ = data()
    ours = model_with(LOSSES)
    loss = outside(ours(input_ids=ids_BS).logits, ids_BS)
    message = (
        r"model.layers.1.mlp: a gradient reached this layer before one reached out.loss.*"
        r"Call the model with labels=..., or pass aux_scale= to replace_moe"
    )
    with pytest.raises(AuxScaleError, match=message):
        loss.backward()


def test_labels_given_but_the_loss_not_used() -> None:
    ids_BS, labels_BS = data()
    ours = model_with(LOSSES)
    out = ours(input_ids=ids_BS, labels=labels_BS)
    with pytest.raises(AuxScaleError, match=r"the loss is computed outside the model"):
        outside(out.logits, ids_BS).backward()


@pytest.mark.parametrize("how", ["number", "callable", "tensor"])
def test_aux_scale(how: str) -> None:
    """A number, or what a callable says in backward."""
    ids_BS, _ = data()
    now = [0.0]
    scales: dict[str, float | Callable[[], float | Tensor]] = {
        "number": 0.25,
        "callable": lambda: now[0],
        "tensor": lambda: torch.tensor(now[0]),
    }
    ours, twin = model_with(LOSSES, aux_scale=scales[how]), model_with()
    loss = outside(ours(input_ids=ids_BS).logits, ids_BS)
    now[0] = 0.25
    loss.backward()
    loss = outside(twin(input_ids=ids_BS).logits, ids_BS)
    ctx = RouterContext(batch_shape=(8, 12))
    (loss + 0.25 * by_hand(twin, LOSSES, ctx)).backward()
    assert_equal(gradients(ours), gradients(twin), 1e-5)


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no labels"])
def test_which_tokens_are_averaged_over(labels: bool) -> None:
    """Those that carry a label where labels reach the model, else those that are no padding."""
    ids_BS, labels_BS = data()
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[2, 7:] = 0
    mask_BS[5, 3:] = 0
    given = {"labels": labels_BS} if labels else {}
    ours, twin = model_with(LOSSES, aux_scale=1.0), model_with()
    outside(ours(input_ids=ids_BS, attention_mask=mask_BS, **given).logits, ids_BS).backward()
    loss = outside(twin(input_ids=ids_BS, attention_mask=mask_BS).logits, ids_BS)
    unmasked = RouterContext(token_mask=mask_BS.flatten().bool(), batch_shape=(8, 12))
    (loss + by_hand(twin, LOSSES, context(labels_BS) if labels else unmasked)).backward()
    assert_equal(gradients(ours), gradients(twin), 1e-5)


def test_no_label_at_all_adds_nothing() -> None:
    """Stock's own loss is NaN there without num_items_in_batch; ours must not add to it."""
    ids_BS, labels_BS = data()
    ours, twin = model_with(LOSSES), model_with()
    for model in (ours, twin):
        nothing = torch.full_like(labels_BS, -100)
        model(input_ids=ids_BS, labels=nothing, num_items_in_batch=64).loss.backward()
    assert_equal(gradients(ours), gradients(twin), 1e-6)
