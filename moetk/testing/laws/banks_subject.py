"""A bank as the laws see it, and what they all ask of it: its output and its gradients.

Letters: T tokens, H hidden, E experts, K choices a token.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn
from torch.func import functional_call

from moetk.equivalence.judge import floor
from moetk.errors import RouterConfigError
from moetk.experts import BankSpec, BankWeights
from moetk.routing import Routing, TokenChoice
from moetk.testing.law import Case, hold
from moetk.testing.strategies.routings import (
    generator,
    normal,
    routed_rows,
    routing_of,
    token_choice,
)

Tensors = Mapping[str, Tensor]
Forward = Callable[[Tensor, Routing, Tensors], Tensor]


@dataclass(frozen=True, eq=False)
class BankUnderTest:
    """bank: (x_TH, routing) -> y_TH, as it was given to `bank_under_test`, or a copy of it.

    num_experts: ids it answers, special ones included. dtype: of rows, and of its parameters.
    spec: what it computes, None = not known. scale: where it applies the routing weight.
    parameters: by name, all of them trained; none for a plain function.
    modes: of `training`, those that the laws are checked in.
    """

    bank: Callable[[Tensor, Routing], Tensor]
    hidden_size: int
    num_experts: int
    dtype: torch.dtype = torch.float64
    spec: BankSpec | None = None
    scale: str = "output"
    parameters: Tensors = field(default_factory=dict)
    modes: tuple[bool, ...] = (False,)

    @property
    def real_experts(self) -> int:
        return self.num_experts if self.spec is None else self.spec.num_experts

    @property
    def per_expert(self) -> dict[str, Tensor]:
        """What has one row an expert: the parameters that the spec speaks of; without a spec all
        of them and the buffers, if each is (E, ...) and one has three dimensions; else nothing."""
        named = list(weight_names(self).values())
        if named:
            return {name: self.parameters[name] for name in named}
        held = {**self.parameters, **self.buffers}
        stacked = all(t.ndim > 1 and t.shape[0] == self.real_experts for t in held.values())
        return held if stacked and any(t.ndim > 2 for t in held.values()) else {}

    @property
    def buffers(self) -> dict[str, Tensor]:
        if not isinstance(self.bank, nn.Module):
            return {}
        return {name: b for name, b in self.bank.named_buffers() if b.is_floating_point()}

    @property
    def terms(self) -> int:
        """Rounded steps behind one element of one token's output, or more: every product of the
        widest matrix that a parameter holds, or of a network four times as wide as the rows (as 8,
        for narrower ones: what cancels there is not averaged away)."""
        widest = [t.shape[-1] * t.shape[-2] for t in self.parameters.values() if t.ndim > 1]
        return 3 * max([4 * max(self.hidden_size, 8) ** 2, *widest])

    def __call__(self, x_TH: Tensor, routing: Routing, parameters: Tensors | None = None) -> Tensor:
        """The bank's output, with `parameters` in place of its own of those names."""
        if not parameters:
            return self.bank(x_TH, routing)
        assert isinstance(self.bank, nn.Module)
        y_TH: Tensor = functional_call(self.bank, dict(parameters), (x_TH, routing))
        return y_TH

    def weights(self, parameters: Tensors | None = None) -> BankWeights:
        """The BankWeights that the spec speaks of, made of `parameters` where given."""
        names = weight_names(self)
        held = {**self.parameters, **(parameters or {})}
        made = {which: held[name] for which, name in names.items()}
        return BankWeights(made["up"], made["down"], made.get("up_bias"), made.get("down_bias"))


def bank_under_test(
    bank: Callable[[Tensor, Routing], Tensor],
    *,
    hidden_size: int | None = None,
    num_experts: int | None = None,
    float64: bool = True,
) -> BankUnderTest:
    """A module is copied to the CPU, cast to float64, unfrozen and put into eval mode; a plain
    function must take float64 rows. float64=False: float32 instead, where the bank has no float64.

    Sizes are read from bank.spec, or from bank.hidden_size and bank.num_experts. Raises
    RouterConfigError where they are neither there nor given, or where `bank` is no bank or cannot
    run at all.
    """
    if isinstance(bank, type) or not callable(bank):
        raise RouterConfigError(
            f"check_expert_bank: bank={bank!r} is no bank; give it an object or a function "
            "(x_TH, routing) -> y_TH, built and ready to call."
        )
    spec = getattr(bank, "spec", None)
    spec = spec if isinstance(spec, BankSpec) else None
    hidden_size = hidden_size or getattr(spec or bank, "hidden_size", None)
    num_experts = num_experts or (spec.num_ids if spec else getattr(bank, "num_experts", None))
    for name, value in (("hidden_size", hidden_size), ("num_experts", num_experts)):
        if not isinstance(value, int) or value < 1:
            raise RouterConfigError(
                f"{name_of(bank)}: {name}={value!r}; the bank has no whole number of that name. "
                f"Give it: check_expert_bank(bank, {name}=...)."
            )
    assert hidden_size is not None and num_experts is not None
    scale = spec.scale if spec else getattr(bank, "scale", "output")
    dtype = torch.float64 if float64 else torch.float32
    subject = BankUnderTest(bank, hidden_size, num_experts, dtype, spec, scale)
    subject = in_dtype(subject, dtype)
    if isinstance(subject.bank, nn.Module):
        subject.bank.eval()
    _try_once(subject)
    return replace(subject, modes=_modes(subject))


