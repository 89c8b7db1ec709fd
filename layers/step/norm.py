"""RMSNorm in one kernel each way: Liger-Kernel's autograd function, called on stock weights."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetk.layers.step.part import ACTIVE, Part
from moetk.layers.swap import own_class


@dataclass(frozen=True)
class Row:
    """Where a family's norm rounds. "llama": x is rounded to its dtype before the weight is
    multiplied; "gemma": after. offset: added to the weight. eps: the attribute that holds it."""

    casting: str
    offset: float = 0.0
    eps: str = "variance_epsilon"


NORMS = {
    "Qwen3MoeRMSNorm": Row("llama"),
    "OlmoeRMSNorm": Row("llama"),
    "MixtralRMSNorm": Row("llama"),
    "GraniteMoeRMSNorm": Row("llama"),
    "DeepseekV3RMSNorm": Row("llama"),
    "GptOssRMSNorm": Row("gemma"),
    "Qwen3NextRMSNorm": Row("gemma", offset=1.0, eps="eps"),
}


LIGER = importlib.util.find_spec("liger_kernel") is not None


class NormShell:
    """In front of a family's RMSNorm. Where Liger's kernel cannot run, the stock forward does."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        module: Any = self
        stock = ACTIVE not in vars(module)
        if stock or _why_stock(hidden_states.device, hidden_states.dtype, module.weight.dtype):
            return super().forward(hidden_states)  # type: ignore[misc, no-any-return]
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        row = NORMS[own_class(module).__name__]
        normed: Tensor = LigerRMSNormFunction.apply(
            hidden_states, module.weight, getattr(module, row.eps), row.offset, row.casting, False
        )
        return normed


def _why_stock(device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"the kernel needs a GPU, the weights are on {device.type}"
    if not LIGER:
        return "liger-kernel is not installed"
    if dtype != weight_dtype:
        return f"the weights are {weight_dtype}, the hidden states {dtype}"
    if dtype == torch.float64:
        return "the kernel computes in fp32, the model is fp64"
    return None


def _concerns(module: nn.Module) -> bool:
    cls = own_class(module)
    return cls.__name__.endswith("RMSNorm") and cls.__module__.startswith("transformers.models.")


def _refusal(module: nn.Module) -> str | None:
    name = own_class(module).__name__
    return None if name in NORMS else f"{name} has no row in moetk.layers.step.norm"


def _runs(module: nn.Module) -> str:
    weight: Any = module.weight
    why = _why_stock(weight.device, weight.dtype, weight.dtype)
    return "liger RMSNorm" if why is None else f"stock: {why}"


NORM = Part("norm", NormShell, _concerns, _refusal, _runs)
