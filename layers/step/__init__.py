"""The rest of a training step: norms, residuals, rotation and loss of a transformers model.

`speed_up(model)` puts moetk's forwards in front of this one model's modules. Other models of the
family, and transformers' modules themselves, are never touched.
"""

from moetk.layers.step.step import Step, speed_up

__all__ = ["Step", "speed_up"]
