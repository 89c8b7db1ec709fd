"""Routings as losses and controllers read them: every field, masks, sequences, unused slots.

Letters: T tokens = B sequences of S, E experts, K choices a token. A case draws shapes, the names
of patterns and a seed, and builds its tensors from the seed: it shrinks to few tokens, quickly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor

from moetk.context import RouterContext
from moetk.routing import TokenChoice
from moetk.testing.law import Case, Setting

FIELDS = ("weights_TK", "logits_TE", "scores_TE", "choice_TE", "std_TE")
"""The floating tensors of a case, in which a loss may have a gradient."""

PER_TOKEN = (*FIELDS, "experts_TK", "kept_TK", "token_mask", "label_mask", "sequence_ids")


def _gaussian(g: Generator, T: int, E: int) -> Tensor:
    return torch.randn(T, E, generator=g, dtype=torch.float64)


def _spaced(g: Generator, T: int, E: int) -> Tensor:
    order_TE = _gaussian(g, T, E).argsort(-1)
    # From 0 down, for sigmoids crowd below 1; to -16 at most, for squares of scores underflow.
    return -min(0.5, 16 / E) * order_TE.double()


def _rotated(g: Generator, T: int, E: int) -> Tensor:
    base_E = 2 * _gaussian(g, 1, E)[0]
    return base_E[(torch.arange(E) - torch.arange(T)[:, None]) % E]


def _one_hot(g: Generator, T: int, E: int) -> Tensor:
    favourite = int(torch.randint(E, (), generator=g))
    logits_TE = _gaussian(g, T, E)
    logits_TE[:, favourite] += 40
    return logits_TE


def _starved(g: Generator, T: int, E: int) -> Tensor:
    logits_TE = _gaussian(g, T, E)
    logits_TE[:, E // 2 + E % 2 :] -= 40
    return logits_TE


def _signed_zeros(g: Generator, T: int, E: int) -> Tensor:
    return torch.zeros(T, E, dtype=torch.float64).copysign(_gaussian(g, T, E))


def _one_ulp(g: Generator, T: int, E: int) -> Tensor:
    steps_TE = torch.randint(0, 3, (T, E), generator=g).double()
    return 1 + steps_TE * torch.finfo(torch.float32).eps


PATTERNS: Mapping[str, Callable[[Generator, int, int], Tensor]] = {
    # ordinary rows without ties
    "gaussian": _gaussian,
    # no two logits of a row closer than 0.5 (16 / E from E = 32 on): no small step changes a choice
    "spaced": _spaced,
    # softmax is one-hot or nearly; squares reach 1e9
    "huge": lambda g, T, E: 1e4 * _gaussian(g, T, E),
    # softmax rounds to uniform
    "tiny": lambda g, T, E: 1e-6 * _gaussian(g, T, E),
    # everything ties
    "equal": lambda g, T, E: torch.zeros(T, E, dtype=torch.float64),
    # every logit is there twice
    "pairs": lambda g, T, E: _gaussian(g, T, -(-E // 2)).repeat_interleave(2, -1)[:, :E],
    # 0 and -0 are equal, and their bits are not
    "signed zeros": _signed_zeros,
    # choices that one rounding decides
    "one ulp": _one_ulp,
    # the first expert is always the best
    "sorted": lambda g, T, E: _gaussian(g, T, E).sort(-1, descending=True).values,
    # the router has collapsed
    "one-hot": _one_hot,
    # half of the experts get nothing
    "starved": _starved,
    # token t is token 0 moved on by t experts: every E tokens are in balance, field by field
    "rotated": _rotated,
}


def build_case(
    logits_TE: Tensor,
    top_k: int,
    *,
    experts_TK: Tensor | None = None,
    choice_TE: Tensor | None = None,
    std_TE: Tensor | None = None,
    score: str = "softmax",
    batch: int = 1,
    **settings: Setting,
) -> Case:
    """A case with every field, from fp64 logits.

    logits_TE, choice_TE, std_TE: fp64. experts_TK: int64, the choice where it is given; else the
    best K of choice_TE, which is logits_TE where it is not given. score: "softmax" or "sigmoid".
    batch: B, of T / B tokens each.

    Tensors are fp32: weights_TK (the scores of the chosen), logits_TE, scores_TE, choice_TE,
    std_TE (the noise's; 0.5 where it is not given); experts_TK is int64.
    """
    if score == "softmax":
        scores_TE = logits_TE.softmax(-1)
    else:  # not below what fp32 can divide by: a gradient of 1 / score would be no number
        scores_TE = logits_TE.sigmoid().clamp(min=1e-30)
    choice_TE = logits_TE if choice_TE is None else choice_TE
    if experts_TK is None:
        experts_TK = choice_TE.topk(top_k, -1).indices
    else:  # the given ones come first, in their order
        best = float(choice_TE.max()) if choice_TE.numel() else 0.0
        lead_K = best + torch.arange(top_k, 0, -1, dtype=torch.float64)
        choice_TE = choice_TE.scatter(-1, experts_TK, lead_K.expand(experts_TK.shape))
    std_TE = torch.full_like(logits_TE, 0.5) if std_TE is None else std_TE
    tensors = {
        "experts_TK": experts_TK,
        "weights_TK": scores_TE.gather(-1, experts_TK).float(),
        "logits_TE": logits_TE.float(),
        "scores_TE": scores_TE.float(),
        "choice_TE": choice_TE.float(),
        "std_TE": std_TE.float(),
    }
    length = logits_TE.shape[0] // max(batch, 1)
    return Case(tensors, {"batch": batch, "length": length, "score": score, **settings})


def draw_mask(g: Generator, kind: str, batch: int, length: int) -> Tensor:
    """(T,) bool, True = counted.

    "all": every token. "padding": each sequence ends in some padding, perhaps at its start.
    "columns": the same positions of every sequence, so that what is left is B sequences of one
    length. "scattered": any tokens. "none": not one token.
    """
    if kind == "padding":
        ends_B = torch.randint(0, length + 1, (batch, 1), generator=g)
        return (torch.arange(length) < ends_B).flatten()
    if kind == "columns":
        return (torch.rand(length, generator=g) < 0.6).repeat(batch)
    if kind == "scattered":
        return torch.rand(batch * length, generator=g) < 0.6
    return torch.full((batch * length,), kind == "all")


@st.composite
def routings(
    draw: st.DrawFn,
    num_experts: int,
    top_k: int,
    *,
    patterns: Sequence[str] = tuple(PATTERNS),
    scores: Sequence[str] = ("softmax", "sigmoid"),
    noisy: bool = True,
    masks: Sequence[str] = ("absent",),
    labels: Sequence[str] = ("absent",),
    unused: bool = False,
    batches: Sequence[int] = (1, 2, 3, 0),
    lengths: Sequence[int] = (1, 2, 3, 5, 8, 0),
) -> Case:
    """Cases for losses and controllers: `build_case`, and what the keywords add.

    patterns: of PATTERNS. scores: of "softmax", "sigmoid". noisy: the choice may be of logits plus
    noise, so that it is not the best K of the scores. masks, labels: kinds of `draw_mask` for
    token_mask (T,) and label_mask (T,), or "absent". unused: some slots are -1, with weight 0.
    batches, lengths: B and S; 0 gives T = 0.

    `pick` in the settings is a whole number for whatever else a law has to draw.
    """
    batch, length = draw(st.sampled_from(batches)), draw(st.sampled_from(lengths))
    pattern, score = draw(st.sampled_from(patterns)), draw(st.sampled_from(scores))
    # No noise is large enough to choose what is 40 logits behind.
    with_noise = noisy and pattern not in ("huge", "one-hot", "starved") and draw(st.booleans())
    kinds = {
        "token_mask": draw(st.sampled_from(masks)),
        "label_mask": draw(st.sampled_from(labels)),
    }
    seed = draw(st.integers(0, 2**31 - 1))
    g = torch.Generator().manual_seed(seed)
    logits_TE = PATTERNS[pattern](g, batch * length, num_experts)
    # Noise and its spread turn with the row where rows are turned, so that balance is kept.
    also = "rotated" if pattern == "rotated" else "spaced"
    noise_TE = PATTERNS[also](g, batch * length, num_experts)
    std_TE = 0.1 + PATTERNS[also](g, batch * length, num_experts).sigmoid()
    case = build_case(
        logits_TE,
        top_k,
        choice_TE=noise_TE if with_noise else logits_TE,
        std_TE=std_TE,
        score=score,
        batch=batch,
        pattern=pattern,
        seed=seed,
        pick=int(torch.randint(2**31 - 1, (), generator=g)),
    )
    tensors = dict(case.tensors)
    for name, kind in kinds.items():
        if kind != "absent":
            tensors[name] = draw_mask(g, kind, batch, length)
    if unused:
        empty_TK = torch.rand(tensors["experts_TK"].shape, generator=g) < 0.3
        tensors["experts_TK"] = tensors["experts_TK"].masked_fill(empty_TK, -1)
        tensors["weights_TK"] = tensors["weights_TK"].masked_fill(empty_TK, 0)
    return Case(tensors, case.settings)


def routing_of(case: Case, dtype: torch.dtype | None = None) -> TokenChoice:
    """The routing of a case; every floating field is a leaf of its own, in `dtype`."""
    leaf = {
        name: case[name].detach().to(dtype or case[name].dtype, copy=True).requires_grad_()
        for name in FIELDS
    }
    return TokenChoice(
        case["experts_TK"],
        leaf["weights_TK"],
        case["logits_TE"].shape[1],
        leaf["logits_TE"],
        leaf["scores_TE"],
        leaf["choice_TE"],
        case.get("kept_TK"),
        {"std_TE": leaf["std_TE"]},
    )


def routing_through_softmax(case: Case) -> TokenChoice:
    """The same in fp64 with logits_TE as the only leaf, and scores and weights made from it."""
    logits_TE = case["logits_TE"].double().requires_grad_()
    scores_TE = logits_TE.softmax(-1)
    used_TK = case["experts_TK"] >= 0
    return TokenChoice(
        case["experts_TK"],
        scores_TE.gather(-1, case["experts_TK"].clamp(min=0)) * used_TK,
        logits_TE.shape[1],
        logits_TE,
        scores_TE,
        logits_TE + (case["choice_TE"] - case["logits_TE"]).double(),
        case.get("kept_TK"),
        {"std_TE": case["std_TE"].double()},
    )


def context_of(case: Case) -> RouterContext:
    """Masks and sequences of a case; packed where it has sequence_ids."""
    ids_T = case.get("sequence_ids")
    shape = (int(case.settings["batch"] or 0), int(case.settings["length"] or 0))
    return RouterContext(
        token_mask=case.get("token_mask"),
        label_mask=case.get("label_mask"),
        sequence_ids=ids_T,
        batch_shape=shape if ids_T is None and math.prod(shape) == len(case["logits_TE"]) else None,
    )


def changed(case: Case, *without: str, **tensors: Tensor) -> Case:
    """The case with other tensors, and without those named."""
    kept = {name: tensor for name, tensor in case.tensors.items() if name not in without}
    return Case({**kept, **tensors}, case.settings)


def take_rows(case: Case, rows: Tensor, batch: int) -> Case:
    """The tokens `rows` (a mask or ids), as `batch` sequences of one length."""
    tensors = {
        name: tensor[rows] if name in PER_TOKEN else tensor for name, tensor in case.tensors.items()
    }
    length = len(tensors["logits_TE"]) // max(batch, 1)
    return Case(tensors, {**case.settings, "batch": batch, "length": length})


def relabel(case: Case, order_E: Tensor) -> Case:
    """Expert order_E[e] becomes expert e, in every field; unused slots stay unused."""
    ids = case["experts_TK"]
    now_E = order_E.argsort()
    tensors = {name: case[name][:, order_E] for name in FIELDS if name.endswith("_TE")}
    return changed(case, **tensors, experts_TK=torch.where(ids < 0, -1, now_E[ids.clamp(min=0)]))
