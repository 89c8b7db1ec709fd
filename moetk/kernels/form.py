"""What stands between an expert's two matrices, as plain values and as the torch code that states
what the kernels of `moetk.kernels.gpu.activation` compute.

Letters: N rows, I expert width, J = 2I for gated activations, else I.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
}


@dataclass(frozen=True)
class Form:
    """What stands between the matrices, and how they lie, as plain values that an operator takes.

    act: "silu", "gelu", "gelu_tanh", "relu", or "gpt_oss" (arXiv 2508.10925, with alpha).
    limit: the clamp of gate and up, 0 = none. gated, interleaved, transposed: as in BankSpec.
    """

    act: str = "silu"
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    alpha: float = 0.0
    limit: float = 0.0

    def activate(self, h_NJ: Tensor) -> Tensor:
        """(N, J) -> (N, I) in the dtype of h."""
        if not self.gated:
            return _act(h_NJ, self.act)
        gate, up = self._clamped(*self._halves(h_NJ))
        if self.act == "gpt_oss":
            return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))
        return _act(gate, self.act) * up

    def backward(self, h_NJ: Tensor, da_NI: Tensor) -> Tensor:
        """The gradient of h from the activation's: (N, J) in the dtype of h."""
        if not self.gated:
            return da_NI * _slope(h_NJ, self.act)
        raw_gate, raw_up = self._halves(h_NJ)
        gate, up = self._clamped(raw_gate, raw_up)
        if self.act == "gpt_oss":
            open_ = torch.sigmoid(gate * self.alpha)
            by_up = gate * open_
            by_gate = (up + 1) * (open_ + self.alpha * by_up * (1 - open_))
        else:
            by_gate, by_up = _slope(gate, self.act) * up, _act(gate, self.act)
        if self.limit:  # at a bound the gradient passes, as in torch.clamp
            by_gate = by_gate.masked_fill(raw_gate > self.limit, 0)
            by_up = by_up.masked_fill(raw_up.abs() > self.limit, 0)
        halves = da_NI * by_gate, da_NI * by_up
        return torch.stack(halves, -1).flatten(1) if self.interleaved else torch.cat(halves, -1)

    def _halves(self, h_NJ: Tensor) -> tuple[Tensor, Tensor]:
        if self.interleaved:
            return h_NJ[:, ::2], h_NJ[:, 1::2]
        gate, up = h_NJ.chunk(2, -1)
        return gate, up

    def _clamped(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        if not self.limit:
            return gate, up
        return gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)

    def up_width(self, up: Tensor) -> int:
        """J, of a bank's up matrices."""
        return up.shape[2 if self.transposed else 1]

    def columns(self, weights: Tensor) -> Tensor:
        """The view (E, in, out) of a stack of matrices."""
        return weights if self.transposed else weights.transpose(1, 2)


def _act(z: Tensor, act: str) -> Tensor:
    if act == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    return ACTIVATIONS[act](z)


def _slope(z: Tensor, act: str) -> Tensor:
    if act == "relu":
        return (z > 0).to(z.dtype)
    if act == "silu":
        s = torch.sigmoid(z)
        return s + z * s * (1 - s)
    if act == "gelu":
        bell = torch.exp(-0.5 * z * z) * math.sqrt(0.5 / math.pi)
        return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * bell
    c = 2 * math.sqrt(2 / math.pi)
    s = torch.sigmoid(c * (z + 0.044715 * z**3))
    return s + z * s * (1 - s) * c * (1 + 3 * 0.044715 * z * z)
