"""Training: optimizers that step at the speed of memory."""

from moetk.train.adamw import AdamW

__all__ = ["AdamW"]
