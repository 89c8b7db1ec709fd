"""Defects in backward: forward agrees, to the bit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from moetk.experts import ClampedGated, GptOssGated
from moetk.kernels.selection import gather, normalise, softmax_over
from moetk.losses import RouterZLoss
from tests.equivalence.planted import Planted
from tests.equivalence.planted_layers import Wrong, layer
from tests.equivalence.steps import (
    GptOss,
    bank,
    inputs,
    loop,
    mixtral,
    router,
    routing,
    v3,
    with_parameters,
)


class _Backward(torch.autograd.Function):
    """x; in backward, the gradient as `change` makes it."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


backward = _Backward.apply


def _planted(name, right, wrong, stage, cause, **more):
    return Planted(name, right, wrong, stage, (cause,), **more)


def _router(name, right, cause, stage="grad logits", **steps):
    return _planted(name, right, lambda: right(**steps), stage, cause)


def _experts(name, stage, cause, right=bank, routing=routing, **steps):
    wrong = lambda: loop(right(), **steps)  # noqa: E731
    return _planted(name, right, wrong, stage, cause, routing=routing)


class _MaskedClamp(torch.autograd.Function):
    """A clamp with a backward of its own: no gradient where the limit is reached."""

    @staticmethod
    def forward(ctx, x, low, high):
        ctx.save_for_backward(x)
        ctx.ends = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        low, high = ctx.ends
        inside = x < high if low is None else (x < high) & (x > low)
        return gradient * inside, None, None


def _masked_activation(self, gate, up):
    gate, up = _MaskedClamp.apply(gate, None, 3.0), _MaskedClamp.apply(up, -3.0, 3.0)
    return (up + 1) * gate * (1.702 * gate).sigmoid()


def _minimum_and_maximum(self, gate, up):
    """Each of two equal operands gets half."""
    limit = torch.full_like(up, 3.0)
    gate, up = torch.minimum(gate, limit), torch.maximum(torch.minimum(up, limit), -limit)
    return F.silu(gate) * up


def _straight_clamp(self, gate, up):
    gate = gate + (gate.clamp(max=3.0) - gate).detach()
    up = up + (up.clamp(-3.0, 3.0) - up).detach()
    return F.silu(gate) * up


def whole_numbers():
    """Products of these are whole numbers, and some are the limit itself."""
    return inputs().mul(2).round().clamp(-2, 2)


def _on_whole_numbers(activation):
    return lambda: with_parameters(
        bank(activation=activation), gate_up_proj=lambda w: w.mul(2).round().clamp(-1, 1)
    )


def _clamped(name, activation, cause, activate):
    right = _on_whole_numbers(activation)
    wrong = lambda: loop(right(), activate=activate)  # noqa: E731
    return _planted(name, right, wrong, "grad up", cause, x=whole_numbers, routing=routing)


def _first_slot_detached(self, x_TH, routing):
    weights_TK = torch.cat([routing.weights_TK[:, :1].detach(), routing.weights_TK[:, 1:]], -1)
    return super(type(self), self).forward(x_TH, replace(routing, weights_TK=weights_TK))


def _repeated_detached(self, x_TH, routing):
    again_TK = torch.zeros_like(routing.experts_TK, dtype=torch.bool)
    again_TK[:, 2] = routing.experts_TK[:, 2] == routing.experts_TK[:, 0]
    weights_TK = torch.where(again_TK, routing.weights_TK.detach(), routing.weights_TK)
    return super(type(self), self).forward(x_TH, replace(routing, weights_TK=weights_TK))


def _mean_over_rows(self, x_NH, expert):
    weight_JH = backward(self.gate_up_proj[expert], lambda g: g / len(x_NH))
    return x_NH @ weight_JH.T


def _straight_through_one(self, scores_TE, ids_TK, choice_TE, logits_TE):
    chosen_TK = gather(logits_TE, ids_TK)
    return softmax_over(logits_TE, ids_TK) + chosen_TK - chosen_TK.detach()


def _sum_detached(self, scores_TE, ids_TK, choice_TE, logits_TE):
    chosen_TK = gather(scores_TE, ids_TK)
    return chosen_TK / chosen_TK.sum(-1, keepdim=True).detach() * self.scale


def _division_skipped(self, scores_TE, ids_TK, choice_TE, logits_TE):
    chosen_TK = gather(scores_TE, ids_TK)
    return (chosen_TK + (normalise(chosen_TK) - chosen_TK).detach()) * self.scale


GRADIENTS = (
    _clamped("gpt-oss clamp masked", GptOssGated(limit=3.0), "gradient clipped at the clamp bound",
             _masked_activation),
    _clamped("clip that splits ties", ClampedGated(3.0), "gradient clipped at the clamp bound",
             _minimum_and_maximum),
    _clamped("clamp straight through", ClampedGated(3.0), "gradient passed through the clamp",
             _straight_clamp),
    _experts("first slot detached", "grad weights", "gradient of one slot missing",
             forward=_first_slot_detached),
    _experts("repeated id detached", "grad weights", "gradient of one of two equal ids missing",
             routing=partial(routing, duplicates=True), forward=_repeated_detached),
    _router("sum detached", v3, "sum of the renormalisation detached", "grad scores",
            weigh=_sum_detached),
    _router("division straight through", v3, "renormalisation skipped in backward", "grad scores",
            weigh=_division_skipped),
    _router("sigmoid straight through", v3, "score function skipped in backward",
            score=lambda self, l: l + (l.sigmoid() - l).detach()),
    _planted("weights detached", partial(layer, v3),
             lambda: layer(partial(v3, weigh=lambda self, s, i, c, l:
                                   normalise(gather(s.detach(), i), self.eps) * self.scale)),
             "grad logits", "no gradient: detached"),
    _router("weights of a bare router detached", v3, "no gradient: detached",
            weigh=lambda self, s, i, c, l: normalise(gather(s.detach(), i), self.eps) * self.scale),
    _planted("a gradient for the only choice", lambda: router(GptOss, {"top_k": 1}),
             lambda: router(GptOss, {"top_k": 1}, weigh=_straight_through_one), "grad logits",
             "gradient where there should be none"),
    _router("gradient reversed", mixtral, "gradient negated",
            score=lambda self, l: backward(l, torch.neg).softmax(-1)),
    _experts("divided by the world size", "grad expert_output", "gradient scaled by a constant",
             weigh=lambda self, y, w: backward(y * w[:, None], lambda g: g / 8)),
    _experts("mean over an expert's rows", "grad up_weight",
             "gradient scaled by a factor for each row", up=_mean_over_rows),
    _planted("loss without a gradient", lambda: layer(losses=[RouterZLoss(1e-3)]),
             lambda: layer(losses=[Wrong(RouterZLoss(1e-3), value=torch.Tensor.detach)]),
             "grad losses", "no gradient: detached"),
)  # fmt: skip
