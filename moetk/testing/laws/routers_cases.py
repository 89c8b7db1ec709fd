"""What routers are checked on, and the small routers that their laws must catch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from moetk.routers import LinearRouter
from moetk.routing import TokenChoice
from moetk.testing.law import Case, Setting
from moetk.testing.laws.routers_subject import RouterSubject
from moetk.testing.strategies.inputs import pattern_names, rows_of
from moetk.testing.strategies.sequences import MASKS, mask_of_kind, packed
from moetk.testing.strategies.shapes import batch_shapes, seeds

Cases = Callable[[RouterSubject], SearchStrategy[Case]]
Added = Callable[[int, int, int, int], Mapping[str, Tensor]]  # seed, B, S, H -> tensors


def inputs(
    *patterns: str,
    sequences: int = 3,
    least_sequences: int = 1,
    least_length: int = 0,
    training: bool | None = False,
    added: Added | None = None,
) -> Cases:
    """Cases with x_TH (T = B * S, H) float64 in one of `patterns` (none named: in any), settings
    batch, length, seed, pattern and training (None: both are drawn), and the tensors `added`."""

    def cases(subject: RouterSubject) -> SearchStrategy[Case]:
        def build(pattern: str, seed: int, shape: tuple[int, int], in_training: bool) -> Case:
            batch, length = shape
            tensors = {"x_TH": rows_of(pattern, seed, batch * length, subject.hidden_size)}
            if added is not None:
                tensors |= added(seed, batch, length, subject.hidden_size)
            settings: dict[str, Setting] = {
                "batch": batch,
                "length": length,
                "seed": seed,
                "pattern": pattern,
                "training": in_training,
            }
            return Case(tensors, settings)

        return st.builds(
            build,
            pattern_names(*patterns),
            seeds(),
            batch_shapes(
                sequences=sequences, least_sequences=least_sequences, least_length=least_length
            ),
            st.booleans() if training is None else st.just(training),
        )

    return cases


def other_rows(seed: int, batch: int, length: int, width: int) -> dict[str, Tensor]:
    """other_TH: other tokens, to put in place of some."""
    return {"other_TH": rows_of("gaussian", seed + 1, batch * length, width)}


def padded_with_others(seed: int, batch: int, length: int, width: int) -> dict[str, Tensor]:
    """token_mask of each kind in turn, and other_TH."""
    kinds = tuple(MASKS)
    mask_T = mask_of_kind(kinds[seed % len(kinds)], seed, batch, length)
    return {"token_mask": mask_T, **other_rows(seed, batch, length, width)}


def packed_with_others(seed: int, batch: int, length: int, width: int) -> dict[str, Tensor]:
    """sequence_ids and positions of up to three packed sequences, and other_TH."""
    sequence_T, position_T = packed(seed, batch * length, 3)
    others = other_rows(seed, batch, length, width)
    return {"sequence_ids": sequence_T, "positions": position_T, **others}


def broken_subject(
    router: Callable[..., Callable[..., object]], *sizes: int, **settings: object
) -> Callable[[], RouterSubject]:
    """() -> a small router of that class, always the same one, as a subject."""

    def build() -> RouterSubject:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = router(*(sizes or (4, 4, 2)), **settings)
        return RouterSubject(made, hidden_size=(sizes or (4,))[0])  # type: ignore[arg-type]

    return build


class ScoredRouter(LinearRouter):
    """Sigmoid scores and nothing chosen yet: what the broken routers start from."""

    def scored(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        logits_TE = self.logits(x_TH)
        return logits_TE, logits_TE.sigmoid()

    def chosen(self, experts_TK: Tensor, weights_TK: Tensor, **fields: Tensor) -> TokenChoice:
        return TokenChoice(experts_TK, weights_TK, self.num_experts, **fields)  # type: ignore[arg-type]


def unless_experts_are_chosen(subject: RouterSubject) -> str | None:
    if subject.chooses_experts:
        return None
    return f"a {type(subject.first).__name__} has no experts_TK"


def unless_tokens_are_chosen(subject: RouterSubject) -> str | None:
    if subject.chooses_tokens:
        return None
    return f"a {type(subject.first).__name__} has no tokens_EC"


EXPERTS_DIFFER = "where some are shared or scaled on purpose, declare experts_differ = True"


def unless_experts_are_alike(subject: RouterSubject) -> str | None:
    return "it declares experts_differ = True" if subject.experts_differ else None


def unless_it_has_a_mode(subject: RouterSubject) -> str | None:
    return None if subject.is_module else "a function is the same in training and in evaluation"
