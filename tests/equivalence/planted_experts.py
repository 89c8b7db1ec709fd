"""Defects in expert banks: a step of a loop over experts, or of a dense bank. The right part is
moetk's own bank.

A step is a method: up, up_bias, split, activate, down, down_bias, weigh, add, taken; of the dense
bank weights, outputs, combine.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from moetk.experts import ClampedGated, Gated, GptOssGated, Plain
from moetk.kernels.selection import normalise
from tests.equivalence.planted import Planted
from tests.equivalence.steps import E, H, bank, dense, loop, routing, with_parameters

BOTH = (torch.float32, torch.bfloat16)
plain_bank = partial(bank, activation=Plain(F.relu))
square_bank = partial(bank, H)
biased_bank = partial(bank, bias=True)
clamped_bank = partial(bank, activation=ClampedGated(1.0))
gpt_oss_bank = partial(
    bank, bias=True, activation=GptOssGated(limit=1.0), transposed=True, interleaved=True
)
twice = partial(routing, duplicates=True)


def _planted(name, right, wrong, stage, *causes, routing=routing, dtypes=(torch.float32,)):
    return Planted(name, right, wrong, stage, causes, routing=routing, dtypes=dtypes)


def _looped(name, right, stage, cause, **steps):
    return _planted(name, right, lambda: loop(right(), **steps), stage, cause)


def _dense(name, right, cause, routing=routing, **steps):
    return _planted(
        name, right, lambda: dense(right(), **steps), "combined", cause, routing=routing
    )


def _stored(name, right, stage, cause, dtypes=(torch.float32,), **changes):
    """The same code on parameters that were read wrongly."""
    wrong = lambda: with_parameters(right(), **changes)  # noqa: E731
    return _planted(name, right, wrong, stage, cause, dtypes=dtypes)


def _halves(weight):
    return torch.cat(weight.chunk(2, 1)[::-1], 1)


def _chunked(self, hidden_NJ):
    return hidden_NJ.chunk(2, -1)


def _strided(self, hidden_NJ):
    return hidden_NJ[:, ::2], hidden_NJ[:, 1::2]


def _declared_concatenated():
    wrong = loop(gpt_oss_bank())
    wrong.is_concatenated = True
    return wrong


def _declared_interleaved():
    wrong = loop(bank())
    wrong.is_concatenated = False
    return wrong


def _gelu(gate, up):
    return F.gelu(gate) * up


COLUMNS = (
    _stored("gate and up rows swapped in the file", bank, "up", "gate and up swapped",
            gate_up_proj=_halves, dtypes=BOTH),
    _looped("up through the activation", bank, "activation", "gate and up swapped",
            activate=lambda self, gate, up: F.silu(up) * gate),
    _dense("swapped where nothing is seen", bank, "gate and up swapped",
           outputs=lambda self, x: dense(with_parameters(bank(), gate_up_proj=_halves)).to(x)
           .outputs(x)),
    _planted("gpt-oss weights in halves", gpt_oss_bank, _declared_concatenated, "up",
             "interleaved read as concatenated"),
    _looped("gpt-oss columns in halves", gpt_oss_bank, "activation",
            "interleaved read as concatenated", split=_chunked),
    _planted("Mixtral weights alternating", bank, _declared_interleaved, "up",
             "concatenated read as interleaved"),
    _looped("Mixtral columns alternating", bank, "activation", "concatenated read as interleaved",
            split=_strided),
)  # fmt: skip


def _act(other):
    return lambda self, gate, up: other(gate) * up


gelu_bank = partial(bank, activation=Gated(F.gelu))

ACTIVATIONS = (
    _looped("gelu", bank, "activation", "activation is gelu", activate=_act(F.gelu)),
    _looped("silu", gelu_bank, "activation", "activation is silu", activate=_act(F.silu)),
    _looped("the other gelu", gelu_bank, "activation", "activation is tanh-gelu",
            activate=_act(partial(F.gelu, approximate="tanh"))),
    _looped("the quick gelu", gelu_bank, "activation", "activation is quick gelu",
            activate=_act(lambda t: t * (1.702 * t).sigmoid())),
    _looped("relu", bank, "activation", "activation is relu", activate=_act(F.relu)),
    _planted("relu squared", plain_bank, lambda: bank(activation=Plain(lambda t: t.relu() ** 2)),
             "activation", "activation is squared relu"),
    _looped("sigmoid", clamped_bank, "activation", "activation is sigmoid",
            activate=lambda self, gate, up: gate.clamp(max=1).sigmoid() * up.clamp(-1, 1)),
    _looped("tanh", bank, "activation", "activation is tanh", activate=_act(torch.tanh)),
    _looped("clamp forgotten", clamped_bank, "activation", "clamp missing",
            activate=_act(F.silu)),
    _planted("gpt-oss clamp forgotten", gpt_oss_bank,
             lambda: loop(gpt_oss_bank(), activate=lambda self, gate, up:
                          (up + 1) * gate * (1.702 * gate).sigmoid()),
             "activation", "clamp missing"),
    _looped("gate clamped on both sides", gpt_oss_bank, "activation",
            "gate clamped from below too",
            activate=lambda self, gate, up: GptOssGated(limit=1.0)(gate.clamp(-1, 1), up)),
    _looped("up clamped from above", gpt_oss_bank, "activation", "up not clamped from below",
            activate=lambda self, gate, up:
            (up.clamp(max=1) + 1) * gate.clamp(max=1) * (1.702 * gate.clamp(max=1)).sigmoid()),
    _looped("gate left free", clamped_bank, "activation", "gate not clamped",
            activate=lambda self, gate, up: F.silu(gate) * up.clamp(-1, 1)),
    _looped("up left free", clamped_bank, "activation", "up not clamped",
            activate=lambda self, gate, up: F.silu(gate.clamp(max=1)) * up),
    _looped("up plus nothing", gpt_oss_bank, "activation", "up is not shifted by one",
            activate=lambda self, gate, up:
            up.clamp(-1, 1) * gate.clamp(max=1) * (1.702 * gate.clamp(max=1)).sigmoid()),
    _looped("plain silu in gpt-oss", gpt_oss_bank, "activation", "alpha missing in the gate",
            activate=lambda self, gate, up: (up.clamp(-1, 1) + 1) * F.silu(gate.clamp(max=1))),
    _looped("gate alone", bank, "activation", "up is not multiplied in",
            activate=lambda self, gate, up: F.silu(gate)),
    _looped("bilinear", bank, "activation", "gate without its activation",
            activate=lambda self, gate, up: gate * up),
)  # fmt: skip


def _next(tensor):
    return tensor.roll(-1, 0)


def _transposed(self, x_NH, expert):
    return x_NH @ torch.cat([w.T for w in self.gate_up_proj[expert].chunk(2)]).T


PRODUCTS = (
    _stored("experts' first matrices in another order", bank, "up", "weights of another expert",
            gate_up_proj=lambda w: w[torch.randperm(E, generator=torch.Generator())]),
    _stored("experts' second matrices in another order", biased_bank, "expert_output",
            "weights of another expert", down_proj=_next, down_proj_bias=_next),
    _dense("ids one off, unseen", biased_bank, "weights of another expert",
           combine=lambda self, y, w: torch.einsum("teh,te->th", y.roll(-1, 1), w)),
    _stored("square halves transposed", square_bank, "up", "expert weight transposed",
            gate_up_proj=lambda w: torch.cat([half.mT for half in w.chunk(2, 1)], 1)),
    _stored("square down transposed", square_bank, "expert_output", "expert weight transposed",
            down_proj=lambda w: w.mT),
    _stored("square up transposed", partial(plain_bank, H), "up", "expert weight transposed",
            gate_up_proj=lambda w: w.mT),
    _looped("up bias forgotten", gpt_oss_bank, "activation", "up bias missing",
            up_bias=lambda self, h, e: h),
    _looped("up bias again", biased_bank, "activation", "up bias added twice",
            up_bias=lambda self, h, e: h + 2 * self.gate_up_proj_bias[e]),
    _looped("the first expert's up bias", biased_bank, "activation", "up bias of another expert",
            up_bias=lambda self, h, e: h + self.gate_up_proj_bias[0]),
    _dense("down bias forgotten", biased_bank, "down bias missing",
           with_bias=lambda self, v, name: v + self.gate_up_proj_bias if "up" in name else v),
    _looped("down bias again", biased_bank, "expert_output", "down bias added twice",
            down_bias=lambda self, y, e: y + 2 * self.down_proj_bias[e]),
    _looped("the next expert's down bias", biased_bank, "expert_output",
            "down bias of another expert",
            down_bias=lambda self, y, e: y + self.down_proj_bias[(e + 1) % E]),
)  # fmt: skip


def _with_weights(change):
    """A bank that changes the weights before it uses them."""

    def forward(self, x_TH, routing):
        changed = replace(routing, weights_TK=change(routing.weights_TK))
        return super(type(self), self).forward(x_TH, changed)

    return forward


def _after(change):
    def forward(self, x_TH, routing):
        return change(super(type(self), self).forward(x_TH, routing), x_TH)

    return forward


def _without_last(self, x_TH, routing):
    fewer = replace(
        routing, experts_TK=routing.experts_TK[:, :-1], weights_TK=routing.weights_TK[:, :-1]
    )
    return super(type(self), self).forward(x_TH, fewer)


def _scattered(self, routing):
    """The weight of an id that stands twice is overwritten."""
    empty_TE = routing.weights_TK.new_zeros(len(routing.experts_TK), E)
    return empty_TE.scatter(1, routing.experts_TK, routing.weights_TK)


def _masked(self, routing, expert):
    """A token per expert, whatever the number of its choices."""
    here_TK = routing.experts_TK == expert
    tokens_N = here_TK.any(-1).nonzero()[:, 0]
    return tokens_N, routing.weights_TK[tokens_N, here_TK[tokens_N].int().argmax(-1)]


def _weighed_first(self, x_TH, routing):
    y_TH = torch.zeros_like(x_TH)
    for expert in range(E):
        tokens_N, weights_N = self.taken(routing, expert)
        if len(tokens_N):
            y_NH = self.expert(x_TH[tokens_N] * weights_N[:, None], expert)
            y_TH = y_TH.index_add(0, tokens_N, y_NH)
    return y_TH


def _bias_at_the_end(self, x_TH, routing):
    return super(type(self), self).forward(x_TH, routing) + (
        self.weights(routing).ne(0).to(x_TH) @ self.down_proj_bias
    )


def _overwrite(self, y_TH, tokens_N, y_NH):
    y_TH = y_TH.clone()
    y_TH[tokens_N] = y_NH
    return y_TH


scaled_bank = partial(bank, scale="input")

COMBINED = (
    _looped("weights forgotten", bank, "combined", "weights ignored",
            weigh=lambda self, y, w: y),
    _looped("mean over the choices", bank, "combined", "plain mean of the experts",
            weigh=lambda self, y, w: y / 3),
    _looped("divided by K", bank, "combined", "divided by the number of choices",
            forward=_after(lambda y, x: y / 3)),
    _looped("weighed by bank and layer", bank, "combined", "weights applied twice",
            weigh=lambda self, y, w: y * w[:, None] ** 2),
    _looped("bank renormalises", bank, "combined", "weights renormalised by the experts",
            forward=_with_weights(normalise)),
    _looped("bank softmaxes", bank, "combined", "weights softmaxed by the experts",
            forward=_with_weights(lambda w: w.softmax(-1))),
    _looped("weights from the other end", bank, "combined", "weights of other slots",
            forward=_with_weights(lambda w: w.flip(-1))),
    _looped("weighed before", bank, "combined", "routing weight on the expert's input",
            forward=_weighed_first),
    _planted("Llama 4 weighed as Mixtral", scaled_bank, bank, "up",
             "routing weight on the expert's output"),
    _planted("Mixtral weighed as Llama 4", bank, scaled_bank, "up",
             "routing weight on the expert's input"),
    _planted("a mask of tokens", bank, lambda: loop(bank(), taken=_masked), "dispatched",
             "one of two equal ids dropped", routing=twice),
    _dense("a scatter that overwrites", bank, "one of two equal ids dropped", routing=twice,
           weights=_scattered),
    _dense("last column forgotten, unseen", bank, "one slot is lost", forward=_without_last),
    _looped("last column forgotten", bank, "dispatched", "one slot is lost",
            forward=_without_last),
    _looped("rows assigned", bank, "combined", "overwritten instead of added", add=_overwrite),
    _dense("bias behind the weights", biased_bank, "down bias not weighed",
           with_bias=lambda self, v, name: v + self.gate_up_proj_bias if "up" in name else v,
           forward=_bias_at_the_end),
    _looped("residual", bank, "combined", "residual added inside",
            forward=_after(lambda y, x: y + x)),
)  # fmt: skip

EXPERTS = (*COLUMNS, *ACTIVATIONS, *PRODUCTS, *COMBINED)
