"""Causes in what experts are chosen from, and in the choosing. They show at the choice scores, or,
where one side keeps those to itself, at the ids.

Letters: T tokens, E experts, K choices a token, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moetk.equivalence.cause import Cause, Evidence, cause
from moetk.equivalence.causes.values import choice_bias, score_function, scores_of, value
from moetk.kernels.selection import best_one, best_two, largest

Worth = Callable[[Tensor], Tensor]


def _groups(e: Evidence) -> tuple[int, int]:
    return int(e.facts.get("groups") or 1), int(e.facts.get("top_groups") or 1)


def _outside(judged_TE: Tensor, groups: int, top_groups: int, worth: Worth) -> Tensor:
    """(T, E) bool: experts outside the best groups."""
    if top_groups >= groups:
        return torch.zeros_like(judged_TE, dtype=torch.bool)
    worth_TG = worth(judged_TE.unflatten(-1, (groups, -1)))
    out_TG = torch.ones_like(worth_TG, dtype=torch.bool)
    out_TG = out_TG.scatter(1, largest(worth_TG, top_groups), False)
    return out_TG.repeat_interleave(judged_TE.shape[-1] // groups, -1)


def _limited(e: Evidence, choice_TE: Tensor) -> Tensor:
    """choice_TE within the best groups, as the reference limits it."""
    groups, top_groups = _groups(e)
    if top_groups >= groups:
        return choice_TE
    return choice_TE.masked_fill(_outside(choice_TE, groups, top_groups, best_two), -torch.inf)


def _scores_and_bias(e: Evidence) -> tuple[Tensor, Tensor] | None:
    scores_TE, bias_E = scores_of(e), choice_bias(e)
    return None if scores_TE is None or bias_E is None else (scores_TE, bias_E)


def _biased(e: Evidence) -> Tensor | None:
    """Scores plus bias, before groups."""
    scores_TE, bias_E = scores_of(e), choice_bias(e)
    return scores_TE if scores_TE is None or bias_E is None else scores_TE + bias_E


def chosen_from(
    name: str, *, fix: str
) -> Callable[[Callable[[Evidence], Iterator[Tensor]]], Cause]:
    """A cause of a function that yields other choice scores."""

    def make(scores: Callable[[Evidence], Iterator[Tensor]]) -> Cause:
        @cause(name, "choice", "indices", fix=fix)
        def predict(e: Evidence) -> Iterator[Tensor]:
            for choice_TE in scores(e):
                at_ids = e.stage == "indices"
                yield largest(choice_TE, e.wanted.shape[1]) if at_ids else choice_TE

        return predict

    return make


@chosen_from("choice bias missing", fix="Add the bias to the scores that experts are chosen by.")
def _bias_missing(e: Evidence) -> Iterator[Tensor]:
    if parts := _scores_and_bias(e):
        yield _limited(e, parts[0])


@chosen_from("choice bias subtracted", fix="A bias raises an expert's chance: add it.")
def _bias_subtracted(e: Evidence) -> Iterator[Tensor]:
    if parts := _scores_and_bias(e):
        yield _limited(e, parts[0] - parts[1])


@chosen_from("choice bias added twice", fix="Add the bias once.")
def _bias_twice(e: Evidence) -> Iterator[Tensor]:
    if parts := _scores_and_bias(e):
        yield _limited(e, parts[0] + 2 * parts[1])


@chosen_from(
    "choice bias added before the score function",
    fix="The bias is added to the scores, not to the logits under them.",
)
def _bias_in_logits(e: Evidence) -> Iterator[Tensor]:
    logits_TE, bias_E, function = value(e, "logits"), choice_bias(e), score_function(e)
    if logits_TE is not None and bias_E is not None and function is not None:
        yield _limited(e, function(logits_TE + bias_E))


@chosen_from("chosen from the logits", fix="Experts are chosen by their scores, bias included.")
def _from_logits(e: Evidence) -> Iterator[Tensor]:
    logits_TE, bias_E = value(e, "logits"), choice_bias(e)
    if logits_TE is not None:
        yield logits_TE
        yield _limited(e, logits_TE)
        if bias_E is not None:
            yield _limited(e, logits_TE + bias_E)


@chosen_from(
    "group mask multiplies by 0",
    fix="Outside the best groups the choice score is -inf. With 0 there, an expert of no chosen "
    "group beats every chosen one whose biased score is negative.",
)
def _mask_of_zeros(e: Evidence) -> Iterator[Tensor]:
    biased_TE = _biased(e)
    if biased_TE is not None:
        yield biased_TE.masked_fill(_outside(biased_TE, *_groups(e), best_two), 0)


@chosen_from(
    "group limit missing",
    fix="Experts are chosen within each token's best groups only.",
)
def _no_groups(e: Evidence) -> Iterator[Tensor]:
    biased_TE = _biased(e)
    if biased_TE is not None:
        yield biased_TE


@chosen_from(
    "groups judged by their best expert",
    fix="A group is worth the sum of its two best choice scores (DeepSeek-V3), not the best one "
    "(DeepSeek-V2).",
)
def _best_one(e: Evidence) -> Iterator[Tensor]:
    yield from _judged(e, best_one)


@chosen_from(
    "groups judged by all their experts",
    fix="A group is worth the sum of its two best choice scores, not the sum or mean of all.",
)
def _all_of_group(e: Evidence) -> Iterator[Tensor]:
    yield from _judged(e, lambda choice_TGM: choice_TGM.sum(-1))


def _judged(e: Evidence, worth: Worth) -> Iterator[Tensor]:
    biased_TE = _biased(e)
    if biased_TE is not None:
        yield biased_TE.masked_fill(_outside(biased_TE, *_groups(e), worth), -torch.inf)


@chosen_from(
    "groups judged without the bias",
    fix="The scores that rank groups carry the bias, as those that rank experts do.",
)
def _unbiased_groups(e: Evidence) -> Iterator[Tensor]:
    if parts := _scores_and_bias(e):
        scores_TE, bias_E = parts
        outside_TE = _outside(scores_TE, *_groups(e), best_two)
        yield (scores_TE + bias_E).masked_fill(outside_TE, -torch.inf)


@chosen_from(
    "another number of groups",
    fix="Compare n_group and topk_group of the two.",
)
def _group_sizes(e: Evidence) -> Iterator[Tensor]:
    biased_TE, ids_TK = _biased(e), value(e, "indices")
    if biased_TE is None or ids_TK is None:
        return
    num_experts, top_k, before = biased_TE.shape[1], ids_TK.shape[1], _groups(e)
    for groups in (n for n in range(1, num_experts // 2 + 1) if num_experts % n == 0):
        for top in range(1, groups):
            if (groups, top) != before and top * (num_experts // groups) >= top_k:
                outside_TE = _outside(biased_TE, groups, top, best_two)
                yield biased_TE.masked_fill(outside_TE, -torch.inf)


@chosen_from(
    "groups of distant experts",
    fix="A group is a run of neighbouring ids, reshape (T, G, E / G), not every G-th id.",
)
def _strided_groups(e: Evidence) -> Iterator[Tensor]:
    biased_TE, (groups, top_groups) = _biased(e), _groups(e)
    if biased_TE is None or groups < 2:
        return
    order_E = torch.arange(biased_TE.shape[1], device=biased_TE.device)
    order_E = order_E.view(-1, groups).T.flatten()  # neighbours in a group, group by group
    outside_TE = _outside(biased_TE[:, order_E], groups, top_groups, best_two)
    yield biased_TE.masked_fill(outside_TE[:, order_E.argsort()], -torch.inf)


CHOICE = (
    _bias_missing,
    _bias_subtracted,
    _bias_twice,
    _bias_in_logits,
    _from_logits,
    _mask_of_zeros,
    _no_groups,
    _best_one,
    _all_of_group,
    _unbiased_groups,
    _group_sizes,
    _strided_groups,
)
