"""Causes in the experts' two products and their biases.

Letters: T tokens, E experts, K choices a token, H hidden, J = 2I up-projection width, I expert
width, N and M the widths of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moetk.equivalence.cause import Cause, Evidence, cause
from moetk.equivalence.causes.chain import CHAIN, otherwise, reference_at, with_parameters
from moetk.equivalence.causes.values import (
    concatenated,
    halves_swapped,
    interleaved,
    per_choice,
    value,
)

# Wherever a gradient shows the up-projection's width, and its dimension there.
WIDTH = {"grad up": -1, "grad up_weight": 1, "grad up_bias": 1}
AFTER_UP = CHAIN[CHAIN.index("activation") :]
AFTER_ACTIVATION = CHAIN[CHAIN.index("expert_output") :]


def _columns(name: str, order: Callable[..., Tensor], *, fix: str) -> Cause:
    """Gate and up columns in another order: in the weights, or where they are taken apart."""

    @cause(name, *CHAIN, *WIDTH, fix=fix)
    def predict(e: Evidence) -> Iterator[Tensor]:
        if e.stage in WIDTH:
            if e.wanted.shape[WIDTH[e.stage]] % 2 == 0:
                yield order(e.wanted, WIDTH[e.stage])
            return
        weight_EJH, bias_EJ = e.parameters.get("up_weight"), e.parameters.get("up_bias")
        if weight_EJH is None or weight_EJH.shape[1] % 2:
            return
        worlds = [with_parameters(e, up_weight=order(weight_EJH, 1))]
        if bias_EJ is not None:
            biased = {"up_bias": order(bias_EJ, 1)}
            worlds.append(with_parameters(e, up_weight=order(weight_EJH, 1), **biased))
        for world in worlds:
            predicted = reference_at(world, e.stage)
            if predicted is not None:
                yield predicted

    return predict


def _by_expert(
    e: Evidence, rows_TKN: Tensor | None, weight_EMN: Tensor, bias_EM: Tensor | None
) -> Tensor | None:
    """(E,) which expert's matrix the rows of each expert have been through, by what was found."""
    ids_TK = value(e, "indices")
    if ids_TK is None or rows_TKN is None or e.found.shape != (*ids_TK.shape, weight_EMN.shape[1]):
        return None
    moved_E = torch.arange(len(weight_EMN), device=ids_TK.device)
    for expert in range(len(weight_EMN)):
        here_TK = ids_TK == expert
        if bool(here_TK.any()):
            answers_EM = weight_EMN @ rows_TKN[here_TK][0]
            answers_EM = answers_EM if bias_EM is None else answers_EM + bias_EM
            apart_E = (answers_EM - e.found[here_TK][0].to(answers_EM)).norm(dim=-1)
            moved_E[expert] = apart_E.argmin()
    return moved_E


def _exchanges(e: Evidence) -> Iterator[Tensor]:
    """(E,) whose parameters each expert has: as read off the stage, or a usual mistake."""
    up_EJH, down_EHI = e.parameters["up_weight"], e.parameters["down_weight"]
    ids_TK, moved_E = value(e, "indices"), None
    if ids_TK is not None and e.stage == "up":
        moved_E = _by_expert(e, per_choice(e.x_TH, ids_TK), up_EJH, None)
    if e.stage == "expert_output":
        rows_TKI = value(e, "activation")
        moved_E = _by_expert(e, rows_TKI, down_EHI, e.parameters.get("down_bias"))
    if moved_E is not None and not torch.equal(moved_E, torch.arange(len(up_EJH)).to(moved_E)):
        yield moved_E
    yield from _neighbours(up_EJH)


def _neighbours(values_EN: Tensor) -> Iterator[Tensor]:
    order_E = torch.arange(len(values_EN), device=values_EN.device)
    yield from (order_E.roll(1), order_E.roll(-1), order_E.flip(0), torch.zeros_like(order_E))


