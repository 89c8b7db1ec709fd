"""Calls of one size of a block: what a recording of it holds for, and what became of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetk.layers.graphs.captured import Inference, Training

_TIMES = 3  # recordings of a size


def key_of(x: Tensor) -> tuple[Any, ...]:
    """What one graph is recorded for: device and current stream first."""
    device, with_grad = x.get_device(), torch.is_grad_enabled()
    stream = torch._C._cuda_getCurrentRawStream(device)
    wanted = with_grad and x.requires_grad
    return device, stream, x.shape, x.dtype, with_grad, wanted, *_settings()


def _settings() -> tuple[object, ...]:
    """Of the whole process, by which products and sums are computed."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.fp32_precision,
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction(),
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction(),
        torch._C._get_cublas_allow_fp16_accumulation(),
        torch._C._get_blas_preferred_backend(),
    )


class Size:
    """One size of input. seen: calls that ran to their end. used: the number of its last call.
    state: what they found where. copies, copies_dy: inputs, gradients of outputs do not always lie
    in the same place. reason: why it is not recorded any more."""

    def __init__(self) -> None:
        self.seen = self.used = self.dropped = 0
        self.state: object = None
        self.graph: Inference | Training | None = None
        self.copies = self.copies_dy = False
        self.reason: str | None = None

    def move(self, state: object) -> None:
        self.state = state
        if self.graph is not None:
            self.drop("its weights or gradients lie elsewhere time and again")
        self.seen = 0

    def look(self, graph: Inference | Training, x: Tensor) -> None:
        """Let go of a graph that x or the last gradient has turned out not to fit."""
        if isinstance(graph, Training) and graph.broken is not None:
            self.drop(graph.broken)
        elif isinstance(graph, Training) and graph.moved:
            self.graph, self.copies_dy = None, True
        elif not graph.input.fits(x):
            self.graph, self.copies, self.copies_dy = None, True, True

    def drop(self, why: str) -> None:
        """Start anew, unless it was so before."""
        self.seen, self.graph, self.dropped = 0, None, self.dropped + 1
        if self.dropped >= _TIMES:
            self.reason = why

    def count(self, _: object = None) -> None:
        self.seen += 1


class Last(NamedTuple):
    """The last call, where it was replayed."""

    key: object
    state: object
    graph: Inference | Training

    def holds(self, key: object, state: object, x: Tensor) -> bool:
        """Whether its graph could be launched for x: it reads and writes what is there."""
        return (
            key == self.key
            and state == self.state
            and not self.graph.pending
            and not self.graph.spent
            and self.graph.input.fits(x)
            and not torch.cuda.is_current_stream_capturing()
        )
