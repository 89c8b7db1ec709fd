"""Recording a call in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")
Pool = Any  # an opaque handle of torch's


def recorded(
    call: Callable[[], Value], pool: Pool = None, errors: str = "global"
) -> tuple[Callable[[], None], Value]:
    """The replay of a call on the current stream (not the default one), and its value, whose
    tensors each replay fills anew. Nothing is computed while it is recorded.

    pool: the memory that it works in, of torch.cuda.graph_pool_handle(); None = its own. Graphs of
    one pool overwrite what the others left there and nobody holds. errors: torch's
    capture_error_mode. Raises what keeps the call from being recorded; the process can go on
    afterwards.
    """
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    stream, reason = torch.cuda.current_stream(), None
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=errors):
            try:
                value = call()
            except Exception as error:
                reason = error
                raise
    except Exception as error:
        _let_go(pool)
        # A broken capture cannot be ended; the error of that does not tell what broke it.
        raise reason or error from None
    return graph.replay, value


def _let_go(pool: Pool) -> None:
    """Undo what a broken capture leaves behind in torch (CUDAGraph::capture_end raises before it
    cleans up): an allocator that waits for the end of the capture, a random generator likewise."""
    device = torch.cuda.current_device()
    with suppress(RuntimeError):  # it did end; what failed was the call within
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream()):
        torch.zeros(1, device=device)  # a capture that ends well lets the generator go