def _try_once(subject: BankUnderTest) -> None:
    """Raise at once, instead of from every law, where the plainest call does not run."""
    x_TH = torch.ones(1, subject.hidden_size, dtype=subject.dtype)
    first_T1 = torch.zeros(1, 1, dtype=torch.int64)
    try:
        subject(x_TH, TokenChoice(first_T1, x_TH.new_ones(1, 1), subject.num_experts))
    except Exception as error:
        raise RouterConfigError(
            f"{name_of(subject.bank)} does not run on one {subject.dtype} row of "
            f"H={subject.hidden_size}, sent to expert 0 of {subject.num_experts}: "
            f"{type(error).__name__}: {error}. Check hidden_size and num_experts; where the bank "
            "has no float64, pass float64=False."
        ) from error


def _modes(subject: BankUnderTest) -> tuple[bool, ...]:
    """Evaluation, and training where it runs and draws nothing: the same four times over."""
    if not isinstance(subject.bank, nn.Module):
        return (False,)
    source, num_ids = generator(0), subject.num_experts
    routing = token_choice(129, num_ids, min(2, num_ids), "random", source, subject.dtype)
    x_TH = normal((129, subject.hidden_size), source, subject.dtype)
    subject.bank.train()
    try:
        with torch.no_grad():
            first, *others = [subject(x_TH, routing) for _ in range(4)]
    except Exception:
        return (False,)
    finally:
        subject.bank.eval()
    same = all(torch.allclose(first, y_TH, rtol=0, atol=0, equal_nan=True) for y_TH in others)
    return (False, True) if same else (False,)


def in_dtype(subject: BankUnderTest, dtype: torch.dtype) -> BankUnderTest:
    """The same bank for rows of `dtype`: a copy on the CPU, cast and unfrozen."""
    if not isinstance(subject.bank, nn.Module):
        return replace(subject, dtype=dtype)
    bank = copy.deepcopy(subject.bank).to("cpu", dtype)
    parameters = {
        n: p.requires_grad_() for n, p in bank.named_parameters() if p.is_floating_point()
    }
    return replace(subject, bank=bank, dtype=dtype, parameters=parameters)


def name_of(bank: object) -> str:
    """The class of an object, the name of a function."""
    return getattr(bank, "__qualname__", type(bank).__name__)


def weight_names(subject: BankUnderTest) -> dict[str, str]:
    """up, down, up_bias, down_bias: the parameter that each is; {} where that is not known."""
    read = getattr(subject.bank, "weights", None)
    if subject.spec is None or not inspect.ismethod(read):
        return {}
    held = {id(tensor): name for name, tensor in subject.parameters.items()}
    tensors = {which: t for which, t in vars(read()).items() if isinstance(t, Tensor)}
    found = {which: held.get(id(t)) for which, t in tensors.items()}
    return {} if None in found.values() else {w: n for w, n in found.items() if n is not None}


# Why a law may not speak about a bank.


def needs_output_scale(subject: BankUnderTest) -> str | None:
    if subject.scale == "output":
        return None
    return f'scale="{subject.scale}": the routing weight passes through the activation'


def needs_parameters(subject: BankUnderTest) -> str | None:
    return None if subject.parameters else "it has no parameters that the law could read"


def needs_stacked(subject: BankUnderTest) -> str | None:
    if subject.per_expert:
        return None
    return "not every parameter has one row an expert, (E, ...): whose is whose is not known"


def needs_spec(subject: BankUnderTest) -> str | None:
    if weight_names(subject):
        return None
    return "it has no spec (BankSpec) with weights() made of its own parameters to compare with"


def first_reason(
    *reasons: Callable[[BankUnderTest], str | None],
) -> Callable[[BankUnderTest], str | None]:
    """The first reason that a bank gives."""

    def unless(subject: BankUnderTest) -> str | None:
        return next((why for reason in reasons if (why := reason(subject))), None)

    return unless


# What is asked of a bank.


