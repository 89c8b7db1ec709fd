"""A family's own router by its kernels, where nobody reads the scores that those leave out.

They run on CUDA alone; here the CPU stands in for it, whose ops say what the kernels compute.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moetk
from moetk import BlockSpec, RouterContext, TokenChoice
from moetk.layers import shells
from moetk.losses import LoadBalancingLoss, RouterZLoss
from moetk.routers import gather, top_k
from moetk.routers.fused import choose_fused, why_not_fused
from tests.layers.parts import Tally
from tests.layers.stock import assert_bitwise, assert_equal, checkpointed, replaced, step, stock
from tests.tiny import FAMILIES, E, K, ids

families = pytest.mark.parametrize("family", FAMILIES)
NEAR = 2e-5  # two orders of summation in float32, through two layers and back
CHOOSE_BY_LOGITS = ("gpt_oss", "granitemoe")  # and have no scores
LAYERS = {"deepseek_v4": 1}  # of two, those whose router has a recipe: a hash table has none


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The routers that ran by their kernels, as if this were a device that has them."""
    found: list[str] = []

    def why_not(router: Any, ctx: RouterContext) -> str | None:
        reason = why_not_fused(router, ctx)
        return None if reason == "device cpu, needs cuda" else reason

    def chosen(router: Any, *args: Any) -> TokenChoice:
        found.append(type(router).__name__)
        return choose_fused(router, *args)

    monkeypatch.setattr(shells, "why_not_fused", why_not)
    monkeypatch.setattr(shells, "choose_fused", chosen)
    return found


def stock32(family: str) -> Any:
    return stock(family, torch.float32)


def plain(model: Any) -> dict[str, Tensor]:
    """A step in which every router runs as its forward is written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shells, "why_not_fused", lambda router, ctx: "this is the plain step")
        return step(model)


def test_a_cpu_is_no_such_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shells, "choose_fused", None)
    model = replaced(stock32("qwen3_moe"))
    assert_bitwise(step(model), plain(model))


@families
def test_logits_and_gradients_stay(family: str, ran: list[str]) -> None:
    model = stock32(family)
    ours = replaced(model)
    found = step(ours)
    assert len(ran) == LAYERS.get(family, 2)
    assert_equal(found, plain(ours), NEAR)
    assert_equal(found, step(model), NEAR)
    for reentrant in (False, True):
        assert_equal(step(checkpointed(replaced(model), reentrant=reentrant)), found, NEAR)


@families
def test_what_is_recorded_is_the_same_choice(family: str, ran: list[str]) -> None:
    ours = replaced(stock32(family))
    with moetk.record(ours, fields=("logits_TE",)) as recording:
        found = step(ours)
    assert len(ran) == LAYERS.get(family, 2)
    with moetk.record(ours, fields=("logits_TE",)) as expected:
        want = plain(ours)
    assert_equal(found, want, NEAR)
    for layer in expected:
        (mine,), (first,) = recording[layer], expected[layer]
        assert torch.equal(mine.experts_TK.sort(-1).values, first.experts_TK.sort(-1).values)
        assert mine.weights_TK.dtype == first.weights_TK.dtype
        torch.testing.assert_close(mine.logits_TE, first.logits_TE, rtol=NEAR, atol=NEAR)


@families
def test_a_replay_runs_the_router_as_written(family: str, ran: list[str]) -> None:
    ours = replaced(stock32(family))
    with moetk.record(ours) as recording:
        want = step(ours)
    ran.clear()
    with moetk.replay(ours, recording):
        assert_equal(step(ours), want, NEAR)
    assert not ran


@families
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_a_recording_of_scores_gets_them(family: str, reentrant: bool, ran: list[str]) -> None:
    """And the recompute, when the recording is over, runs what the forward ran."""
    ours = checkpointed(replaced(stock32(family)), reentrant=reentrant)
    with moetk.record(ours, fields=("scores_TE",)) as expected:
        want = plain(ours)
    ours.zero_grad()
    with moetk.record(ours, fields=("scores_TE",)) as recording:
        out = ours(input_ids=ids(), labels=ids())
    out.loss.backward()
    assert not ran
    for layer in expected:
        (mine,), (first,) = recording[layer], expected[layer]
        if family not in CHOOSE_BY_LOGITS:
            assert torch.equal(mine.scores_TE, first.scores_TE)
    found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert_bitwise(found, {name: want[name] for name in found})


def test_a_loss_that_reads_scores_gets_them(ran: list[str]) -> None:
    """`reads` says it; one that reads logits alone leaves the router its kernels."""
    model = stock32("qwen3_moe").train()
    balanced = replaced(model, losses=[LoadBalancingLoss(0.5)])
    assert_bitwise(step(balanced), plain(balanced))
    assert not ran
    logits = replaced(model, losses=[RouterZLoss(0.5)])
    assert_equal(step(logits), plain(logits), NEAR)
    assert len(ran) == 2


def test_a_loss_that_does_not_say_what_it_reads_gets_all(ran: list[str]) -> None:
    def spread(routing: TokenChoice, ctx: RouterContext) -> Tensor:
        assert routing.scores_TE is not None
        return routing.scores_TE.square().mean()

    model = replaced(stock32("mixtral").train(), losses=[spread])
    assert_bitwise(step(model), plain(model))
    assert not ran


def test_a_controller_counts_the_same_choice(ran: list[str]) -> None:
    model = stock32("olmoe").train()
    given = []
    for run in (step, plain):
        ours = replaced(model)
        replacement = moetk.replace_moe(ours, controllers=[Tally()])
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.0)
        replacement.step_after(optimizer)
        run(ours)
        optimizer.step()
        given.append([counts_E for one in replacement.steered for counts_E in one.controller.given])
    assert len(ran) == 2 and len(given[0]) == 2
    assert all(map(torch.equal, *given))


class FollowsScores(nn.Module):
    """Routes by what the layer before scored."""

    reads_previous = True

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        scores_TE = ctx.require("previous").scores_TE
        assert scores_TE is not None
        experts_TK = top_k(scores_TE, K, ctx)
        return TokenChoice(experts_TK, gather(scores_TE, experts_TK), E, scores_TE=scores_TE)


def test_a_router_that_reads_the_previous_one_gets_its_scores(ran: list[str]) -> None:
    def second(spec: BlockSpec) -> nn.Module | None:
        return FollowsScores() if spec.moe_index else None

    ours = replaced(stock32("qwen3_moe"), second)
    assert_bitwise(step(ours), plain(ours))
    assert not ran


@pytest.mark.parametrize("backend", ["reference", "grouped"])
def test_another_backend_runs_its_router_as_written(backend: str, ran: list[str]) -> None:
    model = replaced(stock32("qwen3_moe"), backend=backend)
    assert_bitwise(step(model), plain(model))
    assert not ran
