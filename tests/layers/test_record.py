"""`moetk.record` writes down what was routed; `moetk.replay` routes so again."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import moetk
from moetk import RouterContext, TokenChoice
from moetk.dispatch import Capacity
from moetk.equivalence.judge import relative_error
from moetk.errors import ReplaceError, ReplayError, UnsupportedRoutingError
from moetk.layers.families import family_of
from moetk.recorded import Recording
from moetk.routers import ExpertChoiceRouter, SwitchRouter
from tests.layers.stock import assert_equal, checkpointed, gradients, replaced, step, stock
from tests.tiny import FAMILIES, E, K, ids

families = pytest.mark.parametrize("family", FAMILIES)
GATES = (".gate.weight", ".router.weight")
kinds = pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])


def what_stock_routes(model: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """Decoder layer -> (ids, weights) that the unmodified gates return."""
    found, handles = {}, []

    def hook(layer: int) -> Callable[..., None]:
        def note(gate: Any, args: Any, output: tuple[Tensor, ...]) -> None:
            ids_TK = next(t for t in output if t.dtype == torch.int64)
            weights_TK = next(t for t in output if t is not ids_TK and t.shape == ids_TK.shape)
            found[layer] = (ids_TK, weights_TK)

        return note

    for name, block in model.named_modules():
        family = family_of(block)
        if family is not None:
            gate = getattr(block, family.router)
            handles.append(gate.register_forward_hook(hook(int(name.split(".")[2]))))
    model(input_ids=ids())
    for handle in handles:
        handle.remove()
    return found


def in_order_of_ids(ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    order_TK = ids_TK.argsort(dim=-1, stable=True)
    return ids_TK.gather(1, order_TK), weights_TK.gather(1, order_TK)


@families
def test_what_is_recorded_is_what_stock_routes(family: str) -> None:
    model = stock(family)
    want, ours = what_stock_routes(model), replaced(model)
    with moetk.record(ours) as recording:
        ours(input_ids=ids())
    ours(input_ids=ids())  # after the block nothing is recorded
    assert list(recording) == sorted(want) and len(recording) == 2
    assert recording.num_forwards == 1
    for layer, (ids_TK, weights_TK) in want.items():
        (routing,) = recording[layer]
        assert not routing.weights_TK.requires_grad
        assert routing.num_experts == E and routing.experts_TK.shape == (24, K)
        assert routing.logits_TE is routing.scores_TE is routing.choice_TE is None
        got = in_order_of_ids(routing.experts_TK, routing.weights_TK)
        for ours_TK, stock_TK in zip(got, in_order_of_ids(ids_TK, weights_TK), strict=True):
            assert torch.equal(ours_TK, stock_TK)


@families
def test_fields_are_kept_on_request(family: str) -> None:
    ours = replaced(stock(family))
    with (
        moetk.record(ours, fields=("logits_TE",)) as logits,
        moetk.record(ours, fields=("scores_TE", "choice_TE")) as scores,
    ):
        ours(input_ids=ids())
    for layer in logits:
        (first,), (second,) = logits[layer], scores[layer]
        assert first.logits_TE.shape == (24, E) and not first.logits_TE.requires_grad
        assert first.scores_TE is None and second.logits_TE is None
        assert torch.equal(first.experts_TK, second.experts_TK)


@families
@kinds
def test_a_recompute_is_not_recorded_again(family: str, reentrant: bool) -> None:
    ours = checkpointed(replaced(stock(family)), reentrant=reentrant)
    with moetk.record(ours) as recording:
        losses = [ours(input_ids=ids(seed=seed)).logits.square().mean() for seed in (1, 2)]
        sum(losses).backward()
    assert recording.num_forwards == 2
    assert all(len(entries) == 2 for _, entries in recording.items())


@families
@kinds
@pytest.mark.parametrize("weights", ["recompute", "stored"])
def test_replay_reproduces(family: str, reentrant: bool, weights: Any) -> None:
    """Two batches in their order: logits, and under checkpointing every gradient."""
    ours = replaced(stock(family))
    with moetk.record(ours) as recording:
        want = [step(ours, ids(seed=seed)) for seed in (1, 2)]
    checkpointed(ours, reentrant=reentrant)
    with moetk.replay(ours, recording, weights=weights):
        found = [step(ours, ids(seed=seed)) for seed in (1, 2)]
    for got, first in zip(found, want, strict=True):
        if weights == "recompute":
            assert_equal(got, first)
        else:
            assert relative_error(got["logits"], first["logits"]) < 1e-10


def elsewhere(recording: Recording) -> Recording:
    """The recording with every choice moved to the next expert."""
    moved = Recording()
    for forward in recording.forwards:
        moved.append(
            {
                layer: [replace(one, experts_TK=(one.experts_TK + 1) % E) for one in calls]
                for layer, calls in forward.items()
            }
        )
    return moved


@families
def test_replay_forces_a_choice(family: str) -> None:
    """Of other experts than its own: recorded as given, weights and their gradient live."""
    ours = replaced(stock(family))
    with moetk.record(ours) as recording:
        want = step(ours)
    moved = elsewhere(recording)
    with moetk.replay(ours, moved), moetk.record(ours) as again:
        found = step(ours)
    assert relative_error(found["logits"], want["logits"]) > 1e-3
    for layer in moved:
        assert torch.equal(again[layer][0].experts_TK, moved[layer][0].experts_TK)
        assert not torch.equal(again[layer][0].weights_TK, recording[layer][0].weights_TK)
    gates = [name for name in found if name.endswith(GATES)]
    assert len(gates) == 2
    assert all(found[name].abs().max() > 0 for name in gates)
    assert_equal(step(ours), want)  # and it ends with the block


@families
def test_stored_weights_carry_no_gradient(family: str) -> None:
    ours = replaced(stock(family))
    with moetk.record(ours) as recording:
        ours(input_ids=ids())
    with moetk.replay(ours, recording, weights="stored"):
        step(ours)
    assert not [name for name in gradients(ours) if name.endswith(GATES)]


def test_capacity_applies_after_the_replayed_choice() -> None:
    def factory(spec: Any) -> SwitchRouter:
        torch.manual_seed(spec.layer)
        return SwitchRouter(spec.hidden_size, spec.num_experts, capacity_factor=0.5, jitter=0)

    ours = replaced(stock("mixtral"), factory)
    with moetk.record(ours) as recording:
        ours(input_ids=ids())
    crowded = Recording()
    (forward,) = recording.forwards
    crowded.append(
        {
            layer: [replace(one, experts_TK=torch.zeros_like(one.experts_TK)) for one in calls]
            for layer, calls in forward.items()
        }
    )
    with moetk.replay(ours, crowded), moetk.record(ours) as again:
        ours(input_ids=ids())
    for layer in again:
        (routing,) = again[layer]
        assert (routing.experts_TK == 0).all()
        # ceil(0.5 * 12 tokens / 8 experts) = 1 place in each of two sequences.
        assert routing.kept_TK.sum() == 2
        assert (routing.weights_TK[~routing.kept_TK] == 0).all()


def test_what_a_dispatcher_drops_is_recorded() -> None:
    ours = replaced(stock("mixtral"), dispatcher=moetk.dispatch.Local(Capacity(0.5)))
    with moetk.record(ours) as recording:
        ours(input_ids=ids())
    for layer in recording:
        (routing,) = recording[layer]
        assert 0 < routing.kept_TK.sum() < routing.kept_TK.numel()
        assert (routing.weights_TK[~routing.kept_TK] == 0).all()
        assert (routing.experts_TK >= 0).all()


def test_the_model_must_be_replaced() -> None:
    for context in (moetk.record, lambda model: moetk.replay(model, Recording())):
        with (
            pytest.raises(ReplaceError, match="OlmoeForCausalLM was not replaced: call moetk"),
            context(stock("olmoe")),
        ):
            pass


@pytest.fixture
def played() -> tuple[Any, Recording]:
    ours = replaced(stock("olmoe"))
    with moetk.record(ours) as recording:
        ours(input_ids=ids())
    return ours, recording


def test_a_layer_that_was_not_recorded(played: tuple[Any, Recording]) -> None:
    with pytest.raises(ReplayError, match=r"Layer 7 was not recorded; recorded layers: \[0, 1\]"):
        played[1][7]


def test_replay_of_another_batch(played: tuple[Any, Recording]) -> None:
    ours, recording = played
    message = "The replay in model.layers.0.mlp holds 24 tokens, this call has 10: replay the"
    with pytest.raises(ReplayError, match=message), moetk.replay(ours, recording):
        ours(input_ids=ids(2, 5))


def test_replay_of_one_forward_too_many(played: tuple[Any, Recording]) -> None:
    ours, recording = played
    with moetk.replay(ours, recording):
        ours(input_ids=ids())
        with pytest.raises(ReplayError, match="holds 1 forwards and this is one more"):
            ours(input_ids=ids())
    ours(input_ids=ids())


def test_replay_of_other_layers(played: tuple[Any, Recording]) -> None:
    message = re.escape("The recording holds layers [0, 1], this model has [1, 2].")
    with (
        pytest.raises(ReplayError, match=message),
        moetk.replay(replaced(stock("deepseek_v3")), played[1]),
    ):
        pass


def test_replay_weights_by_name(played: tuple[Any, Recording]) -> None:
    with (
        pytest.raises(ReplayError, match='weights=\'live\'; "recompute" or "stored".'),
        moetk.replay(*played, weights="live"),  # type: ignore[arg-type]
    ):
        pass


@families
def test_a_router_that_ignores_the_replay(family: str) -> None:
    def stubborn(x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        experts_TK = torch.arange(K).expand(len(x_TH), K)
        return TokenChoice(experts_TK, x_TH.new_full(experts_TK.shape, 1 / K), E)

    ours = replaced(stock(family), lambda spec: stubborn)
    with moetk.record(ours) as recording:
        ours(input_ids=ids())
    with moetk.replay(ours, recording):  # its own choice: nothing to see
        ours(input_ids=ids())
    message = (
        r"stubborn in model.layers.\d.* did not take the replayed choice: its forward ignores "
        r"ctx.replay. Choose with moetk.routers.top_k, or return ctx.replayed\(experts_TK\)."
    )
    with pytest.raises(ReplayError, match=message), moetk.replay(ours, elsewhere(recording)):
        ours(input_ids=ids())


def test_only_token_choice_is_replayed() -> None:
    ours = replaced(
        stock("olmoe"), lambda s: ExpertChoiceRouter(s.hidden_size, s.num_experts, s.top_k)
    )
    with moetk.record(ours) as recording:
        ours(input_ids=ids())
    assert recording[0][0].tokens_EC.shape == (E, 2 * 12 * K // E)
    with (
        pytest.raises(UnsupportedRoutingError, match="Layer 0: only a TokenChoice can be replayed"),
        moetk.replay(ours, recording),
    ):
        pass
