"""Losses and counts enter once for every forward that is differentiated, and not otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetk import ExpertBank, MoELayer, Replacement, RouterContext, record, replace_moe
from moetk.controllers import BiasUpdate
from moetk.errors import RouterConfigError
from moetk.routers import MixtralRouter
from tests.layers.parts import ExactZLoss, Tally
from tests.layers.stock import assert_equal, checkpointed, gradients, step, stock
from tests.tiny import FAMILIES, ids

H, E, K, T = 8, 4, 2, 6
LOSS = ExactZLoss(0.3)
Forward = Callable[[Tensor], Tensor]


def layer(losses: Any = (LOSS,), **settings: Any) -> MoELayer:
    torch.manual_seed(0)
    router = MixtralRouter(H, E, K, score_dtype=None)
    bank = ExpertBank(H, E, 12)
    return MoELayer(router, bank, losses=losses, controllers=[Tally()], **settings).double()


def batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, H, generator=generator, dtype=torch.float64, requires_grad=True)


def tallies(parts: MoELayer | Replacement) -> list[int]:
    """How many choices each layer's tally is given by the step that follows."""
    steered = parts.attachment.steered if isinstance(parts, MoELayer) else parts.steered
    for one in steered:
        one.controller.given.clear()
    parts.step()
    return [sum(int(counts_E.sum()) for counts_E in one.controller.given) for one in steered]


# What is differentiated: one list a backward, in it each forward's batch and factor.
BACKWARDS = {
    "plain": [[(1, 1.0)]],
    "two micro-batches": [[(1, 1.0)], [(2, 1.0)]],
    "four micro-batches": [[(seed, 0.25)] for seed in range(1, 5)],
    "two forwards, one backward": [[(1, 1.0), (2, 3.0)]],
}


def plain(forward: Forward) -> Forward:
    return forward


def non_reentrant(forward: Forward) -> Forward:
    return lambda x_TH: checkpoint(forward, x_TH, use_reentrant=False)


def reentrant(forward: Forward) -> Forward:
    return lambda x_TH: checkpoint(forward, x_TH, use_reentrant=True)


def tied(forward: Forward) -> Forward:
    return lambda x_TH: forward(forward(forward(x_TH)))


def run(forward: Forward, backwards: Any, added: Callable[[], Any] = float) -> None:
    for forwards in backwards:
        total = sum(factor * forward(batch(seed)).sum() for seed, factor in forwards)
        (total + added()).backward()


def by_hand(backwards: Any, shape: Callable[[Forward], Forward]) -> dict[str, Tensor]:
    """The gradients of a layer that has nothing attached, its losses added to each total."""
    bare, pending = layer(losses=()), []

    def forward(x_TH: Tensor) -> Tensor:
        y_TH, routing = bare(x_TH)
        pending.append(LOSS(routing, RouterContext()))
        return y_TH

    def added() -> Tensor:
        total = sum(pending)
        pending.clear()
        return total

    run(shape(forward), backwards, added)
    return gradients(bare)


@pytest.mark.parametrize("backwards", BACKWARDS.values(), ids=list(BACKWARDS))
@pytest.mark.parametrize("kind", [plain, non_reentrant, reentrant])
def test_gradients_and_counts(kind: Callable[[Forward], Forward], backwards: Any) -> None:
    ours = layer()
    run(kind(lambda x_TH: ours(x_TH)[0]), backwards)
    assert_equal(gradients(ours), by_hand(backwards, plain))
    assert tallies(ours) == [sum(map(len, backwards)) * T * K]


@pytest.mark.parametrize("kind", [plain, non_reentrant, reentrant])
@pytest.mark.parametrize("inside", [True, False], ids=["one region", "three regions"])
def test_a_layer_tied_three_times(kind: Callable[[Forward], Forward], inside: bool) -> None:
    ours = layer()

    def forward(x_TH: Tensor) -> Tensor:
        y_TH: Tensor = ours(x_TH)[0]
        return y_TH

    run(kind(tied(forward)) if inside else tied(kind(forward)), BACKWARDS["plain"])
    assert_equal(gradients(ours), by_hand(BACKWARDS["plain"], tied))
    assert tallies(ours) == [3 * T * K]


def discarded(ours: MoELayer) -> None:
    ours(batch(2))


def without_grad(ours: MoELayer) -> None:
    with torch.no_grad():
        ours(batch(2))


