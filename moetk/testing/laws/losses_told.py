"""The law of a loss that is said to be c E sum_e f_e P_e / K: every choice made counts, alike.

Measured alone, a loss of the first choices, or of what the scores alone would choose, is right too.
Letters: T tokens = B sequences of S, E experts, K choices a token.
"""

from __future__ import annotations

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from moetk.losses import DeepSeekSequenceLoss
from moetk.testing.law import Case, Law, law
from moetk.testing.laws.losses_subject import LossSubject, gradients
from moetk.testing.strategies.losses import context_of, routing_through_softmax, routings


def _not_told(subject: LossSubject) -> str | None:
    if subject.told in ("switch", "hf"):
        return None
    return 'nobody told that it is like="switch" or like="hf", of all choices that were made'


def _noisy(subject: LossSubject) -> SearchStrategy[Case]:
    """Probabilities, and choices that are often not the best of them."""
    return routings(
        subject.num_experts,
        subject.top_k,
        patterns=("spaced", "sorted", "gaussian"),
        scores=("softmax",),
        batches=(1, 2, 3),
        lengths=(1, 2, 3, 5, 8),
    )


def _share_of(case: Case, by_sequence: bool) -> Tensor:
    """(T, E) fp64: f of the sequence (or of the whole batch) that each token stands in."""
    experts_TK, num_experts = case["experts_TK"], case["logits_TE"].shape[1]
    chosen_TE = torch.zeros(len(experts_TK), num_experts, dtype=torch.float64)
    chosen_TE.scatter_add_(1, experts_TK, torch.ones_like(chosen_TE)[:, : experts_TK.shape[1]])
    runs = int(case.settings["batch"] or 1) if by_sequence else 1
    share_RE = chosen_TE.view(runs, -1, num_experts).mean(1) / experts_TK.shape[1]
    return share_RE.repeat_interleave(len(experts_TK) // runs, 0)


@law(
    "L33",
    "all choices count, and those that were made",
    formula="L = (c E / T) sum_t sum_e f_e p_te, f_e the share of e in all T K choices; dL/dl = "
    "(c E / T) p_te (f_e - sum_j f_j p_tj)",
    source="arXiv 2101.03961, equations 4-6; noise and biases choose otherwise than scores do",
    cases=_noisy,
    # of what the scores alone would choose
    broken=lambda: LossSubject(DeepSeekSequenceLoss(1.0), told="switch"),
    unless=_not_told,
)
def all_choices(subject: LossSubject, case: Case) -> None:
    routing = routing_through_softmax(case)
    value = subject.loss(routing, context_of(case))
    got_TE = gradients(value, routing)["logits_TE"]
    probs_TE = case["logits_TE"].double().softmax(-1)
    share_TE = _share_of(case, subject.scope == "sequence")
    load_T1 = (share_TE * probs_TE).sum(-1, keepdim=True)
    unit, tokens = subject.in_balance * subject.num_experts, len(probs_TE)
    subject.hold_near(value, unit * load_T1.mean(), "the value", case)
    want_TE = unit / tokens * probs_TE * (share_TE - load_T1)
    subject.hold_near(got_TE, want_TE, "the gradient of the logits", case, tokens)


LAWS: tuple[Law[LossSubject], ...] = (all_choices,)
