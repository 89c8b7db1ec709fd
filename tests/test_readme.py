"""Every Python block of the README runs, in order, as a reader would type them."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import config, ids, tiny

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A reader's session: the model the README names lies, tiny, in the current folder."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny("qwen3_moe").save_pretrained("Qwen/Qwen3-30B-A3B")
        namespace: dict[str, Any] = {"ids": ids(), "folder": str(folder / "saved")}
        for number, block in enumerate(BLOCKS):
            if "factory" in block:
                router = namespace["CosineRouter"]
                namespace["factory"] = lambda spec, router=router: router(
                    spec.hidden_size, spec.num_experts, spec.top_k
                )
                namespace["moetk"].replace_moe(namespace["model"], namespace["factory"])
                namespace["before"] = namespace["model"](input_ids=ids()).logits
            exec(compile(block, f"README.md, block {number + 1}", "exec"), namespace)
    return namespace


def test_the_first_screen_is_code_that_trains(reader: dict[str, Any]) -> None:
    model = reader["moetk"].AutoModelForCausalLM.from_config(
        config("qwen3_moe"), router=reader["factory"]
    )
    model(input_ids=ids(), labels=ids()).loss.backward()
    grad = model.get_submodule("model.layers.0.mlp.gate.moetk").weight.grad
    assert grad.abs().sum() > 0


def test_a_layer_from_parts_returns_output_and_routing(reader: dict[str, Any]) -> None:
    assert reader["y"].shape == (4, 16, 64)
    assert reader["routing"].experts_TK.shape == (64, 1)


def test_replay_gives_the_recorded_logits_again(reader: dict[str, Any]) -> None:
    assert torch.equal(reader["out"].logits, reader["again"].logits)


def test_the_reloaded_model_has_the_trained_router(reader: dict[str, Any]) -> None:
    assert torch.equal(reader["model"](input_ids=ids()).logits, reader["before"])


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w./]+/[\w./]+)`", README))))
def test_every_path_the_readme_names_exists(path: str) -> None:
    parts = path.removeprefix("./").split()
    assert (ROOT / parts[0]).exists(), path


@pytest.mark.parametrize("script", ["readme_table.py", "readme_h200.py"])
def test_the_tables_are_what_the_rows_say(script: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / script), "--check"]
    assert subprocess.run(command, check=False).returncode == 0


def test_the_comparison_is_what_the_report_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["readme_compare.py", "--check"])
    monkeypatch.syspath_prepend(ROOT / "scripts")
    main = runpy.run_path(str(ROOT / "scripts" / "readme_compare.py"))["main"]
    assert main() == 0
