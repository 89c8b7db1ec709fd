"""Routers: one small module per method, over pure functions that a router of your own can use too.

Any callable `(x_TH, ctx) -> Routing` is a router; nothing here has to be inherited or registered.
"""

from moetk.kernels.selection import (
    best_one,
    best_two,
    expert_capacity,
    gather,
    in_best_groups,
    in_order,
    largest,
    normalise,
    softmax_over,
    top_k,
    top_k_as_summed,
    top_tokens,
    within_capacity,
)
from moetk.routers import catalogue
from moetk.routers.deepseek_v3 import DeepSeekV3Router
from moetk.routers.deepseek_v4 import DeepSeekV4HashRouter, DeepSeekV4Router
from moetk.routers.expert_choice import ExpertChoiceRouter
from moetk.routers.gpt_oss import GptOssRouter
from moetk.routers.hash_table import random_table
from moetk.routers.linear import LinearRouter
from moetk.routers.mixtral import MixtralRouter
from moetk.routers.noise import jitter, normal_like
from moetk.routers.noisy_top_k import NoisyTopKRouter
from moetk.routers.soft_moe import SoftMoERouter
from moetk.routers.switch import SwitchRouter

__all__ = [
    "DeepSeekV3Router",
    "DeepSeekV4HashRouter",
    "DeepSeekV4Router",
    "ExpertChoiceRouter",
    "GptOssRouter",
    "LinearRouter",
    "MixtralRouter",
    "NoisyTopKRouter",
    "SoftMoERouter",
    "SwitchRouter",
    "best_one",
    "best_two",
    "catalogue",
    "expert_capacity",
    "gather",
    "in_best_groups",
    "in_order",
    "jitter",
    "largest",
    "normal_like",
    "normalise",
    "random_table",
    "softmax_over",
    "top_k",
    "top_k_as_summed",
    "top_tokens",
    "within_capacity",
]