@otherwise(
    "weights of another expert",
    *CHAIN,
    fix="The rows went through the matrices of other experts: look at how ids become places "
    "(sorting, offsets, expert placement), and at the order of a loaded checkpoint.",
)
def _other_expert(e: Evidence) -> Iterator[Evidence]:
    if not {"up_weight", "down_weight"} <= e.parameters.keys():
        return
    whole = {name: e.parameters[name] for name in _BANK if name in e.parameters}
    up = {name: one for name, one in whole.items() if name.startswith("up")}
    down = {name: one for name, one in whole.items() if name.startswith("down")}
    # What is projected down comes after "up" and "activation", and cannot have moved them.
    parts = (whole, up, down) if e.stage in AFTER_ACTIVATION else (up,)
    for moved_E in _exchanges(e):
        for part in parts:
            yield with_parameters(e, **{name: one[moved_E] for name, one in part.items()})


_BANK = ("up_weight", "down_weight", "up_bias", "down_bias")


@otherwise(
    "expert weight transposed",
    *CHAIN,
    fix="The matrix fits both ways round: compare the layouts, (E, out, in) or (E, in, out).",
)
def _transposed(e: Evidence) -> Iterator[Evidence]:
    up_EJH, down_EHI = e.parameters.get("up_weight"), e.parameters.get("down_weight")
    if up_EJH is not None and up_EJH.shape[1] == up_EJH.shape[2]:
        yield with_parameters(e, up_weight=up_EJH.transpose(1, 2))
    if up_EJH is not None and up_EJH.shape[1] == 2 * up_EJH.shape[2]:
        halves = [half.transpose(1, 2) for half in up_EJH.chunk(2, 1)]
        yield with_parameters(e, up_weight=torch.cat(halves, 1))
    if down_EHI is not None and down_EHI.shape[1] == down_EHI.shape[2]:
        yield with_parameters(e, down_weight=down_EHI.transpose(1, 2))


def _bias_missing(name: str, parameter: str, stages: tuple[str, ...]) -> Cause:
    @otherwise(
        f"{name} bias missing",
        *stages,
        fix=f"Add the {name}-projection's bias to its product.",
    )
    def worlds(e: Evidence) -> Iterator[Evidence]:
        if parameter in e.parameters:
            yield with_parameters(e, **{parameter: torch.zeros_like(e.parameters[parameter])})

    return worlds


def _bias_twice(name: str, parameter: str, stages: tuple[str, ...]) -> Cause:
    @otherwise(
        f"{name} bias added twice",
        *stages,
        fix="The bias is in the product already: add it once.",
    )
    def worlds(e: Evidence) -> Iterator[Evidence]:
        if parameter in e.parameters:
            yield with_parameters(e, **{parameter: 2 * e.parameters[parameter]})

    return worlds


def _bias_moved(name: str, parameter: str, stages: tuple[str, ...]) -> Cause:
    @otherwise(
        f"{name} bias of another expert",
        *stages,
        fix="Each row takes the bias of its own expert: rows and biases are in different orders.",
    )
    def worlds(e: Evidence) -> Iterator[Evidence]:
        bias_EN = e.parameters.get(parameter)
        if bias_EN is not None:
            for moved_E in _neighbours(bias_EN):
                yield with_parameters(e, **{parameter: bias_EN[moved_E]})

    return worlds


EXPERTS = (
    _columns(
        "gate and up swapped",
        halves_swapped,
        fix="The first half of the up-projection is the gate, which goes through the activation; "
        "the second half is multiplied in. Swap the halves.",
    ),
    _columns(
        "interleaved read as concatenated",
        interleaved,
        fix="In the stored weight gate and up rows alternate: read them as [::2] and [1::2].",
    ),
    _columns(
        "concatenated read as interleaved",
        concatenated,
        fix="In the stored weight all gate rows come before all up rows: read them as two halves.",
    ),
    _other_expert,
    _transposed,
    _bias_missing("up", "up_bias", AFTER_UP),
    _bias_twice("up", "up_bias", AFTER_UP),
    _bias_moved("up", "up_bias", AFTER_UP),
    _bias_missing("down", "down_bias", AFTER_ACTIVATION),
    _bias_twice("down", "down_bias", AFTER_ACTIVATION),
    _bias_moved("down", "down_bias", AFTER_ACTIVATION),
)
