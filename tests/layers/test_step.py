"""`speed_up`: the same function as stock, on this model only, in company, and back."""

from __future__ import annotations

import copy
import io
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from moetk import replace_moe
from moetk.controllers import BiasUpdate
from moetk.errors import ReplaceError, UnsupportedModelError
from moetk.kernels.rope import rotated
from moetk.layers.step import speed_up
from moetk.layers.step.attention import WINDOWS
from moetk.layers.step.loss import HEADS
from moetk.layers.step.norm import NORMS
from moetk.layers.swap import own_class
from moetk.routers import DeepSeekV3Router
from tests.layers.stock import PARITY, assert_bitwise, assert_equal, checkpointed, gradients, stock
from tests.tiny import FAMILIES, ids

SINGLE = 1e-4
"""How far models in float32 may be apart."""
NORMED = ("qwen3_moe", "olmoe")
PARTS = ("norm", "residual", "rope", "loss")


def exact_loss(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any
) -> Tensor:
    """Transformers' loss without its detour through fp32."""
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    total = nn.functional.cross_entropy(logits.view(-1, vocab_size), shifted, reduction="sum")
    return total / ((shifted != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def exact(family: str, **changes: Any) -> Any:
    """A stock model in float64, in training mode, its loss in float64 too."""
    model = stock(family, **changes).train()
    model.loss_function = exact_loss
    return model


def single(family: str, **changes: Any) -> Any:
    """A stock model in float32, in training mode: every part runs, which leaves float64 alone."""
    return stock(family, torch.float32, **changes).train()


def fast(model: Any, **parts: bool) -> Any:
    """A sped-up copy, with the loss that transformers would take where ours can replace it."""
    model = copy.deepcopy(model)
    if type(model).__name__ in HEADS:
        vars(model).pop("_loss_function", None)
    speed_up(model, **parts)
    return model


def labels() -> Tensor:
    some = ids().clone()
    some[0, :5] = -100
    return some


def trained(model: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The loss and every gradient of one forward and backward."""
    model.zero_grad()
    out = model(input_ids=ids(), labels=labels(), **kwargs)
    out.loss.backward()
    return {"loss": out.loss.detach(), **gradients(model)}


def logits(model: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"logits": model.eval()(input_ids=ids()).logits}


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("of", "bound"), [(exact, PARITY), (single, SINGLE)])
def test_equals_stock(family: str, of: Any, bound: float) -> None:
    model = of(family)
    ours = fast(model)
    assert_equal(trained(ours), trained(model), bound)
    assert_equal(logits(ours), logits(model), bound)


@pytest.mark.parametrize("family", NORMED)
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing(family: str, reentrant: bool) -> None:
    model = single(family)
    ours = checkpointed(fast(model), reentrant=reentrant)
    assert_equal(trained(ours), trained(model), bound=SINGLE)


def test_eager_sdpa_and_a_mask_agree_with_stock() -> None:
    mask = torch.ones_like(ids())
    mask[0, -3:] = 0
    for attention in ("eager", "sdpa"):
        model = single("qwen3_moe", attn_implementation=attention)
        want = trained(model, attention_mask=mask)
        assert_equal(trained(fast(model), attention_mask=mask), want, bound=SINGLE)


def test_sliding_window_reaches_the_attention_function() -> None:
    model = single("mixtral", sliding_window=3)
    assert_equal(trained(fast(model)), trained(model), bound=SINGLE)
    whole = single("mixtral", sliding_window=None)
    assert not torch.equal(trained(whole)["loss"], trained(model)["loss"])


def test_attentions_and_hidden_states_are_returned_as_in_stock() -> None:
    model = single("qwen3_moe").eval()
    ours = fast(model)
    asked = {"output_attentions": True, "output_hidden_states": True, "output_router_logits": True}
    with torch.no_grad():
        theirs, mine = model(input_ids=ids(), **asked), ours(input_ids=ids(), **asked)
    for name in ("attentions", "hidden_states", "router_logits"):
        assert len(mine[name]) == len(theirs[name]) == 2 + (name == "hidden_states")
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", NORMED)
def test_generates_the_same_tokens(family: str) -> None:
    model = single(family).eval()
    settings = {"max_new_tokens": 6, "do_sample": False}
    want = model.generate(ids(), **settings)
    assert torch.equal(fast(model).generate(ids(), **settings), want)


def test_other_models_and_modules_are_untouched() -> None:
    before = stock("qwen3_moe").train()
    source = sys.modules[type(before).__module__]
    contents = dict(vars(source))
    members = {name: dict(vars(own)) for name, own in contents.items() if isinstance(own, type)}
    want = trained(before)
    step = speed_up(stock("qwen3_moe").train())
    trained(step.model)
    after = stock("qwen3_moe").train()
    assert_bitwise(trained(before), want)
    assert_bitwise(trained(after), want)
    assert dict(vars(source)) == contents
    assert {n: dict(vars(own)) for n, own in contents.items() if isinstance(own, type)} == members


def test_a_model_in_float64_keeps_its_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def watched(*args: Any) -> tuple[Tensor, Tensor]:
        taken.append(args[0].dtype)
        return rotated(*args)

    monkeypatch.setattr("moetk.layers.step.attention.rotated", watched)
    for of in (exact, single):
        trained(fast(of("qwen3_moe")))
    assert set(taken) == {torch.float32}


def test_names_stay_as_transformers_wrote_them() -> None:
    model = stock("qwen3_moe")
    names = [(type(m).__name__, type(m).__module__, type(m).__qualname__) for m in model.modules()]
    keys, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    speed_up(model)
    changed = [
        (type(m).__name__, type(m).__module__, type(m).__qualname__) for m in model.modules()
    ]
    assert changed == names
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == modules


def test_restore_and_install() -> None:
    model = stock("qwen3_moe").train()
    want, before = trained(model), classes(model)
    step = speed_up(model)
    assert classes(model) != before
    step.restore()
    assert classes(model) == before
    assert_bitwise(trained(model), want)
    step.restore()  # nothing left to do
    step.install()
    assert model(input_ids=ids(), labels=ids()).logits is None
    step.restore()
    assert classes(model) == before


def test_a_second_call_starts_from_stock() -> None:
    model = stock("qwen3_moe").train()
    before = classes(model)
    first = speed_up(model)
    second = speed_up(model, loss=False)
    assert model(input_ids=ids(), labels=ids()).logits is not None
    first.restore()  # no longer its model
    assert classes(model) != before
    with pytest.raises(ReplaceError, match="Qwen3MoeForCausalLM is held by another Step: restore"):
        first.install()
    second.restore()
    assert classes(model) == before


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone(part: str) -> None:
    model = single("qwen3_moe")
    ours = fast(model, **{name: name == part for name in PARTS})
    if part == "loss":
        assert_equal(trained(ours), trained(model), bound=SINGLE)
        return
    ours.loss_function = exact_loss
    assert_equal(trained(ours), trained(model), bound=SINGLE)
    assert ours(input_ids=ids(), labels=ids()).logits is not None


def router(spec: Any) -> Any:
    torch.manual_seed(spec.layer)
    return DeepSeekV3Router(spec.hidden_size, spec.num_experts, spec.top_k)


REPLACED: list[dict[str, Any]] = [{}, {"router": router, "controllers": [BiasUpdate(1e-3)]}]


@pytest.mark.parametrize("settings", REPLACED, ids=["stock router", "custom router"])
@pytest.mark.parametrize("replace_first", [True, False])
@pytest.mark.parametrize("restore_first", ["step", "replacement"])
def test_with_replace_moe_in_any_order(
    settings: dict[str, Any], replace_first: bool, restore_first: str
) -> None:
    reference, model = single("qwen3_moe"), single("qwen3_moe")
    before = classes(model)
    replace_moe(reference, **settings)
    if replace_first:
        replacement = replace_moe(model, **settings)
        step = speed_up(model)
    else:
        step = speed_up(model)
        replacement = replace_moe(model, **settings)
    assert_equal(trained(model), trained(reference), bound=SINGLE)
    assert model(input_ids=ids(), labels=ids()).logits is None
    if restore_first == "step":
        step.restore()
        assert model(input_ids=ids(), labels=ids()).logits is not None
        replacement.restore()
    else:
        replacement.restore()
        assert_equal(trained(model), trained(single("qwen3_moe")), bound=SINGLE)
        assert model(input_ids=ids(), labels=ids()).logits is None
        step.restore()
    assert classes(model) == before


def test_saves_what_stock_saves(tmp_path: Path) -> None:
    model = stock("qwen3_moe", torch.float32)
    model.save_pretrained(tmp_path / "stock")
    step = speed_up(model)
    model.save_pretrained(tmp_path / "fast")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "fast" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()
    step.restore()
    speed_up(model)
    replace_moe(model, router)
    model.save_pretrained(tmp_path / "router")
    assert (tmp_path / "router" / "moetk_state.safetensors").exists()


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_a_copy_is_sped_up_and_on_its_own(kind: str) -> None:
    model = single("qwen3_moe")
    ours = fast(model)
    if kind == "deepcopy":
        twin = copy.deepcopy(ours)
    else:
        stream = io.BytesIO()
        torch.save(ours, stream)
        twin = torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    assert_equal(trained(twin), trained(model), bound=SINGLE)
    assert twin(input_ids=ids(), labels=ids()).logits is None
    twin._moetk_speed_up.restore()
    assert classes(twin) == classes(model)
    assert ours(input_ids=ids(), labels=ids()).logits is None


@pytest.mark.parametrize("adapt_first", [True, False])
@pytest.mark.parametrize("target", ["attention", "lm_head"])
def test_adapters_are_called(target: str, adapt_first: bool) -> None:
    targets = ["lm_head"] if target == "lm_head" else ["q_proj", "k_proj", "v_proj", "o_proj"]

    def adapted(model: Any) -> Any:
        torch.manual_seed(0)
        settings = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        return get_peft_model(model, settings, autocast_adapter_dtype=False).train()

    want = trained(adapted(single("qwen3_moe")))
    model: Any = single("qwen3_moe")
    if adapt_first:
        model = adapted(model)
        speed_up(model)
    else:
        speed_up(model)
        model = adapted(model)
    got = trained(model)
    assert_equal(got, want, bound=SINGLE)
    assert sum("lora_" in name for name in got) == (2 if target == "lm_head" else 16)
    kept = model(input_ids=ids(), labels=ids()).logits is not None
    assert kept == (target == "lm_head")


@pytest.mark.parametrize("hook_first", [True, False])
def test_hooks_of_accelerate_on_every_module(hook_first: bool) -> None:
    model = single("mixtral")
    want = trained(model)
    if not hook_first:
        step = speed_up(model)
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    if hook_first:
        step = speed_up(model)
    assert_equal(trained(model), want, bound=SINGLE)
    step.restore()
    assert_bitwise(trained(model), want)


def test_a_hooked_norm_is_called() -> None:
    model = single("qwen3_moe")
    ours = fast(model)
    for each in (model, ours):
        each.model.layers[0].self_attn.q_norm.register_forward_hook(lambda m, a, out: 2 * out)
    assert_equal(trained(ours), trained(model), bound=SINGLE)
    plain = trained(single("qwen3_moe"))
    assert not torch.equal(plain["loss"], trained(ours)["loss"])


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_run_as_in_stock(kind: str) -> None:
    def hooked(model: Any) -> list[str]:
        seen: list[str] = []
        norm = model.model.layers[0].self_attn.q_norm
        for name, module in (("head", model.lm_head), ("q_norm", norm), ("norm", model.model.norm)):
            getattr(module, kind)(lambda *_, name=name: seen.append(name))
        trained(model)
        return seen

    model = stock("qwen3_moe", torch.float32).train()
    assert hooked(fast(model)) == hooked(model) == ["head", "norm", "q_norm"]


def test_below_another_class_the_shell_lets_stock_through() -> None:
    model = single("qwen3_moe")
    step = speed_up(model)
    ours: Any = type(model)
    model.__class__ = type("FSDP" + ours.__name__, (ours,), {})
    step.restore()
    assert model(input_ids=ids(), labels=ids()).logits is not None
    step.install()
    assert model(input_ids=ids(), labels=ids()).logits is None


def test_autocast_runs_stock_attention_and_the_chunked_loss() -> None:
    model = stock("qwen3_moe", torch.float32).train()
    ours = fast(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = trained(model), trained(ours)
        assert ours(input_ids=ids(), labels=ids()).logits is None
    assert_equal(got, want, bound=1e-2)  # of bf16; they differ in the gradients of the logits


def test_compiles_to_one_graph() -> None:
    """With moetk's experts: transformers' own do not compile on every version."""
    model = stock("qwen3_moe", torch.float32, num_hidden_layers=1).train()
    ours = fast(model)
    replace_moe(ours, backend="grouped")
    torch._dynamo.reset()
    compiled: Any = torch.compile(ours, backend="aot_eager", fullgraph=True)
    out = compiled(input_ids=ids(), labels=labels())
    out.loss.backward()
    torch._dynamo.reset()
    got = {"loss": out.loss.detach(), **gradients(ours)}
    assert_equal(got, trained(model), bound=2e-5)


def test_explain_tells_what_runs_and_why_not() -> None:
    text = speed_up(stock("gpt_oss", torch.bfloat16), loss=False).explain()
    for words in (
        "GptOssRMSNorm 5 moetk: plain torch",
        "stock: GptOssAttention has no row in moetk.layers.step.attention",
        "stock: asked for with loss=False",
    ):
        assert words in " ".join(text.split()), text
    step = speed_up(stock("qwen3_moe").train())
    assert "what they take in fp32 of a model in float64" in " ".join(step.explain().split())
    assert "the kernel computes in fp32, and the model is in float64" in step.explain()
    assert "moetk, chunks of 4096 rows; out.logits is None" in repr(step)
    assert "moetk, norm and rotation: plain torch" in speed_up(single("qwen3_moe")).explain()
    assert "moetk, rotation: plain torch" in speed_up(single("mixtral")).explain()
    step.model.eval()
    assert "stock: logits are kept outside training" in step.explain()
    step.restore()
    assert "stock: restored" in step.explain()


def test_explain_names_a_clip_and_a_hook() -> None:
    assert "clip_qkv=3.0 clips between" in speed_up(stock("olmoe", clip_qkv=3.0)).explain()
    model = single("qwen3_moe")
    model.model.layers[1].self_attn.k_norm.register_forward_hook(lambda *_: None)
    text = " ".join(speed_up(model).explain().split())
    assert "stock: k_norm is wrapped or hooked, and must be called" in text


def test_a_clip_is_kept() -> None:
    model = single("olmoe", clip_qkv=0.05)
    assert_equal(trained(fast(model)), trained(model), bound=SINGLE)


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    before = classes(model)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM: nothing to speed up. Llama"):
        speed_up(model)
    assert classes(model) == before


def test_a_forward_on_the_instance_is_refused_and_nothing_changes() -> None:
    model = stock("qwen3_moe")
    last = model.model.layers[1].self_attn
    last.forward = partial(last.forward)
    before = classes(model)
    with pytest.raises(ReplaceError, match="Qwen3MoeAttention has a forward of its own"):
        speed_up(model)
    assert classes(model) == before
    del last.forward
    earlier = speed_up(model, rope=False)
    last.forward = partial(last.forward)
    with pytest.raises(ReplaceError, match="Qwen3MoeAttention has a forward of its own"):
        speed_up(model)
    assert vars(model)["_moetk_speed_up"] is earlier
    assert model.train()(input_ids=ids(), labels=ids()).logits is None


def normed(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    dx, dweight = torch.autograd.grad(y, (x, next(module.parameters())), x.detach().flip(0))
    return {"y": y.detach(), "dx": dx, "dweight": dweight}


def test_norms_equal_stock_to_the_bit_gradients_too() -> None:
    seen = set()
    for family in FAMILIES:
        model = stock(family, torch.bfloat16)
        for module in model.modules():
            name = own_class(module).__name__
            if name not in NORMS or name in seen:
                continue
            seen.add(name)
            weight: Any = module.weight
            generator = torch.Generator().manual_seed(0)
            weight.data = torch.randn(len(weight), generator=generator).to(weight.dtype)
            x = torch.randn(64, len(weight), generator=generator).to(weight.dtype)
            want = normed(module, x)
            step = speed_up(model)
            assert_bitwise(normed(module, x), want)
            step.restore()
    assert seen == set(NORMS)


def test_every_row_is_of_a_family_that_is_tested() -> None:
    names = {own_class(m).__name__ for family in FAMILIES for m in stock(family).modules()}
    assert {*WINDOWS, *HEADS, *NORMS} <= names
