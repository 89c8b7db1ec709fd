"""RMSNorm in one kernel each way, on stock weights: Liger-Kernel's where it is installed."""

from __future__ import annotations

import importlib.util
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

LIGER = importlib.util.find_spec("liger_kernel") is not None


class NormShell:
    """In front of a family's RMSNorm."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        module: Any = self
        weight: Tensor = module.weight
        if ACTIVE not in vars(module) or _why_stock(hidden_states.dtype, weight.dtype):
            return super().forward(hidden_states)  # type: ignore[misc, no-any-return]
        row = NORMS[own_class(module).__name__]
        eps = getattr(module, row.eps)
        if not _liger_runs(weight.device):
            return rms_norm(
                hidden_states, weight, eps, offset=row.offset, rounds_first=row.rounds_first
            )
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        casting = "llama" if row.rounds_first else "gemma"
        normed: Tensor = LigerRMSNormFunction.apply(
            hidden_states, weight, eps, row.offset, casting, False
        )
        return normed


def _liger_runs(device: torch.device) -> bool:
    return LIGER and device.type == "cuda"


def _why_stock(dtype: torch.dtype, weight_dtype: torch.dtype) -> str | None:
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
    why = _why_stock(dtype, dtype)
    if why is not None:
        return f"stock: {why}"
    if _liger_runs(device):
        return "liger's RMSNorm"
    return f"moetk: {'one Triton kernel' if device.type == 'cuda' else 'plain torch'}"


NORM = Part("norm", NormShell, _concerns, _refusal, _runs)
