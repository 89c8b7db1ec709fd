"""Defects around the experts: in counts, capacity, what is added to the sum, and in losses. The
right part is a moetk.MoELayer."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from moetk import MoELayer, RouterContext
from moetk.controllers import BiasUpdate
from moetk.dispatch import Capacity, Local
from moetk.kernels.selection import largest, within_capacity
from moetk.losses import LoadBalancingLoss, RouterZLoss
from moetk.routers import SwitchRouter
from tests.equivalence.planted import Planted
from tests.equivalence.steps import E, H, K, T, bank, inputs, mixtral, router, v3

MASK = RouterContext(batch_shape=(2, T // 2), token_mask=torch.arange(T) % 5 > 0)
LABELS = replace(MASK, label_mask=torch.arange(T) % 3 > 0)


def layer(router=mixtral, experts=bank, **parts):
    return MoELayer(router(), experts(), **parts)


def _planted(name, right, wrong, stage, cause, **more):
    return Planted(name, right, wrong, stage, (cause,), **more)


# --- counts: what a router of one's own counts in forward, beside what it was asked to count.


def _counting(tally, kind=mixtral, **steps):
    """A router that notes the load of its last call in a buffer."""

    def forward(self, x_TH, ctx):
        routing = super(type(self), self).forward(x_TH, ctx)
        self.tokens_per_expert.copy_(tally(routing, ctx, self.tokens_per_expert))
        return routing

    made = kind(forward=forward, **steps)
    made.register_buffer("tokens_per_expert", torch.zeros(E))
    return made


def _bincount(ids):
    return torch.bincount(ids[ids >= 0].flatten(), minlength=E)


def _unique(routing, ctx, held):
    mask_TE = torch.zeros(len(routing.experts_TK), E).scatter(1, routing.experts_TK, 1)
    return mask_TE.sum(0)


def _all(routing, ctx, held):
    return _bincount(routing.experts_TK)


def _real(routing, ctx, held):
    return _bincount(routing.experts_TK[ctx.token_mask])


def _kept(routing, ctx, held):
    return _bincount(routing.experts_TK[routing.kept_TK])


switch = partial(router, SwitchRouter, {"capacity_factor": 0.7})


def _repeat_last(self, choice_TE):
    ids_TK = largest(choice_TE, K)
    ids_TK[::3, 2] = ids_TK[::3, 0]
    return ids_TK


def _without_some(self, choice_TE):
    ids_TK = largest(choice_TE, K)
    ids_TK[::3, 2] = -1
    return ids_TK


class _Share:
    """A function that shows its load in another unit."""

    def __init__(self, unit):
        self.unit, self.__name__ = unit, "share"

    def __call__(self, x_TH):
        scores_TE = (x_TH[:, :E]).softmax(-1)
        weights_TK, ids_TK = scores_TE.topk(K)
        counts_E = self.unit(_bincount(ids_TK).to(x_TH), ids_TK, weights_TK)
        return {"indices": ids_TK, "weights": weights_TK, "counts": counts_E}


def _importance(counts_E, ids_TK, weights_TK):
    return torch.zeros_like(counts_E).scatter_add(0, ids_TK.flatten(), weights_TK.flatten())


def _shares(unit):
    return lambda: _Share(unit)


COUNTS = (
    _planted("counted in forward", lambda: layer(v3, controllers=[BiasUpdate(1e-3)]),
             lambda: layer(partial(_counting, lambda r, c, held: held + _all(r, c, held), v3)),
             "counts", "counted twice"),
    _planted("summed over four replicas", layer,
             lambda: layer(partial(_counting, lambda r, c, h: 4 * _all(r, c, h))),
             "counts", "counted several times"),
    _planted("only kept ones", switch, lambda: _counting(_kept, switch), "counts",
             "dropped choices not counted"),
    _planted("dropped ones too", lambda: _counting(_kept, switch), switch, "counts",
             "dropped choices counted"),
    _planted("a mask of tokens and experts",
             lambda: mixtral(select=_repeat_last, duplicates=True),
             lambda: _counting(_unique, select=_repeat_last, duplicates=True),
             "counts", "duplicate ids counted once"),
    _planted("padding too", mixtral, lambda: _counting(_all), "counts", "padding counted",
             ctx=MASK),
    _planted("padding left out", lambda: _counting(_all), lambda: _counting(_real), "counts",
             "padding not counted", ctx=MASK),
    _planted("shares", _shares(lambda c, i, w: c), _shares(lambda c, i, w: c / c.sum()), "counts",
             "counts normalised"),
    _planted("sums of weights", _shares(lambda c, i, w: c), _shares(_importance), "counts",
             "weights summed instead of choices counted"),
    _planted("first choices", mixtral,
             lambda: _counting(lambda r, c, h: _bincount(r.experts_TK[:, 0])), "counts",
             "first choices counted alone"),
    _planted("unused slots as the first expert", lambda: mixtral(select=_without_some),
             lambda: _counting(lambda r, c, h: _bincount(r.experts_TK.clamp(min=0)),
                               select=_without_some),
             "counts", "unused slots counted"),
)  # fmt: skip


# --- capacity


class Served:
    """A capacity as a loop: each choice in turn gets a place while there is one."""

    def __init__(self, factor, **steps):
        self.factor = factor
        for name, step in steps.items():
            setattr(self, name, partial(step, self))

    def places(self, length):
        return math.ceil(self.factor * length * K / E - 1e-9)

    def queue(self, token, length):
        return token // length

    def arrivals(self, routing):
        tokens, choices = routing.experts_TK.shape
        return [(token, slot) for slot in range(choices) for token in range(tokens)]

    def real(self, ctx, token):
        return ctx.token_mask is None or bool(ctx.token_mask[token])

    def __call__(self, routing, ctx):
        batch, length = ctx.batch_shape
        taken = {}
        kept_TK = torch.zeros_like(routing.experts_TK, dtype=torch.bool)
        for token, slot in self.arrivals(routing):
            key = (self.queue(token, length), int(routing.experts_TK[token, slot]))
            if self.real(ctx, token) and taken.get(key, 0) < self.places(length):
                taken[key] = taken.get(key, 0) + 1
                kept_TK[token, slot] = True
        weights_TK = routing.weights_TK.masked_fill(~kept_TK, 0)
        return replace(routing, kept_TK=kept_TK, weights_TK=weights_TK)


def crowded():
    """Tokens that agree on what they like."""
    return inputs(2, 8, H) + 1.2


def _limited(capacity):
    return lambda: layer(dispatcher=Local(capacity=capacity))


def _capacity(name, *causes, factor=2.0, wrong=None, ctx=None, **steps):
    wrong = Served(factor, **steps) if wrong is None else wrong
    return Planted(
        name, _limited(Capacity(factor)), _limited(wrong), "dispatched", causes, x=crowded, ctx=ctx
    )


def _token_major(self, routing):
    tokens, choices = routing.experts_TK.shape
    return [(token, slot) for token in range(tokens) for slot in range(choices)]


def _from_the_end(self, routing):
    tokens, choices = routing.experts_TK.shape
    return [(token, slot) for slot in range(choices) for token in reversed(range(tokens))]


def _heaviest_first(self, routing):
    best = routing.weights_TK.detach().amax(-1).argsort(descending=True, stable=True).tolist()
    return [(token, slot) for slot in range(K) for token in best]


PADDED = RouterContext(batch_shape=(2, 8), token_mask=torch.arange(16) % 8 > 1)

CAPACITY = (
    _capacity("a place too few", "capacity one too few", places=lambda self, n: 2),
    _capacity("a place too many", "capacity one too many", factor=1.3, places=lambda self, n: 3),
    # A place that rounding loses is one place: at this factor the two are one number.
    _capacity("rounded down", "capacity one too few", "capacity rounded down", factor=1.8,
              places=lambda self, n: int(1.8 * n * K / E)),
    _capacity("rounded up to fours", "capacity rounded up to a multiple", factor=1.3,
              places=lambda self, n: 4),
    _capacity("without K", "capacity forgets the number of choices",
              places=lambda self, n: math.ceil(2 * n / E)),
    _capacity("places of the whole batch", "capacity over the whole batch",
              queue=lambda self, token, n: 0, places=lambda self, n: 6),
    _capacity("token after token", "all choices of a token served before the next token",
              arrivals=_token_major),
    _capacity("from the end", "the last come are served first", arrivals=_from_the_end),
    _capacity("the heaviest first", "served by weight", arrivals=_heaviest_first),
    _capacity("padding is served", "padding takes places", ctx=PADDED,
              real=lambda self, ctx, token: True),
    Planted("no capacity", _limited(Capacity(1.3)), layer, "dispatched",
            ("capacity missing: nothing is dropped",), x=lambda: inputs(1, 24, H) + 1.2),
    _capacity("another factor", "drops with another number of places", factor=0.6,
              places=lambda self, n: 3),
)  # fmt: skip


class _PassesOn(Local):
    def dispatch(self, x_TH, routing, ctx=None):
        x_RH, local, _ = super().dispatch(x_TH, routing, ctx)
        lost_T = ~local.kept_TK.any(-1)
        return x_RH, local, (x_TH, lost_T)

    def combine(self, y_RH, handle):
        x_TH, lost_T = handle
        return torch.where(lost_T[:, None], x_TH, y_RH)


# --- what is added to the experts' sum


class Shared(nn.Module):
    """A shared expert, and the gate that Qwen2's has."""

    def __init__(self, gate=torch.sigmoid):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.up = nn.Parameter(torch.randn(H, H, generator=generator) * 0.3)
        self.gate = nn.Parameter(torch.randn(1, H, generator=generator))
        self.open = gate

    def forward(self, x_TH):
        return self.open(F.linear(x_TH, self.gate)) * F.silu(F.linear(x_TH, self.up))


