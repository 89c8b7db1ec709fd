"""Causes where the experts' outputs are weighed and summed.

Letters: T tokens, E experts, K choices a token, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moetk.equivalence.cause import Evidence, cause
from moetk.equivalence.causes.chain import (
    onward,
    reference_at,
    used_weights,
    weighed,
    with_parameters,
)
from moetk.equivalence.causes.values import normalised, only_used, rows_of, used, value
from moetk.equivalence.sides.loads import repeats


def _outputs(e: Evidence) -> tuple[Tensor, Tensor, Tensor] | None:
    """What the experts return (T, K, H), the weights (T, K) and the ids (T, K)."""
    y_TKH, weights_TK, ids_TK = (
        reference_at(e, "expert_output"),
        used_weights(e),
        value(e, "indices"),
    )
    if y_TKH is None or weights_TK is None or ids_TK is None:
        return None
    return y_TKH, weights_TK, ids_TK


def _of_weighed_input(e: Evidence) -> Tensor | None:
    """(T, H): the experts' sum where each is given its weight times x. (Products are linear.)"""
    up_TKJ, weights_TK = reference_at(e, "up"), used_weights(e)
    if up_TKJ is None or weights_TK is None:
        return None
    y_TKH = onward(e, "up", weights_TK[..., None] * up_TKJ, "expert_output")
    return None if y_TKH is None else y_TKH.sum(1)


@cause(
    "weights ignored",
    "combined",
    fix="The experts' outputs are summed as they are: multiply each by its weight.",
)
def _unweighed(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        yield parts[0].sum(1)


@cause(
    "plain mean of the experts",
    "combined",
    fix="The weights do not enter: the experts' outputs are averaged over the choices.",
)
def _mean(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        y_TKH, weights_TK, _ = parts
        yield y_TKH.mean(1)
        yield y_TKH.sum(1) / (weights_TK != 0).sum(-1, keepdim=True).clamp(min=1)


@cause(
    "divided by the number of choices",
    "combined",
    fix="The weighed outputs are summed over the choices, not averaged.",
)
def _divided(e: Evidence) -> Iterator[Tensor]:
    ids_TK = value(e, "indices")
    if ids_TK is not None and ids_TK.shape[1] > 1:
        yield e.wanted / ids_TK.shape[1]


@cause(
    "weights applied twice",
    "combined",
    fix="Each output is weighed twice, by the bank and by whoever sums up.",
)
def _twice(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        yield weighed(parts[0], parts[1].square())


@cause(
    "weights renormalised by the experts",
    "combined",
    fix="The bank divides the weights by their sum; the router decides on that.",
)
def _renormalised(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        yield weighed(parts[0], normalised(parts[1]))


@cause(
    "weights softmaxed by the experts",
    "combined",
    fix="The bank takes a softmax of what are weights already.",
)
def _softmaxed(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        yield weighed(parts[0], parts[1].softmax(-1))


@cause(
    "weights of other slots",
    "combined",
    fix="Outputs and weights are in different orders of slots: sort both, or neither.",
)
def _other_slots(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        y_TKH, weights_TK, ids_TK = parts
        yield weighed(y_TKH, weights_TK.flip(-1))
        for shift in range(1, weights_TK.shape[1]):
            yield weighed(y_TKH, weights_TK.roll(shift, -1))
        order_TK = ids_TK.argsort(-1)  # outputs by expert, weights by choice, and the reverse
        yield weighed(y_TKH.take_along_dim(order_TK[..., None], 1), weights_TK)
        yield weighed(y_TKH, weights_TK.gather(1, order_TK))


@cause(
    "routing weight on the expert's input",
    "up",
    "combined",
    fix="The weight multiplies what an expert returns, not what it is given.",
)
def _input(e: Evidence) -> Iterator[Tensor]:
    weights_TK = value(e, "weights")
    if weights_TK is not None and e.stage == "up":
        yield e.wanted * weights_TK[..., None]
    sum_TH = _of_weighed_input(e)
    if e.stage == "combined" and sum_TH is not None:
        yield sum_TH


@cause(
    "routing weight on the expert's output",
    "up",
    "combined",
    fix="The weight multiplies what an expert is given, not what it returns (Llama 4).",
)
def _output(e: Evidence) -> Iterator[Tensor]:
    # What the reference shows is of weighed input; from its parameters it is of x as it is.
    plain = reference_at(with_parameters(e), e.stage)
    if plain is not None:
        yield plain


@cause(
    "one of two equal ids dropped",
    "combined",
    fix="A token that names one expert twice gets both shares: a (T, E) mask, or a scatter "
    "without adding, keeps one.",
)
def _duplicate(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        y_TKH, weights_TK, ids_TK = parts
        for again_TK in (repeats(ids_TK), repeats(ids_TK.flip(-1)).flip(-1)):
            yield weighed(y_TKH, weights_TK.masked_fill(again_TK, 0))


@cause(
    "one slot is lost",
    "dispatched",
    "combined",
    fix="All choices of a token are summed, the first and the last too.",
)
def _lost(e: Evidence) -> Iterator[Tensor]:
    if e.stage == "dispatched":
        for slot in range(e.wanted.shape[1]):
            kept_TK = e.wanted.clone()
            kept_TK[:, slot] = False
            yield kept_TK
    elif parts := _outputs(e):
        y_TKH, weights_TK, _ = parts
        if weights_TK.shape[1] > 1:
            for slot in range(weights_TK.shape[1]):
                without = weights_TK.clone()
                without[:, slot] = 0
                yield weighed(y_TKH, without)


@cause(
    "overwritten instead of added",
    "combined",
    fix="Each token keeps its last expert's share alone: add into the rows (index_add, "
    "accumulate=True).",
)
def _overwritten(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        y_TKH, weights_TK, ids_TK = parts
        by_expert_T1 = ids_TK.masked_fill(weights_TK == 0, -1).argmax(-1, keepdim=True)
        last_T1 = torch.full_like(by_expert_T1, ids_TK.shape[1] - 1)
        for slot_T1 in (by_expert_T1, last_T1):
            alone_TK = torch.zeros_like(weights_TK).scatter(
                1, slot_T1, weights_TK.gather(1, slot_T1)
            )
            yield weighed(y_TKH, alone_TK)


@cause(
    "dropped tokens passed through",
    "combined",
    fix="A token without a place contributes nothing here; the residual around the layer carries "
    "it on.",
)
def _passed(e: Evidence) -> Iterator[Tensor]:
    used_TK = used(e)
    if used_TK is not None:
        yield torch.where(used_TK.any(-1, keepdim=True), e.wanted, e.x_TH)


@cause(
    "down bias not weighed",
    "combined",
    fix="The down-projection's bias belongs to the expert's output, and is weighed with it.",
)
def _bias_unweighed(e: Evidence) -> Iterator[Tensor]:
    bias_EH, parts = e.parameters.get("down_bias"), _outputs(e)
    if bias_EH is not None and parts:
        _, weights_TK, ids_TK = parts
        bias_TKH = only_used(e, rows_of(bias_EH, ids_TK))
        yield e.wanted + ((1 - weights_TK.to(bias_TKH))[..., None] * bias_TKH).sum(1)


COMBINE = (
    _unweighed,
    _mean,
    _divided,
    _twice,
    _renormalised,
    _softmaxed,
    _other_slots,
    _input,
    _output,
    _duplicate,
    _lost,
    _overwritten,
    _passed,
    _bias_unweighed,
)
