"""The shapes that are measured, and the work in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moetk.errors import ConfigError


@dataclass(frozen=True)
class LayerShape:
    """One mixture-of-experts layer with SwiGLU experts: E experts of H x I, K for each token."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    def flops(self, tokens: int) -> int:
        """Floating-point operations of the experts' matrix products in one forward; backward
        takes twice as many. The router and everything elementwise are left out."""
        return 6 * tokens * self.top_k * self.hidden_size * self.intermediate_size

    def traffic(self, tokens: int, itemsize: int) -> int:
        """Bytes that a forward and backward must move at least: tokens, the up-projection's
        output and the weights once in each direction, and each weight's gradient written once."""
        rows = tokens * self.top_k
        hidden, inner = tokens * self.hidden_size, rows * 2 * self.intermediate_size
        weights = 3 * self.num_experts * self.hidden_size * self.intermediate_size
        return itemsize * ((2 * hidden + inner + weights) + (3 * hidden + inner + 2 * weights))

    def words(self) -> str:
        letters = zip(
            "HIEK",
            (self.hidden_size, self.intermediate_size, self.num_experts, self.top_k),
            strict=True,
        )
        return " ".join([f"layer={self.name}", *(f"{letter}={value}" for letter, value in letters)])


LAYERS = {
    shape.name: shape
    for shape in (
        LayerShape("qwen3-30b-a3b", 2048, 768, 128, 8),
        LayerShape("olmoe-1b-7b", 2048, 1024, 64, 8),
        LayerShape("mixtral-8x7b", 4096, 14336, 8, 2),
        LayerShape("dsv3-ep8", 7168, 2048, 32, 8),  # DeepSeek-V3, one rank of eight
    )
}


def config_changes(text: str) -> dict[str, Any]:
    """{"num_experts": 4} of "num_experts=4": numbers, true, false or text. Raises ConfigError."""
    found: dict[str, Any] = {}
    for word in filter(None, text.split(",")):
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is no setting of the model: write name=value.")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def layer_shape(text: str) -> LayerShape:
    """A name of LAYERS, or letters such as "H=32 I=16 E=4 K=2". Raises ConfigError."""
    if text in LAYERS:
        return LAYERS[text]
    found = parse_words(text)
    if set(found) != set("HIEK") or not all(value.isdecimal() for value in found.values()):
        raise ConfigError(
            f"{text!r} is no layer's shape: one of {', '.join(LAYERS)}, or letters such as "
            '"H=32 I=16 E=4 K=2".'
        )
    return LayerShape("own", *(int(found[letter]) for letter in "HIEK"))


def dtype_named(name: str) -> torch.dtype:
    """Raises ConfigError for what is no floating-point dtype of torch."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype {name!r} is none of bfloat16, float16, float32, float64.")
    return found


def parse_words(text: str) -> dict[str, str]:
    """{"H": "32", "T": "64"} of "H=32 T=64"; words without "=" are left out."""
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


@dataclass(frozen=True)
class ModelShape:
    """A causal language model with Qwen3-30B-A3B's layers and fewer of them, and a batch of it.

    changes: settings of transformers' Qwen3MoeConfig that differ.
    """

    layers: int = 8
    batch: int = 4
    length: int = 4096
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def config(self) -> Any:
        from transformers import Qwen3MoeConfig

        settings: dict[str, Any] = {
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "intermediate_size": 6144,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "output_router_logits": False,
            "use_cache": False,
        }
        return Qwen3MoeConfig(**{**settings, **self.changes, "num_hidden_layers": self.layers})

    def words(self) -> str:
        sizes = {"layers": self.layers, "batch": self.batch, "length": self.length}
        return " ".join(f"{key}={value}" for key, value in {**sizes, **self.changes}.items())