class _Twice(Shared):
    def forward(self, x_TH):
        return super().forward(x_TH) + super().forward(x_TH)


class _SharedOnly(MoELayer):
    def forward(self, x, ctx=None):
        _, routing = super().forward(x, ctx)
        return self.shared_experts(x.flatten(0, -2)).view_as(x), routing


def _with_shared(shared=Shared, kind=MoELayer):
    return lambda: kind(mixtral(), bank(), shared_experts=shared())


OUTPUT = (
    _planted("no shared experts", _with_shared(), layer, "output", "shared experts missing"),
    _planted("shared experts by block and model", _with_shared(), _with_shared(_Twice), "output",
             "shared experts added twice"),
    _planted("shared experts alone", _with_shared(), _with_shared(kind=_SharedOnly), "output",
             "routed experts missing"),
    _planted("shared experts ungated", _with_shared(),
             _with_shared(partial(Shared, torch.ones_like)), "output",
             "shared experts' gate missing"),
    Planted("lost tokens keep x", _limited(Capacity(0.6)),
            lambda: layer(dispatcher=_PassesOn(Capacity(0.6))), "combined",
            ("dropped tokens passed through",), x=crowded),
)  # fmt: skip


# --- losses


class Wrong:
    """A loss that asks another routing or context, or makes something else of the answer."""

    reads = ("logits_TE", "scores_TE", "choice_TE", "extras")

    def __init__(self, loss, routing=lambda r: r, ctx=lambda c: c, value=lambda v: v):
        self.loss, self.routing, self.ctx, self.value = loss, routing, ctx, value

    def __call__(self, routing, ctx):
        return self.value(self.loss(self.routing(routing), self.ctx(ctx)))


