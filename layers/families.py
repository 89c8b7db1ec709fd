"""One row a transformers family: where its parts are, and which published router it runs.

A row is data. Its router is a catalogue class whose forward runs on the family's own gate module
(same parameter names), with the settings read off that gate and `tie="stock"`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from moetk.experts import Activation, BankSpec, BankWeights, ClampedGated, Gated, GptOssGated
from moetk.held import held
from moetk.layers.swap import own_class
from moetk.routers import (
    DeepSeekV3Router,
    DeepSeekV4HashRouter,
    DeepSeekV4Router,
    GptOssRouter,
    LinearRouter,
    MixtralRouter,
)

Order = Literal["logits_weights_index", "index_weights_logits"]


@dataclass(frozen=True)
class Gate:
    """How a family's gate class maps to a catalogue router.

    router: the class whose forward the gate runs. settings: its knobs, read off the gate module.
    weight_dtype: what the weights are rounded to for the bank: "model" = the dtype of x, None =
    they stay as the router computed them.
    hf_aux: transformers' pooled loss describes this router (softmax scores, top-k of them).
    """

    router: type[LinearRouter]
    settings: Callable[[nn.Module], dict[str, Any]]
    weight_dtype: Literal["model"] | None
    hf_aux: bool = True


# Rows travel with a pickled model, so what they hold is named in this module: no lambda.
def _gated(experts: Any) -> Activation:
    return Gated(_act(experts))


def _clamped_gated(experts: Any) -> Activation:
    return ClampedGated(experts.limit, _act(experts))


def _gpt_oss_gated(experts: Any) -> Activation:
    return GptOssGated(experts.alpha, experts.limit)


@dataclass(frozen=True)
class Family:
    """A block class of transformers. `gates` maps gate class names to their routers."""

    model_type: str
    block: str
    gates: Mapping[str, Gate]
    router: str = "gate"
    experts: str = "experts"
    activation: Callable[[nn.Module], Activation] = _gated

    def gate_row(self, gate: nn.Module) -> Gate:
        return self.gates[own_class(gate).__name__]

    def order(self, gate: nn.Module) -> Order:
        """granitemoe on 5.17 returns its tuple the other way round."""
        if self.model_type == "granitemoe" and not _returns_logits_first(own_class(gate)):
            return "index_weights_logits"
        return "logits_weights_index"

    def spec(self, experts: nn.Module) -> BankSpec:
        """The bank's function, read off the experts module."""
        transposed = bool(getattr(experts, "is_transposed", False))
        num_experts, rows, columns = bank_weights(experts).up.shape
        hidden, width = (rows, columns) if transposed else (columns, rows)
        return BankSpec(
            num_experts,
            hidden,
            width // 2,
            activation=self.activation(experts),
            transposed=transposed,
            interleaved=not getattr(experts, "is_concatenated", True),
        )


def bank_weights(experts: nn.Module, add_to_grad: bool = False) -> BankWeights:
    """This call's tensors. Collected inside forward: only there PEFT's and FSDP2's exist."""
    return BankWeights(
        experts.gate_up_proj,  # type: ignore[arg-type]
        experts.down_proj,  # type: ignore[arg-type]
        held(experts, "gate_up_proj_bias"),
        held(experts, "down_proj_bias"),
        add_to_grad,
    )


# Versions of transformers differ in which module says it.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "SiLU": torch.nn.functional.silu,
    "SiLUActivation": torch.nn.functional.silu,
    "GELUActivation": torch.nn.functional.gelu,
    "ReLU": torch.nn.functional.relu,
}


def _act(experts: nn.Module) -> Callable[..., Any]:
    """torch's function where the module is that, so that equal layers have equal specs and kernels
    know it; else the module."""
    act: Callable[..., Any] = experts.act_fn  # type: ignore[assignment]
    return _FUNCTIONS.get(type(act).__name__, act)


def _returns_logits_first(gate_class: Any) -> bool:
    import inspect

    last = inspect.getsource(gate_class.forward).rsplit("return", 1)[-1]
    return last.split(",")[0].strip() == "router_logits"


def _norm_topk_prob(gate: Any) -> dict[str, Any]:
    return {"renormalise": bool(gate.norm_topk_prob)}


def _mixtral(gate: Any) -> dict[str, Any]:
    return {"renormalise": True}


def _gpt_oss(gate: Any) -> dict[str, Any]:
    return {"score_dtype": None}


def _granitemoe(gate: Any) -> dict[str, Any]:
    return {"score_dtype": torch.float32}


def _deepseek_v3(gate: Any) -> dict[str, Any]:
    return {
        "groups": gate.num_group,
        "top_groups": gate.topk_group,
        "scale": gate.routed_scaling_factor,
        "renormalise": gate.norm_topk_prob,
        "gemm_dtype": torch.float32,
    }


def _deepseek_v4(gate: Any) -> dict[str, Any]:
    return {"scale": gate.routed_scaling_factor, "score_dtype": None}


_SOFTMAX_TOP_K = Gate(MixtralRouter, _norm_topk_prob, "model")
_V4 = {
    "DeepseekV4TopKRouter": Gate(DeepSeekV4Router, _deepseek_v4, None),
    "DeepseekV4HashRouter": Gate(DeepSeekV4HashRouter, _deepseek_v4, None),
}

FAMILIES: tuple[Family, ...] = (
    Family("qwen3_moe", "Qwen3MoeSparseMoeBlock", {"Qwen3MoeTopKRouter": _SOFTMAX_TOP_K}),
    Family("qwen3_next", "Qwen3NextSparseMoeBlock", {"Qwen3NextTopKRouter": _SOFTMAX_TOP_K}),
    Family("olmoe", "OlmoeSparseMoeBlock", {"OlmoeTopKRouter": _SOFTMAX_TOP_K}),
    Family(
        "mixtral",
        "MixtralSparseMoeBlock",
        {"MixtralTopKRouter": Gate(MixtralRouter, _mixtral, None)},
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3MoE",
        {"DeepseekV3TopkRouter": Gate(DeepSeekV3Router, _deepseek_v3, None, hf_aux=False)},
    ),
    Family(
        "deepseek_v4",
        "DeepseekV4SparseMoeBlock",
        _V4,
        activation=_clamped_gated,
    ),
    Family(
        "gpt_oss",
        "GptOssMLP",
        {"GptOssTopKRouter": Gate(GptOssRouter, _gpt_oss, "model")},
        router="router",
        activation=_gpt_oss_gated,
    ),
    Family(
        "granitemoe",
        "GraniteMoeMoE",
        {"GraniteMoeTopKRouter": Gate(GptOssRouter, _granitemoe, "model")},
        router="router",
    ),
)

_BY_BLOCK = {family.block: family for family in FAMILIES}


def family_of(module: nn.Module) -> Family | None:
    """The row of a block, or None where the module is not a block that moetk knows."""
    cls = own_class(module)
    if not cls.__module__.startswith("transformers.models."):
        return None
    return _BY_BLOCK.get(cls.__name__)
