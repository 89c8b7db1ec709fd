"""Causes inside the experts: up-projection, activation, down-projection.

Letters: T tokens, E experts, K choices a token, H hidden, J = 2I up-projection width, I expert
width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from moetk.equivalence.cause import Cause, Evidence, cause, deviation
from moetk.equivalence.causes.values import (
    concatenated,
    halves_swapped,
    interleaved,
    only_used,
    per_choice,
    rows_of,
    through,
    value,
)
from moetk.experts import ClampedGated, GptOssGated, Plain

# Wherever the up-projection's width shows: its place there.
WIDTH = {"up": -1, "grad up": -1, "grad up_weight": 1, "grad up_bias": 1}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh-gelu": lambda t: F.gelu(t, approximate="tanh"),
    "quick gelu": lambda t: t * torch.sigmoid(1.702 * t),
    "relu": torch.relu,
    "squared relu": lambda t: torch.relu(t).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@cause(
    "gate and up swapped", *WIDTH, "activation",
    fix="The first half of the up-projection is the gate, which goes through the activation; the "
    "second half is multiplied in. Swap the halves.",
)  # fmt: skip
def _swapped(e: Evidence) -> Iterator[Tensor]:
    if e.stage in WIDTH:
        yield halves_swapped(e.wanted, WIDTH[e.stage])
    else:
        yield from _activated(e, halves_swapped)


@cause(
    "interleaved read as concatenated", *WIDTH, "activation",
    fix="In the stored weight gate and up rows alternate: read them as [::2] and [1::2].",
)  # fmt: skip
def _read_as_concatenated(e: Evidence) -> Iterator[Tensor]:
    if e.stage in WIDTH:
        yield interleaved(e.wanted, WIDTH[e.stage])
    else:
        yield from _activated(e, interleaved)


@cause(
    "concatenated read as interleaved", *WIDTH, "activation",
    fix="In the stored weight all gate rows come before all up rows: read them as two halves.",
)  # fmt: skip
def _read_as_interleaved(e: Evidence) -> Iterator[Tensor]:
    if e.stage in WIDTH:
        yield concatenated(e.wanted, WIDTH[e.stage])
    else:
        yield from _activated(e, concatenated)


def hidden(e: Evidence) -> Tensor | None:
    """What the reference's activation sees: up plus its bias, (T, K, J)."""
    up_TKJ, ids_TK = value(e, "up"), value(e, "indices")
    if up_TKJ is None or ids_TK is None:
        return None
    bias_EJ = e.parameters.get("up_bias")
    return up_TKJ if bias_EJ is None else up_TKJ + rows_of(bias_EJ, ids_TK)


def _apply(e: Evidence, hidden_TKJ: Tensor, activation: Callable[..., Tensor]) -> Tensor:
    parts = (
        (hidden_TKJ,)
        if isinstance(e.facts.get("activation"), Plain)
        else hidden_TKJ.chunk(2, -1)
    )  # fmt: skip
    return only_used(e, activation(*parts))


def _understood(e: Evidence) -> Tensor | None:
    """`hidden`, where the activation that the reference names makes its stage of it."""
    hidden_TKJ, activation = hidden(e), e.facts.get("activation")
    if hidden_TKJ is None or activation is None or "activation" not in e.a.values:
        return None
    again = _apply(e, hidden_TKJ, activation)
    return hidden_TKJ if deviation(again, e.a.values["activation"]) <= e.tolerance else None


