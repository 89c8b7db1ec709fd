"""Tiny random models of the supported families, for tests on two cores."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

E, K, H, VOCAB = 8, 4, 32, 96
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": H,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "num_experts_per_tok": K,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
EXTRA: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True, "num_experts": E},
    "mixtral": {},
    "olmoe": {},
    "granitemoe": {},
    "gpt_oss": {},
    "deepseek_v3": {
        **MLA,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
    },
    "qwen3_next": {
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "layer_types": ["sliding_attention"] * 2,
        "mlp_layer_types": ["hash_moe", "moe"],
        "head_dim": 16,
        "q_lora_rank": 16,
        "n_shared_experts": 1,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "hc_mult": 2,
        "partial_rotary_factor": 0.5,
    },
}
FAMILIES = tuple(EXTRA)


def config(family: str, **changes: Any) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[family]
    fields = {name for base in cls.__mro__ for name in getattr(base, "__annotations__", {})}
    aliases = dict(getattr(cls, "attribute_map", {}))
    extra = {**EXTRA[family], **changes}
    kwargs = {k: v for k, v in BASE.items() if k in fields and k not in aliases}
    for alias, name in aliases.items():
        if alias in BASE and name not in BASE:
            kwargs.setdefault(name, BASE[alias])
    return cls(**{**kwargs, **extra})


def tiny(family: str = "qwen3_moe", *, seed: int = 0, **changes: Any) -> Any:
    """A model whose gates differ enough that routing matters, with real tables and biases."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    attention = changes.pop("attn_implementation", "eager")
    model = AutoModelForCausalLM.from_config(
        config(family, **changes), attn_implementation=attention
    )
    spread(model)
    return model


@torch.no_grad()
def spread(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 2)[-2]
        if leaf in ("gate", "router"):
            parameter.normal_(std=0.6)
        elif parameter.ndim == 3 or "bias" in name:
            parameter.normal_(std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            # A real table, with some tokens that name one expert twice.
            rows = torch.stack([torch.randperm(E)[: buffer.shape[1]] for _ in buffer])
            rows[::7, 1] = rows[::7, 0]
            buffer.copy_(rows)
        elif name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)


def ids(batch: int = 2, length: int = 12, *, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def generated(model: Any, prompt: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    """Eight greedy tokens behind each prompt, with their logits."""
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt) if mask is None else mask,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
