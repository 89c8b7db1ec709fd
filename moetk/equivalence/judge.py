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
from dataclasses import dataclass

import torch
from torch import Tensor

from moetk.errors import MoeShapeError
from moetk.routing import TokenChoice, need

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
    ours: TokenChoice,
    other_TK: Tensor,
    truth_TE: Tensor,
    *,
    selection: torch.dtype,
    reduction: int,
) -> Choices:
    """Ours against another implementation's ids (T, K).

    ours carries choice_TE, or else the scores or logits it chose from. truth_TE: those scores in
    fp64, (T, E). selection: the dtype the choice was made in; reduction: length of the longest sum
    behind a score. A pair counts as tied within twice the largest measured error of the scores plus
    one unit of that dtype; an error beyond sqrt(reduction) units is no rounding and excuses
    nothing.

    Raises MissingFieldError when ours carries none of the three.
    """
    chosen_TE = next(
        (t for t in (ours.choice_TE, ours.scores_TE, ours.logits_TE) if t is not None), None
    )
    if chosen_TE is None:
        chosen_TE = need(ours, "choice_TE", "compare_choices")
    chosen_TE, truth_TE = chosen_TE.detach().double(), truth_TE.detach().double()
    ids_TK, other_TK = ours.experts_TK, other_TK.to(ours.experts_TK.device)
    num_choices = ids_TK.shape[1]

    same_T = (ids_TK == other_TK).all(-1)
    sets_T = (ids_TK.sort(-1).values == other_TK.sort(-1).values).all(-1)
    mask_ours = torch.zeros_like(truth_TE).scatter_(1, ids_TK.clamp(min=0), 1).bool()
    mask_other = torch.zeros_like(truth_TE).scatter_(1, other_TK.clamp(min=0), 1).bool()
    only_ours, only_other = mask_ours & ~mask_other, mask_other & ~mask_ours
    finite_TE = torch.where(truth_TE.isfinite(), truth_TE, 0)
    errors_TE = (chosen_TE - truth_TE).abs().nan_to_num(0.0, 0.0, 0.0)
    error = float(errors_TE.max()) if errors_TE.numel() else 0.0
    # A score that is wrong would excuse every choice.
    unit = torch.finfo(selection).eps * float(finite_TE.abs().max()) if finite_TE.numel() else 0.0
    low = truth_TE.masked_fill(~(only_ours | only_other), math.inf).amin(-1)
    high = truth_TE.masked_fill(~(only_ours | only_other), -math.inf).amax(-1)
    tied_T = ~sets_T & ((high - low) <= 2 * min(error, unit * math.sqrt(reduction)) + unit)

    border = 0
    if num_choices < chosen_TE.shape[1]:
        best = chosen_TE.topk(num_choices + 1, -1).values
        border = int((best[:, -1] == best[:, -2]).sum())
    same, equal_sets, tied = int(same_T.sum()), int(sets_T.sum()), int(tied_T.sum())
    return Choices(same, equal_sets - same, tied, len(ids_TK) - equal_sets - tied, border)
