"""What predictions are built from: the reference's values, read the way a stage reads them.

Letters: T tokens, E experts, K choices a token, H hidden, J up-projection width, I expert width,
M a matrix's outputs, N its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from moetk.equivalence.cause import Evidence, deviation

Scores = Callable[[Tensor], Tensor]


def sqrt_softplus(logits_TE: Tensor) -> Tensor:
    return F.softplus(logits_TE).sqrt()


def softmax(logits_TE: Tensor) -> Tensor:
    return logits_TE.softmax(-1)


def normalised(weights_TK: Tensor) -> Tensor:
    """Rows that sum to one; a row of zeros stays."""
    total_T1 = weights_TK.sum(-1, keepdim=True)
    return weights_TK / (total_T1 + (total_T1 == 0))


SCORE_FUNCTIONS: dict[str, Scores] = {
    "softmax": softmax,
    "sigmoid": torch.sigmoid,
    "sqrt(softplus)": sqrt_softplus,
    "softplus": F.softplus,
    "relu": torch.relu,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "no function": lambda logits_TE: logits_TE,
}


def value(evidence: Evidence, stage: str) -> Tensor | None:
    return evidence.a.values.get(stage)


def scores_of(evidence: Evidence) -> Tensor | None:
    """The reference's scores, of all experts; without them, the softmax of its logits."""
    scores_TE, logits_TE = value(evidence, "scores"), value(evidence, "logits")
    return scores_TE if scores_TE is not None or logits_TE is None else softmax(logits_TE)


def score_function(evidence: Evidence) -> Scores | None:
    """Which function the reference's scores are of its logits."""
    logits_TE, scores_TE = value(evidence, "logits"), value(evidence, "scores")
    if logits_TE is None or scores_TE is None:
        return None
    for function in SCORE_FUNCTIONS.values():
        if deviation(function(logits_TE), scores_TE) <= evidence.tolerance:
            return function
    return None


def choice_bias(evidence: Evidence) -> Tensor | None:
    """(E,) what is added where experts are chosen, in the dtype of the evidence's scores."""
    bias_E, scores_TE = evidence.facts.get("choice_bias"), scores_of(evidence)
    return bias_E if bias_E is None or scores_TE is None else bias_E.to(scores_TE)


def at(values_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """The chosen experts' values, (T, K); 0 at an unused slot."""
    return values_TE.gather(1, ids_TK.clamp(min=0)).masked_fill(ids_TK < 0, 0)


def at_chosen(evidence: Evidence, values_TE: Tensor | None) -> Tensor | None:
    ids_TK = value(evidence, "indices")
    return None if values_TE is None or ids_TK is None else at(values_TE, ids_TK)


def rows_of(values_EN: Tensor, ids_TK: Tensor) -> Tensor:
    """Each choice's row of its expert, (T, K, N)."""
    return values_EN[ids_TK.clamp(min=0)]


def used(evidence: Evidence) -> Tensor | None:
    """(T, K) bool: choices that are carried out."""
    ids_TK, kept_TK = value(evidence, "indices"), value(evidence, "dispatched")
    if ids_TK is None:
        return None
    return ids_TK >= 0 if kept_TK is None else (ids_TK >= 0) & kept_TK.bool()


def only_used(evidence: Evidence, values_TKN: Tensor) -> Tensor:
    used_TK = used(evidence)
    return values_TKN if used_TK is None else values_TKN.masked_fill(~used_TK[..., None], 0)


def through(rows_TKN: Tensor, weight_EMN: Tensor, ids_TK: Tensor) -> Tensor:
    """Each choice's row times the transposed matrix of its expert, (T, K, M)."""
    out_TKM = rows_TKN.new_zeros(*ids_TK.shape, weight_EMN.shape[1])
    for expert, weight_MN in enumerate(weight_EMN):
        here_TK = ids_TK == expert
        out_TKM[here_TK] = rows_TKN[here_TK] @ weight_MN.T
    return out_TKM


def per_choice(x_TH: Tensor, ids_TK: Tensor) -> Tensor:
    """x once for each choice, (T, K, H)."""
    return x_TH[:, None].expand(-1, ids_TK.shape[1], -1)


def halves_swapped(values: Tensor, dim: int = -1) -> Tensor:
    return torch.cat(values.chunk(2, dim)[::-1], dim)


def interleaved(values: Tensor, dim: int = -1) -> Tensor:
    """Gate and up behind each other -> alternating."""
    dim %= values.ndim
    return torch.stack(values.chunk(2, dim), dim + 1).flatten(dim, dim + 1)


def concatenated(values: Tensor, dim: int = -1) -> Tensor:
    """Gate and up alternating -> behind each other."""
    dim %= values.ndim
    pairs = values.unflatten(dim, (-1, 2))
    return torch.cat([pairs.select(dim + 1, 0), pairs.select(dim + 1, 1)], dim)


def rearranged(wanted: Tensor, found: Tensor, dim: int) -> Tensor | None:
    """`wanted` with its slices along `dim` moved to where `found` has the same ones, if any."""
    if wanted.shape != found.shape or not bool(wanted.isfinite().all() & found.isfinite().all()):
        return None
    flat, other = (t.double().movedim(dim, 0).flatten(1) for t in (wanted, found))
    # A random projection tells slices apart, and sorts both alike.
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(flat.shape[1], generator=generator, dtype=torch.float64).to(flat.device)
    places = torch.empty_like((flat @ direction).argsort())
    places[(other @ direction).argsort()] = (flat @ direction).argsort()
    return wanted.index_select(dim, places)


def nearest_multiple(e: Evidence, dims: tuple[int, ...]) -> Tensor | None:
    """What was wanted, times the factor that brings it nearest to what was found; one factor for
    each index that is not in `dims`. None where one number alone would be scaled, of which a
    factor says nothing."""
    found, wanted = e.found.double(), e.wanted.double()
    if found.shape != wanted.shape or not bool(wanted.isfinite().all() & found.isfinite().all()):
        return None
    if math.prod(wanted.shape[dim] for dim in dims) < 2:
        return None
    square = (wanted * wanted).sum(dims, keepdim=True)
    return wanted * (found * wanted).sum(dims, keepdim=True) / (square + (square == 0))


def multiple_of_all(e: Evidence) -> Iterator[Tensor]:
    one = nearest_multiple(e, tuple(range(e.wanted.ndim)))
    if one is not None:
        yield one


def multiple_of_rows(e: Evidence) -> Iterator[Tensor]:
    """One factor for each row, where they are not all the same."""
    if any(e.equals(one) for one in multiple_of_all(e)):
        return
    rows = nearest_multiple(e, tuple(range(1, e.wanted.ndim)))
    if rows is not None:
        yield rows


def is_rounding(found: Tensor, exact: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Whether `found` holds numbers of `dtype` alone, where `wanted` holds others, and each is
    `exact` rounded: to one unit of the last place, for a sum may have been rounded on the way."""
    found, exact, wanted = found.double(), exact.double(), wanted.double()
    if found.shape != exact.shape or found.numel() == 0:
        return False
    held, fits = found.to(dtype).double() == found, wanted.to(dtype).double() == wanted
    if not bool(held.all()) or bool(fits.all()):
        return False
    slack = torch.finfo(dtype).eps * exact.abs() + 1e-5 * exact.abs().amax()
    return bool(((found - exact).abs() <= slack).all())
