"""One mixture-of-experts block at the same rounded input and weights: the pass rule by itself."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetk import replace_moe
from moetk.equivalence.judge import judge, relative_error
from moetk.layers.families import family_of
from moetk.layers.swap import own_class
from tests.layers.stock import PARITY, stock
from tests.tiny import FAMILIES, VOCAB, H

families = pytest.mark.parametrize("family", FAMILIES)
T = 64


def blocks(model: Any) -> list[nn.Module]:
    return [module for module in model.modules() if family_of(module) is not None]


def run(block: Any, x_1TH: Tensor, kept_T: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Output and gradients over the kept rows, and the ids that the router chose."""
    chosen: list[Tensor] = []

    def note(gate: Any, args: Any, output: tuple[Any, ...]) -> None:
        ids = [getattr(value, "experts_TK", value) for value in output]
        chosen.append(next(t for t in ids if isinstance(t, Tensor) and t.dtype == torch.int64))

    family = family_of(block)
    assert family is not None
    handle = getattr(block, family.router).register_forward_hook(note)
    inputs: dict[str, Any] = {}
    if "input_ids" in inspect.signature(own_class(block).forward).parameters:
        inputs["input_ids"] = torch.arange(T)[None] % VOCAB
    block.zero_grad()
    x_1TH = x_1TH.clone().requires_grad_()
    out = block(x_1TH, **inputs)
    y_1TH = out[0] if isinstance(out, tuple) else out
    handle.remove()
    generator = torch.Generator().manual_seed(5)
    cotangent = torch.randn(y_1TH.shape, generator=generator).to(y_1TH.dtype)
    y_1TH.backward(cotangent * kept_T[:, None])
    assert x_1TH.grad is not None
    found = {"y": y_1TH.detach()[:, kept_T], "x": x_1TH.grad[:, kept_T]}
    found |= {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
    return found, chosen[0].sort(-1).values


def raised(model: Any) -> Any:
    """The truth: the reference in fp64 with every declared dtype raised."""
    model = copy.deepcopy(model).double()
    replace_moe(model, backend="reference")
    for module in model.modules():
        for name in ("gemm_dtype", "score_dtype"):
            if name in vars(module):
                setattr(module, name, torch.float64)
    return model


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pass_rule(family: str, dtype: torch.dtype) -> None:
    model = stock(family, dtype)
    ours = copy.deepcopy(model)
    replace_moe(ours)
    torch.manual_seed(0)
    x_1TH = torch.randn(1, T, H).to(dtype)
    everything = torch.ones(T, dtype=torch.bool)
    for mine, theirs, true in zip(blocks(ours), blocks(model), blocks(raised(model)), strict=True):
        _, ids_TK = run(theirs, x_1TH, everything)
        _, true_TK = run(true, x_1TH.double(), everything)
        kept_T = (ids_TK == true_TK).all(-1)  # elsewhere rounding decided, and the truth differs
        assert kept_T.float().mean() > 0.8
        eager, _ = run(theirs, x_1TH, kept_T)
        found, our_TK = run(mine, x_1TH, kept_T)
        truth, _ = run(true, x_1TH.double(), kept_T)
        assert torch.equal(our_TK, ids_TK)
        assert found.keys() == eager.keys() == truth.keys()
        for name, tensor in truth.items():
            verdict = judge(name, found[name], eager[name], tensor, reduction=T)
            assert found[name].dtype == eager[name].dtype
            assert verdict.ok, verdict


@families
def test_a_block_called_alone(family: str) -> None:
    """Outside its model no forward is open; a hash layer takes the ids that it is given."""
    model = stock(family)
    ours = copy.deepcopy(model)
    replace_moe(ours)
    torch.manual_seed(0)
    x_1TH = torch.randn(1, T, H, dtype=torch.float64)
    for mine, theirs in zip(blocks(ours), blocks(model), strict=True):
        (found, ids_TK), (want, want_TK) = (
            run(block, x_1TH, torch.ones(T, dtype=torch.bool)) for block in (mine, theirs)
        )
        assert torch.equal(ids_TK, want_TK) and found.keys() == want.keys()
        assert all(relative_error(found[name], want[name]) <= PARITY for name in want)
