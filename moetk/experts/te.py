"""The bank with Transformer Engine's grouped products, in bf16, fp16 or FP8.

Few fat experts are where it wins: cuBLAS runs each expert's product by itself.

Letters: T tokens, K choices, H hidden, I expert width.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
from torch import Tensor

from moetk.errors import BackendError, UnsupportedRoutingError
from moetk.experts.fused import form_of, why_not_fused
from moetk.experts.spec import BankSpec, BankWeights
from moetk.kernels.fused_mlp import check_adds, several_ranks
from moetk.kernels.sort_plan import sort_plan
from moetk.routing import Routing, TokenChoice

_OLDEST = (2, 12)  # whose grouped product takes what `moetk.kernels.gpu.te_products` gives it


def te(spec: BankSpec, weights: BankWeights, x_TH: Tensor, routing: Routing) -> Tensor:
    """The same function as `reference`: (T, H) -> (T, H).

    Within `transformer_engine.pytorch.autocast(recipe=...)` the products run in FP8, by the recipe
    Float8CurrentScaling (one scale a tensor) or Float8BlockScaling (DeepSeek-V3, arXiv 2412.19437,
    section 3.3); rows are padded here. With one scale a tensor, a token that is not finite spoils
    every row. Recomputing a layer (torch.utils.checkpoint) outside that autocast recomputes it in
    the weights' dtype: use transformer_engine.pytorch.checkpoint.

    Waits for the device once a forward, to read how many rows each expert has; backward does not.

    Raises UnsupportedRoutingError for anything but a TokenChoice; BackendError for a spec or a
    moment for which `why_not_te` has a reason, for another recipe, in FP8 for H or I that are no
    multiples of 16, and where gradients cannot be added as `weights` asks.
    """
    if not isinstance(routing, TokenChoice):
        raise UnsupportedRoutingError(
            f'backend="te" reads a TokenChoice; this router returns a {type(routing).__name__}. '
            'Use backend="auto" or "grouped".'
        )
    reason = why_not_te(spec, weights.dtype)
    if reason is not None:
        raise BackendError(f'backend="te": {reason}. Use backend="auto" or "grouped".')
    from moetk.kernels.gpu.te_mlp import te_mlp
    from moetk.kernels.gpu.te_numbers import numbers_here
    from moetk.kernels.gpu.te_rows import expert_rows

    numbers = numbers_here(x_TH.device)
    for name, size in (("H", spec.hidden_size), ("I", spec.intermediate_size)):
        if size % numbers.align:
            raise BackendError(
                f'backend="te" in FP8: {name}={size} is no multiple of {numbers.align}. Leave '
                "transformer_engine's autocast for this layer."
            )
    x_in = x_TH.to(weights.dtype)
    tensors = (
        x_in,
        routing.weights_TK,
        weights.up,
        weights.down,
        weights.up_bias,
        weights.down_bias,
    )
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if weights.add_to_grad and trains:
        check_adds(x_in, weights.up, weights.down)
    form = form_of(spec)
    assert form is not None
    plan = sort_plan(routing.experts_TK, routing.kept_TK, spec.num_experts, routing.known)
    rows = expert_rows(plan, numbers.align)
    y_TH = te_mlp(*tensors, rows, form, numbers, add_to_grad=weights.add_to_grad)
    return y_TH.to(x_TH.dtype)


def why_not_te(spec: BankSpec | None, dtype: torch.dtype) -> str | None:
    """What keeps Transformer Engine from running here and now, or None where it runs."""
    if torch.compiler.is_compiling():
        return "it reads the number of rows of each expert on the host, which cannot be compiled"
    lacking = _lacks_te()
    if lacking is not None:
        return lacking
    if torch.cuda.is_current_stream_capturing():
        return "it reads the number of rows of each expert on the host, which a CUDA graph cannot"
    return None if spec is None else why_not_fused(spec, dtype)


def why_not_unasked(device: torch.device) -> str | None:
    """Why `auto` leaves it to who asks for it by name, or None. Asked where it runs."""
    from moetk.kernels.gpu.te_numbers import in_fp8

    if in_fp8():
        return "within transformer_engine's autocast it computes in FP8"
    if torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        # What runs in the warm-up of a CUDA graph must be what is captured.
        return "this is a side stream, where CUDA graphs are warmed up, and it cannot be captured"
    if several_ranks():
        return "several ranks run, and its wait for the device holds up what they exchange"
    return None


@functools.cache
def _lacks_te() -> str | None:
    """Found is not enough: its library is built for one torch and one CUDA, and fails on others."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "needs the package transformer_engine"
    try:
        importlib.import_module("transformer_engine.pytorch")
        version = importlib.import_module("transformer_engine").__version__
    except Exception as error:  # ImportError, OSError, AssertionError: whatever its loader raises
        return f"transformer_engine cannot be imported here ({type(error).__name__}: {error})"
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        return f"transformer_engine {version}, needs {_OLDEST[0]}.{_OLDEST[1]} or later"
    return None