def in_eval(ours: MoELayer) -> None:
    ours.eval()
    torch.autograd.grad(ours(batch(2))[0].sum(), list(ours.parameters()), allow_unused=True)
    ours.train()


@pytest.mark.parametrize("waste", [discarded, without_grad, in_eval])
def test_what_is_not_trained_on_leaves_no_trace(waste: Callable[[MoELayer], None]) -> None:
    ours = layer()
    waste(ours)
    assert sum(tallies(ours)) == 0
    waste(ours)
    run(lambda x_TH: ours(x_TH)[0], BACKWARDS["plain"])
    waste(ours)
    assert_equal(gradients(ours), by_hand(BACKWARDS["plain"], plain))
    assert tallies(ours) == [T * K]


def test_scale_of_a_layer_on_its_own() -> None:
    """A float, or a callable that is asked in backward."""
    scales = [0.5]
    for aux_scale in (2.0, lambda: torch.tensor(scales[-1])):
        ours = layer(aux_scale=aux_scale)
        y_TH, _ = ours(batch(1))
        scales.append(2.0)
        y_TH.sum().backward()
        twin = layer(losses=[ExactZLoss(0.6)])
        run(lambda x_TH, twin=twin: twin(x_TH)[0], BACKWARDS["plain"])
        assert_equal(gradients(ours), gradients(twin))


class TallyOfRows(Tally):
    """The ids themselves, one row a token, concatenated over micro-batches."""

    accumulate = "cat"

    def observe(self, routing: Any, ctx: RouterContext) -> tuple[Tensor, Tensor]:
        return routing.experts_TK, routing.weights_TK.detach()


def test_accumulating_by_concatenation() -> None:
    ours = layer()
    ours = MoELayer(ours.router, ours.experts, controllers=[TallyOfRows()]).double()
    run(lambda x_TH: ours(x_TH)[0], BACKWARDS["four micro-batches"])
    for _ in range(2):
        ours.step()
    (given,) = ours.attachment.steered[0].controller.given
    routings = [ours.router(batch(seed), RouterContext()) for seed in range(1, 5)]
    assert torch.equal(given[0], torch.cat([routing.experts_TK for routing in routings]))
    assert torch.equal(given[1], torch.cat([routing.weights_TK for routing in routings]))


class Muddled(Tally):
    accumulate = "mean"


def test_accumulate_is_sum_or_cat() -> None:
    ours = layer()
    with pytest.raises(RouterConfigError, match=r"Muddled.accumulate = 'mean'; it is \"sum\" or"):
        MoELayer(ours.router, ours.experts, controllers=[Muddled()])


def test_parts_are_copied_for_each_layer_and_step_after_follows_the_optimizer() -> None:
    tally = Tally()
    ours, other = layer(), MoELayer(layer().router, layer().experts, controllers=[tally])
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    handle = ours.step_after(optimizer)
    for _ in range(2):
        run(lambda x_TH: ours(x_TH)[0], BACKWARDS["two micro-batches"])
        optimizer.step()
    given = ours.attachment.steered[0].controller.given
    assert [int(counts_E.sum()) for counts_E in given] == [2 * T * K] * 2
    handle.remove()
    optimizer.step()
    assert len(given) == 2
    assert tally.given == [] and other.attachment.steered[0].controller is not tally


def test_compiled_whole() -> None:
    """The counts and the loss survive one graph without breaks."""
    ours = layer()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    run(lambda x_TH: compiled(x_TH)[0], BACKWARDS["two micro-batches"])
    assert_equal(gradients(ours), by_hand(BACKWARDS["two micro-batches"], plain))
    assert tallies(ours) == [2 * T * K]


# In a stock model.

OUT = ("loss", "logits")
MODELS = pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])


def stock_with_loss(model: Any) -> dict[str, Tensor]:
    """The gradients of an unmodified model, its routers' losses computed from their inputs."""
    model, losses = copy.deepcopy(model), []

    def watch(gate: Any, args: Any) -> None:
        x_TH = args[0].reshape(-1, args[0].shape[-1])
        if "e_score_correction_bias" in dict(gate.named_buffers()):
            x_TH, weight = x_TH.float(), gate.weight.float()  # as this family's router does
        else:
            weight = gate.weight
        logits_TE = torch.nn.functional.linear(x_TH, weight, getattr(gate, "bias", None))
        losses.append(0.3 * logits_TE.logsumexp(-1).square().view(*ids().shape)[:, :-1].mean())

    for name, module in model.named_modules():
        if name.endswith(("mlp.gate", "mlp.router")):
            module.register_forward_pre_hook(watch)
    model.train()
    (model(input_ids=ids(), labels=ids()).loss + sum(losses)).backward()
    assert len(losses) == 2
    return gradients(model)


