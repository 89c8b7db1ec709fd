"""Published settings, number by number: the papers', and Transformers' configurations'."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from transformers import (
    DeepseekV3Config,
    DeepseekV4Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SwitchTransformersConfig,
)

from moetk.routers import catalogue

SETTINGS = {  # hidden_size, num_experts, top_k, and what else the method's name stands for
    "mixtral_8x7b": (4096, 8, 2, {"renormalise": True}),
    "qwen3_30b_a3b": (2048, 128, 8, {"renormalise": True}),
    "qwen3_next_80b_a3b": (2048, 512, 10, {"renormalise": True}),
    "olmoe_1b_7b": (2048, 64, 8, {"renormalise": False}),
    "deepseek_v3": (7168, 256, 8, {"groups": 8, "top_groups": 4, "scale": 2.5, "eps": 1e-20}),
    "kimi_k2": (7168, 384, 8, {"groups": 1, "top_groups": 1, "scale": 2.827, "eps": 1e-20}),
    "deepseek_v4_flash": (4096, 256, 6, {"scale": 1.5, "eps": 1e-20}),
    "gpt_oss_20b": (2880, 32, 4, {"score_dtype": None}),
    "gpt_oss_120b": (2880, 128, 4, {"score_dtype": None}),
    "granitemoe": (4096, 8, 2, {}),
    "switch_base_8": (768, 8, 1, {"capacity_factor": 1.25, "jitter": 0.01}),
}
CONFIGS = {
    "mixtral_8x7b": MixtralConfig,
    "qwen3_30b_a3b": Qwen3MoeConfig,
    "qwen3_next_80b_a3b": Qwen3NextConfig,
    "olmoe_1b_7b": OlmoeConfig,
    "deepseek_v3": DeepseekV3Config,
    "deepseek_v4_flash": DeepseekV4Config,
    "gpt_oss_120b": GptOssConfig,
    "granitemoe": GraniteMoeConfig,
    "switch_base_8": SwitchTransformersConfig,
}
THEIR_NAMES = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "top_k": ("num_experts_per_tok",),
    "groups": ("n_group",),
    "top_groups": ("topk_group",),
    "scale": ("routed_scaling_factor",),
    "jitter": ("router_jitter_noise",),
}
MADE = {
    name: make
    for name, make in vars(catalogue).items()
    if inspect.isfunction(make) and make.__module__ == catalogue.__name__
}


def test_every_published_setting_is_listed_here():
    assert MADE.keys() == SETTINGS.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_the_published_ones(name):
    hidden_size, num_experts, top_k, others = SETTINGS[name]
    router = MADE[name]()
    assert router.weight.shape == (num_experts, hidden_size)
    assert (router.num_experts, router.top_k, router.tie) == (num_experts, top_k, "low")
    assert {key: getattr(router, key) for key in others} == others
    assert hasattr(router, "bias") == name.startswith("gpt_oss")


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_are_those_of_transformers(name):
    config = CONFIGS[name]()
    router: Any = MADE[name]()
    assert router.weight.shape[1] == config.hidden_size
    stated = {
        ours: getattr(config, key)
        for ours, theirs in THEIR_NAMES.items()
        for key in theirs
        if hasattr(router, ours) and getattr(config, key, None) is not None
    }
    assert "num_experts" in stated and ("top_k" in stated or name == "switch_base_8")
    assert {ours: getattr(router, ours) for ours in stated} == stated
