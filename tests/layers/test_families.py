"""Every family equals stock: logits and each gradient, by name, in three dtypes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moetk
from moetk.equivalence.stock import against_stock, parity
from moetk.io.digest import sha256_file
from tests.layers.stock import assert_equal, replaced, step, stock
from tests.tiny import FAMILIES, E, ids

families = pytest.mark.parametrize("family", FAMILIES)


@families
@pytest.mark.parametrize("backend", ["auto", "stock", "reference", "grouped"])
def test_float64_equals_stock(family: str, backend: str) -> None:
    model = stock(family)
    assert_equal(step(replaced(model, backend=backend)), step(model))


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routers_leave_no_trace(family: str, dtype: torch.dtype) -> None:
    """With stock's own experts behind the composed router, the logits are bitwise stock's."""
    model = stock(family, dtype)
    ours = replaced(model, backend="stock")
    assert torch.equal(ours(input_ids=ids()).logits, model(input_ids=ids()).logits)


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pass_rule(family: str, dtype: torch.dtype) -> None:
    model = stock(family, torch.float32)
    found = against_stock(model, replaced(model), [ids(seed=seed) for seed in (1, 2)], dtype)
    assert found.choices.ok, found.choices
    assert found.ok, found.worst


@families
def test_parity_sees_a_fault(family: str) -> None:
    model = stock(family)
    ours = replaced(model)
    with torch.no_grad():
        next(p for n, p in ours.named_parameters() if "down_proj" in n and p.ndim == 3).mul_(1.001)
    assert not parity(model, ours, [ids()]).ok


def _limited_choice(family: str, **changes: Any) -> dict[str, Any]:
    return {**({"n_group": 1, "topk_group": 1} if family == "deepseek_v3" else {}), **changes}


@families
def test_every_token_to_every_expert(family: str) -> None:
    model = stock(family, **_limited_choice(family, num_experts_per_tok=E))
    if family == "deepseek_v4":
        _all_experts_in_the_table(model)
    ours, theirs = step(replaced(model)), step(model)
    assert_equal(ours, theirs)


def _all_experts_in_the_table(model: Any) -> None:
    table = next(b for n, b in model.named_buffers() if n.endswith("tid2eid"))
    table.copy_(torch.arange(E).expand_as(table))


@families
def test_empty_experts(family: str) -> None:
    """Two tokens reach four experts at most; the others' gradients are zeros, as stock's are."""
    model = stock(family, **_limited_choice(family, num_experts_per_tok=2))
    ours, token_ids = replaced(model), ids(1, 2)
    with moetk.record(ours) as recording:
        got = step(ours, token_ids)
    assert_equal(got, step(model, token_ids))
    assert len(recording) >= 2
    for layer in recording:
        assert recording[layer][0].experts_TK.unique().numel() <= 4


@families
def test_one_token(family: str) -> None:
    model = stock(family)
    assert_equal(_squared(replaced(model), ids(1, 1)), _squared(model, ids(1, 1)))


def _squared(model: Any, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    logits = model(input_ids=token_ids).logits
    logits.square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


@families
def test_saved_bytes(family: str, tmp_path: Path) -> None:
    """Before, while and after replacement, and after a reload: the same files, bit for bit."""
    model = stock(family, torch.float32)
    model.save_pretrained(tmp_path / "stock")
    want = _digests(tmp_path / "stock")
    assert any(name.endswith(".safetensors") for name in want) and "config.json" in want

    replacement = moetk.replace_moe(model)
    model.save_pretrained(tmp_path / "replaced")
    replacement.restore()
    model.save_pretrained(tmp_path / "restored")
    loaded = moetk.AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    loaded.save_pretrained(tmp_path / "reloaded")
    for name in ("replaced", "restored", "reloaded"):
        assert _digests(tmp_path / name) == want, name
    assert not any(".moetk." in key for key in load_file(tmp_path / "replaced/model.safetensors"))
