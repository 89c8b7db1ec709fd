"""Published settings by name. Each returns a router of this package; sizes may be overridden."""

from __future__ import annotations

import torch

from moetk.kernels.selection import Tie
from moetk.routers.deepseek_v3 import DeepSeekV3Router
from moetk.routers.deepseek_v4 import DeepSeekV4Router
from moetk.routers.gpt_oss import GptOssRouter
from moetk.routers.mixtral import MixtralRouter
from moetk.routers.switch import SwitchRouter


def mixtral_8x7b(
    hidden_size: int = 4096, num_experts: int = 8, top_k: int = 2, *, tie: Tie = "low"
) -> MixtralRouter:
    """arXiv 2401.04088"""
    return MixtralRouter(hidden_size, num_experts, top_k, tie=tie)


def qwen3_30b_a3b(
    hidden_size: int = 2048, num_experts: int = 128, top_k: int = 8, *, tie: Tie = "low"
) -> MixtralRouter:
    """arXiv 2505.09388"""
    return MixtralRouter(hidden_size, num_experts, top_k, tie=tie)


def qwen3_next_80b_a3b(
    hidden_size: int = 2048, num_experts: int = 512, top_k: int = 10, *, tie: Tie = "low"
) -> MixtralRouter:
    """transformers, Qwen3NextConfig"""
    return MixtralRouter(hidden_size, num_experts, top_k, tie=tie)


def olmoe_1b_7b(
    hidden_size: int = 2048, num_experts: int = 64, top_k: int = 8, *, tie: Tie = "low"
) -> MixtralRouter:
    """arXiv 2409.02060: probabilities are not rescaled."""
    return MixtralRouter(hidden_size, num_experts, top_k, renormalise=False, tie=tie)


def deepseek_v3(
    hidden_size: int = 7168, num_experts: int = 256, top_k: int = 8, *, tie: Tie = "low"
) -> DeepSeekV3Router:
    """arXiv 2412.19437: the best 4 of 8 groups."""
    return DeepSeekV3Router(
        hidden_size, num_experts, top_k, groups=8, top_groups=4, scale=2.5, tie=tie
    )


def kimi_k2(
    hidden_size: int = 7168, num_experts: int = 384, top_k: int = 8, *, tie: Tie = "low"
) -> DeepSeekV3Router:
    """arXiv 2507.20534: DeepSeek-V3's router without groups."""
    return DeepSeekV3Router(hidden_size, num_experts, top_k, scale=2.827, tie=tie)


def deepseek_v4_flash(
    hidden_size: int = 4096, num_experts: int = 256, top_k: int = 6, *, tie: Tie = "low"
) -> DeepSeekV4Router:
    """arXiv 2606.19348: the layers after the hash layers."""
    return DeepSeekV4Router(hidden_size, num_experts, top_k, scale=1.5, tie=tie)


def gpt_oss_20b(
    hidden_size: int = 2880, num_experts: int = 32, top_k: int = 4, *, tie: Tie = "low"
) -> GptOssRouter:
    """arXiv 2508.10925"""
    return GptOssRouter(hidden_size, num_experts, top_k, tie=tie)


def gpt_oss_120b(
    hidden_size: int = 2880, num_experts: int = 128, top_k: int = 4, *, tie: Tie = "low"
) -> GptOssRouter:
    """arXiv 2508.10925"""
    return GptOssRouter(hidden_size, num_experts, top_k, tie=tie)


def granitemoe(
    hidden_size: int = 4096, num_experts: int = 8, top_k: int = 2, *, tie: Tie = "low"
) -> GptOssRouter:
    """transformers, GraniteMoeConfig: no bias, softmax in float32."""
    return GptOssRouter(
        hidden_size, num_experts, top_k, bias=False, score_dtype=torch.float32, tie=tie
    )


def switch_base_8(
    hidden_size: int = 768, num_experts: int = 8, top_k: int = 1, *, tie: Tie = "low"
) -> SwitchRouter:
    """arXiv 2101.03961, with the capacity factor and jitter of its pre-training."""
    return SwitchRouter(hidden_size, num_experts, top_k, capacity_factor=1.25, jitter=0.01, tie=tie)
