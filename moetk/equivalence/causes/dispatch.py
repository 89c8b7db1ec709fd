"""Causes in what finds a place at its expert. Letters: T tokens, E experts, K choices a token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from moetk.dispatch import Capacity
from moetk.equivalence.cause import Evidence, cause
from moetk.equivalence.causes.values import value
from moetk.equivalence.sides.loads import repeats
from moetk.kernels.selection import expert_capacity, sequences
from moetk.routing import TokenChoice

MULTIPLE = 4  # some round a capacity up to whole vectors


def _places(e: Evidence) -> tuple[Tensor, Capacity, int] | None:
    """What was wanted, the reference's rule, and how many places an expert has by it."""
    ids_TK, capacity = value(e, "indices"), e.facts.get("capacity")
    if ids_TK is None or capacity is None:
        return None
    _, length = sequences(e.ctx, len(ids_TK))
    places = expert_capacity(length, ids_TK.shape[1], _num_experts(e), capacity.factor)
    return ids_TK, capacity, places


def _num_experts(e: Evidence) -> int:
    told, counts_E = e.facts.get("num_experts"), value(e, "counts")
    if told is not None:
        return int(told)
    if counts_E is not None:
        return len(counts_E)
    ids_TK = e.a.values["indices"]
    return 1 + int(ids_TK.max()) if ids_TK.numel() else 1  # enough to tell them apart


def _kept(e: Evidence, places: int, *, whole_batch: bool = False, padding: bool = False) -> Tensor:
    """As the reference serves, with another number of places."""
    ids_TK, capacity = e.a.values["indices"], e.facts["capacity"]
    if places < 1:
        return torch.zeros_like(ids_TK, dtype=torch.bool)
    ctx = replace(e.ctx, batch_shape=None) if whole_batch else e.ctx
    ctx = replace(ctx, token_mask=None) if padding else ctx
    _, length = sequences(ctx, len(ids_TK))
    wanted = max(length * ids_TK.shape[1], 1)
    # The factor that makes ceil(factor * S * K / E) the places asked for.
    factor = (places - 0.5) * _num_experts(e) / wanted
    other = Capacity(factor, capacity.order)
    kept_TK = other(_routing(e), ctx).kept_TK
    assert kept_TK is not None
    return kept_TK


def _routing(e: Evidence) -> TokenChoice:
    ids_TK = e.a.values["indices"]
    weights_TK = e.a.values.get("weights", torch.ones(ids_TK.shape, device=ids_TK.device))
    return TokenChoice(ids_TK, weights_TK, _num_experts(e))


def _in_order(e: Evidence, ids_TK: Tensor, arrival_N: Tensor, places: int) -> Tensor:
    """Choices served one after the other, in the order of `arrival_N`, their flat positions."""
    batch, length = sequences(e.ctx, len(ids_TK))
    sequence_T = torch.arange(len(ids_TK), device=ids_TK.device) // max(length, 1)
    used_TK = ids_TK >= 0
    if e.ctx.token_mask is not None:
        used_TK = used_TK & e.ctx.token_mask[:, None]
    queue_TK = torch.where(used_TK, sequence_T[:, None] * _num_experts(e) + ids_TK, -1)
    queue_N = queue_TK.flatten()[arrival_N]
    before_NN = (queue_N[:, None] == queue_N[None, :]).tril(-1)
    fits_N = (before_NN.sum(-1) < places) & (queue_N >= 0)
    return torch.zeros_like(fits_N).scatter(0, arrival_N, fits_N).view_as(ids_TK)


@cause(
    "capacity one too few",
    "dispatched",
    fix="An expert has ceil(factor S K / E) places; here one less: look for < where <= belongs, "
    "or a rank counted from 1.",
)
def _one_less(e: Evidence) -> Iterator[Tensor]:
    if parts := _places(e):
        yield _kept(e, parts[2] - 1)


@cause(
    "capacity one too many",
    "dispatched",
    fix="An expert has ceil(factor S K / E) places; here one more: look for <= where < belongs, "
    "or floor(...) + 1.",
)
def _one_more(e: Evidence) -> Iterator[Tensor]:
    if parts := _places(e):
        yield _kept(e, parts[2] + 1)


@cause(
    "capacity rounded down",
    "dispatched",
    fix="factor S K / E is rounded up to whole places, not down.",
)
def _floor(e: Evidence) -> Iterator[Tensor]:
    if parts := _places(e):
        ids_TK, capacity, places = parts
        _, length = sequences(e.ctx, len(ids_TK))
        exact = capacity.factor * length * ids_TK.shape[1] / _num_experts(e)
        if int(exact) != places:
            yield _kept(e, int(exact))


