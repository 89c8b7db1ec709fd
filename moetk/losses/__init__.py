"""Losses: any `(routing, ctx) -> scalar fp32`, coefficient included, that says what it `reads`."""

from moetk.losses.hf import hf_load_balancing
from moetk.losses.load_balancing import (
    DeepSeekSequenceLoss,
    GShardLoss,
    LoadBalancingLoss,
    load_balancing,
)
from moetk.losses.variation import ImportanceLoss, LoadLoss, smooth_load, squared_variation
from moetk.losses.z_loss import RouterZLoss, router_z

__all__ = [
    "DeepSeekSequenceLoss",
    "GShardLoss",
    "ImportanceLoss",
    "LoadBalancingLoss",
    "LoadLoss",
    "RouterZLoss",
    "hf_load_balancing",
    "load_balancing",
    "router_z",
    "smooth_load",
    "squared_variation",
]