@MODELS
@pytest.mark.parametrize("kind", ["plain", "non_reentrant", "reentrant"])
def test_in_a_stock_model(family: str, kind: str) -> None:
    model = stock(family)
    ours = copy.deepcopy(model)
    replacement = replace_moe(ours, losses=[LOSS], controllers=[Tally()])
    ours.train()
    if kind != "plain":
        checkpointed(ours, reentrant=kind == "reentrant")
    ours(input_ids=ids(), labels=ids()).loss.backward()
    # deepseek_v3's own router, and the model's loss, are float32.
    bound = 1e-6 if family == "deepseek_v3" else 1e-10
    assert_equal(gradients(ours), stock_with_loss(model), bound)
    assert tallies(replacement) == [ids().numel() * 4] * 2


def test_nothing_attached_acts_in_eval() -> None:
    model = stock("qwen3_moe").eval()
    ours = copy.deepcopy(model)
    replacement = replace_moe(ours, losses=[LOSS], controllers=[Tally()])
    assert_equal(step(ours), step(model))
    assert sum(tallies(replacement)) == 0


def test_layers_below_the_first_trainable_parameter_are_not_counted_and_explain_says_so() -> None:
    model = stock("qwen3_moe").train()
    replacement = replace_moe(model, losses=[LOSS], controllers=[Tally()])
    assert "not counted" not in replacement.explain()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    model(input_ids=ids(), labels=ids()).loss.backward()
    first, second = replacement.steered
    replacement.step()
    assert first.controller.given == []
    assert [int(counts_E.sum()) for counts_E in second.controller.given] == [ids().numel() * 4]
    note = "not counted, below the first trainable parameter: model.layers.0.mlp (no gradient"
    assert note in replacement.explain()


def test_the_bias_of_a_stock_model_moves_by_the_sign_rule() -> None:
    """On the counts of all micro-batches since the last step, as recorded."""
    model = stock("deepseek_v3", torch.float32).train()
    replacement = replace_moe(model, controllers=[BiasUpdate(0.01)])
    gates = [layer.mlp.gate for layer in model.model.layers[1:]]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replacement.step_after(optimizer)
    for seeds in ((1,), (2, 3)):
        before = [gate.e_score_correction_bias.clone() for gate in gates]
        with record(model) as recording:
            for seed in seeds:
                model(input_ids=ids(seed=seed), labels=ids(seed=seed)).loss.backward()
        optimizer.step()
        for layer, old_E, gate in zip((1, 2), before, gates, strict=True):
            chosen = torch.cat([routing.experts_TK for routing in recording[layer]])
            counts_E = torch.bincount(chosen.flatten(), minlength=8)
            assert int(counts_E.sum()) == len(seeds) * ids().numel() * 4
            want_E = old_E + 0.01 * (counts_E.float().mean() - counts_E).sign()
            assert torch.equal(gate.e_score_correction_bias, want_E)


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.startswith("deepseek")])
def test_a_router_without_a_bias_cannot_be_steered(family: str) -> None:
    model = stock(family)
    before = {name: type(module) for name, module in model.named_modules()}
    message = (
        r"^model.layers.0\S*: BiasUpdate moves e_score_correction_bias, which \w+Router does not "
        r"have. Give it a router with a buffer of that name"
    )
    with pytest.raises(RouterConfigError, match=message):
        replace_moe(model, controllers=[BiasUpdate(0.01)])
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_model_compiled_whole() -> None:
    """One graph: losses at the scale of the loss's own gradient, and counts."""
    ours = stock("qwen3_moe", torch.float32).train()
    replacement = replace_moe(ours, losses=[LOSS], controllers=[Tally()])
    want = {name: tensor.clone() for name, tensor in step(ours).items()}
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    ours.zero_grad()
    (3 * compiled(input_ids=ids(), labels=ids()).loss).backward()
    assert_equal(gradients(ours), {n: 3 * t for n, t in want.items() if n not in OUT}, 1e-5)
    assert tallies(replacement) == [2 * ids().numel() * 4] * 2
