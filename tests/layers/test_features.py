"""What people do with a transformers model goes on working, and gives what stock gives."""

import contextlib
import copy
import pickle
import re
from typing import Any

import pytest
import torch

import moetk
from moetk.equivalence.judge import relative_error
from moetk.errors import MissingContextError
from moetk.layers.replacement import replacement_of
from moetk.losses import hf_load_balancing
from tests.layers.limits import able, balancing_loss, inputs_embeds
from tests.layers.stock import (
    assert_equal,
    checkpointed,
    gradients,
    replaced,
    step,
    stock,
)
from tests.tiny import FAMILIES, ids

families = pytest.mark.parametrize("family", FAMILIES)
kinds = pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])


@pytest.mark.parametrize("family", able(balancing_loss))
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_balancing_loss(family: str, masked: bool) -> None:
    """transformers' own loss, from our router's logits: value, logits and every gradient."""
    model = stock(family)
    mask = torch.ones_like(ids())
    if masked:
        mask[1, -3:] = 0  # on the right, where eager attention stays finite in float64
    found = []
    for one in (replaced(model), model):
        out = one(input_ids=ids(), labels=ids(), attention_mask=mask, output_router_logits=True)
        out.loss.backward()
        logits = {f"router_logits.{n}": tensor for n, tensor in enumerate(out.router_logits)}
        found.append({"loss": out.loss, "aux": out.aux_loss, **logits, **gradients(one)})
    assert_equal(*found)


def test_balancing_loss_from_records() -> None:
    model = replaced(stock("qwen3_moe", torch.float32))
    with moetk.record(model, fields=("logits_TE",)) as recording:
        out = model(input_ids=ids(), output_router_logits=True)
    routings = [entries[0] for _, entries in recording.items()]
    assert torch.equal(hf_load_balancing(routings), out.aux_loss)


@families
@kinds
def test_checkpointing(family: str, reentrant: bool) -> None:
    model = stock(family)
    ours = checkpointed(replaced(model), reentrant=reentrant)
    assert_equal(step(ours), step(checkpointed(model, reentrant=reentrant)))


@families
@kinds
def test_two_forwards_before_one_backward(family: str, reentrant: bool) -> None:
    """Each recompute must see its own forward's ids, not the last ones."""
    model = stock(family)
    found = []
    for one in (replaced(model), model):
        checkpointed(one, reentrant=reentrant)
        losses = [one(input_ids=ids(seed=s)).logits.square().mean() * s for s in (1, 2)]
        sum(losses).backward()
        found.append(gradients(one))
    assert_equal(*found)


@families
@pytest.mark.parametrize("experts", ["auto", "stock"])
def test_generate(family: str, experts: str) -> None:
    """Greedy, with a cache, one prompt padded on the left."""
    model = stock(family, torch.float32).eval()
    prompt = ids(2, 6)
    mask = torch.ones_like(prompt)
    prompt[0, :2], mask[0, :2] = 0, 0
    settings: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    want = model.generate(prompt, attention_mask=mask, **settings)
    got = replaced(model, backend=experts).generate(prompt, attention_mask=mask, **settings)
    assert got.sequences.shape == (2, 14)
    assert torch.equal(got.sequences, want.sequences)
    assert relative_error(torch.stack(got.logits), torch.stack(want.logits)) < 1e-5


def moetk_parts(model: Any) -> set[str]:
    """Every trace in a model: attributes, classes and hooks."""
    found = set()
    for name, module in model.named_modules():
        found |= {f"{name}.{key}" for key in vars(module) if "moetk" in key}
        if any("moetk" in cls.__module__ for cls in type(module).__mro__):
            found.add(f"{name}: {type(module)}")
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            found |= {f"{name}: {type(hook)}" for hook in hooks.values() if "moetk" in repr(hook)}
    return found


