"""torch's AdamW, stepped by one kernel a parameter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import compress
from operator import not_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adam import adam
from torch.optim.optimizer import _use_grad_for_differentiable

from moetk.kernels.adamw import DTYPES, Numbers, Row, adamw_, step_scales

DEVICES = frozenset(("cuda",))
"""Where the kernel runs. (Its twin in plain torch runs anywhere, slower than torch's own step.)"""


class Lists(NamedTuple):
    """What torch collects of a group to step it; entries of one place belong together."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]


_SETTINGS = (
    "lr",
    "eps",
    "weight_decay",
    "decoupled_weight_decay",
    "maximize",
    "amsgrad",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
)
"""A group's settings that torch's functional step takes by the same name."""


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with the same settings, state and checkpoints, in either direction.

    Parameters, gradients and moments on a GPU, contiguous and each of fp32, bf16 or fp16, are
    stepped by moetk's kernel: every element is read and written once, arithmetic is fp32, results
    are rounded when stored, the host waits for nothing. torch's own step runs for

    - groups with amsgrad, capturable or differentiable, with lr or betas as GPU tensors, or with
      decoupled_weight_decay=False (Adam);
    - parameters elsewhere, of another dtype, not contiguous, or of a tensor subclass (DTensor);
    - all parameters while torch.compile traces the step, and while a GradScaler leaves it to a
      fused optimizer whether a step is taken.

    `explain()` says which it is. `foreach` and `fused` choose among torch's own steps; `fused` also
    keeps `step` on the GPU, as in torch. Source: arXiv 1711.05101, algorithm 2.
    """

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. closure: computes the loss anew; what it returns is returned."""
        self._check_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lists = Lists([], [], [], [], [], [])
            has_complex = self._init_group(group, *lists)
            if self._why_torch(group) is None:
                lists = _step_by_kernel(group, lists)
            self._step_by_torch(group, lists, has_complex)
        return loss

    def explain(self) -> str:
        """How many parameters the kernel steps, and why torch steps the others.

        Gradients and moments are looked at as far as they exist yet.
        """
        ours, torchs = _Tally(), defaultdict[str, _Tally](_Tally)
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                state = self.state.get(param, {})
                known = (param, param.grad, state.get("exp_avg"), state.get("exp_avg_sq"))
                why = self._why_torch(group) or _why_torch_steps(*known)
                (torchs[f"group {number}: {why}"] if why else ours).add(param)
        return "\n".join(
            [f"{type(self).__name__}: moetk's kernel steps {ours}"]
            + [f"- torch steps {tally} of {why}" for why, tally in torchs.items()]
        )

    def _why_torch(self, group: dict[str, Any]) -> str | None:
        """Why torch steps the whole group; None: it does not."""
        if torch.compiler.is_compiling():
            return "torch.compile traces the step"
        if any(getattr(self, name, None) is not None for name in ("grad_scale", "found_inf")):
            return "a GradScaler leaves to the step whether it is taken"
        for option in ("amsgrad", "capturable", "differentiable"):
            if group[option]:
                return f"{option}=True"
        if not group["decoupled_weight_decay"]:
            return "decoupled_weight_decay=False"
        for name, number in zip(
            ("lr", "beta1", "beta2"), (group["lr"], *group["betas"]), strict=True
        ):
            if isinstance(number, Tensor) and number.device.type != "cpu":
                return f"{name} is a tensor on {number.device}"
        return None

    def _check_capture(self) -> None:
        """torch's check that only capturable groups are stepped under CUDA graph capture."""
        now, before = "_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"
        getattr(self, now if hasattr(self, now) else before)()

    def _step_by_torch(self, group: dict[str, Any], lists: Lists, has_complex: bool) -> None:
        beta1, beta2 = group["betas"]
        adam(
            *lists,
            beta1=beta1,
            beta2=beta2,
            has_complex=has_complex,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            **{name: group[name] for name in _SETTINGS},
        )


def _step_by_kernel(group: dict[str, Any], lists: Lists) -> Lists:
    """Step what the kernel takes. Returns the lists of what is left."""
    rows = [Row(*row) for row in zip(*lists[:4], strict=True)]
    ours = [_why_torch_steps(*row) is None for row in rows]
    # A group may span devices, and a checkpoint may have brought steps of either kind.
    alike = defaultdict[tuple[torch.device, torch.device], list[tuple[Row, Tensor]]](list)
    for row, step in compress(zip(rows, lists.steps, strict=True), ours):
        alike[row.param.device, step.device].append((row, step))
    lr, betas = float(group["lr"]), (float(group["betas"][0]), float(group["betas"][1]))
    numbers = Numbers.of(lr, betas, group["eps"], group["weight_decay"], maximize=group["maximize"])
    for (device, _), pairs in alike.items():
        same, steps = zip(*pairs, strict=True)
        torch._foreach_add_(steps, 1)
        adamw_(same, _sent(step_scales(steps, lr, betas), device), numbers)
    return Lists._make(list(compress(column, map(not_, ours))) for column in lists)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on that device, without a wait: from pinned memory a copy is only queued."""
    if tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _why_torch_steps(param: Tensor, *others: Tensor | None) -> str | None:
    """Why torch steps a parameter, given its gradient and its moments; None: it does not."""
    names = ("parameter", "gradient", "exp_avg", "exp_avg_sq")
    for name, tensor in zip(names, (param, *others), strict=True):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, Parameter):
            return f"{name} is a {type(tensor).__name__}"
        if tensor.device.type not in DEVICES or tensor.device != param.device:
            return f"{name} is on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}"
        if tensor.shape != param.shape:
            return f"{name} is {tuple(tensor.shape)}"  # which torch refuses in its own words
        if tensor.layout is not torch.strided or not tensor.is_contiguous():
            return f"{name} is not contiguous"
    return None


class _Tally:
    """How many parameters and elements."""

    def __init__(self) -> None:
        self.parameters = self.elements = 0

    def add(self, param: Tensor) -> None:
        self.parameters += 1
        self.elements += param.numel()

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters ({self.elements:,} elements)"
