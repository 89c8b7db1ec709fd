"""Metrics: small functions of counts or of a routing. They return tensors and wait for nothing."""

from moetk.metrics.choices import (
    chosen_mask,
    co_activation,
    drop_fraction,
    saturation,
    unserved_fraction,
)
from moetk.metrics.load import (
    Load,
    coefficient_of_variation,
    dead_experts,
    load_entropy,
    max_violation,
    min_violation,
    tokens_per_expert,
)
from moetk.metrics.logits import logit_max, logit_rms

__all__ = [
    "Load",
    "chosen_mask",
    "co_activation",
    "coefficient_of_variation",
    "dead_experts",
    "drop_fraction",
    "load_entropy",
    "logit_max",
    "logit_rms",
    "max_violation",
    "min_violation",
    "saturation",
    "tokens_per_expert",
    "unserved_fraction",
]
