"""Transformer Engine in plain torch: the calls that moetk makes, with the checks of its C++ in 2.12
(which copy a layout reads, lengths in multiples of 16). It proves the graph and the padding, not
the library."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pytest

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Recipe:
    """As in TE, only a recipe's own predicate tells which fields it has."""

    def float8_current_scaling(self) -> bool:
        return isinstance(self, Float8CurrentScaling)

    def float8_block_scaling(self) -> bool:
        return isinstance(self, Float8BlockScaling)


class DelayedScaling(Recipe):
    pass


class MXFP8BlockScaling(Recipe):
    pass


class Float8CurrentScaling(Recipe):
    backward_dtype = E5M2
    fp8_quant_fwd_inp = fp8_quant_bwd_grad = fp8_quant_fwd_weight = SimpleNamespace(
        power_2_scale=False, amax_epsilon=0.0
    )
    fp8_gemm_fprop = SimpleNamespace(use_split_accumulator=False)
    fp8_gemm_dgrad = fp8_gemm_wgrad = SimpleNamespace(use_split_accumulator=True)


class Float8BlockScaling(Recipe):
    backward_dtype = E4M3
    fp8_quant_fwd_inp = fp8_quant_bwd_grad = fp8_quant_fwd_weight = SimpleNamespace(
        power_2_scale=True, amax_epsilon=0.0
    )
    x_block_scaling_dim, grad_block_scaling_dim, w_block_scaling_dim = 1, 1, 2
    fp8_gemm_fprop = fp8_gemm_dgrad = fp8_gemm_wgrad = SimpleNamespace(use_split_accumulator=True)


class State:
    recipe: Recipe | None = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None

    @classmethod
    def get_fp8_recipe(cls) -> Recipe | None:
        return cls.recipe


@contextmanager
def autocast(recipe: Recipe | None) -> Iterator[None]:
    State.recipe = recipe
    try:
        yield
    finally:
        State.recipe = None


def get_fp8_te_dtype(recipe: Any, fprop_tensor: bool = True) -> torch.dtype:
    return E4M3 if fprop_tensor else recipe.backward_dtype


@dataclass
class Float8TensorStorage:
    data: Tensor
    fp8_scale_inv: Tensor
    fp8_dtype: torch.dtype
    data_transpose: Tensor | None = None

    def __post_init__(self) -> None:
        self._data, self._scale_inv = self.data, self.fp8_scale_inv

    def rowwise(self) -> Tensor:
        return self._numbers(self.data)

    def columnwise(self) -> Tensor:
        assert self.data_transpose is not None, "no columnwise copy"
        return self._numbers(self.data_transpose).T

    def _numbers(self, data: Tensor) -> Tensor:
        assert data.is_contiguous() and data.dtype == torch.uint8
        assert data.shape[1] % 16 == 0, "Caller must pad"
        return data.view(self.fp8_dtype).float() * self.fp8_scale_inv


class Float8CurrentScalingQuantizer:
    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        *,
        rowwise: bool,
        columnwise: bool,
        force_pow_2_scales: bool,
        amax_epsilon: float,
    ) -> None:
        assert rowwise and not columnwise and not force_pow_2_scales
        self.dtype, self.internal = dtype, False


class Float8BlockQuantizer:
    def __init__(
        self,
        dtype: torch.dtype,
        *,
        rowwise: bool,
        columnwise: bool,
        amax_epsilon: float,
        force_pow_2_scales: bool,
        block_scaling_dim: int,
    ) -> None:
        assert (rowwise or block_scaling_dim == 1) and force_pow_2_scales
        self.dtype, self.internal, self.square = dtype, False, block_scaling_dim == 2
        self.writes = rowwise, columnwise


class Block:
    """Quantised along its rows, along its columns, or in squares for both."""

    def __init__(self, numbers: Tensor, quantizer: Float8BlockQuantizer) -> None:
        assert quantizer.internal and numbers.is_contiguous()
        self.square = quantizer.square
        shapes = [(128, 128)] * 2 if self.square else [(1, 128), (128, 1)]
        self.copies = [
            _rounded(numbers.float(), shape, quantizer.dtype) if written else None
            for written, shape in zip(quantizer.writes, shapes, strict=True)
        ]

    def rowwise(self) -> Tensor:
        (copy, _) = self.copies
        assert copy is not None and copy.shape[1] % 16 == 0 and copy.shape[0] % 8 == 0
        return copy

    def columnwise(self) -> Tensor:
        (_, copy) = self.copies
        assert copy is not None and copy.shape[0] % 16 == 0
        return copy


