"""One line that checks a loss."""

from __future__ import annotations

from typing import get_args

from moetk.errors import RouterConfigError
from moetk.layers.attach import Loss, name_of
from moetk.settings import check_whole
from moetk.testing.law import judge_laws
from moetk.testing.laws import (
    losses_any,
    losses_balance,
    losses_forms,
    losses_sequences,
    losses_tokens,
)
from moetk.testing.laws.losses_subject import Like, LossSubject
from moetk.testing.report import LawReport

_ROOMS = (losses_any, losses_tokens, losses_sequences, losses_balance, losses_forms)
LAWS = tuple(law for room in _ROOMS for law in room.LAWS)


def check_loss(
    loss: Loss,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    examples: int = 50,
    derandomize: bool = True,
    like: Like | None = None,
) -> LawReport:
    """Check every law of losses that speaks about this one, on `examples` drawn routings each.

    loss: any `(routing, ctx) -> scalar`, of a TokenChoice with logits_TE, scores_TE, choice_TE,
        weights_TK and extras["std_TE"]. Where it has `coefficient`, `normalisation`, `scope`
        ("token", "sequence", "micro_batch", "global_batch") and `reduce`, they are believed, and
        checked; otherwise the scope is measured. A loss whose experts are not alike declares
        `experts_differ = True`, one that reads the order of tokens `ordered = True`.
    like: what it is a form of: "switch" (E sum f P / K), "hf" (without / K), "z", "variation";
        None = as measured, and as none of them where it behaves like none.

    Raises LawBrokenError where a law breaks, with the smallest case; RouterConfigError for sizes
    that cannot be; MoeShapeError for a loss that returns no scalar; what the loss itself raises on
    an ordinary routing.
    """
    check_sizes("check_loss", num_experts, top_k)
    if like is not None and like not in get_args(Like):
        raise RouterConfigError(
            f"check_loss: like={like!r}; it is one of {', '.join(get_args(Like))}, or None."
        )
    subject = LossSubject(loss, num_experts, top_k, like)
    subject(subject.balanced())
    outcomes = judge_laws(LAWS, subject, examples=examples, derandomize=derandomize)
    return LawReport(
        name_of(loss),
        tuple(outcomes),
        subject_of=LossSubject,
        arguments={"num_experts": num_experts, "top_k": top_k, "told": like},
        part=loss,
    ).or_raise()


def check_sizes(who: str, num_experts: int, top_k: int) -> None:
    """Raise RouterConfigError unless 1 <= top_k <= num_experts."""
    check_whole(who, num_experts=num_experts, top_k=top_k)
    if top_k > num_experts:
        raise RouterConfigError(
            f"{who}: top_k={top_k} but num_experts={num_experts}; need 1 <= top_k <= num_experts."
        )
