"""Causes where the experts' outputs are weighed and summed, and in what is added to the sum.

Letters: T tokens, E experts, K choices a token, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moetk.equivalence.cause import Evidence, cause, deviation
from moetk.equivalence.causes.counts import repeats
from moetk.equivalence.causes.values import (
    normalised,
    only_used,
    per_choice,
    rows_of,
    through,
    used,
    value,
)
from moetk.experts import Plain


def _through_experts(e: Evidence, rows_TKH: Tensor) -> Tensor | None:
    """Each row through its expert, from the reference's parameters, (T, K, H)."""
    ids_TK, activation = value(e, "indices"), e.facts.get("activation")
    up_EJH, down_EHI = e.parameters.get("up_weight"), e.parameters.get("down_weight")
    if ids_TK is None or activation is None or up_EJH is None or down_EHI is None:
        return None
    if up_EJH.ndim != 3 or up_EJH.shape[-1] != rows_TKH.shape[-1]:
        return None
    hidden_TKJ = through(rows_TKH, up_EJH, ids_TK)
    if "up_bias" in e.parameters:
        hidden_TKJ = hidden_TKJ + rows_of(e.parameters["up_bias"], ids_TK)
    plain = isinstance(activation, Plain)
    inner_TKI = activation(hidden_TKJ) if plain else activation(*hidden_TKJ.chunk(2, -1))
    y_TKH = through(inner_TKI, down_EHI, ids_TK)
    if "down_bias" in e.parameters:
        y_TKH = y_TKH + rows_of(e.parameters["down_bias"], ids_TK)
    return only_used(e, y_TKH)


def _outputs(e: Evidence) -> tuple[Tensor, Tensor, Tensor] | None:
    """What the experts returned (T, K, H), the weights (T, K) and the ids (T, K), where the
    reference's sum is the sum of those."""
    ids_TK, weights_TK, y_TKH = (value(e, s) for s in ("indices", "weights", "expert_output"))
    if ids_TK is None or weights_TK is None:
        return None
    y_TKH = _through_experts(e, per_choice(e.x_TH, ids_TK)) if y_TKH is None else y_TKH
    if y_TKH is None:
        return None
    used_TK = used(e)
    if used_TK is not None:
        weights_TK = weights_TK.masked_fill(~used_TK, 0)
    again_TH = (weights_TK[..., None] * y_TKH).sum(1)
    if deviation(again_TH, e.a.values["combined"]) > max(e.tolerance, 1e-9):
        return None
    return y_TKH, weights_TK, ids_TK


def _weighed(y_TKH: Tensor, weights_TK: Tensor) -> Tensor:
    return (weights_TK.to(y_TKH)[..., None] * y_TKH).sum(1)