@cause(
    "capacity rounded up to a multiple",
    "dispatched",
    fix="One of the two rounds the number of places up to a multiple of 4 or 8.",
)
def _multiple(e: Evidence) -> Iterator[Tensor]:
    if parts := _places(e):
        for unit in (MULTIPLE, 2 * MULTIPLE):
            yield _kept(e, -(-parts[2] // unit) * unit)


@cause(
    "capacity forgets the number of choices",
    "dispatched",
    fix="K choices of S tokens want places: ceil(factor S K / E), not ceil(factor S / E).",
)
def _without_k(e: Evidence) -> Iterator[Tensor]:
    if parts := _places(e):
        ids_TK, capacity, _ = parts
        _, length = sequences(e.ctx, len(ids_TK))
        yield _kept(e, expert_capacity(length, 1, _num_experts(e), capacity.factor))


@cause(
    "capacity over the whole batch",
    "dispatched",
    fix="Places are counted in each sequence, S tokens each, so that sequences do not compete.",
)
def _whole_batch(e: Evidence) -> Iterator[Tensor]:
    if parts := _places(e):
        ids_TK, capacity, _ = parts
        places = expert_capacity(len(ids_TK), ids_TK.shape[1], _num_experts(e), capacity.factor)
        yield _kept(e, places, whole_batch=True)


@cause(
    "all choices of a token served before the next token",
    "dispatched",
    fix="All first choices come before any second choice.",
)
def _token_major(e: Evidence) -> Iterator[Tensor]:
    if parts := _places(e):
        ids_TK, _, places = parts
        yield _in_order(e, ids_TK, torch.arange(ids_TK.numel(), device=ids_TK.device), places)


@cause(
    "the last come are served first",
    "dispatched",
    fix="Within a column the earlier token is served first: look for a reversed or unstable sort, "
    "or a topk over a 0/1 mask.",
)
def _last_first(e: Evidence) -> Iterator[Tensor]:
    if parts := _places(e):
        ids_TK, _, places = parts
        flat_TK = torch.arange(ids_TK.numel(), device=ids_TK.device).view_as(ids_TK)
        yield _in_order(e, ids_TK, flat_TK.flip(0).T.flatten(), places)
        yield _in_order(e, ids_TK, flat_TK.flatten().flip(0), places)


@cause(
    "served by weight",
    "dispatched",
    fix="Who comes first is served first here, not who weighs most (by_weight).",
)
def _by_weight(e: Evidence) -> Iterator[Tensor]:
    parts, weights_TK = _places(e), value(e, "weights")
    if parts is not None and weights_TK is not None:
        ids_TK, _, places = parts
        flat_TK = torch.arange(ids_TK.numel(), device=ids_TK.device).view_as(ids_TK)
        best_T = weights_TK.amax(-1).argsort(descending=True, stable=True)
        yield _in_order(e, ids_TK, flat_TK[best_T].T.flatten(), places)
        yield _in_order(
            e, ids_TK, weights_TK.flatten().argsort(descending=True, stable=True), places
        )


@cause(
    "padding takes places",
    "dispatched",
    fix="Padding (ctx.token_mask) takes no place from real tokens.",
)
def _padding(e: Evidence) -> Iterator[Tensor]:
    parts = _places(e)
    if parts is not None and e.ctx.token_mask is not None:
        kept_TK = _kept(e, parts[2], padding=True)
        yield from (kept_TK, kept_TK & e.ctx.token_mask[:, None])


@cause(
    "capacity missing: nothing is dropped",
    "dispatched",
    fix="Only one of the two limits what an expert takes.",
)
def _no_capacity(e: Evidence) -> Iterator[Tensor]:
    ids_TK = value(e, "indices")
    if ids_TK is not None:
        yield ids_TK >= 0


@cause(
    "one of two equal ids dropped",
    "dispatched",
    fix="A token that names one expert twice is served twice.",
)
def _duplicate(e: Evidence) -> Iterator[Tensor]:
    ids_TK = value(e, "indices")
    if ids_TK is not None:
        yield e.wanted & ~repeats(ids_TK)
        yield e.wanted & ~repeats(ids_TK.flip(-1)).flip(-1)


@cause(
    "drops with another number of places",
    "dispatched",
    fix="First comers are served, under another capacity: compare the factors of the two.",
    general=True,
)
def _another_capacity(e: Evidence) -> Iterator[Tensor]:
    ids_TK = value(e, "indices")
    if ids_TK is None or e.found.shape != ids_TK.shape:
        return
    _, length = sequences(e.ctx, len(ids_TK))
    columns_N = torch.arange(ids_TK.numel(), device=ids_TK.device).view_as(ids_TK).T.flatten()
    fullest = torch.bincount(ids_TK[e.found.bool()], minlength=1).max()
    for places in range(1, int(fullest) + 1):
        yield _in_order(e, ids_TK, columns_N, places)


DISPATCH = (
    _one_less,
    _one_more,
    _floor,
    _multiple,
    _without_k,
    _whole_batch,
    _token_major,
    _last_first,
    _by_weight,
    _padding,
    _no_capacity,
    _duplicate,
    _another_capacity,
)
