"""Causes in what is added to the routed experts' sum. Letters: T tokens, H hidden."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from moetk.equivalence.cause import Evidence, cause
from moetk.equivalence.causes.values import value


@cause(
    "shared experts missing",
    "output",
    fix="Add what the shared experts return.",
)
def _no_shared(e: Evidence) -> Iterator[Tensor]:
    routed_TH = value(e, "combined")
    if routed_TH is not None:
        yield routed_TH


@cause(
    "shared experts added twice",
    "output",
    fix="Block and model both add the shared experts.",
)
def _shared_twice(e: Evidence) -> Iterator[Tensor]:
    routed_TH = value(e, "combined")
    if routed_TH is not None:
        yield 2 * e.wanted - routed_TH


@cause(
    "routed experts missing",
    "output",
    fix="Only the shared experts are returned: add the routed ones.",
)
def _no_routed(e: Evidence) -> Iterator[Tensor]:
    routed_TH = value(e, "combined")
    if routed_TH is not None:
        yield e.wanted - routed_TH


@cause(
    "shared experts' gate missing",
    "output",
    fix="What the shared experts return is multiplied by the sigmoid of a gate of its own.",
)
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
    "residual added inside",
    "output",
    "combined",
    fix="The layer returns its own share; what x adds is the model's business.",
)
def _residual(e: Evidence) -> Iterator[Tensor]:
    yield e.wanted + e.x_TH


OUTPUT = (_no_shared, _shared_twice, _no_routed, _shared_ungated, _residual)