@families
def test_deepcopy(family: str) -> None:
    model = stock(family)
    ours = replaced(model)
    twin = copy.deepcopy(ours)
    want = step(model)
    assert_equal(step(twin), want)
    assert_equal(step(ours), want)
    # The copies live apart: one's restore leaves the other replaced.
    twin_parts = moetk_parts(twin)
    assert twin_parts == moetk_parts(ours)
    replacement_of(twin).restore()
    assert not moetk_parts(twin)
    assert_equal(step(twin), want)
    assert moetk_parts(ours) == twin_parts
    with moetk.record(ours) as recording:
        step(ours)
    assert recording.num_forwards == 1


@families
def test_pickle(family: str) -> None:
    model = stock(family)
    ours = replaced(model)
    step(ours)
    twin = pickle.loads(pickle.dumps(ours))
    assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
    assert_equal(step(twin), step(model))
    replacement_of(twin).restore()
    assert not moetk_parts(twin)
    assert_equal(step(twin), step(model))


@families
def test_call_styles(family: str) -> None:
    """Ids by position, and the inner model called alone."""
    model = stock(family)
    ours = replaced(model)
    assert relative_error(ours(ids()).logits, model(ids()).logits) < 1e-10
    for inner in (model.model, ours.model):
        inner(ids()).last_hidden_state.square().mean().backward()
    assert_equal(gradients(ours), gradients(model))


@pytest.mark.parametrize("family", able(inputs_embeds))
def test_inputs_embeds(family: str) -> None:
    model = stock(family)
    embeds = model.get_input_embeddings()(ids()).detach()
    found = [one(inputs_embeds=embeds).logits for one in (replaced(model), model)]
    assert relative_error(*found) < 1e-10


def test_inputs_embeds_of_a_hash_layer_say_what_is_missing() -> None:
    ours = replaced(stock("deepseek_v4"))
    message = (
        "DeepseekV4HashRouter in model.layers.0.mlp needs ctx.token_ids, which is None: the model "
        "was called with inputs_embeds. Call it with input_ids, or call the layer with "
        "RouterContext(token_ids=...)."
    )
    with pytest.raises(MissingContextError, match=re.escape(message)):
        ours(inputs_embeds=ours.get_input_embeddings()(ids()))


@families
def test_no_grad_and_eval(family: str) -> None:
    model = stock(family)
    ours = replaced(model)
    for mode in (True, False):
        model.train(mode), ours.train(mode)
        assert ours.model.training is mode
        for context in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
            with context():
                found = [one(input_ids=ids()).logits for one in (ours, model)]
            assert relative_error(*found) < 1e-10
            assert found[0].requires_grad is found[1].requires_grad


@families
def test_moved_to_another_dtype_after_replacement(family: str) -> None:
    model = stock(family, torch.float32)
    ours = replaced(model).double()
    assert_equal(step(ours), step(model.double()))


@families
def test_autocast(family: str) -> None:
    """bf16 autocast over fp32 weights: as close to fp64 as stock's experts come."""
    model = stock(family, torch.float32)
    truth = step(copy.deepcopy(model).double())
    with torch.autocast("cpu", torch.bfloat16):
        found = [step(one) for one in (replaced(model), model)]
    ours, theirs = ({n: relative_error(t[n], truth[n]) for n in truth} for t in found)
    assert {n: t.dtype for n, t in found[0].items()} == {n: t.dtype for n, t in found[1].items()}
    assert ours["logits"] <= 2 * theirs["logits"]
    root = [sum(error**2 for error in errors.values()) ** 0.5 for errors in (ours, theirs)]
    assert root[0] <= 2 * root[1]


@families
def test_a_second_model_is_left_alone(family: str) -> None:
    model, other = stock(family), stock(family)
    before = {name: type(module) for name, module in other.named_modules()}
    want = step(other)
    moetk.replace_moe(model)
    assert {name: type(module) for name, module in other.named_modules()} == before
    assert not moetk_parts(other)
    for name, tensor in step(other).items():
        assert torch.equal(tensor, want[name])
