"""The pass rule: is a fast or composed part as close to the truth as the plain one in its dtype?

    error(ours) <= max(2 x error(eager, same dtype), floor)
    error(x)    =  |x - truth|_F / |truth|_F
    floor       =  eps(dtype the products accumulate in) x sqrt(reduction length)

No hand-set tolerance, no element by element: a tolerance that is right for one width is wrong for
another, and single elements near zero say nothing. Choices are compared apart from numbers, aware
of ties.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetk.errors import MoeShapeError

FACTOR = 2.0


@dataclass(frozen=True)
class Verdict:
    """One tensor under the pass rule. `ratio` = error / max(eager's error, floor); ok up to 2 (or,
    where the floor decides, up to 1)."""

    name: str
    error: float
    eager_error: float
    floor: float

    @property
    def ratio(self) -> float:
        return self.error / max(self.eager_error, self.floor / FACTOR)

    @property
    def ok(self) -> bool:
        # Written so that NaN fails.
        return self.error <= max(FACTOR * self.eager_error, self.floor)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth|_F / |truth|_F in fp64; 0 when both are zero, inf when only the truth is."""
    if value.shape != truth.shape:
        raise MoeShapeError(f"{tuple(value.shape)} is compared with {tuple(truth.shape)}.")
    difference: float = (value.detach().double() - truth.detach().double()).norm().item()
    norm: float = truth.detach().double().norm().item()
    if norm == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / norm


def floor(dtype: torch.dtype, reduction: int) -> float:
    """The error that a sum of `reduction` terms may have in the dtype it accumulates in: fp32 for
    bf16, fp16 and fp32, fp64 for fp64."""
    accumulates = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(accumulates).eps * math.sqrt(max(reduction, 1))


def judge(
    name: str,
    ours: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    reduction: int,
    eager_truth: Tensor | None = None,
) -> Verdict:
    """Judge one tensor. truth: fp64, at the same rounded inputs.

    reduction: length of the longest sum behind one element.
    eager_truth: the truth at eager's own choices, where it chose other experts than ours on a tie;
    None = the same truth.
    """
    against = truth if eager_truth is None else eager_truth
    return Verdict(
        name,
        relative_error(ours, truth),
        relative_error(eager, against),
        floor(ours.dtype, reduction),
    )


def judge_together(verdicts: Sequence[Verdict]) -> tuple[Verdict]:
    """One verdict for tensors of a handful of numbers each (norms' and mixers' scales), in which a
    sum over all tokens cancels: alone their error is a single draw, and so is eager's; the root
    mean square over them is not."""

    def rms(values: Iterable[float]) -> float:
        return math.sqrt(sum(value**2 for value in values) / len(verdicts))

    return (
        Verdict(
            f"{len(verdicts)} gradients of a few numbers, together",
            rms(verdict.error for verdict in verdicts),
            rms(verdict.eager_error for verdict in verdicts),
            max(verdict.floor for verdict in verdicts),
        ),
    )


@dataclass(frozen=True)
class Choices:
    """How two routings of the same tokens differ, in tokens.

    same: equal sets in equal order. permuted: equal sets. tied: each swapped pair of experts lies
    within the scores' own error. flipped: a true difference. border_ties: tokens whose last chosen
    and first unchosen score are equal to the bit, so that the choice is the tie rule's.
    """

    same: int
    permuted: int
    tied: int
    flipped: int
    border_ties: int

    @property
    def total(self) -> int:
        return self.same + self.permuted + self.tied + self.flipped

    @property
    def ok(self) -> bool:
        return self.flipped == 0

    @property
    def tie_share(self) -> float:
        """Share of tokens that a tie decides, or could."""
        return max(self.border_ties, self.tied) / max(self.total, 1)

    def __add__(self, other: Choices) -> Choices:
        return Choices(
            self.same + other.same,
            self.permuted + other.permuted,
            self.tied + other.tied,
            self.flipped + other.flipped,
            self.border_ties + other.border_ties,
        )


def compare_choices(
    ours_TK: Tensor, other_TK: Tensor, truth_TE: Tensor, scores_TE: Tensor, *, error: float
) -> Choices:
    """Ours against another implementation's ids, both (T, K).

    truth_TE: the scores of the choice in fp64. scores_TE: those ours chose from, in their own
    dtype. error: the largest error that a right implementation's scores have in that dtype,
    measured on the eager one, never on ours: a wrong score would excuse every choice. A pair of
    experts counts as tied where the truth sets it apart by at most twice that.
    """
    truth_TE, other_TK = truth_TE.detach().double(), other_TK.to(ours_TK.device)
    same_T = (ours_TK == other_TK).all(-1)
    sets_T = (ours_TK.sort(-1).values == other_TK.sort(-1).values).all(-1)
    # How much more often each expert is named: one that stands twice in a row counts twice.
    surplus_TE = _times_named(ours_TK, truth_TE) - _times_named(other_TK, truth_TE)
    swapped_TE = surplus_TE != 0
    low_T = truth_TE.masked_fill(~swapped_TE, math.inf).amin(-1)
    high_T = truth_TE.masked_fill(~swapped_TE, -math.inf).amax(-1)
    tied_T = ~sets_T & (surplus_TE.sum(-1) == 0) & ((high_T - low_T) <= 2 * error)

    border, num_choices = 0, ours_TK.shape[1]
    if num_choices < scores_TE.shape[1]:
        best = scores_TE.detach().topk(num_choices + 1, -1).values
        border = int((best[:, -1] == best[:, -2]).sum())
    same, equal_sets, tied = int(same_T.sum()), int(sets_T.sum()), int(tied_T.sum())
    return Choices(same, equal_sets - same, tied, len(ours_TK) - equal_sets - tied, border)


def _times_named(experts_TK: Tensor, like_TE: Tensor) -> Tensor:
    """(T, E): how often each token names each expert."""
    named_TK = (experts_TK >= 0).to(like_TE.dtype)
    return torch.zeros_like(like_TE).scatter_add(1, experts_TK.clamp(min=0), named_TK)


def largest_error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth| over the entries that are finite in both; 0 where there are none."""
    difference = (value.detach().double() - truth.detach().double()).abs()
    difference = difference[difference.isfinite()]
    return float(difference.max()) if difference.numel() else 0.0
