"""What a module keeps for itself stays its own: losses of the last step, lists, random numbers."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetk import MoELayer, RouterContext, TokenChoice, compare
from moetk.equivalence.sides.untouched import copied, untouched
from tests.equivalence.steps import Mixtral, bank, gather, inputs, router


class Keeps(Mixtral):
    """Keeps the loss of its last step, and what came of it."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        routing = super().forward(x_TH, ctx)
        assert routing.logits_TE is not None
        self.aux_loss = routing.logits_TE.logsumexp(-1).square().mean()
        self.losses = [{"z": self.aux_loss}]
        return routing


class Stages(nn.Module):
    """A router as a function of stages, which keeps the loss of its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.router = router(Keeps, {}, own=True)

    def forward(self, x_TH: Tensor) -> dict[str, Tensor]:
        routing = self.router(x_TH, RouterContext())
        return {"indices": routing.experts_TK, "weights": routing.weights_TK}


def used(part: Any, *args: Any) -> Any:
    """The part after a step."""
    part(inputs().flatten(0, 1), *args)
    return part


PARTS = {
    "router": lambda **steps: used(router(Keeps, {}, own=True, **steps), RouterContext()),
    "layer": lambda **steps: used(MoELayer(router(Keeps, {}, own=True, **steps), bank())),
    "function": lambda: used(Stages()),
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_part_that_keeps_a_loss_is_its_copy(kind: str) -> None:
    report = compare(PARTS[kind](), PARTS[kind](), inputs())
    assert report.ok and report.notes == ()
    assert all(row.function is not None for row in report.rows if row.stage.endswith("weights"))


@pytest.mark.parametrize("kind", ["router", "layer"])
def test_a_part_that_keeps_a_loss_is_found_wrong(kind: str) -> None:
    def weigh(self: Any, scores_TE: Tensor, ids_TK: Tensor, *rest: Tensor) -> Tensor:
        return gather(scores_TE, ids_TK)

    report = compare(PARTS[kind](), PARTS[kind](weigh=weigh), inputs())
    assert report.first is not None and report.first.stage == "weights"
    assert report.cause == "renormalisation missing"


def test_a_copy_keeps_values_and_ties_and_no_graph() -> None:
    part = used(router(Keeps, {}, own=True), RouterContext())
    part.same_weight = part.weight
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(part)
    other = copied(part)
    assert torch.equal(other.aux_loss, part.aux_loss) and not other.aux_loss.requires_grad
    assert other.losses[0]["z"] is other.aux_loss is not part.aux_loss
    assert other.same_weight is other.weight is not part.weight and other.weight.requires_grad
    assert part.aux_loss.requires_grad


def test_lists_and_dicts_and_sets_are_as_they_were() -> None:
    part = nn.Linear(2, 2)
    part.seen, part.stats, part.names = [1], defaultdict(list, {"load": [2]}), {"a"}
    part.seen.append(part.seen)  # a list may hold itself
    kept = (part.seen, part.stats, part.stats["load"], part.names)
    with pytest.raises(KeyError, match="inside"), untouched(part):
        part.seen.append(3)
        part.stats["load"].append(4)
        part.stats["more"].append(5)
        part.names.clear()
        part.seen = []
        raise KeyError("inside")
    assert (part.seen, part.stats, part.stats["load"], part.names) == kept
    assert all(now is old for now, old in zip((part.seen, part.stats), kept, strict=False))
    assert len(part.seen) == 2 and part.stats == {"load": [2]} and part.names == {"a"}


class Noisy(Mixtral):
    """Noise in evaluation too, and a history of what it drew."""

    def __init__(self, *sizes: int, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.drawn: list[Tensor] = []

    def product(self, x_TH: Tensor) -> Tensor:
        noise_TE = torch.rand(len(x_TH), self.num_experts, dtype=torch.float64)
        self.drawn.append(noise_TE)
        return self.logits(x_TH) + noise_TE.to(x_TH.dtype)


def test_random_numbers_are_not_used_up() -> None:
    part = router(Noisy, {}, own=True)
    before = torch.get_rng_state()
    report = compare(part, copy.deepcopy(part), inputs())
    assert torch.equal(torch.get_rng_state(), before)
    assert report.ok, report.table()  # each run drew the same numbers
    assert part.drawn == []


def test_a_function_of_ones_own_may_draw_too() -> None:
    def noisy(x_TH: Tensor) -> dict[str, Tensor]:
        return {"combined": x_TH + torch.rand(x_TH.shape, dtype=torch.float64).to(x_TH)}

    before = torch.get_rng_state()
    assert compare(noisy, noisy, inputs()).ok
    assert torch.equal(torch.get_rng_state(), before)
