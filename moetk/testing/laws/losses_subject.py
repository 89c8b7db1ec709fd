"""A loss under the laws: what it says of itself, and what is measured where it says nothing.

Letters: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor

from moetk.context import RouterContext
from moetk.equivalence.judge import floor
from moetk.errors import MissingContextError, MoeShapeError
from moetk.layers.attach import Loss, name_of
from moetk.routing import TokenChoice
from moetk.testing.law import Case, hold
from moetk.testing.strategies.losses import FIELDS, build_case, changed, context_of, routing_of

Like: TypeAlias = Literal["switch", "hf", "z", "variation", "none"]
"""What a loss is a form of. "switch": E * sum f P / K, 1 in balance. "hf": the same without / K.
"z": mean of squared logsumexp. "variation": of sums over tokens, 0 where experts are equal.
"none": of none of these."""

OPERATIONS = 16
"""Roundings beside the sums (exp, log, divisions, squares) that a loss may make on one path."""


def _size_of_weights(case: Case) -> float:
    """Root mean square of the weights in use, at most 1."""
    used = case["weights_TK"][case["weights_TK"] != 0].double()
    return min(1.0, float(used.square().mean().sqrt())) if used.numel() else 1.0


@dataclass(frozen=True, eq=False)
class LossSubject:
    """A loss, the sizes it is checked at, and what it is a form of (None = as measured).

    factor: what the form is multiplied with, for a loss that has no `coefficient` of its own.
    """

    loss: Loss
    num_experts: int = 8
    top_k: int = 2
    told: Like | None = None
    factor: float | None = None

    def with_loss(self, loss: Loss) -> LossSubject:
        """The same question to another loss."""
        return dataclasses.replace(self, loss=loss)

    def __call__(self, case: Case) -> Tensor:
        """The loss of a case, without its graph. Raises MoeShapeError unless it is a scalar."""
        value = self.loss(routing_of(case), context_of(case))
        if not isinstance(value, Tensor) or value.ndim:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise MoeShapeError(
                f"{name_of(self.loss)} returned {got}; a loss returns a scalar tensor."
            )
        return value.detach()

    @cached_property
    def setting(self) -> float | None:
        """The loss's own `coefficient`, where that is a number."""
        value = getattr(self.loss, "coefficient", None)
        return float(value) if isinstance(value, int | float) else None

    @cached_property
    def coefficient(self) -> float | None:
        """By which factor its value is known: its own, as told, or 1 where its form is told."""
        if self.setting is not None:
            return self.setting
        if self.factor is None and self.told in ("switch", "hf", "z"):
            return 1.0
        return self.factor

    @cached_property
    def scope(self) -> str:
        """Over what it counts: "token", "sequence", "micro_batch" or "global_batch"."""
        said = getattr(self.loss, "scope", None)
        if said in ("token", "sequence", "micro_batch", "global_batch"):
            return str(said)
        if self.like == "z":
            return "token"
        if not self._runs_with(RouterContext()):
            return "sequence"
        two, one = (self._two_collapses(batch) for batch in (2, 1))
        return "micro_batch" if self.near(two, one) else "sequence"

    @cached_property
    def takes_sequence_ids(self) -> bool:
        ids_T = torch.zeros(self.num_experts, dtype=torch.int64)
        return self._runs_with(RouterContext(sequence_ids=ids_T))

    @cached_property
    def like(self) -> Like | None:
        """What it is a form of: as told, as its `normalisation` says, else as it behaves."""
        if self.told is not None:
            return None if self.told == "none" else self.told
        values = self._probes
        if self._is_z():
            return "z"
        if 1 <= self.top_k < self.num_experts:
            if self._is_balance(values):
                said = getattr(self.loss, "normalisation", None)
                if said in ("switch", "hf"):
                    return cast(Like, said)
                return "hf" if self._counts_k_times(values["balanced"]) else "switch"
            even = [self.near(values[name], torch.zeros(())) for name in ("balanced", "rotated")]
            if all(even) and values["collapsed"] > 1e-3 * self.scale > 0:
                return "variation"
        return None

    @cached_property
    def in_balance(self) -> Tensor:
        """Its value, fp64, where counts and scores are uniform: from the coefficient, else
        measured."""
        if self.coefficient is None:
            return self._probes["balanced"]
        per_choice = self.top_k if self.like == "hf" else 1
        return torch.tensor(self.coefficient * per_choice, dtype=torch.float64)

    @cached_property
    def scale(self) -> float:
        """The size of its values: the largest on the ordinary ones of its probes, whose logits
        are no more than a few units."""
        return max(
            float(value.abs()) for name, value in self._probes.items() if name != "collapsed"
        )

    def near(
        self,
        got: Tensor,
        want: Tensor,
        *,
        reduction: int | None = None,
        counted: int = 1,
        unit: float = 1.0,
        exponent: float = 1.0,
    ) -> bool:
        """Whether two results, each within the fp32 floor of its sums, may be one value.

        reduction: terms of the longest sum; None = E * E, the probes'. counted: for gradients, the
        tokens that they are spread over: each is about scale / counted, hence together
        scale / sqrt(counted). unit: the size of what they are taken for, where that is below 1: a
        gradient whose terms cancel leaves their rounding, not its own.
        """
        terms = OPERATIONS + (self.num_experts**2 if reduction is None else reduction)
        size = max(
            float(got.double().norm()),
            float(want.double().norm()),
            self.scale / (math.sqrt(max(counted, 1)) * unit),
        )
        error = float((got.double() - want.double()).norm())
        # Written so that NaN is not near.
        return error <= 2 * floor(torch.float32, terms) * size * max(exponent, 1.0)

    def hold_near(
        self,
        got: Tensor,
        want: Tensor,
        what: str,
        case: Case,
        counted: int = 0,
        exponent: float = 1.0,
    ) -> None:
        """Raise Breach unless two values (counted = 0) or gradients are `near`. exponent: the
        largest number that is exponentiated on the way: its own rounding is a relative error of
        what comes out."""
        got, want = got.detach(), want.detach()
        ok = self.near(
            got,
            want,
            reduction=case["logits_TE"].numel(),
            counted=max(counted, 1),
            unit=_size_of_weights(case) if counted else 1.0,
            exponent=exponent,
        )
        shown = (
            f"{float(got):.8g}, not {float(want):.8g}"
            if got.ndim == 0
            else f"off by {float((got - want).norm()):.3g} of {float(want.norm()):.3g}"
        )
        hold(ok, f"{what}: {shown}", got=got, want=want)

    def balanced(self) -> Case:
        """T = E tokens at uniform scores, token t with experts t, t + 1, ...: all counts are K."""
        zeros_TE = torch.zeros(self.num_experts, self.num_experts, dtype=torch.float64)
        return build_case(zeros_TE, self.top_k, experts_TK=self._turning_ids())

    def collapsed(self, first: int = 0, share: float = 1.0) -> Case:
        """T = E tokens that all chose the same K experts. Those have a `share` of all score, and
        an even part of the rest."""
        num_experts = self.num_experts
        ids_K = (first + torch.arange(self.top_k)) % num_experts
        probs_E = torch.full((num_experts,), (1 - share) / num_experts, dtype=torch.float64)
        probs_E[ids_K] += share / self.top_k
        logits_TE = probs_E.log().clamp(min=-1e3).repeat(num_experts, 1)
        ids_TK = ids_K.repeat(num_experts, 1)
        return build_case(logits_TE, self.top_k, experts_TK=ids_TK, share=share)

    def _turning_ids(self) -> Tensor:
        t_T, k_K = torch.arange(self.num_experts), torch.arange(self.top_k)
        return (t_T[:, None] + k_K) % self.num_experts

    @cached_property
    def _probes(self) -> dict[str, Tensor]:
        """fp64 values on six routings of E tokens."""
        num_experts, g = self.num_experts, torch.Generator().manual_seed(0)
        base_E = torch.randn(num_experts, generator=g, dtype=torch.float64)
        turned_TE = base_E[(torch.arange(num_experts) - torch.arange(num_experts)[:, None])]
        uniform = self.collapsed()
        zeros = {name: self.balanced()[name] for name in ("logits_TE", "scores_TE", "weights_TK")}
        cases = {
            "balanced": self.balanced(),
            "rotated": build_case(turned_TE, self.top_k),
            "collapsed": self.collapsed(),
            "half": self.collapsed(0, 0.5),
            "uniform scores": changed(uniform, **zeros),
            "skewed": build_case(base_E.repeat(num_experts, 1), self.top_k),
        }
        return {name: self(case).double() for name, case in cases.items()}

    def _is_balance(self, values: dict[str, Tensor]) -> bool:
        """Bilinear in counts and scores: right at both ends and in the middle between them."""
        one, most = values["balanced"], self.num_experts / self.top_k
        near_all = (
            self._close(values["uniform scores"], one)
            and self._close(values["collapsed"], one * most)
            and self._close(values["half"], one * (1 + most) / 2)
        )
        return bool(one != 0) and near_all

    def _counts_k_times(self, one: Tensor) -> bool:
        if not self.coefficient or self.top_k == 1:
            return False
        return self._close(one, one.new_tensor(self.coefficient * self.top_k))

    def _is_z(self) -> bool:
        def at(logit: float) -> Tensor:
            flat_TE = torch.full((self.num_experts,) * 2, logit, dtype=torch.float64)
            ids = self._turning_ids() % self.num_experts
            return self(build_case(flat_TE, self.top_k, experts_TK=ids)).double()

        log_e = math.log(self.num_experts)
        unit = at(1.0) / (1 + log_e) ** 2
        return bool(unit != 0) and all(
            self._close(at(logit), unit * (logit + log_e) ** 2) for logit in (2.0, -3.0)
        )

    def _runs_with(self, ctx: RouterContext) -> bool:
        try:
            self.loss(routing_of(self.balanced()), ctx)
        except MissingContextError:
            return False
        return True

    @staticmethod
    def _close(got: Tensor, want: Tensor) -> bool:
        # Only tells forms apart, which differ by factors: laws do the exact work.
        return bool((got - want).abs() <= 1e-3 * want.abs())

    def _two_collapses(self, batch: int) -> Tensor:
        parts = [self.collapsed(), self.collapsed(self.num_experts // 2)]
        names = parts[0].tensors
        both = {name: torch.cat([part[name] for part in parts]) for name in names}
        length = 2 * self.num_experts // batch
        return self(Case(both, {"batch": batch, "length": length})).double()


def gradients(value: Tensor, routing: TokenChoice) -> dict[str, Tensor]:
    """The gradient of each floating field that is a leaf; zero where there is no path."""
    fields = {name: field_of(routing, name) for name in FIELDS}
    leaves = {
        name: field for name, field in fields.items() if field.is_leaf and field.requires_grad
    }
    if not value.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


def flat_gradient(
    subject: LossSubject, case: Case, *, used_only: bool = False
) -> tuple[Tensor, Tensor]:
    """The value, and (T, X): all fields' gradients side by side.

    used_only: without what arrives at the weights of unused slots, which no router passes on.
    """
    routing = routing_of(case)
    value = subject.loss(routing, context_of(case))
    found = gradients(value, routing)
    if used_only:
        found["weights_TK"] = found["weights_TK"].masked_fill(case["experts_TK"] < 0, 0)
    return value.detach(), torch.cat(list(found.values()), -1)


def field_of(routing: TokenChoice, name: str) -> Tensor:
    value = routing.extras[name] if name in routing.extras else getattr(routing, name)
    return cast(Tensor, value)


def with_setting(loss: Loss, name: str, value: Any) -> Loss:
    """A copy of the loss with another setting."""
    if dataclasses.is_dataclass(loss) and not isinstance(loss, type):
        return cast(Loss, dataclasses.replace(loss, **{name: value}))
    new = copy.copy(loss)
    setattr(new, name, value)
    return new


class Written:
    """A loss as users write it: a function, what it reads, and what else it says of itself."""

    def __init__(
        self,
        value: Callable[[TokenChoice, RouterContext], Tensor],
        *,
        reads: tuple[str, ...] = ("scores_TE",),
        **says: Any,
    ) -> None:
        self.value, self.reads = value, reads
        self.__dict__.update(says)

    def __call__(self, routing: TokenChoice, ctx: RouterContext) -> Tensor:
        return self.value(routing, ctx)