@cause(
    "weights ignored", "combined",
    fix="The experts' outputs are summed as they are: multiply each by its weight.",
)  # fmt: skip
def _unweighed(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        yield parts[0].sum(1)


@cause(
    "plain mean of the experts", "combined",
    fix="The weights do not enter: the experts' outputs are averaged over the choices.",
)  # fmt: skip
def _mean(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        y_TKH, weights_TK, _ = parts
        yield y_TKH.mean(1)
        yield y_TKH.sum(1) / (weights_TK != 0).sum(-1, keepdim=True).clamp(min=1)


@cause(
    "divided by the number of choices", "combined",
    fix="The weighed outputs are summed over the choices, not averaged.",
)  # fmt: skip
def _divided(e: Evidence) -> Iterator[Tensor]:
    ids_TK = value(e, "indices")
    if ids_TK is not None and ids_TK.shape[1] > 1:
        yield e.wanted / ids_TK.shape[1]


@cause(
    "weights applied twice", "combined",
    fix="Each output is weighed twice, by the bank and by whoever sums up.",
)  # fmt: skip
def _twice(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        yield _weighed(parts[0], parts[1].square())


@cause(
    "weights renormalised by the experts", "combined",
    fix="The bank divides the weights by their sum; the router decides on that.",
)  # fmt: skip
def _renormalised(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        yield _weighed(parts[0], normalised(parts[1]))


@cause(
    "weights softmaxed by the experts", "combined",
    fix="The bank takes a softmax of what are weights already.",
)  # fmt: skip
def _softmaxed(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        yield _weighed(parts[0], parts[1].softmax(-1))


@cause(
    "weights of other slots", "combined",
    fix="Outputs and weights are in different orders of slots: sort both, or neither.",
)  # fmt: skip
def _other_slots(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        y_TKH, weights_TK, ids_TK = parts
        yield _weighed(y_TKH, weights_TK.flip(-1))
        for shift in range(1, weights_TK.shape[1]):
            yield _weighed(y_TKH, weights_TK.roll(shift, -1))
        order_TK = ids_TK.argsort(-1)  # outputs by expert, weights by choice, and the reverse
        yield _weighed(y_TKH.take_along_dim(order_TK[..., None], 1), weights_TK)
        yield _weighed(y_TKH, weights_TK.gather(1, order_TK))


@cause(
    "routing weight on the expert's input", "combined",
    fix="The weight multiplies what an expert returns, not what it is given.",
)  # fmt: skip
def _input(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        _, weights_TK, ids_TK = parts
        y_TKH = _through_experts(e, weights_TK[..., None] * per_choice(e.x_TH, ids_TK))
        if y_TKH is not None:
            yield y_TKH.sum(1)


@cause(
    "routing weight on the expert's output", "combined",
    fix="The weight multiplies what an expert is given, not what it returns (Llama 4).",
)  # fmt: skip
def _output(e: Evidence) -> Iterator[Tensor]:
    ids_TK, weights_TK = value(e, "indices"), value(e, "weights")
    if ids_TK is None or weights_TK is None:
        return
    rows_TKH = per_choice(e.x_TH, ids_TK)
    weighed_TKH = _through_experts(e, weights_TK[..., None] * rows_TKH)
    y_TKH = _through_experts(e, rows_TKH)
    if weighed_TKH is None or y_TKH is None:
        return
    if deviation(weighed_TKH.sum(1), e.wanted) <= max(e.tolerance, 1e-9):
        yield _weighed(y_TKH, weights_TK)


@cause(
    "one of two equal ids dropped", "combined",
    fix="A token that names one expert twice gets both shares: a (T, E) mask, or a scatter "
    "without adding, keeps one.",
)  # fmt: skip
def _duplicate(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        y_TKH, weights_TK, ids_TK = parts
        for again_TK in (repeats(ids_TK), repeats(ids_TK.flip(-1)).flip(-1)):
            yield _weighed(y_TKH, weights_TK.masked_fill(again_TK, 0))


@cause(
    "one slot is lost", "combined",
    fix="All choices of a token are summed, the first and the last too.",
)  # fmt: skip
def _lost(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        y_TKH, weights_TK, _ = parts
        if weights_TK.shape[1] > 1:
            for slot in range(weights_TK.shape[1]):
                without = weights_TK.clone()
                without[:, slot] = 0
                yield _weighed(y_TKH, without)


@cause(
    "overwritten instead of added", "combined",
    fix="Each token keeps its last expert's share alone: add into the rows (index_add, "
    "accumulate=True).",
)  # fmt: skip
def _overwritten(e: Evidence) -> Iterator[Tensor]:
    if parts := _outputs(e):
        y_TKH, weights_TK, ids_TK = parts
        by_expert_T1 = ids_TK.masked_fill(weights_TK == 0, -1).argmax(-1, keepdim=True)
        last_T1 = torch.full_like(by_expert_T1, ids_TK.shape[1] - 1)
        for slot_T1 in (by_expert_T1, last_T1):
            alone_TK = torch.zeros_like(weights_TK).scatter(
                1, slot_T1, weights_TK.gather(1, slot_T1)
            )
            yield _weighed(y_TKH, alone_TK)


@cause(
    "dropped tokens passed through", "combined",
    fix="A token without a place contributes nothing here; the residual around the layer carries "
    "it on.",
)  # fmt: skip
def _passed(e: Evidence) -> Iterator[Tensor]:
    used_TK = used(e)
    if used_TK is not None:
        yield torch.where(used_TK.any(-1, keepdim=True), e.wanted, e.x_TH)


@cause(
    "dropped choices carried out", "combined",
    fix="A choice that found no place adds nothing.",
)  # fmt: skip
def _carried_out(e: Evidence) -> Iterator[Tensor]:
    ids_TK, weights_TK = value(e, "indices"), value(e, "weights")
    if ids_TK is None or weights_TK is None or bool((ids_TK < 0).any()) or not _outputs(e):
        return
    whole = {name: one for name, one in e.a.values.items() if name != "dispatched"}
    y_TKH = _through_experts(_with_values(e, whole), per_choice(e.x_TH, ids_TK))
    if y_TKH is not None:
        yield _weighed(y_TKH, weights_TK)


def _with_values(e: Evidence, values: dict[str, Tensor]) -> Evidence:
    from dataclasses import replace

    return replace(e, a=replace(e.a, values=values))


@cause(
    "down bias not weighed", "combined",
    fix="The down-projection's bias belongs to the expert's output, and is weighed with it.",
)  # fmt: skip
def _bias_unweighed(e: Evidence) -> Iterator[Tensor]:
    bias_EH, parts = e.parameters.get("down_bias"), _outputs(e)
    if bias_EH is not None and parts:
        _, weights_TK, ids_TK = parts
        bias_TKH = only_used(e, rows_of(bias_EH, ids_TK))
        yield e.wanted + ((1 - weights_TK)[..., None] * bias_TKH).sum(1)


@cause(
    "shared experts missing", "output",
    fix="Add what the shared experts return.",
)  # fmt: skip
def _no_shared(e: Evidence) -> Iterator[Tensor]:
    routed_TH = value(e, "combined")
    if routed_TH is not None:
        yield routed_TH


@cause(
    "shared experts added twice", "output",
    fix="Block and model both add the shared experts.",
)  # fmt: skip
def _shared_twice(e: Evidence) -> Iterator[Tensor]:
    routed_TH = value(e, "combined")
    if routed_TH is not None:
        yield 2 * e.wanted - routed_TH


@cause(
    "routed experts missing", "output",
    fix="Only the shared experts are returned: add the routed ones.",
)  # fmt: skip
def _no_routed(e: Evidence) -> Iterator[Tensor]:
    routed_TH = value(e, "combined")
    if routed_TH is not None:
        yield e.wanted - routed_TH


@cause(
    "shared experts' gate missing", "output",
    fix="What the shared experts return is multiplied by the sigmoid of a gate of its own.",
)  # fmt: skip
def _shared_ungated(e: Evidence) -> Iterator[Tensor]:
    routed_TH, gate_1H = value(e, "combined"), _shared_gate(e)
    if routed_TH is not None and gate_1H is not None:
        logit_T1 = e.x_TH @ gate_1H.T
        shared_TH = (e.wanted - routed_TH) / logit_T1.sigmoid()
        yield from (routed_TH + shared_TH, routed_TH + shared_TH * logit_T1)


def _shared_gate(e: Evidence) -> Tensor | None:
    for name, weight in e.parameters.items():
        if "shared" in name and "gate" in name and tuple(weight.shape) == (1, e.x_TH.shape[1]):
            return weight
    return None


@cause(
    "residual added inside", "output", "combined",
    fix="The layer returns its own share; what x adds is the model's business.",
)  # fmt: skip
def _residual(e: Evidence) -> Iterator[Tensor]:
    yield e.wanted + e.x_TH


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
    _carried_out,
    _bias_unweighed,
)

OUTPUT = (_no_shared, _shared_twice, _no_routed, _shared_ungated, _residual)
