"""Attention with queries and keys normed and rotated in one kernel; the rest is as in stock."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moetk.kernels.rope import Norm, rotated
from moetk.layers.find import runs_on
from moetk.layers.step.norm import NORMS
from moetk.layers.step.part import ACTIVE, Part, is_watched
from moetk.layers.swap import own_class


def _own_window(attention: Any) -> dict[str, Any]:
    return {"sliding_window": attention.sliding_window}


def _model_window(attention: Any) -> dict[str, Any]:
    return {"sliding_window": getattr(attention.config, "sliding_window", None)}


def _no_window(attention: Any) -> dict[str, Any]:
    return {}


WINDOWS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Qwen3MoeAttention": _own_window,
    "OlmoeAttention": _model_window,
    "MixtralAttention": _model_window,
    "GraniteMoeAttention": _no_window,
}
"""Attention classes whose forward is the one below, and what each tells the attention function of
a sliding window."""


class AttentionShell:
    """In front of a family's attention. Projections are called as modules (adapters, quantised
    weights), the attention function is the one the model is set to."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        module: Any = self
        stock = ACTIVE not in vars(module) or position_embeddings is None
        if stock or _why_stock(module, hidden_states.device, hidden_states.dtype):
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        heads = (*hidden_states.shape[:-1], -1, module.head_dim)
        query = module.q_proj(hidden_states).view(heads)
        key = module.k_proj(hidden_states).view(heads)
        value = module.v_proj(hidden_states).view(heads).transpose(1, 2)
        cos, sin = position_embeddings  # type: ignore[misc]
        query, key = rotated(query, key, cos, sin, *_norms(module))
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, module.layer_idx)
        output, weights = _attention_function(module)(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=module.attention_dropout if module.training else 0.0,
            scaling=module.scaling,
            **WINDOWS[own_class(module).__name__](module),
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return module.o_proj(output), weights


def _norms(attention: Any) -> tuple[Norm | None, Norm | None]:
    if not hasattr(attention, "q_norm"):
        return None, None
    q_norm, k_norm = attention.q_norm, attention.k_norm
    return (
        Norm(q_norm.weight, q_norm.variance_epsilon),
        Norm(k_norm.weight, k_norm.variance_epsilon),
    )


def _attention_function(attention: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """As stock looks it up, its own module's eager function included."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = vars(sys.modules[own_class(attention).__module__])["eager_attention_forward"]
    name = attention.config._attn_implementation
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[no-any-return]


def _why_stock(attention: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """What may change between calls; `_refusal` looks at what cannot."""
    if dtype == torch.float64:
        return "the kernel computes in fp32, and the model is in float64"
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name, None)
        if norm is not None and (own_class(norm).__name__ not in NORMS or is_watched(norm)):
            return f"{name} is wrapped or hooked, and must be called"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    return None


def _concerns(module: nn.Module) -> bool:
    cls = own_class(module)
    return cls.__name__.endswith("Attention") and cls.__module__.startswith("transformers.models.")


def _refusal(module: nn.Module) -> str | None:
    cls, settings = own_class(module), getattr(module, "config", None)
    if cls.__name__ not in WINDOWS:
        return f"{cls.__name__} has no row in moetk.layers.step.attention"
    if getattr(settings, "clip_qkv", None) is not None:
        return f"clip_qkv={settings.clip_qkv} clips between norm and rotation"  # type: ignore[union-attr]
    return None


def _runs(module: nn.Module) -> str:
    device = runs_on(module)
    why = _why_stock(module, device, next(module.parameters()).dtype)
    if why is not None:
        return f"stock: {why}"
    how = "one Triton kernel" if device.type == "cuda" else "plain torch"
    return f"moetk, {'norm and ' if hasattr(module, 'q_norm') else ''}rotation: {how}"


ROPE = Part("rope", AttentionShell, _concerns, _refusal, _runs)