def _rounded(numbers: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    (height, width), (m, n) = block, numbers.shape
    if not m:
        return numbers
    tall, wide = -(-m // height), -(-n // width)
    padded = torch.nn.functional.pad(numbers, (0, wide * width - n, 0, tall * height - m))
    blocks = padded.view(tall, height, wide, width)
    scale = torch.finfo(dtype).max / blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-30)
    scale = scale.log2().floor().exp2()
    rounded = (blocks * scale).to(dtype).float() / scale
    return rounded.reshape(tall * height, wide * width)[:m, :n]


def quantize(numbers: Tensor, quantizer: Float8CurrentScalingQuantizer) -> Float8TensorStorage:
    assert quantizer.internal and numbers.is_contiguous()
    largest = numbers.float().abs().max().clamp(min=1e-30)
    scale = torch.finfo(quantizer.dtype).max / largest
    data = (numbers.float() * scale).to(quantizer.dtype).view(torch.uint8)
    return Float8TensorStorage(data, 1 / scale, quantizer.dtype)


def split_quantize(
    numbers: Tensor, counts: list[int], quantizers: list[Float8BlockQuantizer]
) -> list[Block]:
    parts = zip(numbers.split(counts), quantizers, strict=True)
    return [Block(part, quantizer) for part, quantizer in parts]


def fp8_transpose(data: Tensor, dtype: torch.dtype, out: None) -> Tensor:
    assert data.is_contiguous() and data.dtype == torch.uint8
    return data.T.contiguous()


def general_grouped_gemm(
    A: list[Any],
    B: list[Any],
    out: list[Tensor],
    quantization_params: list[None],
    out_dtype: torch.dtype,
    layout: str = "TN",
    m_splits: list[int] | None = None,
    grad: bool = False,
    accumulate: bool = False,
    bias: list[Tensor] | None = None,
    use_bias: bool = False,
    use_split_accumulator: bool = False,
    single_output: bool = False,
) -> None:
    """out = B A in cuBLAS's letters: T reads A as it lies, N reads B as it lies."""
    assert m_splits is not None and out[0].dtype == out_dtype and out[0].is_contiguous()
    assert len(quantization_params) == len(A) and (bias is not None) == use_bias
    outs = out[0].split(m_splits) if single_output else out
    biases = bias if bias is not None else [None] * len(A)
    for a, b, made, one in zip(A, B, outs, biases, strict=True):
        assert not all(isinstance(one, Block) and one.square for one in (a, b))
        left, right = _read(b, layout[1] == "N"), _read(a, layout[0] == "T")
        left = left.T if layout[1] == "T" else left
        right = right.T if layout[0] == "T" else right
        if not left.numel() or not right.numel():
            if not accumulate:
                made.zero_()
            continue
        product = left.double() @ right.double()
        if one is not None:
            assert not grad
            product = product + one.double()
        made.copy_(made + product if accumulate else product)


def _read(operand: Any, rowwise: bool) -> Tensor:
    if isinstance(operand, Tensor):
        assert operand.is_contiguous()
        return operand
    numbers: Tensor = operand.rowwise() if rowwise else operand.columnwise()
    return numbers


_TE = "transformer_engine"
MODULES: dict[str, dict[str, Any]] = {
    _TE: {"__version__": "2.12.0"},
    f"{_TE}.pytorch": {},
    f"{_TE}.pytorch.cpp_extensions": {"general_grouped_gemm": general_grouped_gemm},
    f"{_TE}.pytorch.quantization": {
        "FP8GlobalStateManager": State,
        "get_fp8_te_dtype": get_fp8_te_dtype,
    },
    f"{_TE}.pytorch.tensor": {},
    f"{_TE}.pytorch.tensor.float8_blockwise_tensor": {"Float8BlockQuantizer": Float8BlockQuantizer},
    f"{_TE}.pytorch.tensor.float8_tensor": {
        "Float8CurrentScalingQuantizer": Float8CurrentScalingQuantizer
    },
    f"{_TE}.pytorch.tensor.storage": {},
    f"{_TE}.pytorch.tensor.storage.float8_tensor_storage": {
        "Float8TensorStorage": Float8TensorStorage
    },
    f"{_TE}_torch": {
        "quantize": quantize,
        "split_quantize": split_quantize,
        "fp8_transpose": fp8_transpose,
    },
}


def modules() -> dict[str, ModuleType]:
    """What `sys.modules` holds once it is imported."""
    made = {}
    for name, contents in MODULES.items():
        module = made[name] = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
        vars(module).update(contents)
    return made


def install(patch: pytest.MonkeyPatch) -> None:
    """What `import transformer_engine` finds until the patch is undone."""
    for name, module in modules().items():
        patch.setitem(sys.modules, name, module)
