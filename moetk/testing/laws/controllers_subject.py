"""A controller under the laws: bound to a router as a layer binds it, and what is measured of it.

Letters: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moetk.controllers.bias_update import BUFFER
from moetk.equivalence.judge import floor
from moetk.kernels.counting import count_choices
from moetk.layers.attach import Controller, Steered
from moetk.routers import DeepSeekV3Router
from moetk.routing import detached
from moetk.testing.law import Case, hold
from moetk.testing.strategies.losses import build_case, context_of, routing_of

OPERATIONS = 16
"""Roundings beside the sums that a controller may make on the way to one number."""


class Running:
    """A copy of the controller, steering a copy of the router."""

    def __init__(self, controller: Controller, router: nn.Module) -> None:
        self.router = router
        self.steered = Steered(controller, router, "check_controller")

    def __deepcopy__(self, memo: dict[int, Any]) -> Running:
        new = copy.copy(self)
        new.router = copy.deepcopy(self.router, memo)
        new.steered = copy.deepcopy(self.steered, memo)
        return new

    @torch.no_grad()
    def observe(self, case: Case) -> tuple[Tensor, ...]:
        return self.steered.observe(detached(routing_of(case)), context_of(case))

    def total(self, *cases: Case) -> list[Tensor]:
        """What is observed of the micro-batches together."""
        for case in cases:
            self.steered.commit(self.observe(case))
        return self.steered.take() or []

    def add(self, case: Case, more: int) -> None:
        """Observe a case, and `more` of everything beside it, as far as its dtype goes."""
        observed = self.observe(case)
        self.steered.commit(observed)
        for value in observed:
            most = math.inf if value.is_floating_point() else torch.iinfo(value.dtype).max // 2
            self.steered.commit([torch.full_like(value, min(more, most))])

    def step(self, *cases: Case) -> Running:
        """One optimizer step after these micro-batches."""
        self.steered.step(self.total(*cases))
        return self

    @property
    def bias_E(self) -> Tensor:
        """fp64 copy."""
        bias_E: Tensor = getattr(self.router, BUFFER)
        return bias_E.detach().double().clone()

    def state(self) -> dict[str, Tensor]:
        """A copy of every number that it may have moved, the router's and its own."""
        own = self.steered.controller.state_dict()
        tensors = {
            **{f"router.{name}": value for name, value in self.router.named_parameters()},
            **{f"router.{name}": value for name, value in self.router.named_buffers()},
            **{f"state.{name}": torch.as_tensor(value) for name, value in own.items()},
        }
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@dataclass(frozen=True, eq=False)
class ControllerSubject:
    """A controller, the sizes it is checked at, and what makes a router for it to move."""

    controller: Controller
    num_experts: int = 8
    top_k: int = 2
    router: Callable[[], nn.Module] | None = None

    def run(self, dtype: torch.dtype = torch.float32, start: float = 0.0) -> Running:
        """A fresh copy on a fresh router, whose bias is `start` throughout."""
        router = copy.deepcopy(self._router).to("cpu", dtype)
        bias_E = getattr(router, BUFFER, None)
        if isinstance(bias_E, Tensor) and start:
            with torch.no_grad():
                bias_E.fill_(start)
        return Running(self.controller, router)

    @cached_property
    def _router(self) -> nn.Module:
        if self.router is not None:
            return self.router()
        return DeepSeekV3Router(8, self.num_experts, self.top_k)

    @cached_property
    def has_bias(self) -> bool:
        """It is bound to a router with a bias per expert that enters the choice."""
        bias_E = getattr(self._router, BUFFER, None)
        bound = hasattr(self.controller, "bind")
        return bound and isinstance(bias_E, Tensor) and bias_E.shape == (self.num_experts,)

    @cached_property
    def counts_choices(self) -> bool:
        """What it observes of an ordinary routing is how many choices name each expert."""
        case = self.skewed(3)
        observed = self.run().total(case)
        counts_E = count_choices(case["experts_TK"], self.num_experts)[0]
        return (
            len(observed) == 1
            and observed[0].shape == counts_E.shape
            and bool((observed[0] == counts_E).all())
        )

    @cached_property
    def moves_by_sign(self) -> bool:
        """It moves as far for one token in thousands as for all of them: no band around balance,
        and not by how much the load is off."""
        if not self.has_bias or not self.counts_choices or self.top_k == self.num_experts:
            return False
        far, near = self.run().step(self.skewed(2)), self.run()
        near.add(self.skewed(2), 2**14)
        near.step()
        return bool(near.bias_E.any()) and torch.equal(near.bias_E, far.bias_E)

    def rate_at(self, step: int) -> float | None:
        """How far this step may move, where it says so."""
        rate = getattr(self.controller, "rate", None)
        rate = rate(step) if callable(rate) else rate
        return float(rate) if isinstance(rate, int | float) else None

    @property
    def rate(self) -> float | None:
        return self.rate_at(0)

    @cached_property
    def moves(self) -> bool:
        """The bias is not, after a collapse, what it was."""
        return self.has_bias and bool(self.run().step(self.skewed(64)).bias_E.any())

    @property
    def centred(self) -> bool:
        return bool(getattr(self.controller, "centred", False))

    def skewed(self, times: int, first: int = 0) -> Case:
        """All tokens, `times` many, on K experts from `first` on."""
        logits_E = -torch.arange(self.num_experts, dtype=torch.float64).roll(first)
        return build_case(logits_E.repeat(times, 1), self.top_k)

    def balanced(self) -> Case:
        """T = E tokens whose counts are K for every expert."""
        e_E = torch.arange(self.num_experts, dtype=torch.float64)
        return build_case((e_E - e_E[:, None]) % self.num_experts, self.top_k)

    def hold_same(
        self, got: dict[str, Tensor], want: dict[str, Tensor], what: str, *, exact: bool = False
    ) -> None:
        """Raise Breach unless two states agree: integers, and `exact` ones, to the bit, others
        within the floor of fp32."""
        hold(got.keys() == want.keys(), f"{what}: {sorted(got)}, not {sorted(want)}")
        for name, tensor in got.items():
            if exact or not tensor.is_floating_point():
                ok = torch.equal(tensor, want[name])
            else:
                ok = self.near(tensor, want[name])
            hold(ok, f"{what}: {name} differs", got=tensor, want=want[name])

    def near(self, got: Tensor, want: Tensor) -> bool:
        if got.shape != want.shape:
            return False
        got, want = got.double(), want.double()
        bound = 2 * floor(torch.float32, OPERATIONS + self.num_experts)
        # Written so that NaN is not near.
        return bool((got - want).norm() <= bound * torch.maximum(got.norm(), want.norm()))


def pair_under_test(
    pair: tuple[Controller, Callable[[], nn.Module]], num_experts: int = 8, top_k: int = 2
) -> ControllerSubject:
    """`ControllerSubject` of a controller with what makes its router, built together."""
    controller, router = pair
    return ControllerSubject(controller, num_experts, top_k, router)
