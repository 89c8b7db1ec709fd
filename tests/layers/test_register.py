"""`experts_implementation="moetk"`: the stock router in front of moetk's bank."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moetk
from moetk.errors import UnsupportedModelError
from tests.layers.stock import assert_equal, replaced, step, stock
from tests.tiny import FAMILIES, config, spread

families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def registered() -> None:
    moetk.register()
    moetk.register()  # twice is once


@families
def test_equals_stock(family: str) -> None:
    model = stock(family)
    want = step(model)
    model.set_experts_implementation("moetk")
    assert_equal(step(model), want)
    model.set_experts_implementation("eager")
    for name, tensor in step(model).items():
        assert torch.equal(tensor, want[name])


@families
def test_from_config(family: str) -> None:
    found = []
    for name in ("moetk", "eager"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(family), experts_implementation=name)
        assert model.config._experts_implementation == name
        spread(model)
        found.append(step(model.double()))
    assert_equal(*found)


@families
def test_from_pretrained_and_the_saved_bytes(family: str, tmp_path: Path) -> None:
    model = stock(family, torch.float32)
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", experts_implementation="moetk", attn_implementation="eager"
    )
    assert_equal(step(loaded.double()), step(model.double()))
    loaded.float().save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_router_of_ones_own_before_registered_experts() -> None:
    """backend="stock" runs the experts that the model is set to, these too."""
    model = stock("mixtral")
    want = step(replaced(model))
    model.set_experts_implementation("moetk")
    for backend in ("auto", "stock"):
        assert_equal(step(replaced(model, backend=backend)), want)


def test_a_family_without_a_row() -> None:
    settings: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "shared_expert_intermediate_size": 8,
    }
    from transformers import Qwen2MoeConfig

    model = AutoModelForCausalLM.from_config(
        Qwen2MoeConfig(**settings), experts_implementation="moetk"
    )
    message = 'experts_implementation="moetk": no row for Qwen2MoeExperts; moetk knows qwen3_moe, '
    with pytest.raises(UnsupportedModelError, match=message):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64))


def test_nothing_registers_on_import() -> None:
    code = (
        "import moetk.auto, moetk.layers.register\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as table\n"
        "assert 'moetk' not in table\n"
        "moetk.layers.register.register()\n"
        "assert 'moetk' in table"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
