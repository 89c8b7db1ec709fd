"""RMSNorm in one kernel each way, on stock weights.

moetk's own kernel, which adds the weight's gradient up in an order that does not depend on the GPU;
how it compares with Liger-Kernel's is in scripts/results/NOTES.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetk.kernels.norm import rms_norm
from moetk.layers.find import runs_on
from moetk.layers.step.part import ACTIVE, Part
from moetk.layers.swap import own_class


@dataclass(frozen=True)
class Row:
    """How a family's norm differs from Llama's; see moetk.kernels.norm. eps: the attribute that
    holds it."""

    rounds_first: bool = True
    offset: float = 0.0
    eps: str = "variance_epsilon"


NORMS = {
    "Qwen3MoeRMSNorm": Row(),
    "OlmoeRMSNorm": Row(),
    "MixtralRMSNorm": Row(),
    "GraniteMoeRMSNorm": Row(),
    "DeepseekV3RMSNorm": Row(),
    "GptOssRMSNorm": Row(rounds_first=False),
    "Qwen3NextRMSNorm": Row(rounds_first=False, offset=1.0, eps="eps"),
}


class NormShell:
    """In front of a family's RMSNorm."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        module: Any = self
        weight: Tensor = module.weight
        if ACTIVE not in vars(module) or why_stock(hidden_states.dtype, weight.dtype):
            return super().forward(hidden_states)  # type: ignore[misc, no-any-return]
        return rms_norm(hidden_states, weight, **rule_of(module))


def rule_of(norm: Any) -> dict[str, Any]:
    """How a norm of NORMS computes, as moetk.kernels.norm is told."""
    row = NORMS[own_class(norm).__name__]
    eps = getattr(norm, row.eps)
    return {"eps": eps, "offset": row.offset, "rounds_first": row.rounds_first}


def why_stock(dtype: torch.dtype, weight_dtype: torch.dtype) -> str | None:
    """Why moetk's code does not take hidden states of `dtype`, or None."""
    if dtype != weight_dtype:
        return f"the weight is {weight_dtype}, the hidden states {dtype}"
    if dtype == torch.float64:
        return "families differ in what they take in fp32 of a model in float64"
    return None


def _concerns(module: nn.Module) -> bool:
    cls = own_class(module)
    return cls.__name__.endswith("RMSNorm") and cls.__module__.startswith("transformers.models.")


def _refusal(module: nn.Module) -> str | None:
    name = own_class(module).__name__
    return None if name in NORMS else f"{name} has no row in moetk.layers.step.norm"


def _runs(module: nn.Module) -> str:
    device, dtype = runs_on(module), next(module.parameters()).dtype
    why = why_stock(dtype, dtype)
    if why is not None:
        return f"stock: {why}"
    return f"moetk: {'one Triton kernel' if device.type == 'cuda' else 'plain torch'}"


NORM = Part("norm", NormShell, _concerns, _refusal, _runs)
