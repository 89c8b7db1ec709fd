"""Two routings of the same tokens: equal to the bit, or within what rounding explains.

Where the two came through products of another shape, scores differ by rounding. Then choices may
differ only where scores are as close as that, and weights by no more than such a change of the
input makes in the router itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moetk.routing import ExpertChoice, Routing, SoftChoice, TokenChoice
from moetk.testing.law import Case, hold
from moetk.testing.laws.routers_subject import RouterSubject, context_of
from moetk.testing.laws.routers_told import by_token, differing


def hold_same(first: Routing, second: Routing, when: str, rows: Tensor | None = None) -> None:
    """Each token (of `rows`, (T,) bool) is routed the same, to the bit."""
    left, right = by_token(first), by_token(second)
    changed_T = differing(left, right)
    if rows is not None:
        changed_T = changed_T & rows
    if bool(changed_T.any()):
        token = int(changed_T.nonzero()[0])
        names = [name for name, tensor in left.items() if _differs(tensor, right.get(name), token)]
        hold(
            False,
            f"token {token} is routed differently when {when}: {', '.join(names)} "
            f"{[_row(left, name, token) for name in names]} became "
            f"{[_row(right, name, token) for name in names]}",
            **{f"first_{name}": tensor for name, tensor in left.items()},
            **{f"second_{name}": tensor for name, tensor in right.items()},
        )


def _differs(left: Tensor, right: Tensor | None, token: int) -> bool:
    if right is None or left.shape != right.shape:
        return True
    return bool(differing({"": left}, {"": right})[token])


def _row(told: dict[str, Tensor], name: str, token: int) -> object:
    tensor = told.get(name)
    return None if tensor is None or token >= len(tensor) else tensor[token].tolist()


def coarsest_eps(routing: Routing) -> float:
    """eps of the coarsest floating dtype in the routing: what its scores are rounded to."""
    tensors = [t for t in vars(routing).values() if isinstance(t, Tensor) and t.is_floating_point()]
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors)


def rounding_of(
    subject: RouterSubject, routing: Routing, case: Case, *, eps: float, terms: int, ulps: int
) -> Tensor:
    """How far each weight may be off by rounding alone, in the shape of by_token's weights: twice
    the largest change that rounding the input at random makes in the router itself, and `ulps`
    roundings of the weight.

    eps: of the dtype that rounds. terms: how many roundings one upon the other a score has.
    """
    told = by_token(routing)
    moved = torch.zeros_like(told["weights"], dtype=torch.float64)
    step = eps * math.sqrt(terms)
    generator = torch.Generator().manual_seed(0)
    training = bool(case.settings["training"])
    for _ in range(3):
        noise_TH = torch.randn(case["x_TH"].shape, generator=generator, dtype=torch.float64)
        near_TH = case["x_TH"] * (1 + step * noise_TH.clamp(-2, 2))
        near = by_token(subject.route(near_TH, context_of(case), training=training))
        change = (near["weights"].double() - told["weights"].double()).abs()
        moved = torch.maximum(moved, change)
    return 2 * moved + ulps * eps * told["weights"].double().abs()


def rounding(subject: RouterSubject, routing: Routing, case: Case) -> Tensor:
    """`rounding_of` in the coarsest dtype of the routing, in sums as long as x is wide.

    Of 64 ulps, as a softmax turns one rounding of a score of size 16 into 16 of its weight, and a
    score has had a few: 1e-14 of a weight in float64.
    """
    eps = coarsest_eps(routing)
    return rounding_of(subject, routing, case, eps=eps, terms=subject.hidden_size, ulps=64)


def hold_close(
    subject: RouterSubject, first: Routing, second: Routing, case: Case, when: str
) -> None:
    """The same experts, but where scores tie within rounding, and the same weights within it.

    Where tokens compete, equal tokens tie for a place, and rounding says who gets it: such a batch
    is not compared.
    """
    told, other = by_token(first), by_token(second)
    if subject.mixes and not isinstance(first, SoftChoice) and _has_equal_rows(case["x_TH"]):
        return
    hold(
        told["chosen"].shape == other["chosen"].shape,
        f"shapes change when {when}: {tuple(told['chosen'].shape)} became "
        f"{tuple(other['chosen'].shape)}",
    )
    judged_T = torch.ones(len(told["chosen"]), dtype=torch.bool)
    if not isinstance(first, SoftChoice):
        swapped_T, tied_T = ~(told["chosen"] == other["chosen"]).all(-1), near_ties(first)
        bad_T = swapped_T & ~tied_T
        token = _first(bad_T)
        hold(
            ~bad_T,
            f"token {token} goes elsewhere when {when}: {_row(told, 'chosen', token)} became "
            f"{_row(other, 'chosen', token)}",
            first=told["chosen"],
            second=other["chosen"],
        )
        judged_T = ~swapped_T & ~tied_T
    allowed = rounding(subject, first, case)
    off = (told["weights"].double() - other["weights"].double()).abs()
    bad_T = (~(off <= allowed)).any(-1) & judged_T
    hold(
        ~bad_T,
        f"token {_first(bad_T)} weighs {_row(other, 'weights', _first(bad_T))} instead of "
        f"{_row(told, 'weights', _first(bad_T))} when {when}",
        first=told["weights"],
        second=other["weights"],
    )


def _has_equal_rows(x_TH: Tensor) -> bool:
    return len(x_TH.unique(dim=0)) < len(x_TH)


def _first(mask_T: Tensor) -> int:
    return int(mask_T.nonzero()[0]) if bool(mask_T.any()) else 0


def choice_of(routing: Routing) -> Tensor | None:
    """What the selection saw, as far as the routing says: choice_TE, else scores_TE, else
    logits_TE."""
    if isinstance(routing, SoftChoice):
        return None
    names = ("choice_TE", "scores_TE", "logits_TE")
    found = (getattr(routing, name, None) for name in names)
    return next((tensor for tensor in found if tensor is not None), None)


def near_ties(routing: TokenChoice | ExpertChoice) -> Tensor:
    """(T,) bool: tokens of which two scores are so close that rounding may swap them. None are
    where the routing carries no scores: then its choices are compared as they are."""
    choice_TE, num_tokens = choice_of(routing), len(by_token(routing)["chosen"])
    if choice_TE is None or choice_TE.numel() == 0:
        return torch.zeros(num_tokens, dtype=torch.bool)
    if isinstance(routing, TokenChoice):
        return _close_pairs(choice_TE, coarsest_eps(routing)).any(-1)
    # Two tokens that tie for one expert: either may be taken, so that both are in doubt; and any
    # token may be one of them.
    close = _close_pairs(choice_TE.T, coarsest_eps(routing))
    return close.any().expand(num_tokens)


def _close_pairs(x_RN: Tensor, eps: float) -> Tensor:
    """(R, N - 1) bool: neighbours in size that are within 64 eps of their row's largest."""
    ordered_RN = x_RN.double().sort(-1).values
    finite_RN = ordered_RN.masked_fill(~ordered_RN.isfinite(), 0)
    return ordered_RN.diff(dim=-1) <= 64 * eps * finite_RN.abs().amax(-1, keepdim=True)
