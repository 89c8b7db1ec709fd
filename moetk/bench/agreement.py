"""Do the contenders compute the same function? Values and gradients against fp64, before any time.

Each is held to twice the error that transformers' own block has in the same dtype, or the
rounding of the longest sum, or two roundings of a narrower format that its products read,
whichever is most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetk.bench.meter import Meter
from moetk.experts import BankSpec, BankWeights, bank_forward
from moetk.routing import TokenChoice


@dataclass(frozen=True)
class Truth:
    """fp64 values at the same rounded weights and tokens. rows_T: tokens whose choice no rounding
    can turn; the others get a zero gradient and are left out of y and dx. gradients: of the
    block's parameters, by their names."""

    y_TH: Tensor
    dx_TH: Tensor
    gradients: Mapping[str, Tensor]
    rows_T: Tensor

    @property
    def border_share(self) -> float:
        return 1 - float(self.rows_T.double().mean()) if len(self.rows_T) else 0.0


def truth_that_fits(block: Any, x_TH: Tensor, dy_TH: Tensor, meter: Meter) -> Truth:
    """The truth of all tokens, or of the first half, quarter, ... where the device's memory is too
    small for fp64 weights, gradients and rows beside the contenders."""
    tokens = len(x_TH)
    while True:
        try:
            return truth_of(block, x_TH[:tokens], dy_TH[:tokens])
        except torch.OutOfMemoryError:
            if tokens < 2:
                raise
        tokens //= 2
        meter.release()


def truth_of(block: Any, x_TH: Tensor, dy_TH: Tensor) -> Truth:
    """The block (softmax, best K, rescaled, SwiGLU) in fp64, with the choice of its own router."""
    gate = block.gate
    with torch.no_grad():
        logits_TE, _, experts_TK = gate(x_TH)
    rows_T = clear_choices(logits_TE, gate.top_k)
    x64_TH = x_TH.detach().double().requires_grad_()
    twins = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in block.named_parameters()
    }
    scores_TE = (x64_TH @ twins["gate.weight"].T).softmax(-1)
    weights_TK = scores_TE.gather(1, experts_TK)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    down = twins["experts.down_proj"]
    spec = BankSpec(gate.num_experts, down.shape[1], down.shape[2])
    weights = BankWeights(twins["experts.gate_up_proj"], down)
    routing = TokenChoice(experts_TK, weights_TK, gate.num_experts)
    y_TH = bank_forward(spec, weights, x64_TH, routing, "reference")
    dy_TH = (dy_TH * rows_T[:, None]).double()
    dx_TH, *gradients = torch.autograd.grad(y_TH, [x64_TH, *twins.values()], dy_TH)
    return Truth(y_TH.detach(), dx_TH, dict(zip(twins, gradients, strict=True)), rows_T)


def clear_choices(logits_TE: Tensor, top_k: int) -> Tensor:
    """Tokens (T,) whose K-th and next logit lie more than two roundings apart. Where they do not,
    another order of summation or another rule for ties may rightly choose otherwise."""
    if top_k == logits_TE.shape[1]:
        return torch.ones(len(logits_TE), dtype=torch.bool, device=logits_TE.device)
    best = logits_TE.float().topk(top_k + 1, dim=-1).values
    inside_T, outside_T = best[:, -2], best[:, -1]
    rounding = 2 * torch.finfo(logits_TE.dtype).eps
    return (inside_T - outside_T) > rounding * torch.maximum(inside_T.abs(), outside_T.abs())


def errors_of(
    layer: nn.Module, x: Tensor, dy: Tensor, step: Callable[[], Tensor], truth: Truth
) -> dict[str, float]:
    """Relative Frobenius errors of y, of dx and of each gradient that the layer has under the
    block's own name; peers keep some of theirs in other layouts. The gradients are zero afterwards.

    step: one forward and backward of the layer on x and dy (1, T, H), which holds zeros meanwhile
    where the truth has no gradient. It runs twice: it makes the gradients where there are none,
    they are set to zero, and it adds to them, so that both ways are looked at.
    """
    leaves, clear, given = [x, *layer.parameters()], truth.rows_T, dy.clone()
    checked = len(clear)
    dy[0, checked:] = 0
    dy[0, :checked] *= clear[:, None]
    try:
        step()
        _zero(leaves)
        y = step()
    finally:
        dy.copy_(given)
    assert x.grad is not None
    errors = {
        "y": _error(y[0, :checked][clear], truth.y_TH[clear]),
        "dx": _error(x.grad[0, :checked][clear], truth.dx_TH[clear]),
    }
    for name, parameter in layer.named_parameters():
        if name in truth.gradients and parameter.grad is not None:
            errors[f"d{name}"] = _error(parameter.grad, truth.gradients[name])
    _zero(leaves)
    return errors


def verdict(
    errors: Mapping[str, float],
    baseline: Mapping[str, float],
    dtype: torch.dtype,
    length: int,
    operands: torch.dtype | None = None,
) -> str | None:
    """None where every error is within bounds, else the worst of those that are not, in words.

    length: of the longest sum, whose rounding is allowed to everyone. operands: what the products
    read, where that is narrower than dtype. A sum of products of rounded numbers is relatively as
    far off as each of them is, however long it is, and what comes out depends on a handful of
    roundings: two of that format's are allowed (e4m3: 0.125; Transformer Engine 2.12 on one H200
    has 0.066 to 0.094, with e5m2 for gradients too).
    """
    accumulated = torch.promote_types(dtype, torch.float32)
    floor = torch.finfo(accumulated).eps * length**0.5
    if operands is not None:
        floor = max(floor, torch.finfo(operands).eps)  # the distance of two numbers: two roundings
    bounds = {name: max(2 * baseline[name], floor) for name in errors}
    # A NaN is within no bound.
    broken = {name: error for name, error in errors.items() if not error <= bounds[name]}
    if not broken:
        return None
    name = max(broken, key=lambda key: broken[key])
    return (
        f"WRONG: {name} has error {broken[name]:.2g}, the baseline {baseline[name]:.2g}; "
        f"allowed {bounds[name]:.2g}"
    )


def _zero(leaves: Sequence[Tensor]) -> None:
    """In place: a CUDA graph goes on writing where the gradients lay when it was recorded."""
    for leaf in leaves:
        if leaf.grad is not None:
            leaf.grad.zero_()


def _error(mine: Tensor, true: Tensor) -> float:
    scale = float(true.norm())
    return float((mine.double() - true).norm()) / scale if scale > 0 else float(mine.norm())
