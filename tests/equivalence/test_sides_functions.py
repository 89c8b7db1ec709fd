"""Functions of any framework, and stored traces, as sides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moetk.equivalence.sides.pick import side_of
from moetk.equivalence.stored import load_trace, save_trace
from moetk.equivalence.trace import Trace, cotangent, observe
from moetk.errors import EquivalenceError, UnsafeFormatError

H = 4


def batch() -> Tensor:
    return torch.randn(2, 3, H, generator=torch.Generator().manual_seed(0))


def seen(function: Any, **given: Tensor) -> Trace:
    return observe(side_of(function, batch()), batch().flatten(0, 1), given=given)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(H))

    def forward(self, x_TH: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = x_TH @ self.weight
        weights, ids = logits.softmax(-1).topk(2)
        used = given.get("weights", weights)
        combined = x_TH * used.sum(-1, keepdim=True)
        return {"logits": logits, "indices": ids, "weights": weights, "combined": combined}


def test_a_module_that_returns_stages() -> None:
    part = Layer()
    trace = seen(part)
    assert set(trace.values) == {"logits", "indices", "weights", "combined"}
    assert set(trace.grads) == {"logits", "weights", "weight", "x"}
    given = torch.full((6, 2), 0.5)
    forced = seen(part, weights=given)
    assert torch.equal(forced.values["combined"], batch().flatten(0, 1))
    x_TH = batch().flatten(0, 1)
    want = (cotangent(x_TH, 0) * x_TH).sum(-1, keepdim=True).expand(6, 2)
    assert torch.allclose(forced.grads["weights"], want)
    exact = side_of(part, batch()).in_double()
    assert observe(exact, x_TH.double()).values["combined"].dtype == torch.float64
    assert part.weight.dtype == torch.float32


def test_a_function_without_given_is_not_forced() -> None:
    def plain(x_TH: Tensor) -> dict[str, Tensor]:
        return {"combined": 2 * x_TH}

    assert torch.equal(seen(plain).grads["x"], 2 * cotangent(batch().flatten(0, 1), 0))
    with pytest.raises(EquivalenceError, match="plain cannot take given indices: it has no second"):
        seen(plain, indices=torch.zeros(6, 2, dtype=torch.int64))


def test_arrays_of_another_framework_with_their_own_gradients() -> None:
    def foreign(x_TH: Tensor) -> dict[str, Any]:
        x = x_TH.detach().numpy()
        read_only = x * 3
        read_only.flags.writeable = False
        ids = np.argsort(-x, 1)[:, :2].astype(np.int32)
        upstream = cotangent(x_TH, 0).numpy()
        return {"combined": read_only, "indices": ids, "dispatched": np.ones((6, 2), np.int32),
                "grad x": 3 * upstream}  # fmt: skip

    trace = seen(foreign)
    x_TH = batch().flatten(0, 1)
    assert trace.values["indices"].dtype == torch.int64
    assert trace.values["dispatched"].dtype == torch.bool
    assert torch.equal(trace.values["combined"], 3 * x_TH)
    assert torch.equal(trace.grads["x"], 3 * cotangent(x_TH, 0))


def test_what_only_speaks_dlpack() -> None:
    class Array:
        """As JAX's: no numpy array, no buffer, but a DLPack capsule."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def __dlpack__(self, **kwargs: Any) -> Any:
            return self.tensor.__dlpack__()

        def __dlpack_device__(self) -> Any:
            return self.tensor.__dlpack_device__()

    trace = seen(lambda x_TH: {"combined": Array(x_TH.detach().bfloat16())})
    assert trace.values["combined"].dtype == torch.bfloat16


def test_double_is_tried() -> None:
    weight = torch.eye(H)
    good = side_of(lambda x_TH: {"combined": x_TH * 2}, batch())
    assert observe(good.in_double(), batch().flatten(0, 1).double()).values["combined"].dtype == (
        torch.float64
    )
    for bad, why in (
        (lambda x_TH: {"combined": x_TH @ weight}, "does not run in float64"),
        (lambda x_TH: {"combined": x_TH.float()}, "returns combined in torch.float32"),
    ):
        with pytest.raises(EquivalenceError, match=why):
            side_of(bad, batch()).in_double()


def test_what_is_no_dict_of_stages() -> None:
    with pytest.raises(EquivalenceError, match="returned Tensor; a function that is compared"):
        seen(lambda x_TH: x_TH)
    with pytest.raises(EquivalenceError, match="returned 'gate_up'; stages are logits, scores"):
        seen(lambda x_TH: {"gate_up": x_TH})


def test_a_stored_trace_is_the_trace(tmp_path: Path) -> None:
    trace = seen(Layer())
    save_trace(trace, tmp_path / "a.safetensors", model="tiny", groups=4, bias=torch.ones(2))
    stored = load_trace(tmp_path / "a.safetensors")
    side = side_of(stored, batch())
    assert side.facts["model"] == "tiny" and side.facts["groups"] == 4
    assert torch.equal(side.facts["bias"], torch.ones(2))
    again = observe(side, batch().flatten(0, 1))
    for held, kept in ((again.values, trace.values), (again.grads, trace.grads)):
        assert held.keys() == kept.keys()
        assert all(torch.equal(held[name], kept[name]) for name in kept)
    assert side.eager() is side and not side.leaves()


def test_a_stored_trace_computes_nothing() -> None:
    side = side_of(seen(Layer()), batch())
    with pytest.raises(EquivalenceError, match="cannot take given weights: nothing is computed"):
        observe(side, batch().flatten(0, 1), given={"weights": torch.ones(6, 2)})
    with pytest.raises(EquivalenceError, match=r"an input \(6, 4\), compared on \(5, 4\)"):
        observe(side, batch().flatten(0, 1)[1:])
    with pytest.raises(EquivalenceError, match="no float64 copy"):
        side.in_double()


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UnsafeFormatError, match="is no stored trace: its header says None"):
        load_trace(tmp_path / "other.safetensors")
    (tmp_path / "junk").write_bytes(b"\x80\x04junk that is long enough")
    with pytest.raises(UnsafeFormatError, match="junk is no stored trace"):
        load_trace(tmp_path / "junk")
    with pytest.raises(EquivalenceError, match="facts cannot be stored: .*set"):
        save_trace(Trace({}), tmp_path / "b", ids={1, 2})
    assert not (tmp_path / "b").exists()


def test_everything_lies_where_x_does(tmp_path: Path) -> None:
    """`meta` stands for an accelerator: what lies there is no longer on the CPU."""
    x = batch().to("meta")
    save_trace(seen(Layer()), tmp_path / "trace.safetensors", bias=torch.ones(3), scale=2.5)
    stored = side_of(load_trace(tmp_path / "trace.safetensors"), x)
    held = (*stored.run(x.flatten(0, 1), {}).values(), stored.facts["bias"])
    assert len(held) > 5 and all(one.device.type == "meta" for one in held)
    assert stored.facts["scale"] == 2.5

    def on_the_cpu(x_TH: Tensor) -> dict[str, Any]:
        return {"logits": torch.ones(6, 3), "combined": np.ones((6, H), np.float32)}

    stages = side_of(on_the_cpu, x).run(x.flatten(0, 1), {})
    assert [stages[name].device.type for name in ("logits", "combined")] == ["meta", "meta"]
