"""Sums and concatenations over ranks. Without a process group, or alone in it, they change nothing.

They wait at most as long as the process group's own timeout. Results are constants: no gradient
passes through them. Every rank of the group must call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetk.errors import MoeShapeError, TopologyError

_MOST_DIMS = 7
# By name, so that every rank of one torch numbers them alike.
_DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str
)


def sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of every rank's `tensor`, same shape and dtype; the input is left as it was.

    group: None = all ranks. Raises TopologyError when this rank is not in it.
    """
    tensor = tensor.detach()
    if _num_ranks(group) == 1:
        return tensor
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def gather_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Every rank's `tensor` in rank order, concatenated along the first dimension.

    The lengths may differ and may be 0; every other dimension, and the dtype, must agree. Waits for
    the lengths on the host. group: None = all ranks.
    Raises TopologyError, on every rank, where shapes or dtypes disagree, and when this rank is not
    in the group; MoeShapeError for a tensor without dimensions or with more than seven.
    """
    tensor = tensor.detach()
    if not 1 <= tensor.ndim <= _MOST_DIMS:
        raise MoeShapeError(
            f"gather_over_ranks got {tuple(tensor.shape)}; it takes 1 to {_MOST_DIMS} dimensions, "
            "and concatenates along the first."
        )
    num_ranks = _num_ranks(group)
    if num_ranks == 1:
        return tensor
    dtypes, shapes = _kinds_of_ranks(tensor, num_ranks, group)
    if len(set(dtypes)) > 1 or len({shape[1:] for shape in shapes}) > 1:
        kinds = zip(shapes, dtypes, strict=True)
        listed = ", ".join(
            f"rank {rank} {shape} {dtype}" for rank, (shape, dtype) in enumerate(kinds)
        )
        raise TopologyError(
            f"gather_over_ranks: the dtype and all dimensions but the first must agree, but the "
            f"tensors are {listed}. Convert them alike before they are gathered."
        )
    longest = max(shape[0] for shape in shapes)
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    parts = [torch.zeros_like(padded) for _ in shapes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: shape[0]] for part, shape in zip(parts, shapes, strict=True)])


@dataclass(frozen=True)
class SumOverRanks:
    """`sum_over_ranks` of one group as a value, with `gather` for what is concatenated."""

    group: dist.ProcessGroup | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor, self.group)

    def gather(self, tensor: Tensor) -> Tensor:
        return gather_over_ranks(tensor, self.group)


def _num_ranks(group: dist.ProcessGroup | None) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    if dist.get_rank(group) < 0:
        raise TopologyError(
            f"Rank {dist.get_rank()} is not in the group it was asked to sum over: pass this "
            "rank's own group."
        )
    return dist.get_world_size(group)


def _kinds_of_ranks(
    tensor: Tensor, num_ranks: int, group: dist.ProcessGroup | None
) -> tuple[list[torch.dtype], list[tuple[int, ...]]]:
    """The dtype and the shape of every rank's tensor."""
    padding = [-1] * (_MOST_DIMS - tensor.ndim)
    own = torch.tensor([_DTYPES.index(tensor.dtype), *tensor.shape, *padding], device=tensor.device)
    every = [torch.zeros_like(own) for _ in range(num_ranks)]
    dist.all_gather(every, own, group=group)
    dtypes, shapes = [], []
    for kind in every:
        code, *sizes = kind.tolist()
        dtypes.append(_DTYPES[code])
        shapes.append(tuple(size for size in sizes if size >= 0))
    return dtypes, shapes
