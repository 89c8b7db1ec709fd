"""`from moetk import AutoModelForCausalLM`: the same call, the same model, moetk's parts in it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, PhimoeConfig

import moetk
from moetk import AutoModelForCausalLM
from moetk.errors import RouterConfigError, UnsupportedModelError
from moetk.layers.replacement import replacement_of
from tests.layers.stock import assert_equal, step, stock
from tests.layers.test_replace import cosine
from tests.tiny import FAMILIES, config, spread

families = pytest.mark.parametrize("family", FAMILIES)
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@families
def test_from_pretrained(family: str, tmp_path: Path) -> None:
    folder = saved(stock(family, torch.float32), tmp_path)
    call: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "eager"}
    ours = AutoModelForCausalLM.from_pretrained(folder, **call)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="eager", **call
    )
    assert isinstance(ours, type(theirs)) and len(replacement_of(ours).sites) == 2
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.training is theirs.training
    assert_equal(step(ours), step(theirs))


@families
def test_from_config(family: str) -> None:
    found = []
    for cls, kwargs in (
        (AutoModelForCausalLM, {}),
        (transformers.AutoModelForCausalLM, {"experts_implementation": "eager"}),
    ):
        torch.manual_seed(0)
        model = cls.from_config(config(family), **kwargs)
        assert ("_moetk_replacement" in vars(model)) == (not kwargs)
        spread(model)
        found.append(step(model.double()))
    assert_equal(*found)


def test_loading_info_is_handed_on(tmp_path: Path) -> None:
    folder = saved(stock("olmoe", torch.float32), tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert replacement_of(model).model is model
    assert not info["missing_keys"] and not info["unexpected_keys"]


@families
def test_a_custom_router_comes_back_bitwise(family: str, tmp_path: Path) -> None:
    """Saved with the model, loaded with its factory: the same logits, and nothing unexpected."""
    ours = stock(family, torch.float32)
    moetk.replace_moe(ours, cosine)
    want = step(ours)
    folder = saved(ours, tmp_path)
    mark = json.loads((folder / "config.json").read_text())["moetk"]
    assert mark["router"] == "CosineRouter"
    call: dict[str, Any] = {"router": cosine, "attn_implementation": "eager"}
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **call)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(step(loaded)["logits"], want["logits"])

    with pytest.raises(RouterConfigError, match="was saved with the router 'CosineRouter'. Its"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_backend_stock_loads_what_transformers_loads(tmp_path: Path) -> None:
    folder = saved(stock("olmoe", torch.float32), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, backend="stock")
    assert type(model) is transformers.OlmoeForCausalLM
    assert "_moetk_replacement" not in vars(model)


def test_a_family_without_a_row(tmp_path: Path) -> None:
    settings = PhimoeConfig(**SMALL, num_local_experts=4)
    folder = saved(transformers.AutoModelForCausalLM.from_config(settings), tmp_path)
    for call in (
        lambda **kwargs: AutoModelForCausalLM.from_pretrained(folder, **kwargs),
        lambda **kwargs: AutoModelForCausalLM.from_config(settings, **kwargs),
    ):
        with pytest.raises(UnsupportedModelError, match='Load the model with backend="stock"'):
            call()
        assert type(call(backend="stock")) is transformers.PhimoeForCausalLM


def test_a_dense_model_loads_as_stock(tmp_path: Path) -> None:
    settings = LlamaConfig(**SMALL)
    folder = saved(transformers.AutoModelForCausalLM.from_config(settings), tmp_path)
    for model in (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_config(settings),
    ):
        assert type(model) is transformers.LlamaForCausalLM


def test_the_name_is_transformers_own() -> None:
    """A model's remote code is looked up by the name of this class."""
    assert AutoModelForCausalLM.__name__ == "AutoModelForCausalLM"
    assert issubclass(AutoModelForCausalLM, transformers.AutoModelForCausalLM)
