"""One line that checks a loss."""

from __future__ import annotations

import copy
import inspect
from typing import TypeVar, get_args

from torch import Tensor, nn

from moetk.errors import RouterConfigError
from moetk.layers.attach import Loss, name_of
from moetk.settings import check_whole
from moetk.testing.law import judge_laws, untouched_random
from moetk.testing.laws import (
    losses_any,
    losses_balance,
    losses_forms,
    losses_sequences,
    losses_tokens,
    losses_told,
)
from moetk.testing.laws.losses_subject import Like, LossSubject
from moetk.testing.report import LawReport

Part = TypeVar("Part")

_ROOMS = (losses_any, losses_tokens, losses_sequences, losses_balance, losses_forms, losses_told)
LAWS = tuple(law for room in _ROOMS for law in room.LAWS)


def check_loss(
    loss: Loss,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    examples: int = 50,
    derandomize: bool = True,
    like: Like | None = None,
    coefficient: float | None = None,
) -> LawReport:
    """Check every law of losses that speaks about this one, on `examples` drawn routings each.

    loss: any `(routing, ctx) -> scalar`, of a TokenChoice with logits_TE, scores_TE, choice_TE,
        weights_TK and extras["std_TE"]. Where it has `coefficient`, `normalisation`, `scope`
        ("token", "sequence", "micro_batch", "global_batch") and `reduce`, they are believed, and
        checked; otherwise the scope is measured. A loss whose experts are not alike declares
        `experts_differ = True`, one that reads the order of tokens `ordered = True`.
        It is not changed: its copy is checked, on the CPU. torch's random numbers go on after the
        check as if it had drawn none.
    like: what it is a form of: "switch" (E sum f P / K, f of all choices that were made), "hf"
        (without / K), "z", "variation", "none"; None = as measured, and as none of them where it
        behaves like none.
    coefficient: what that form is multiplied with, for a loss without a `coefficient` of its own;
        None = 1 where `like` is told, else as measured.

    Raises LawBrokenError where a law breaks, with the smallest case; RouterConfigError for what is
    no loss and for sizes that cannot be; MoeShapeError for a loss that returns no scalar; what the
    loss itself raises on an ordinary routing.
    """
    _check_loss(loss)
    check_sizes("check_loss", num_experts, top_k)
    if like is not None and like not in get_args(Like):
        raise RouterConfigError(
            f"check_loss: like={like!r}; it is one of {', '.join(get_args(Like))}, or None."
        )
    arguments = {"num_experts": num_experts, "top_k": top_k, "told": like, "factor": coefficient}
    subject = LossSubject(own_copy(loss), num_experts, top_k, like, coefficient)
    with untouched_random():
        subject(subject.balanced())
        outcomes = judge_laws(LAWS, subject, examples=examples, derandomize=derandomize)
    return LawReport(
        name_of(loss),
        tuple(outcomes),
        subject_of=LossSubject,
        arguments=arguments,
        part=loss,
    ).or_raise()


def _check_loss(loss: Loss) -> None:
    """Raise RouterConfigError unless it can be called with a routing and a context."""
    check_object("check_loss", loss, "loss")
    if not callable(loss):
        raise RouterConfigError(
            f"check_loss: {name_of(loss)} cannot be called; a loss is called as loss(routing, ctx)."
        )
    try:
        inspect.signature(loss).bind(None, None)
    except TypeError as error:
        raise RouterConfigError(
            f"check_loss: {name_of(loss)} is called as loss(routing, ctx), and takes "
            f"{inspect.signature(loss)}: {error}."
        ) from error
    except ValueError:  # written in C: it does not say what it takes
        pass


def check_object(who: str, part: object, kind: str) -> None:
    """Raise RouterConfigError for a class, which is no part but makes some."""
    if isinstance(part, type):
        raise RouterConfigError(
            f"{who}: {part.__name__} is a class; pass a {kind}, {who}({part.__name__}(...))."
        )


def own_copy(part: Part) -> Part:
    """A copy to check, with its tensors on the CPU; itself where it cannot be copied (it holds a
    process group, say)."""
    try:
        new = copy.deepcopy(part)
    except (TypeError, RuntimeError, NotImplementedError):
        return part
    if isinstance(new, nn.Module):
        return new.cpu()
    for name, value in getattr(new, "__dict__", {}).items():
        if isinstance(value, Tensor) and not inspect.isroutine(new):
            object.__setattr__(new, name, value.cpu())  # also where a dataclass is frozen
    return new


def check_sizes(who: str, num_experts: int, top_k: int) -> None:
    """Raise RouterConfigError unless 1 <= top_k <= num_experts."""
    check_whole(who, num_experts=num_experts, top_k=top_k)
    if top_k > num_experts:
        raise RouterConfigError(
            f"{who}: top_k={top_k} but num_experts={num_experts}; need 1 <= top_k <= num_experts."
        )
