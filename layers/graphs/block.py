"""Which calls of a mixture-of-experts block are replayed from CUDA graphs, and which run as Python.

A block of few tokens is as slow as the Python that launches it. A replay does the same work
without; it must not do what that Python would not have done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moetk.kernels.direct import direct, on_device_of
from moetk.kernels.fused_mlp import check_adds
from moetk.layers.carrier import ModelForward, Visit
from moetk.layers.graphs.captured import Flight, Inference, Memories, Training, replayed
from moetk.layers.graphs.watch import Parts, Watch
from moetk.layers.shells import BOUND, Site, recomputing
from moetk.layers.swap import extend, withdraw

GRAPHS = "_moetk_graphs"
WARM_UP = 2  # calls of a size before it is recorded: by then its kernels are compiled
SIZES = 8  # recorded for each block
_SEEN = 64  # sizes that are counted at once
_MOVES = 3  # recordings of a size whose weights or gradients have moved


def put_in(blocks: Sequence[tuple[Parts, Site]], tokens: int) -> None:
    """Let calls of at most so many tokens of these blocks of one model be replayed."""
    memories = Memories()
    for parts, site in blocks:
        extend(parts.block, BlockShell)
        vars(parts.block)[GRAPHS] = Graphs(parts, site, memories, tokens)


def take_out(block: nn.Module) -> None:
    vars(block).pop(GRAPHS, None)
    withdraw(block)


class BlockShell:
    """In front of a mixture-of-experts block."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        graphs: Graphs | None = self.__dict__.get(GRAPHS)
        plain = super().forward  # type: ignore[misc]
        compiling = torch.compiler.is_compiling()
        if compiling or graphs is None or args or kwargs or not graphs.take(hidden_states):
            return plain(hidden_states, *args, **kwargs)
        return graphs(hidden_states, plain)


class Graphs:
    """Of one block: the sizes that were recorded, and what they were recorded with.

    tokens: calls of more are left to Python, as is every call in which somebody else has a part: a
    hook inside the block, a router of the user's, losses and controllers in training, a recording
    or a replay of routings, activation checkpointing, autocast, torch.compile, an outer capture.
    """

    def __init__(self, parts: Parts, site: Site, memories: Memories, tokens: int) -> None:
        self.parts, self.site, self.memories, self.tokens = parts, site, memories, tokens
        self._watch: Watch | None = None
        self._sizes: dict[Any, _Size] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model records its own; this may run before the block itself is copied.
        return Graphs, (self.parts, self.site, self.memories, self.tokens)

    def take(self, x: Tensor) -> bool:
        """Whether a replay could stand for this call."""
        if not self.site.active or x.dim() != 3 or not 0 < x.numel() <= self.tokens * x.shape[-1]:
            return False
        if not direct(x) or _watched() or recomputing():
            return False
        visit: Visit | None = vars(self.parts.experts).get(BOUND)
        if visit is not None:
            forward = visit.forward
            if visit.sealed or forward.recordings or forward.replay is not None:
                return False
        block = self.parts.block
        if block.training and (self.site.attachment or vars(block).get("jitter_noise")):
            return False
        watch = self._watch
        if watch is None or watch.changed():
            self._sizes.clear()
            watch = self._watch = Watch(self.parts, self.site)
        return watch.reason is None and not any(watch.hooks)

    def __call__(self, x: Tensor, plain: Callable[[Tensor], Any]) -> Any:
        """The block's output, for a call that `take` takes. plain: its own forward."""
        watch = self._watch
        assert watch is not None
        trains = torch.is_grad_enabled() and (x.requires_grad or bool(watch.leaves()))
        state = watch.state(trains)
        if state is None:
            return plain(x)
        place = _place(x)
        size = self._size((place, x.shape, x.dtype, trains, trains and x.requires_grad))
        if size.state != state:
            size.move(state)
        if size.graph is None and size.seen >= WARM_UP and size.reason is None:
            self._record(size, place, x, trains)
        if size.graph is None:
            return _counted(size, x, plain, trains)
        if isinstance(size.graph, Inference):
            return size.graph(x)
        assert size.graph is not None
        if size.graph.flies:  # several forwards before a backward
            return plain(x)
        if self.site.add_to_grad:
            up, down = watch.matrices()
            check_adds(x, up, down)
        return replayed(_Run(self, size, size.graph, state), x, *watch.leaves())

    def again(self, x: Tensor, dy: Tensor) -> list[Tensor | None]:
        """The gradients of x and of the leaves by Python, within backward."""
        watch, parts = self._watch, self.parts
        assert watch is not None
        leaf = x.detach().requires_grad_(x.requires_grad)
        leaves = [leaf, *watch.leaves()]
        visit = Visit(ModelForward(), 0)  # of which the family's own router reads nothing
        shells = (vars(parts.gate), vars(parts.experts))
        before = [held.get(BOUND) for held in shells]
        try:
            for held in shells:
                held[BOUND] = visit
            with torch.enable_grad():
                y = parts.block.forward(leaf)
        finally:
            for held, was in zip(shells, before, strict=True):
                held[BOUND] = was
        wanted = [tensor for tensor in leaves if tensor.requires_grad]
        grads = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True))
        return [next(grads) if tensor.requires_grad else None for tensor in leaves]

    def still(self, state: object) -> bool:
        """Whether weights and gradients lie where they lay."""
        watch = self._watch
        return watch is not None and not watch.changed() and watch.state(True) == state

    def explain(self) -> str:
        """What is replayed by now, or why nothing is."""
        watch = Watch(self.parts, self.site)
        if watch.reason is not None:
            return f"none: {watch.reason}"
        if any(watch.hooks):
            return "none: a hook within the block runs in Python"
        recorded = sum(size.graph is not None for size in self._sizes.values())
        reasons = dict.fromkeys(one.reason for one in self._sizes.values() if one.reason)
        return "; ".join((f"{recorded} sizes recorded", *reasons))

    def _size(self, key: Any) -> _Size:
        sizes = self._sizes
        size = sizes.get(key)
        if size is None:
            if len(sizes) >= _SEEN:  # the oldest that came to nothing
                del sizes[next(k for k, one in sizes.items() if one.graph is None)]
            size = sizes[key] = _Size()
        return size

    def _record(self, size: _Size, place: object, x: Tensor, trains: bool) -> None:
        if sum(one.graph is not None for one in self._sizes.values()) >= SIZES:
            return
        block, watch = self.parts.block, self._watch
        assert watch is not None
        try:
            with on_device_of(x):
                memory = self.memories.at(place)
                if trains:
                    size.graph = Training(block, x, watch.added, memory)
                else:
                    size.graph = Inference(block, x, memory)
        except Exception as error:  # whatever keeps it from a graph: Python goes on without
            size.reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]


