"""Expert banks: what they compute (spec), what with (weights), and how (backends)."""

from moetk.experts.activations import (
    Activation,
    ClampedGated,
    Gated,
    GptOssGated,
    Plain,
)
from moetk.experts.backends import Backend, auto_row, auto_table, backends, pick_backend
from moetk.experts.bank import ExpertBank, bank_forward
from moetk.experts.spec import BankSpec, BankWeights

__all__ = [
    "Activation",
    "Backend",
    "BankSpec",
    "BankWeights",
    "ClampedGated",
    "ExpertBank",
    "Gated",
    "GptOssGated",
    "Plain",
    "auto_row",
    "auto_table",
    "backends",
    "bank_forward",
    "pick_backend",
]