def routed(subject: BankUnderTest, **narrow: Any) -> SearchStrategy[Case]:
    """Rows and a TokenChoice over all ids of the bank; see `routed_rows`."""
    return routed_rows(subject.hidden_size, subject.num_experts, dtype=subject.dtype, **narrow)


@dataclass(frozen=True, eq=False)
class Run:
    """One forward and backward. leaves: what gradients were asked of, by name: x_TH, the routing's
    floating tensors, every parameter. gradients: in their order, None where the graph ends."""

    y_TH: Tensor
    leaves: Tensors
    gradients: tuple[Tensor | None, ...]

    def results(self) -> dict[str, Tensor]:
        """y_TH and "d x_TH", ...: a gradient that does not exist is zero."""
        found = {
            f"d {name}": torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(self.leaves.items(), self.gradients, strict=True)
        }
        return {"y_TH": self.y_TH.detach(), **found}


def run(
    subject: BankUnderTest,
    x_TH: Tensor,
    routing: Routing,
    g_TH: Tensor,
    parameters: Tensors | None = None,
    forward: Forward | None = None,
) -> Run:
    """The output, and the gradients of <g, y>. parameters: in place of the bank's own.
    forward: (x_TH, routing, parameters) -> y_TH, in place of the bank."""
    x_TH = x_TH.detach().requires_grad_()
    routed_by: dict[str, Any] = {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in vars(routing).items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    }
    held = {
        name: tensor.detach().requires_grad_()
        for name, tensor in {**subject.parameters, **(parameters or {})}.items()
    }
    leaves = {"x_TH": x_TH, **routed_by, **held}
    y_TH = (forward or subject)(x_TH, replace(routing, **routed_by), held)
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if y_TH.requires_grad:
        found = torch.autograd.grad(y_TH, list(leaves.values()), g_TH, allow_unused=True)
    return Run(y_TH, leaves, found)


def cotangent(subject: BankUnderTest, x_TH: Tensor, routing: Routing, g_TH: Tensor) -> Tensor:
    """g_TH with the signs of y: <g, y> then adds up magnitudes, and a gradient of a single number
    is not what rounding left over of a sum that cancels."""
    with torch.no_grad():
        return g_TH.abs().copysign(subject(x_TH, routing).to(g_TH.dtype))


def routed_call(subject: BankUnderTest, case: Case) -> tuple[Tensor, TokenChoice, Tensor]:
    """(x_TH, routing, g_TH) of a case that `routed` drew."""
    routing = routing_of(case, subject.num_experts)
    return case["x_TH"], routing, cotangent(subject, case["x_TH"], routing, case["g_TH"])


def results(
    subject: BankUnderTest,
    x_TH: Tensor,
    routing: Routing,
    g_TH: Tensor,
    parameters: Tensors | None = None,
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """y_TH and every gradient of `run`, by name."""
    return run(subject, x_TH, routing, g_TH, parameters, forward).results()


def rounding(subject: BankUnderTest, num_rows: int) -> float:
    """The relative error that no right bank exceeds: eps in every step, all in one direction."""
    return floor(subject.dtype, 1) * (subject.terms + num_rows)


def agree(
    subject: BankUnderTest,
    found: Tensor,
    want: Tensor,
    what: str,
    *,
    num_rows: int,
    size: Tensor | float | None = None,
) -> None:
    """Hold |found - want|_F <= rounding x size. size: norm of the addends' magnitudes where they
    cancel; None = |want|_F."""
    hold(found.shape == want.shape, f"{what} is {tuple(found.shape)}, not {tuple(want.shape)}")
    found, want = found.double(), want.double()
    error = float((found - want).norm())
    bound = rounding(subject, num_rows) * float(want.norm() if size is None else size)
    # Written so that NaN fails.
    hold(
        error <= bound,
        f"{what} differs by {error:.3g}, where rounding explains {bound:.3g}",
        found=found,
        want=want,
    )


_VANISHED = 1e-2


def agree_all(
    subject: BankUnderTest, found: Tensors, want: Tensors, *, num_rows: int, because: str
) -> None:
    """`agree` for every tensor of `want`, by name. One that is far smaller than the others is what
    is left of a sum that cancels (1 - sigmoid, where an activation saturates): it is measured with
    a hundredth of the largest."""
    norms = {name: float(tensor.double().norm()) for name, tensor in want.items()}
    least = _VANISHED * max((n for n in norms.values() if math.isfinite(n)), default=0.0)
    for name, tensor in want.items():
        size = max(norms[name], least)
        agree(subject, found[name], tensor, f"{because}: {name}", num_rows=num_rows, size=size)


def rows_of(case: Case) -> int:
    """T x K: how many rows one gradient may sum over."""
    return case["experts_TK"].numel() + 1