class _Size:
    """One size of input. seen: calls that ran to their end. state: what they found where."""

    def __init__(self) -> None:
        self.seen = self.moves = 0
        self.state: object = None
        self.graph: Inference | Training | None = None
        self.reason: str | None = None

    def move(self, state: object) -> None:
        self.seen, self.state = 0, state
        if self.graph is not None:
            self.graph, self.moves = None, self.moves + 1
        if self.moves >= _MOVES:
            self.reason = "weights or gradients lie elsewhere time and again"

    def count(self, _: object = None) -> None:
        self.seen += 1


class _Run:
    """One replayed call, for its node."""

    def __init__(self, graphs: Graphs, size: _Size, graph: Training, state: object) -> None:
        self.graphs, self.graph, self.state = graphs, graph, state

    def forward(self, x: Tensor) -> tuple[Tensor, Flight]:
        return self.graph.forward(x)

    def backward(self, x: Tensor, dy: Tensor, flight: Flight) -> Sequence[Tensor | None]:
        grads = self.graph.backward(dy, flight) if self.graphs.still(self.state) else None
        return self.graphs.again(x, dy) if grads is None else grads


def _counted(size: _Size, x: Tensor, plain: Callable[[Tensor], Any], trains: bool) -> Any:
    """The block by Python; counted when it has run, backward included."""
    if not trains:
        y = plain(x)
        size.count()
        return y
    inner = x.view_as(x) if x.requires_grad else x  # whose gradient comes last, and once
    y = plain(inner)
    last = inner if x.requires_grad else y
    if isinstance(last, Tensor) and last.requires_grad:
        last.register_hook(size.count)
    return y


def _watched() -> bool:
    """An outer capture, autocast, or who keeps tensors of the graph elsewhere (checkpointing)."""
    return (
        torch.cuda.is_current_stream_capturing()
        or torch.is_autocast_enabled("cuda")
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def _place(x: Tensor) -> object:
    """Device and current stream."""
    device = x.get_device()
    return device, torch._C._cuda_getCurrentRawStream(device)
