"""What a cold review broke, each held by a test: recompute below the layer, forwards that raise,
ties, graphs walked twice, memory, stale handles, marks, labels of other heads."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moetk
from moetk import ExpertBank, MoELayer, RouterContext, TokenChoice, replace_moe
from moetk.controllers import BiasUpdate
from moetk.dispatch import Capacity, Local, dropped
from moetk.equivalence.stock import against_stock
from moetk.errors import (
    MoeShapeError,
    ReplaceError,
    ReplayError,
    RouterConfigError,
    UnsupportedModelError,
    UnsupportedRoutingError,
)
from moetk.experts import BankSpec, bank_forward
from moetk.kernels.sort_plan import sort_plan
from moetk.layers.carrier import ModelForward
from moetk.losses import RouterZLoss
from moetk.routers import DeepSeekV3Router, MixtralRouter
from tests.layers.parts import Tally, cosine
from tests.tiny import E, H, K, config, ids, tiny


def loss_of(model: nn.Module, prompt: Tensor | None = None) -> Tensor:
    prompt = ids() if prompt is None else prompt
    return model(input_ids=prompt, labels=prompt).loss  # type: ignore[no-any-return]


def test_a_block_recomputed_on_its_own_is_refused() -> None:
    """It knows neither replay nor mask: it chose other experts, and the gradient was wrong."""
    model = tiny("qwen3_moe").train()
    replace_moe(model)
    for layer in model.model.layers:
        inner = layer.mlp.forward
        layer.mlp.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
    with pytest.raises(ReplaceError, match="recomputed on its own"):
        loss_of(model).backward()


def test_a_forward_that_raises_leaves_nothing_in_the_recording() -> None:
    model = tiny("qwen3_moe")
    fails = {"now": False}

    def fragile(spec: Any) -> Any:
        router = MixtralRouter(spec.hidden_size, spec.num_experts, spec.top_k)

        def route(x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
            if fails["now"] and spec.moe_index == 1:
                raise RuntimeError("no")
            return router(x_TH, ctx)

        return route

    replace_moe(model, fragile)
    with moetk.record(model) as recording:
        model(input_ids=ids())
        fails["now"] = True
        with pytest.raises(RuntimeError, match="no"):
            model(input_ids=ids(seed=2))
        fails["now"] = False
        want = model(input_ids=ids(seed=3)).logits
    assert recording.num_forwards == 2
    assert [len(entries) for _, entries in recording.items()] == [2, 2]
    with moetk.replay(model, recording):
        model(input_ids=ids())
        assert torch.equal(model(input_ids=ids(seed=3)).logits, want)


def test_tied_decoder_layers_are_recorded_and_replayed_call_by_call() -> None:
    model = tiny("qwen3_moe").eval()
    model.model.layers[1] = model.model.layers[0]
    replace_moe(model)

    def run() -> list[Tensor]:
        return [model(input_ids=ids(seed=s), use_cache=False).logits for s in (1, 2)]

    with moetk.record(model) as recording:
        want = run()
    assert recording.num_forwards == 2 and len(recording[0]) == 4
    with moetk.replay(model, recording):
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("recomputed", [False, True], ids=["plain", "checkpointed"])
def test_a_step_leaves_no_forward_behind(recomputed: bool) -> None:
    model = tiny("qwen3_moe").train()
    replace_moe(model, cosine, losses=[RouterZLoss(1e-3)], controllers=[Tally()])
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(3):
        loss_of(model).backward()
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, ModelForward)]


def test_a_graph_walked_twice_counts_once() -> None:
    model = tiny("deepseek_v3").train()
    moe = replace_moe(model, controllers=[BiasUpdate(1e-3)])
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    once = [one.totals[0].clone() for one in moe.steered]
    loss.backward()
    assert all(torch.equal(a.totals[0], b) for a, b in zip(moe.steered, once, strict=True))
    assert int(once[0].sum()) == ids().numel() * K


@pytest.mark.parametrize("factor", [0.0, 2.0], ids=["lost", "doubled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_choice_bias_is_no_tie(dtype: torch.dtype, factor: float) -> None:
    stock = tiny("deepseek_v4")
    ours = copy.deepcopy(stock)
    replace_moe(ours)
    batches = [ids(4, 16, seed=seed) for seed in range(2)]
    assert against_stock(stock, ours, batches, dtype).choices.ok
    for name, buffer in ours.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.mul_(factor)
    assert not against_stock(stock, ours, batches, dtype).ok


def test_ids_below_minus_one_are_unused_too() -> None:
    plan = sort_plan(torch.tensor([[-2, 0], [-5, 1]]), None, 4)
    assert plan.counts_E.tolist() == [1, 1, 0, 0]


def test_labels_of_other_heads() -> None:
    from transformers import Qwen3MoeForSequenceClassification, Qwen3MoeForTokenClassification

    seen: list[RouterContext] = []

    def spy(spec: Any) -> Any:
        router = MixtralRouter(spec.hidden_size, spec.num_experts, spec.top_k)

        def route(x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
            seen.append(ctx)
            return router(x_TH, ctx)

        return route

    settings = config("qwen3_moe", num_labels=3)
    whole = Qwen3MoeForSequenceClassification(settings)
    replace_moe(whole, spy, losses=[RouterZLoss(1e-3)])
    whole(input_ids=ids(), labels=torch.tensor([0, 2])).loss.backward()
    assert seen[0].label_mask is None

    tokens = Qwen3MoeForTokenClassification(settings)
    replace_moe(tokens, spy)
    labels = torch.full_like(ids(), -100)
    labels[0, 3] = 1
    seen.clear()
    tokens(input_ids=ids(), labels=labels)
    assert seen[0].label_mask is not None
    assert seen[0].label_mask.nonzero().tolist() == [[3]]


def test_stale_and_doubled_handles_do_nothing() -> None:
    model = tiny("qwen3_moe")
    first = replace_moe(model, cosine)
    second = replace_moe(model)
    second.install()
    first.restore()
    with moetk.record(model) as recording:
        model(input_ids=ids())
    assert recording.num_forwards == 1 and len(recording[0]) == 1
    with pytest.raises(ReplaceError, match="held by another Replacement"):
        first.install()
    second.restore()
    assert not [n for n, m in model.named_modules() if hasattr(type(m), "_moetk_original")]


@pytest.mark.parametrize(
    "router",
    [
        lambda spec: MixtralRouter(spec.hidden_size, spec.num_experts, 2),
        lambda spec: MixtralRouter(spec.hidden_size, spec.num_experts, K, choice_bias=True),
    ],
    ids=["another K", "a choice bias"],
)
def test_the_pooled_loss_is_refused_where_it_measures_another_routing(router: Any) -> None:
    model = tiny("qwen3_moe")
    replace_moe(model, router)
    with pytest.raises(moetk.MoetkError, match="balance a routing that does not happen"):
        model(input_ids=ids(), output_router_logits=True)


def test_another_router_of_equal_shapes_does_not_load(tmp_path: Any) -> None:
    class Cosine2(type(cosine_router())):  # type: ignore[misc]
        pass

    model = tiny("qwen3_moe")
    replace_moe(model, cosine)
    model.save_pretrained(tmp_path)
    with pytest.raises(RouterConfigError, match="was saved with the router 'CosineRouter'"):
        moetk.AutoModelForCausalLM.from_pretrained(
            tmp_path, router=lambda spec: Cosine2(spec.hidden_size, spec.num_experts, spec.top_k)
        )


def cosine_router() -> nn.Module:
    model = tiny("qwen3_moe")
    replace_moe(model, cosine)
    return model.get_submodule("model.layers.0.mlp.gate.moetk")  # type: ignore[no-any-return]


def test_a_model_without_blocks_says_so() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    with pytest.raises(UnsupportedModelError, match="no mixture-of-experts block"):
        replace_moe(llama, cosine)
    assert replace_moe(llama).sites == ()


def test_factories_that_cannot_work() -> None:
    model = tiny("qwen3_moe")
    with pytest.raises(RouterConfigError, match="returned the stock gate"):
        replace_moe(model, lambda spec: spec.gate)
    one = MixtralRouter(H, E, K)
    with pytest.raises(RouterConfigError, match="one module for several layers"):
        replace_moe(model, lambda spec: one)


def test_losses_that_are_no_scalars_and_losses_that_do_not_say_what_they_read() -> None:
    model = tiny("qwen3_moe").train()
    replace_moe(model, losses=[lambda routing, ctx: routing.logits_TE.float().square().mean()])
    loss_of(model).backward()
    replace_moe(model, losses=[lambda routing, ctx: routing.logits_TE.float().sum(-1)])
    with pytest.raises(MoeShapeError, match=r"returned \(24,\); a loss returns a scalar"):
        loss_of(model)


@pytest.mark.parametrize("fields", ["logits_TE", ("logits",)])
def test_fields_of_a_recording_are_named(fields: Any) -> None:
    model = tiny("qwen3_moe")
    replace_moe(model)
    with (
        pytest.raises(ReplayError, match="name them in a tuple"),
        moetk.record(model, fields=fields),
    ):
        pass


def test_a_bank_looks_at_its_weights() -> None:
    bank, other = ExpertBank(8, 4, 8), BankSpec(2, 8, 8)
    routing = TokenChoice(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), 2)
    with pytest.raises(MoeShapeError, match=r"bank weight up is \(4, 16, 8\), expected \(2, 16"):
        bank_forward(other, bank.weights(), torch.randn(3, 8), routing)
    special = replace(bank.spec, special=("zero",))
    chosen = moetk.ExpertChoice(torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1), 3)
    with pytest.raises(UnsupportedRoutingError, match="special experts"):
        bank_forward(special, bank.weights(), torch.randn(3, 8), chosen)


def test_a_layer_from_parts_says_what_it_dropped_and_resumes_its_controllers() -> None:
    def built() -> MoELayer:
        torch.manual_seed(0)
        rate = BiasUpdate(lambda step: 0.1 / (1 + step))
        return MoELayer(DeepSeekV3Router(8, 4, 2), ExpertBank(8, 4, 8), controllers=[rate])

    def train(layer: MoELayer, seeds: range) -> None:
        for seed in seeds:
            x = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
            layer(x.requires_grad_())[0].sum().backward()
            layer.step()

    straight, first, second = built(), built(), built()
    train(straight, range(4))
    train(first, range(2))
    second.load_state_dict(first.state_dict())
    second.load_controller_state(first.controller_state())
    train(second, range(2, 4))
    assert torch.equal(
        second.router.e_score_correction_bias,  # type: ignore[union-attr]
        straight.router.e_score_correction_bias,  # type: ignore[union-attr]
    )

    layer = MoELayer(MixtralRouter(8, 4, 2), ExpertBank(8, 4, 8), dispatcher=Local(Capacity(0.25)))
    _, routing = layer(torch.randn(2, 16, 8))
    assert int(dropped(routing)) == int((~routing.kept_TK).sum()) > 0  # type: ignore[union-attr]


def test_compiled_layers_share_their_code() -> None:
    """Nothing in the forward is a constant of one layer: ten layers need no ten graphs."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = tiny("qwen3_moe", num_hidden_layers=6).train()
    replace_moe(model)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    for seed in range(2):
        model(input_ids=ids(seed=seed), labels=ids(seed=seed), use_cache=False).loss.backward()
    assert counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()
