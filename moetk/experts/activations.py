"""What stands between an expert's two matrices.

A gated activation takes (gate, up), each (..., I); a plain one takes (..., I). Instances are
compared by value, so that two layers with equal activations share compiled code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Elementwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Gated:
    """act(gate) * up; with silu, SwiGLU (arXiv 2002.05202)."""

    act: Elementwise = F.silu

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act(gate) * up


@dataclass(frozen=True)
class ClampedGated:
    """act(min(gate, limit)) * clamp(up, -limit, limit): DeepSeek-V4's experts."""

    limit: float
    act: Elementwise = F.silu

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class GptOssGated:
    """(up + 1) * gate * sigmoid(alpha * gate), both clamped: gpt-oss (arXiv 2508.10925)."""

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        gate = gate.clamp(max=self.limit)
        up = up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


@dataclass(frozen=True)
class Plain:
    """act(h), without a gate: the experts of Switch and GShard."""

    act: Elementwise = F.relu

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.act(hidden)


Activation = Gated | ClampedGated | GptOssGated | Plain