BALANCE, Z = LoadBalancingLoss(1e-2), RouterZLoss(1e-3)


def _loss(name, wrong, *causes, right=BALANCE, ctx=None, made=layer):
    """One of two losses is wrong."""
    return Planted(
        name, lambda: made(losses=[Z, right]), lambda: made(losses=[Z, wrong]), "losses", causes,
        ctx=ctx,
    )  # fmt: skip


def _chosen_alone(routing):
    ids_TK, scores_TE = routing.experts_TK, routing.scores_TE
    kept_TE = torch.zeros_like(scores_TE).scatter(1, ids_TK, scores_TE.gather(1, ids_TK))
    return replace(routing, scores_TE=kept_TE)


def _dropping(losses):
    """Drops before its losses read the routing."""

    def forward(self, x_TH, ctx):
        routing = super(type(self), self).forward(x_TH, ctx)
        kept_TK = within_capacity(routing.experts_TK, E, 0.8, ctx)
        weights_TK = routing.weights_TK.masked_fill(~kept_TK, 0)
        return replace(routing, kept_TK=kept_TK, weights_TK=weights_TK)

    return layer(partial(mixtral, forward=forward), losses=losses)


def _without_dropped(routing):
    return replace(routing, experts_TK=routing.experts_TK.masked_fill(~routing.kept_TK, -1))


def _first_column(routing):
    return replace(
        routing, experts_TK=routing.experts_TK[:, :1], weights_TK=routing.weights_TK[:, :1]
    )


LOSSES = (
    _loss("K is not divided by", LoadBalancingLoss(1e-2, normalisation="hf"),
          "K factor in a loss"),
    _loss("no factor E", Wrong(BALANCE, value=lambda v: v / E), "E factor in a loss"),
    _loss("a sum over tokens", Wrong(BALANCE, value=lambda v: v * T),
          "sum over tokens for a mean in a loss"),
    _loss("the coefficient again", Wrong(BALANCE, value=lambda v: v * 1e-2),
          "coefficient applied twice"),
    _loss("no coefficient", LoadBalancingLoss(1.0), "coefficient missing"),
    _loss("padding averaged in", Wrong(BALANCE, ctx=lambda c: replace(c, token_mask=None)),
          "padding counted in a loss", ctx=MASK),
    _loss("all but padding averaged", Wrong(BALANCE, ctx=lambda c: replace(c, label_mask=None)),
          "unlabelled tokens counted in a loss", ctx=LABELS),
    _loss("kept choices balanced", Wrong(BALANCE, routing=_without_dropped),
          "dropped choices left out of a loss", made=_dropping),
    _loss("logits averaged",
          Wrong(BALANCE, routing=lambda r: replace(r, scores_TE=r.logits_TE)),
          "loss reads the logits as scores"),
    _loss("scores of the kept", Wrong(BALANCE, routing=_chosen_alone),
          "loss reads the scores of the chosen alone"),
    _loss("first choices", Wrong(BALANCE, routing=_first_column),
          "loss counts first choices alone"),
    _loss("counted by sequence", LoadBalancingLoss(1e-2, scope="sequence"),
          "loss counted over another scope"),
    _loss("not attached", Wrong(BALANCE, value=lambda v: 0 * v), "a loss is missing: zero"),
    Planted("both losses less", lambda: layer(losses=[Z, BALANCE]),
            lambda: layer(losses=[Wrong(Z, value=lambda v: 0.7 * v),
                                  Wrong(BALANCE, value=lambda v: 0.7 * v)]),
            "losses", ("a loss is scaled by a constant",)),
    _loss("a bonus", Wrong(BALANCE, value=lambda v: -v), "a loss is negated"),
)  # fmt: skip

LAYERS = (*COUNTS, *CAPACITY, *OUTPUT, *LOSSES)
