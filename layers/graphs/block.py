"""Which calls of a mixture-of-experts block are replayed from CUDA graphs, and which run as Python.

A block of few tokens is as slow as the Python that launches it. A replay does the same work
without; it must not do what that Python would not have done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moetk.kernels.direct import direct, on_device_of
from moetk.layers.carrier import ModelForward, Visit
from moetk.layers.graphs.captured import Flight, Inference, Memories, Training
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
        if graphs is None or args or kwargs or not direct(hidden_states):
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
        self._last: _Replay | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model records its own; this may run before the block itself is copied.
        return Graphs, (self.parts, self.site, self.memories, self.tokens)

    def __call__(self, x: Tensor, plain: Callable[[Tensor], Any]) -> Any:
        """The block's output. x: of which `direct` holds. plain: the block's own forward."""
        key = _key(x)
        ahead = self._ahead(x, key)
        watch = self._taken(x)
        if watch is None:
            return plain(x)
        with_grad = torch.is_grad_enabled()
        state = watch.state(with_grad)
        if state is None:
            return plain(x)
        leaves = watch.leaves() if with_grad else []
        trains = with_grad and (x.requires_grad or bool(leaves))
        size = self._size(key)
        if size.state != state:
            size.move(state)
        if size.graph is not None and not size.graph.input.fits(x):
            size.graph, size.copies = None, True
        if size.graph is None and size.seen >= WARM_UP and size.reason is None:
            self._record(size, key, x, trains)
        graph = size.graph
        if graph is None:
            return _counted(size, x, plain, trains)
        if ahead is None or graph is not ahead.graph:
            if graph.flies:  # several forwards before a backward
                return plain(x)
            graph.launch(x)
            ahead = _Replay(key, graph, watch.addresses())
        self._last = ahead
        return graph.finish(_Run(self, graph, state), x, leaves)

    def _ahead(self, x: Tensor, key: object) -> _Replay | None:
        """Launches what the last call replayed, if this one is of its size, before all else is
        asked: meanwhile the device computes. In vain where the answer is another."""
        last, self._last = self._last, None
        if last is None or last.key != key or last.graph.flies or not last.graph.input.fits(x):
            return None
        watch = self._watch
        if watch is None or watch.addresses() != last.addresses:
            return None  # memory that may be gone
        if torch.cuda.is_current_stream_capturing():
            return None
        last.graph.launch(x)
        return last

    def _taken(self, x: Tensor) -> Watch | None:
        """The block as it is, where a replay could stand for this call."""
        if not self.site.active or x.dim() != 3 or not 0 < x.numel() <= self.tokens * x.shape[-1]:
            return None
        if _watched() or recomputing():
            return None
        visit: Visit | None = vars(self.parts.experts).get(BOUND)
        if visit is not None:
            forward = visit.forward
            if visit.sealed or forward.recordings or forward.replay is not None:
                return None
        block = self.parts.block
        if block.training and (self.site.attachment or vars(block).get("jitter_noise")):
            return None
        watch = self._watch
        if watch is None or watch.changed():
            self._sizes.clear()
            watch = self._watch = Watch(self.parts, self.site)
        return watch if watch.reason is None and not any(watch.hooks) else None

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

    def _record(self, size: _Size, key: tuple[Any, ...], x: Tensor, trains: bool) -> None:
        if sum(one.graph is not None for one in self._sizes.values()) >= SIZES:
            return
        block, watch = self.parts.block, self._watch
        assert watch is not None
        try:
            with on_device_of(x):
                memory = self.memories.at(key[:2], x.device)
                copies = size.copies or not x.is_contiguous()
                if trains:
                    size.graph = Training(block, x, copies, memory, watch.added)
                else:
                    size.graph = Inference(block, x, copies, memory)
        except Exception as error:  # whatever keeps it from a graph: Python goes on without
            size.reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]


class _Size:
    """One size of input. seen: calls that ran to their end. state: what they found where. copies:
    inputs did not always lie in the same place."""

    def __init__(self) -> None:
        self.copies = False
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


class _Replay(NamedTuple):
    """The last call, if it was replayed. addresses: of the weights then."""

    key: object
    graph: Inference | Training
    addresses: list[int]


class _Run(NamedTuple):
    """One replayed call, for its backward."""

    graphs: Graphs
    graph: Inference | Training
    state: object

    def backward(self, x: Tensor, dy: Tensor, flight: Flight) -> Sequence[Tensor | None]:
        assert isinstance(self.graph, Training)
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


def _key(x: Tensor) -> tuple[Any, ...]:
    """What one graph is recorded for: device and current stream first."""
    device, stream = x.get_device(), torch._C._cuda_getCurrentRawStream
    return device, stream(device), x.shape, x.dtype, torch.is_grad_enabled(), x.requires_grad
