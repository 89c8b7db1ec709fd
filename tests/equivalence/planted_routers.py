"""Defects in routers: a step of one that is written out. The right part is moetk's own.

A step is a method: product(x), score(logits), limit(scores, logits), select(choice),
weigh(scores, ids, choice, logits), show(...).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moetk.kernels.selection import (
    best_one,
    gather,
    in_best_groups,
    largest,
    normalise,
    softmax_over,
)
from moetk.routers import DeepSeekV3Router
from tests.equivalence.planted import Planted
from tests.equivalence.steps import GROUPED, gpt_oss, mixtral, router, v3

BOTH = (torch.float32, torch.bfloat16)
BF16, FP16 = torch.bfloat16, torch.float16


def _logits(name, stage_of, causes, right=v3, **more):
    if isinstance(causes, str):
        causes = (causes,)
    return Planted(name, right, lambda: right(product=stage_of), "logits", causes, **more)


def _scores(name, score, causes, right=v3, **more):
    return Planted(name, right, lambda: right(score=score), "scores", (causes,), **more)


def _choice(name, limit, causes):
    return Planted(name, v3, lambda: v3(limit=limit), "choice", (causes,))


def _ids(name, select, causes, **steps):
    return Planted(name, v3, lambda: v3(select=select, **steps), "indices", (causes,))


def _weights(name, weigh, *causes, right=v3, **steps):
    return Planted(name, right, lambda: right(weigh=weigh, **steps), "weights", causes)


def _unnormalised():
    return mixtral(renormalise=False)


def _unnormalised_with(**steps):
    return mixtral(renormalise=False, **steps)


def _linear_in(dtype):
    def product(self, x_TH):
        return F.linear(x_TH.to(dtype), self.weight.to(dtype)).float()

    return product


def _sequence_major(self, x_TH):
    logits_BSE = self.logits(x_TH).view(2, -1, self.num_experts)
    return logits_BSE.transpose(0, 1).reshape(-1, self.num_experts)


LOGITS = (
    _logits("product in bfloat16", _linear_in(BF16), "router GEMM in bfloat16"),
    _logits("product in float16", _linear_in(FP16), "router GEMM in float16"),
    Planted(
        "product in the model's dtype",
        v3,
        lambda: router(DeepSeekV3Router, {**GROUPED, "gemm_dtype": None}),
        "logits",
        # Of operands that are bfloat16 already, a narrow product is the wide one rounded.
        ("router GEMM in bfloat16", "rounded to bfloat16"),
        dtypes=(BF16,),
    ),
    _logits(
        "logits rounded", lambda self, x: self.logits(x).to(BF16).float(), "rounded to bfloat16"
    ),
    _logits(
        "logits rounded to half", lambda self, x: self.logits(x).half().float(),
        "rounded to float16",
    ),
    _logits(
        "bias forgotten", lambda self, x: F.linear(x, self.weight), "router bias missing", gpt_oss,
        dtypes=BOTH,
    ),
    _logits(
        "bias in the product and behind it", lambda self, x: self.logits(x) + self.bias,
        "router bias added twice", gpt_oss,
    ),
    _logits(
        "steering bias on the logits",
        lambda self, x: self.logits(x) + self.e_score_correction_bias,
        "choice bias in the logits",
    ),
    _logits(
        "rows of the weight permuted", lambda self, x: F.linear(x.float(), self.weight.roll(5, 0)),
        "experts in another order",
    ),
    _logits(
        "weight not transposed", lambda self, x: x.float() @ self.weight,
        "router weight transposed",
    ),
    _logits(
        "router behind a norm", lambda self, x: self.logits(F.rms_norm(x, x.shape[-1:], eps=1e-6)),
        "router input normalised",
    ),
    _logits(
        "cosine router",
        lambda self, x: F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1)),
        "cosine similarity instead of a product", mixtral,
    ),
    _logits(
        "scaled as attention is", lambda self, x: self.logits(x) * x.shape[-1] ** -0.5,
        "logits scaled with the width", dtypes=BOTH,
    ),
    _logits(
        "probabilities returned as logits", lambda self, x: self.logits(x).softmax(-1),
        "scores in place of logits", mixtral,
    ),
    _logits("minus", lambda self, x: -self.logits(x), "negated"),
    _logits("nothing written", lambda self, x: torch.zeros_like(self.logits(x)),
            "missing: all zero"),
    _logits("sequences and positions exchanged", _sequence_major, "tokens in another order"),
    _logits("a temperature", lambda self, x: self.logits(x) / 0.7, "scaled by a constant"),
    _logits(
        "each token's logits divided by their largest",
        lambda self, x: self.logits(x) / self.logits(x).abs().amax(-1, keepdim=True),
        "scaled by a factor for each token",
    ),
)  # fmt: skip


def _kept_alone(self, logits_TE):
    ids_TK = largest(logits_TE, self.top_k)
    return torch.zeros_like(logits_TE).scatter(1, ids_TK, softmax_over(logits_TE, ids_TK))


SCORES = (
    _scores("softmax for sigmoid", lambda self, l: l.softmax(-1), "score function is softmax"),
    _scores("sigmoid for softmax", lambda self, l: l.sigmoid(), "score function is sigmoid",
            mixtral, dtypes=BOTH),
    _scores("sqrt softplus", lambda self, l: F.softplus(l).sqrt(),
            "score function is sqrt(softplus)"),
    _scores("softplus", lambda self, l: F.softplus(l), "score function is softplus"),
    _scores("relu", lambda self, l: l.relu(), "score function is relu"),
    _scores("exp", lambda self, l: l.exp(), "score function is exp"),
    _scores("tanh", lambda self, l: l.tanh(), "score function is tanh"),
    _scores("none", lambda self, l: l, "score function is no function"),
    _scores("sigmoid in bfloat16", lambda self, l: l.to(BF16).sigmoid().float(),
            "scores from logits in bfloat16"),
    _scores("softmax of bfloat16", lambda self, l: l.to(BF16).softmax(-1).float(),
            "scores from logits in bfloat16", mixtral),
    _scores("sigmoid of half", lambda self, l: l.half().float().sigmoid(),
            "scores from logits in float16"),
    _scores("softmax along the tokens", lambda self, l: l.softmax(0), "softmax over tokens",
            mixtral),
    _scores("capped logits", lambda self, l: (30 * (l / 30).tanh()).sigmoid(),
            "logits capped before the score function"),
    _scores("softmax with a temperature", lambda self, l: (l / 0.7).softmax(-1),
            "temperature in the softmax", mixtral),
    _scores("biased scores", lambda self, l: l.sigmoid() + self.e_score_correction_bias,
            "choice bias in the scores"),
    _scores("softmax of the kept logits, spread", _kept_alone, "scores of the chosen alone",
            mixtral),
    _scores("sigmoid scores that sum to one", lambda self, l: normalise(l.sigmoid()),
            "scores normalised over the experts"),
)  # fmt: skip


def _masked_with_zeros(self, scores_TE, logits_TE):
    choice_TE = scores_TE + self.e_score_correction_bias
    groups_TGM = choice_TE.unflatten(-1, (self.groups, -1))
    best_TG = groups_TGM.topk(2, dim=-1).values.sum(-1).topk(self.top_groups).indices
    mask_TG = torch.zeros_like(groups_TGM[..., 0]).scatter(1, best_TG, 1)
    return (groups_TGM * mask_TG[..., None]).flatten(1)


def _other_worth(worth):
    def limit(self, scores_TE, logits_TE):
        choice_TE = self.with_choice_bias(scores_TE)
        return in_best_groups(choice_TE, self.groups, self.top_groups, worth=worth)

    return limit


def _ranked_without_bias(self, scores_TE, logits_TE):
    limited_TE = in_best_groups(scores_TE, self.groups, self.top_groups)
    return self.with_choice_bias(scores_TE).masked_fill(limited_TE == -torch.inf, -torch.inf)


def _every_gth(self, scores_TE, logits_TE):
    choice_TGM = self.with_choice_bias(scores_TE).view(-1, E_PER_GROUP, self.groups).mT
    limited_TE = in_best_groups(choice_TGM.flatten(1), self.groups, self.top_groups)
    return limited_TE.view(-1, self.groups, E_PER_GROUP).mT.flatten(1)


E_PER_GROUP = 4


def _limited(change):
    def limit(self, scores_TE, logits_TE):
        choice_TE = change(self, scores_TE, logits_TE)
        return in_best_groups(choice_TE, self.groups, self.top_groups)

    return limit


def _bias(self):
    return self.e_score_correction_bias


CHOICE = (
    _choice("bias forgotten", _limited(lambda self, s, l: s), "choice bias missing"),
    _choice("bias taken off", _limited(lambda self, s, l: s - _bias(self)),
            "choice bias subtracted"),
    _choice("bias in two places", _limited(lambda self, s, l: s + 2 * _bias(self)),
            "choice bias added twice"),
    _choice("bias under the sigmoid", _limited(lambda self, s, l: (l + _bias(self)).sigmoid()),
            "choice bias added before the score function"),
    _choice("logits chosen by", _limited(lambda self, s, l: l + _bias(self)),
            "chosen from the logits"),
    _choice("group mask multiplied in", _masked_with_zeros, "group mask multiplies by 0"),
    _choice("no groups", lambda self, s, l: s + _bias(self), "group limit missing"),
    _choice("best of a group", _other_worth(best_one), "groups judged by their best expert"),
    _choice("mean of a group", _other_worth(lambda c: c.mean(-1)),
            "groups judged by all their experts"),
    _choice("groups ranked by plain scores", _ranked_without_bias,
            "groups judged without the bias"),
    _choice("one group too many",
            lambda self, s, l: in_best_groups(s + _bias(self), 4, 3), "another number of groups"),
    _choice("groups along the wrong axis", _every_gth, "groups of distant experts"),
)  # fmt: skip


def _hidden(self, **stages):
    return {"logits_TE": stages["logits_TE"]}


class _Repeats:
    duplicates = True


INDICES = (
    _ids("smallest", lambda self, c: largest(-c.masked_fill(c == -torch.inf, torch.inf), 3),
         "the smallest are chosen"),
    _ids("one choice more", lambda self, c: largest(c, 4), "another number of choices"),
    _ids("slice from one", lambda self, c: largest(c, 4)[:, 1:], "the best is left out"),
    _ids("ids from one", lambda self, c: (largest(c, 3) + 1) % 16, "ids shifted by one"),
    _ids("last column overwritten",
         lambda self, c: torch.cat([largest(c, 3)[:, :2], largest(c, 3)[:, :1]], -1),
         "last choice repeats the first", duplicates=True),
    Planted("bias forgotten, choice not shown", v3,
            lambda: v3(limit=_limited(lambda self, s, l: s), show=_hidden), "indices",
            ("choice bias missing",), dtypes=BOTH),
    Planted("group mask multiplied in, choice not shown", v3,
            lambda: v3(limit=_masked_with_zeros, show=_hidden), "indices",
            ("group mask multiplies by 0",)),
)  # fmt: skip


def _in_another_order(self, s, ids, c, l):
    return normalise(gather(s, ids.sort(-1).values), self.eps) * self.scale


def _scores_hidden(name, score, cause, right):
    """The router weighs by another function and shows no scores."""

    def weigh(self, scores_TE, ids_TK, choice_TE, logits_TE):
        return gather(score(logits_TE), ids_TK) * getattr(self, "scale", 1.0)

    wrong = lambda: right(weigh=weigh, show=_hidden)  # noqa: E731
    return Planted(name, right, wrong, "weights", (cause,))


WEIGHTS = (
    _weights("not renormalised", lambda self, s, i, c, l: gather(s, i) * self.scale,
             "renormalisation missing"),
    Planted("norm_topk_prob off", mixtral, _unnormalised, "weights", ("renormalisation missing",),
            dtypes=BOTH),
    _weights("softmax over all experts", lambda self, s, i, c, l: gather(l.softmax(-1), i),
             "renormalisation missing", right=gpt_oss),
    # Of softmax scores the two are one function: exp over a sum of exps.
    Planted("norm_topk_prob on", _unnormalised, mixtral, "weights",
            ("renormalised where it should not be", "softmax after top-k")),
    _weights("gathered from the choice",
             lambda self, s, i, c, l: normalise(gather(c, i)) * self.scale,
             "choice bias in the weights"),
    _weights("gathered from the choice, not renormalised",
             lambda self, s, i, c, l: gather(c, i) * self.scale, "choice bias in the weights"),
    _weights("softmax of the kept logits",
             lambda self, s, i, c, l: softmax_over(l, i) * self.scale, "softmax after top-k"),
    _weights("softmax of the kept scores",
             lambda self, s, i, c, l: softmax_over(s, i) * self.scale, "softmax after top-k"),
    _weights("softmax at the end",
             lambda self, s, i, c, l: (normalise(gather(s, i)) * self.scale).softmax(-1),
             "softmax of the weights once more"),
    _weights("scale forgotten", lambda self, s, i, c, l: normalise(gather(s, i)), "scale missing"),
    _weights("scale twice",
             lambda self, s, i, c, l: normalise(gather(s, i)) * self.scale**2,
             "scale applied twice"),
    _weights("scaled, then renormalised",
             lambda self, s, i, c, l: normalise(gather(s, i) * self.scale), "scale missing"),
    _weights("gathered from the logits",
             lambda self, s, i, c, l: gather(l, i) * self.scale, "logits as weights"),
    _weights("ids sorted, weights not", _in_another_order, "weights in another column order"),
    _weights("ones", lambda self, s, i, c, l: torch.ones_like(gather(s, i)), "all weights equal"),
    _weights("divided by the sum of all",
             lambda self, s, i, c, l: gather(normalise(s), i) * self.scale,
             "normalised over all experts"),
    _weights("squared", lambda self, s, i, c, l: gather(s, i).square(), "weights squared",
             right=_unnormalised_with),
    _weights("rounded", lambda self, s, i, c, l: gather(s, i).to(BF16).float(),
             "rounded to bfloat16", right=_unnormalised_with),
    _weights("a factor", lambda self, s, i, c, l: 2 * normalise(gather(s, i)),
             "scaled by a constant"),
    _weights("divided by the largest",
             lambda self, s, i, c, l: gather(s, i) / gather(s, i)[:, :1],
             "scaled by a factor for each token"),
    _scores_hidden("softmax unseen", lambda l: l.softmax(-1), "weighed by softmax", v3),
    _scores_hidden("sigmoid unseen", torch.sigmoid, "weighed by sigmoid", _unnormalised_with),
    _scores_hidden("sqrt softplus unseen", lambda l: F.softplus(l).sqrt(),
                   "weighed by sqrt(softplus)", v3),
)  # fmt: skip

ROUTERS = (*LOGITS, *SCORES, *CHOICE, *INDICES, *WEIGHTS)
