"""Overhears an expert bank's products with its own matrices, in whatever code they happen.

Letters: N rows, A and B the two widths of a product, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moetk.equivalence.sides.bank_view import BankView

_PRODUCTS = frozenset(
    {"linear", "mm", "matmul", "__matmul__", "_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
)
_SORTS = frozenset({"sort", "argsort"})
_SUMS = frozenset({"add", "add_", "__add__", "__iadd__"})


@dataclass(frozen=True, eq=False)
class Place:
    """Rows `start`, `start + 1`, ... of a tensor. Inside an autograd.Function, slices have no
    graph of their own, but the tensor that they are slices of gets one when it is returned."""

    tensor: Tensor
    start: int = 0


@dataclass(eq=False)
class Product:
    """Rows of one expert times its matrix; or of all, sorted by expert.

    expert: None = all, whose rows end at `offsets`. left, out: where the operands lie. value: the
    product as it was when it was made. summed, summed_value: the same plus what was added to it
    next, and its value.
    """

    part: Literal["up", "down"]
    expert: int | None
    offsets: Sequence[int]
    left: Place
    left_value: Tensor
    out: Place
    value: Tensor
    summed: Tensor | None = None
    summed_value: Tensor | None = None

    def by_expert(self) -> list[tuple[int, Tensor]]:
        """Each expert's rows of the left operand; rows behind the last offset are nobody's."""
        if self.expert is not None:
            return [(self.expert, self.left_value)]
        starts = (0, *self.offsets)
        return [
            (expert, self.left_value[start:end])
            for expert, (start, end) in enumerate(zip(starts, self.offsets, strict=False))
        ]


def _is_vector_of_ids(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and not value.is_floating_point()


class Products(TorchFunctionMode):
    """Within it, every product whose right operand is a matrix of `bank` is noted in `made`.

    clear: False once a product was seen that is no plain (N, A) x (A, B) of whole matrices.
    sorts: each sort of a vector of whole numbers, as (the vector, its order).
    """

    def __init__(self, bank: BankView) -> None:
        super().__init__()
        self.bank = bank
        self.made: list[Product] = []
        self.clear = True
        self.sorts: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS:
            named = [value for key, value in kwargs.items() if key != "out"]
            operands = [t for t in (*args, *named) if isinstance(t, Tensor)]
            if len(operands) >= 2:
                self._product(name, operands, result)
        elif name in _SUMS and args and isinstance(args[0], Tensor):
            self._sum(args[0], result)
        elif name in _SORTS and _is_vector_of_ids(args[0]):
            order = result if isinstance(result, Tensor) else result[1]
            self.sorts.append((args[0].clone(), order.clone()))
        return result

    def order_of(self, ids_N: Tensor) -> Tensor | None:
        """(N,) int64: in which order these ids were sorted; None = it was not overheard."""
        for sorted_N, order_N in self.sorts:
            if torch.equal(sorted_N, ids_N):
                return order_N
        return None

    def _sum(self, left: Tensor, result: Tensor) -> None:
        value = None
        for product in reversed(self.made):
            if product.out.tensor is not left or product.summed is not None:
                return
            value = result.detach().clone() if value is None else value
            product.summed, product.summed_value = result, value

    def _product(self, name: str, operands: list[Tensor], result: Any) -> None:
        left, right = operands[:2]
        part = self._part(right)
        if part is None:
            return
        value, biased = result, name == "linear" and len(operands) == 3
        if biased:  # linear(x, w, b) is heard as the product, and what was added to it
            operands = operands[:2]
            with torch.no_grad():
                value = F.linear(left, right)
        matrices = self.bank.up if part == "up" else self.bank.down
        grouped = right.ndim == 3
        ends = [t for t in operands[2:] if not t.is_floating_point()]
        plain = left.ndim == 2 and len(operands) == 2 + grouped and len(ends) == grouped
        if not plain or right.numel() != (matrices if grouped else matrices[0]).numel():
            self.clear = False
            return
        expert: int | None = None
        offsets: tuple[int, ...] = ()
        if grouped:
            offsets = tuple(int(end) for end in ends[0].tolist())
        else:
            start = right.storage_offset() - matrices.storage_offset()
            expert = start // max(matrices.stride(0), 1)
        self.made.append(
            Product(
                part,
                expert,
                offsets,
                _place(left),
                left.detach().clone(),
                _place(result),
                value.detach().clone(),
                result if biased else None,
                result.detach().clone() if biased else None,
            )
        )

    def _part(self, tensor: Tensor) -> Literal["up", "down"] | None:
        if _is_view(tensor, self.bank.up):
            return "up"
        return "down" if _is_view(tensor, self.bank.down) else None


def _is_view(tensor: Tensor, of: Tensor) -> bool:
    if tensor.untyped_storage().data_ptr() != of.untyped_storage().data_ptr():
        return False
    return 0 <= tensor.storage_offset() - of.storage_offset() < max(of.numel(), 1)


def _place(tensor: Tensor) -> Place:
    base = tensor._base
    if torch.is_grad_enabled() or base is None or base.ndim != 2:
        return Place(tensor)
    if base.shape[1] != tensor.shape[1] or base.stride() != tensor.stride():
        return Place(tensor)
    start = (tensor.storage_offset() - base.storage_offset()) // max(base.stride(0), 1)
    return Place(base, start)
