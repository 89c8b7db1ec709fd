"""The bank as one operator that keeps only its input and the up product.

Letters: T tokens, K choices, H hidden, I expert width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moetk.errors import BackendError, UnsupportedRoutingError
from moetk.experts.activations import Activation, ClampedGated, GptOssGated, Plain
from moetk.experts.spec import BankSpec, BankWeights
from moetk.kernels.form import Form
from moetk.kernels.fused_mlp import experts_mlp
from moetk.kernels.sort_plan import sort_plan
from moetk.memo import remembered
from moetk.routing import Routing, TokenChoice

_NAMES: dict[Callable[..., Any], str] = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}
_ROW_BYTES = 16  # what the device's copy engine reads at once: H and I are whole multiples


def fused(spec: BankSpec, weights: BankWeights, x_TH: Tensor, routing: Routing) -> Tensor:
    """The same function as `reference`: (T, H) -> (T, H).

    Raises UnsupportedRoutingError for anything but a TokenChoice, BackendError for a spec whose
    `why_not_fused` says why.
    """
    if not isinstance(routing, TokenChoice):
        raise UnsupportedRoutingError(
            f'backend="fused" reads a TokenChoice; this router returns a {type(routing).__name__}. '
            'Use backend="auto" or "grouped".'
        )
    dtype = weights.dtype
    form = _form_or_reason(spec, dtype)
    if isinstance(form, str):
        raise BackendError(f'backend="fused": {form}. Use backend="auto" or "grouped".')
    plan = sort_plan(routing.experts_TK, routing.kept_TK, spec.num_experts, routing.known)
    # Asked before it is cast: on the host a cast to the same costs as much as a launch.
    same = x_TH.dtype == dtype
    y_TH = experts_mlp(
        x_TH if same else x_TH.to(dtype),
        routing.weights_TK,
        weights.up,
        weights.down,
        weights.up_bias,
        weights.down_bias,
        plan,
        form,
        add_to_grad=weights.add_to_grad,
    )
    return y_TH if same else y_TH.to(x_TH.dtype)


@remembered
def _form_or_reason(spec: BankSpec, dtype: torch.dtype) -> Form | str:
    """The spec as plain values, or what keeps the operator from it."""
    return why_not_fused(spec, dtype) or cast(Form, form_of(spec))


@remembered
def why_not_fused(spec: BankSpec, dtype: torch.dtype) -> str | None:
    """What keeps the fused operator from this spec, or None where it runs."""
    if form_of(spec) is None:
        return f"it has no kernel for {spec.activation}"
    if spec.scale == "input":
        return 'scale="input" multiplies rows before the up product, which it does not'
    lanes = _ROW_BYTES // dtype.itemsize
    for name, size in (("H", spec.hidden_size), ("I", spec.intermediate_size)):
        if size % lanes:
            return f"{name}={size} is no multiple of {lanes}, 16 bytes of {dtype}"
    return None


@remembered
def form_of(spec: BankSpec) -> Form | None:
    """The spec as plain values, or None where no kernel computes its activation."""
    activation = spec.activation
    if isinstance(activation, ClampedGated | GptOssGated) and not activation.limit > 0:
        return None  # the kernels read 0 as no clamp
    layout = {"interleaved": spec.interleaved and spec.gated, "transposed": spec.transposed}
    if isinstance(activation, GptOssGated):
        return Form("gpt_oss", alpha=activation.alpha, limit=activation.limit, **layout)
    act = _act_name(activation)
    if act is None:
        return None
    limit = activation.limit if isinstance(activation, ClampedGated) else 0.0
    return Form(act, gated=not isinstance(activation, Plain), limit=limit, **layout)


def _act_name(activation: Activation) -> str | None:
    assert not isinstance(activation, GptOssGated)
    act = activation.act
    if isinstance(act, functools.partial) and act.func is F.gelu:
        return "gelu_tanh" if act.keywords == {"approximate": "tanh"} else None
    # Compared, not looked up: it may have no hash.
    return next((name for known, name in _NAMES.items() if known is act), None)
