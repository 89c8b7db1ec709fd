"""AdamW's step in place (arXiv 1711.05101, algorithm 2): each element read and written once.

Letters: N parameters of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
"""What each of a row's four tensors may be, in any mix."""


class Row(NamedTuple):
    """One parameter, its gradient and its moments: one shape, one device, contiguous, of DTYPES."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Numbers(NamedTuple):
    """What a group's elements are multiplied with, taken in fp64 and rounded to fp32 once."""

    keep1: float
    """beta1"""
    take1: float
    """1 - beta1; its negative to maximise, as the other moment does not see the sign"""
    keep2: float
    """beta2"""
    take2: float
    """1 - beta2"""
    decay: float
    """lr x weight decay"""
    eps: float

    @classmethod
    def of(
        cls,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        maximize: bool = False,
    ) -> Numbers:
        beta1, beta2 = betas
        sign = -1 if maximize else 1
        return cls(beta1, sign * (1 - beta1), beta2, 1 - beta2, lr * weight_decay, eps)


def step_scales(steps: Sequence[Tensor], lr: float, betas: tuple[float, float]) -> Tensor:
    """(N, 2) fp32: what the first moment is multiplied with, lr / (1 - beta1^step), and the root of
    the second, 1 / sqrt(1 - beta2^step), after the step of that number (counted from 1).

    steps: N scalars on one device, where the powers are taken, in fp64, and the result lies.
    """
    steps_N = torch.stack(tuple(steps)).double()
    first_N, second_N = (1 - beta**steps_N for beta in betas)
    return torch.stack([lr / first_N, second_N.rsqrt()], dim=1).float()


def adamw_(rows: Sequence[Row], scales_N2: Tensor, numbers: Numbers) -> None:
    """Step every row in place: param, exp_avg, exp_avg_sq; the gradients stay.

    scales_N2: fp32, of `step_scales`, on the rows' device. Arithmetic is in fp32 whatever the
    tensors' dtypes, each result rounded once, when it is stored: the terms and their order are
    those of torch's fused kernel. On a GPU one Triton kernel a row, without a host sync.
    """
    if not scales_N2.is_cuda:
        for row, scales_2 in zip(rows, scales_N2, strict=True):
            adamw_plain_(row, scales_2, numbers)
        return
    from moetk.kernels.gpu.adamw import adamw_fused_

    adamw_fused_(rows, scales_N2, numbers)


def adamw_plain_(row: Row, scales_2: Tensor, numbers: Numbers) -> None:
    """One row's step in plain torch."""
    keep1, take1, keep2, take2, decay, eps = numbers
    first_scale, root_scale = scales_2
    param, grad, exp_avg, exp_avg_sq = (tensor.float() for tensor in row)
    if decay:
        param = param - decay * param
    exp_avg = keep1 * exp_avg + take1 * grad
    exp_avg_sq = keep2 * exp_avg_sq + take2 * grad * grad
    param = param - first_scale * exp_avg / (exp_avg_sq.sqrt() * root_scale + eps)
    row.param.copy_(param)
    row.exp_avg.copy_(exp_avg)
    row.exp_avg_sq.copy_(exp_avg_sq)
