"""From x through the experts to their sum, as the reference computes it; and worlds in which it
would have been otherwise.

Letters: T tokens, K choices a token, H hidden, J = 2I up-projection width, I expert width, E
experts, N and M the widths of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from moetk.equivalence.cause import Cause, Evidence, cause
from moetk.equivalence.causes.values import only_used, per_choice, rows_of, through, used, value
from moetk.experts import Plain

CHAIN = ("up", "activation", "expert_output", "combined")
Activate = Callable[..., Tensor]


def reference_at(e: Evidence, stage: str) -> Tensor | None:
    """A stage of the chain as the reference shows it, else computed from the stages before it and
    the parameters; None where those are not known."""
    shown = value(e, stage)
    if shown is not None:
        return shown
    if stage == "up":
        return _projected(e)
    before = CHAIN[CHAIN.index(stage) - 1]
    earlier = reference_at(e, before)
    return None if earlier is None else _NEXT[before](e, earlier)


def onward(e: Evidence, stage: str, changed: Tensor, to: str) -> Tensor | None:
    """What a value `changed` at `stage` makes of the later stage `to`, all else being right."""
    return reference_at(_without(e, stage, {stage: changed}), to)


def with_parameters(e: Evidence, **changed: Tensor) -> Evidence:
    """A world in which the reference had other parameters."""
    return replace(_without(e, "up"), parameters={**e.parameters, **changed})


def with_activation(e: Evidence, activation: Activate) -> Evidence:
    """A world in which its activation was another."""
    return replace(_without(e, "activation"), facts={**e.facts, "activation": activation})


def _without(e: Evidence, first: str, instead: dict[str, Tensor] | None = None) -> Evidence:
    """The reference without what it shows of the chain from `first` on."""
    unknown = CHAIN[CHAIN.index(first) :]
    kept = {name: one for name, one in e.a.values.items() if name not in unknown}
    return replace(e, a=replace(e.a, values={**kept, **(instead or {})}))


def otherwise(
    name: str, *stages: str, fix: str
) -> Callable[[Callable[[Evidence], Iterator[Evidence]]], Cause]:
    """A cause of a function that yields worlds; what the reference would read there is what the
    defect reads."""

    def make(worlds: Callable[[Evidence], Iterator[Evidence]]) -> Cause:
        @cause(name, *stages, fix=fix)
        def predict(e: Evidence) -> Iterator[Tensor]:
            for world in worlds(e):
                predicted = reference_at(world, e.stage)
                if predicted is not None:
                    yield predicted

        return predict

    return make


def weighed(y_TKH: Tensor, weights_TK: Tensor) -> Tensor:
    """(T, H): the sum over a token's choices."""
    return (weights_TK.to(y_TKH)[..., None] * y_TKH).sum(1)


def used_weights(e: Evidence) -> Tensor | None:
    """(T, K), 0 at choices that are not carried out."""
    weights_TK, used_TK = value(e, "weights"), used(e)
    if weights_TK is None or used_TK is None:
        return weights_TK
    return weights_TK.masked_fill(~used_TK, 0)


def hidden(e: Evidence) -> Tensor | None:
    """What the reference's activation sees: up plus its bias, (T, K, J)."""
    up_TKJ = reference_at(e, "up")
    return None if up_TKJ is None else _biased(e, up_TKJ, "up_bias")


def _biased(e: Evidence, rows_TKN: Tensor, name: str) -> Tensor:
    bias_EN, ids_TK = e.parameters.get(name), value(e, "indices")
    return rows_TKN if bias_EN is None or ids_TK is None else rows_TKN + rows_of(bias_EN, ids_TK)


def _projected(e: Evidence) -> Tensor | None:
    ids_TK, weight_EJH = value(e, "indices"), e.parameters.get("up_weight")
    if ids_TK is None or weight_EJH is None or weight_EJH.shape[-1] != e.x_TH.shape[-1]:
        return None
    return only_used(e, through(per_choice(e.x_TH, ids_TK), weight_EJH, ids_TK))


def _activation(e: Evidence, up_TKJ: Tensor) -> Tensor | None:
    own, hidden_TKJ = e.facts.get("activation"), _biased(e, up_TKJ, "up_bias")
    if own is None:
        return None
    parts = (hidden_TKJ,) if isinstance(own, Plain) else hidden_TKJ.chunk(2, -1)
    return only_used(e, own(*parts))


def _output(e: Evidence, inner_TKI: Tensor) -> Tensor | None:
    ids_TK, down_EHI = value(e, "indices"), e.parameters.get("down_weight")
    if ids_TK is None or down_EHI is None or down_EHI.shape[-1] != inner_TKI.shape[-1]:
        return None
    return only_used(e, _biased(e, through(inner_TKI, down_EHI, ids_TK), "down_bias"))


def _sum(e: Evidence, y_TKH: Tensor) -> Tensor | None:
    weights_TK = used_weights(e)
    return None if weights_TK is None else weighed(y_TKH, weights_TK)


_NEXT = {"up": _activation, "activation": _output, "expert_output": _sum}