def _activated(e: Evidence, change: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    hidden_TKJ = _understood(e)
    if hidden_TKJ is not None:
        yield _apply(e, change(hidden_TKJ), e.facts["activation"])


def _with(e: Evidence, *activations: Callable[..., Tensor]) -> Iterator[Tensor]:
    """Another activation of the same hidden values."""
    hidden_TKJ = _understood(e)
    if hidden_TKJ is not None:
        yield from (_apply(e, hidden_TKJ, activation) for activation in activations)


@cause(
    "up bias missing", "activation",
    fix="Add the up-projection's bias before the activation.",
)  # fmt: skip
def _up_bias_missing(e: Evidence) -> Iterator[Tensor]:
    if "up_bias" in e.parameters:
        yield from _activated(e, lambda _: e.a.values["up"])


@cause(
    "up bias of another expert", "activation",
    fix="Each row takes the bias of its own expert: rows and biases are in different orders.",
)  # fmt: skip
def _up_bias_moved(e: Evidence) -> Iterator[Tensor]:
    bias_EJ, ids_TK = e.parameters.get("up_bias"), value(e, "indices")
    if bias_EJ is not None and ids_TK is not None:
        for moved_EJ in _other_rows(bias_EJ):
            moved_TKJ = rows_of(moved_EJ, ids_TK)
            yield from _activated(e, lambda _, add=moved_TKJ: e.a.values["up"] + add)  # type: ignore[misc]


def _other_rows(values_EN: Tensor) -> Iterator[Tensor]:
    """Each expert takes its neighbour's row, the opposite's, or all the first one's."""
    yield from (values_EN.roll(1, 0), values_EN.roll(-1, 0), values_EN.flip(0))
    yield values_EN[:1].expand_as(values_EN)


def _instead(name: str) -> Cause:
    other = ACTIVATIONS[name]

    @cause(
        f"activation is {name}", "activation",
        fix="The two use different activation functions: compare hidden_act.",
    )  # fmt: skip
    def predict(e: Evidence) -> Iterator[Tensor]:
        own = e.facts.get("activation")
        if isinstance(own, Plain):
            yield from _with(e, other)
        elif isinstance(own, ClampedGated):
            yield from _with(e, ClampedGated(own.limit, other))
        else:
            yield from _with(e, lambda gate, up: other(gate) * up)

    return predict


@cause(
    "clamp missing", "activation",
    fix="Gate and up are clamped to the limit before they are multiplied.",
)  # fmt: skip
def _no_clamp(e: Evidence) -> Iterator[Tensor]:
    own = e.facts.get("activation")
    if isinstance(own, ClampedGated):
        yield from _with(e, ClampedGated(torch.inf, own.act))
    if isinstance(own, GptOssGated):
        yield from _with(e, GptOssGated(own.alpha, torch.inf))


@cause(
    "gate clamped from below too", "activation",
    fix="The gate is clamped from above only; up is clamped on both sides.",
)  # fmt: skip
def _gate_clamped(e: Evidence) -> Iterator[Tensor]:
    own = e.facts.get("activation")
    if isinstance(own, ClampedGated | GptOssGated):
        yield from _with(e, lambda gate, up: own(gate.clamp(min=-own.limit), up))


@cause(
    "up not clamped from below", "activation",
    fix="The gate is clamped from above only; up is clamped on both sides.",
)  # fmt: skip
def _up_unclamped(e: Evidence) -> Iterator[Tensor]:
    own = e.facts.get("activation")
    if isinstance(own, ClampedGated):
        top = own.limit
        yield from _with(e, lambda gate, up: own.act(gate.clamp(max=top)) * up.clamp(max=top))
    if isinstance(own, GptOssGated):
        yield from _with(e, lambda gate, up: (up.clamp(max=own.limit) + 1) * _glu(own, gate))


def _glu(own: GptOssGated, gate: Tensor) -> Tensor:
    gate = gate.clamp(max=own.limit)
    return gate * torch.sigmoid(own.alpha * gate)


@cause(
    "up is not shifted by one", "activation",
    fix="gpt-oss multiplies by up + 1.",
)  # fmt: skip
def _no_one(e: Evidence) -> Iterator[Tensor]:
    own = e.facts.get("activation")
    if isinstance(own, GptOssGated):
        yield from _with(e, lambda gate, up: up.clamp(-own.limit, own.limit) * _glu(own, gate))


@cause(
    "alpha missing in the gate", "activation",
    fix="gpt-oss gates with gate sigmoid(alpha gate), alpha = 1.702.",
)  # fmt: skip
def _no_alpha(e: Evidence) -> Iterator[Tensor]:
    own = e.facts.get("activation")
    if isinstance(own, GptOssGated):
        yield from _with(e, GptOssGated(1.0, own.limit))


@cause(
    "up is not multiplied in", "activation",
    fix="A gated activation is act(gate) * up; here it is act(gate) alone.",
)  # fmt: skip
def _gate_alone(e: Evidence) -> Iterator[Tensor]:
    own = e.facts.get("activation")
    if own is not None and not isinstance(own, Plain):
        one = 0.0 if isinstance(own, GptOssGated) else 1.0
        yield from _with(e, lambda gate, up: own(gate, torch.full_like(up, one)))


@cause(
    "gate without its activation", "activation",
    fix="A gated activation is act(gate) * up; here it is gate * up.",
)  # fmt: skip
def _bilinear(e: Evidence) -> Iterator[Tensor]:
    own = e.facts.get("activation")
    if own is not None and not isinstance(own, Plain):
        yield from _with(e, lambda gate, up: gate * up)


@cause(
    "weights of another expert", "up", "expert_output",
    fix="The rows went through the matrices of other experts: look at how ids become places "
    "(sorting, offsets, expert placement), and at the order of a loaded checkpoint.",
)  # fmt: skip
def _other_expert(e: Evidence) -> Iterator[Tensor]:
    for rows_TKN, weight_EMN, bias_EM, ids_TK in _product(e):
        answers_E: dict[int, int] = {}
        if e.found.shape != e.wanted.shape or len(weight_EMN) > 512:
            return
        for expert in ids_TK[ids_TK >= 0].unique().tolist():
            here_TK = ids_TK == expert
            all_ENM = torch.einsum("nh,emh->enm", rows_TKN[here_TK], weight_EMN)
            if bias_EM is not None:
                all_ENM = all_ENM + bias_EM[:, None]
            apart_E = (all_ENM - e.found[here_TK].to(all_ENM)).flatten(1).norm(dim=1)
            answers_E[expert] = int(apart_E.argmin())
        moved_E = torch.arange(len(weight_EMN), device=ids_TK.device)
        for expert, other in answers_E.items():
            moved_E[expert] = other
        out_TKM = through(rows_TKN, weight_EMN[moved_E], ids_TK)
        if bias_EM is not None:
            out_TKM = out_TKM + rows_of(bias_EM[moved_E], ids_TK)
        yield only_used(e, out_TKM)


@cause(
    "expert weight transposed", "up", "expert_output",
    fix="The matrix fits both ways round: compare the layouts, (E, out, in) or (E, in, out).",
)  # fmt: skip
def _transposed(e: Evidence) -> Iterator[Tensor]:
    for rows_TKN, weight_EMN, bias_EM, ids_TK in _product(e):
        if weight_EMN.shape[1] == weight_EMN.shape[2]:
            out_TKM = through(rows_TKN, weight_EMN.transpose(1, 2), ids_TK)
            yield only_used(e, out_TKM if bias_EM is None else out_TKM + rows_of(bias_EM, ids_TK))
    yield from _transposed_halves(e)


def _transposed_halves(e: Evidence) -> Iterator[Tensor]:
    """Gate and up each transposed, where H = I."""
    for rows_TKN, weight_EMN, _, ids_TK in _product(e):
        if e.stage == "up" and weight_EMN.shape[1] == 2 * weight_EMN.shape[2]:
            parts = (part.transpose(1, 2) for part in weight_EMN.chunk(2, 1))
            yield only_used(e, torch.cat([through(rows_TKN, w, ids_TK) for w in parts], -1))


def _product(e: Evidence) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """Rows, matrices and bias of this stage, and who takes them."""
    ids_TK = value(e, "indices")
    weight_EMN = e.parameters.get("up_weight" if e.stage == "up" else "down_weight")
    if ids_TK is None or weight_EMN is None:
        return
    rows_TKN, bias_EM = value(e, "activation"), e.parameters.get("down_bias")
    if e.stage == "up":
        rows_TKN, bias_EM = per_choice(e.x_TH, ids_TK), None
    if rows_TKN is not None and rows_TKN.shape[-1] == weight_EMN.shape[-1]:
        yield rows_TKN, weight_EMN, bias_EM, ids_TK


@cause(
    "routing weight on the expert's input", "up",
    fix="The weight multiplies what an expert returns, not what it is given.",
)  # fmt: skip
def _weighed_input(e: Evidence) -> Iterator[Tensor]:
    weights_TK = value(e, "weights")
    if weights_TK is not None:
        yield e.wanted * weights_TK[..., None]


@cause(
    "down bias missing", "expert_output",
    fix="Add the down-projection's bias to what the expert returns, before it is weighed.",
)  # fmt: skip
def _down_bias_missing(e: Evidence) -> Iterator[Tensor]:
    yield from _with_down_bias(e, lambda bias_EH: torch.zeros_like(bias_EH))


@cause(
    "down bias added twice", "expert_output",
    fix="The bias is in the product already: add it once.",
)  # fmt: skip
def _down_bias_twice(e: Evidence) -> Iterator[Tensor]:
    yield from _with_down_bias(e, lambda bias_EH: 2 * bias_EH)


@cause(
    "down bias of another expert", "expert_output",
    fix="Each row takes the bias of its own expert: rows and biases are in different orders.",
)  # fmt: skip
def _down_bias_moved(e: Evidence) -> Iterator[Tensor]:
    if "down_bias" in e.parameters:
        for moved_EH in _other_rows(e.parameters["down_bias"]):
            yield from _with_down_bias(e, lambda _, moved=moved_EH: moved)  # type: ignore[misc]


def _with_down_bias(e: Evidence, change: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    bias_EH, ids_TK = e.parameters.get("down_bias"), value(e, "indices")
    if bias_EH is not None and ids_TK is not None:
        yield e.wanted + only_used(e, rows_of(change(bias_EH) - bias_EH, ids_TK))


EXPERTS = (
    _swapped,
    _read_as_concatenated,
    _read_as_interleaved,
    _up_bias_missing,
    _up_bias_moved,
    *(_instead(name) for name in ACTIVATIONS),
    _no_clamp,
    _gate_clamped,
    _up_unclamped,
    _no_one,
    _no_alpha,
    _gate_alone,
    _bilinear,
    _other_expert,
    _transposed,
    _weighed_input,
    _down_bias_missing,
    _down_bias_twice,
    _down_bias_moved,
)
