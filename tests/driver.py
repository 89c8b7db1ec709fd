"""CUDA graphs on a machine without a GPU: a recording of torch's operators stands in for them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph(TorchDispatchMode):
    """As a torch.cuda.CUDAGraph: a replay runs the same operators on the same tensors."""

    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, Any, Any, Any]] = []
        self.alive: Callable[[], bool] = lambda: True  # the memory that its products work in

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        Graph.replays += 1
        assert self.alive(), "a product works in memory that is gone"
        for func, args, kwargs, out in self.operators:
            again = tree_leaves(func(*args, **kwargs))
            for kept, new in zip(tree_leaves(out), again, strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    with torch.autograd._unsafe_preserve_version_counter(kept):
                        kept.copy_(new)  # unseen by autograd, as by a kernel


class Side:
    def wait_stream(self, other: object) -> None:
        assert other == "default"


_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}


class Driver:
    """The part of torch.cuda that a capture uses, and the state that it leaves behind.

    cuBLAS works in memory that it takes at its first call on a stream, of the pool that is recorded
    with, and newer torch has it give that back when a graph of the stream ends.
    """

    def __init__(self) -> None:
        self.stream: object = "default"
        self.pools: list[str] = []
        self.graphs: dict[object, weakref.WeakSet[Graph]] = {}
        self.recording: set[object] = set()
        self.generator_waits = False
        self.broken = False
        self.blas = False  # made at its first product, which cannot be recorded
        self.workspaces: dict[object, object] = {}  # the pool, of each stream

    def current_stream(self) -> Any:
        return self.stream

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def graph_pool_handle(self) -> str:
        self.pools.append(f"pool {len(self.pools)}")
        return self.pools[-1]

    def graph(
        self,
        graph: Graph,
        pool: object = None,
        stream: Any = None,
        capture_error_mode: str = "global",
    ) -> Any:
        assert stream is self.stream and stream != "default"
        pool = object() if pool is None else pool
        graphs = self.graphs.get(pool)
        if graphs is not None and not graphs:
            # It went with its last graph.
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        self.graphs.setdefault(pool, weakref.WeakSet()).add(graph)
        return Capture(self, graph, pool)

    def workspace(self, graph: Graph, pool: object) -> None:
        """What a graph that was recorded computes its products in."""
        if any(func.__name__.split(".")[0] in _PRODUCTS for func, *_ in graph.operators):
            graphs = self.graphs[self.workspaces.setdefault(self.stream, pool)]
            graph.alive = lambda: len(graphs) > 0
        weakref.finalize(graph, self.workspaces.pop, self.stream, None)

    def end(self, device: int, pool: object) -> None:
        if pool not in self.recording:
            raise RuntimeError("not currently recording to mempool_id")
        self.recording.remove(pool)


class Capture:
    """As torch.cuda.graph: on its own stream, which it leaves current where it cannot be ended;
    then the allocator goes on recording and the generator waits."""

    def __init__(self, driver: Driver, graph: Graph, pool: object) -> None:
        self.driver, self.graph, self.pool = driver, graph, pool

    def __enter__(self) -> None:
        assert not self.driver.recording
        self.driver.recording.add(self.pool)
        self.driver.generator_waits = True
        self.graph.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.graph.__exit__(*error)
        if self.driver.broken:
            self.driver.broken = False
            self.driver.stream = "the capture's"
            raise RuntimeError("operation failed due to a previous error during capture")
        self.driver.recording.remove(self.pool)
        self.driver.generator_waits = False
        self.driver.workspace(self.graph, self.pool)


def installed(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver in the place of torch's, for one test."""
    made, mm = Driver(), torch.mm

    def product(*args: Any, **kwargs: Any) -> Tensor:
        if made.recording and not made.blas:
            raise RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED")
        made.blas = True
        return mm(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(torch.cuda, "Stream", Side)
    for name in ("current_stream", "graph_pool_handle", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", made.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *_: None, raising=False)
    return made
