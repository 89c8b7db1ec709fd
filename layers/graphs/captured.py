"""A block's forward and backward for one size of its input, as a CUDA graph each.

What `torch.cuda.make_graphed_callables` makes, but for four things. What a replay computes is
handed out as a copy, so that nobody's tensor changes under his hands. Its input, and the gradient
of its output, are read where they lie as long as they lie there in every call, which is the rule
where each step allocates as the one before, and copied only when they did not. Gradients that
backward adds to itself are added to where they lie. And a graph whose backward is pending, which
still needs what its forward kept, is not replayed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moetk.errors import BackendError
from moetk.kernels.cuda_graph import Pool, Value, recorded
from moetk.kernels.direct import direct, node
from moetk.kernels.first_order import refuse_second_order
from moetk.kernels.fused_mlp import addable

# Other threads may go on allocating (a loader's pinned memory, NCCL's watchdog).
ERRORS = "thread_local"


class Memory:
    """What graphs have in common that run one after the other, on one stream: what they compute
    with, and where tensors are put that they read and do not keep."""

    def __init__(self, device: torch.device) -> None:
        self._side, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._shared: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        self._square = torch.zeros(16, 16, device=device)
        torch.mm(self._square, self._square)  # makes cuBLAS, which cannot be recorded
        self._stays: list[object] = []
        self.keep_for_cublas()

    def keep_for_cublas(self) -> None:
        """cuBLAS computes in memory that it takes at its first call on a stream, and again when it
        was made to give that back: by who asks for it, in newer torch by a graph that ends. Let it
        be this pool's, which stays, as a pool ends with its last graph: every graph of this stream
        is recorded with it."""
        square = self._square
        self._stays.append(self.recorded(lambda: torch.mm(square, square), self.pool))

    def recorded(
        self, call: Callable[[], Value], pool: Pool = None
    ) -> tuple[Callable[[], None], Value]:
        with torch.cuda.stream(self._side):
            return recorded(call, pool, ERRORS)

    def shared_like(self, tensor: Tensor) -> Tensor:
        key = (tensor.shape, tensor.dtype)
        if key not in self._shared:
            self._shared[key] = _buffer_like(tensor)
        return self._shared[key]


class Memories:
    """A model's, one for each stream of each device. lock: held while one thread replays."""

    def __init__(self) -> None:
        self._by_place: dict[object, Memory] = {}
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Memories, ()  # a copy of the model records its own

    def at(self, place: object, device: torch.device) -> Memory:
        """place: names the device and its current stream."""
        if place not in self._by_place:
            self._by_place[place] = Memory(device)
        return self._by_place[place]


class Bare(nn.Module):
    """The block without its hooks, which run around its forward, recorded or not."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        return self.block.forward(x)

    def with_parameters(self, names: Sequence[str], parameters: Sequence[Tensor], x: Tensor) -> Any:
        swapped = {f"block.{name}": p for name, p in zip(names, parameters, strict=True)}
        return functional_call(self, swapped, (x,))


def twin(parameter: Tensor, wanted: bool, adds: bool) -> Tensor:
    """A leaf of another graph in the same memory, with the same gradient where that is added to."""
    made = _unwatched(parameter).requires_grad_(wanted)
    if adds:
        made.grad = parameter.grad
    return made


class Input:
    """What a graph reads: x, or the gradient of y. address: of all calls' x, which belongs to them;
    None = of a buffer, into which each call's x is copied."""

    def __init__(self, x: Tensor, buffer: Callable[[Tensor], Tensor] | None) -> None:
        self.address = x.data_ptr() if buffer is None else None
        self._buffer = None if buffer is None else buffer(x)

    def tensor(self, x: Tensor) -> Tensor:
        """To record with. Not kept: who holds another's memory sees it move."""
        return _unwatched(x if self._buffer is None else self._buffer)

    def fits(self, x: Tensor) -> bool:
        return self.address is None or (x.data_ptr() == self.address and x.is_contiguous())

    def fill(self, x: Tensor) -> None:
        if self._buffer is not None:
            self._buffer.copy_(x.detach())  # else the buffer would hang on x's graph


Output = Tensor | tuple[Tensor, ...]  # gpt_oss's block returns its scores, too


class Inference:
    """y of x without gradients: where `input.fits(x)` and not `pending`, `launch` and `output`."""

    pending = spent = False

    def __init__(self, block: nn.Module, x: Tensor, copies: bool, memory: Memory) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.input = Input(x, memory.shared_like if copies else None)
            read = self.input.tensor(x)
            self.replay, y = memory.recorded(lambda: block.forward(read), memory.pool)
            self._y: Output = tuple(map(_one, y)) if type(y) is tuple else _one(y)

    def launch(self, x: Tensor) -> None:
        self.input.fill(x)
        self.replay()

    def output(self) -> Output:
        y = self._y
        return y.clone() if isinstance(y, Tensor) else tuple(one.clone() for one in y)


class Pending:
    """From a replayed forward to its backward, or until nobody can ask for that any more."""

    __slots__ = ("__weakref__",)


class Training:
    """y of x, and the gradients of x and of the parameters that require one; used as `Inference`.

    names: of the block's parameters. added: those whose gradients its backward adds to itself.
    copies_dy: the gradient of y lies now here, now there. Else its graph is recorded in the first
    backward, where that gradient lies. moved, broken: it lies elsewhere by now; what kept its graph
    from being recorded. Of either this graph is of no more use.
    """

    def __init__(
        self,
        block: nn.Module,
        x: Tensor,
        copies: bool,
        copies_dy: bool,
        memory: Memory,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        added: Sequence[str],
    ) -> None:
        self.moved = False
        self.broken: str | None = None
        self._memory = memory
        self._pending: Callable[[], Pending | None] = _over
        pairs = zip(names, parameters, strict=True)
        self._added = [name in added and parameter.requires_grad for name, parameter in pairs]
        self._places = self._places_of(parameters)
        with torch.inference_mode(False), torch.enable_grad():
            # On the caller's stream, which reads it until it is given back.
            self.input = Input(x, _buffer_like if copies else None)
            # Leaves of this graph alone: autograd ties a leaf to the stream that used it first.
            leaf = self.input.tensor(x).requires_grad_(x.requires_grad)
            both = zip(parameters, self._added, strict=True)
            twins = [twin(p, p.requires_grad, adds) for p, adds in both]
            bare = Bare(block)
            memory.keep_for_cublas()
            # Its memory is its own: it has to stay as it is until backward.
            self.replay, made = memory.recorded(lambda: bare.with_parameters(names, twins, leaf))
        y = _one(made)
        self._y = y.detach()
        self._unrecorded: tuple[Tensor, list[Tensor]] | None = (y, [leaf, *twins])
        if copies_dy:
            self._record_backward(y, copies=True)

    @property
    def pending(self) -> bool:
        """A backward may still come that needs what the last forward kept."""
        return self._pending() is not None

    @property
    def spent(self) -> bool:
        """There will be no backward by this graph."""
        return self.moved or self.broken is not None

    def launch(self, x: Tensor) -> None:
        self.input.fill(x)
        self.replay()

    def output(self) -> tuple[Tensor, Pending]:
        """y, and what to come back with for the gradients."""
        pending, here = Pending(), weakref.ref(self)

        def forgotten(_: object) -> None:
            graph = here()
            if graph is not None:
                graph._forget()

        # Until its backward is recorded it holds what autograd kept of the forward.
        self._pending = weakref.ref(pending, None if self._unrecorded is None else forgotten)
        return self._y.clone(), pending

    def _forget(self) -> None:
        if self._unrecorded is not None:
            self._unrecorded, self.broken = None, "nobody went back through it"

    def gradients(
        self, x: Tensor, dy: Tensor, parameters: Sequence[Tensor], pending: Pending
    ) -> list[Tensor | None] | None:
        """Of x and of the parameters, None for those that require none; None in all where what they
        need is gone: asked for before, or elsewhere by now."""
        if self._pending() is not pending or self._places_of(parameters) != self._places:
            return None
        if not self.input.fits(x):
            return None
        self._pending = _over
        if self._unrecorded is not None:
            try:
                self._record_backward(dy, copies=not dy.is_contiguous())
            except BaseException as error:  # whatever it is: Python goes on without
                self.broken = told(error)
                if not isinstance(error, Exception):
                    raise
                return None
        if not self._dy.fits(dy):
            self.moved = True
            return None
        self._dy.fill(dy)
        self.replay_backward()
        return [None if grad is None else grad.clone() for grad in self._grads]

    def _record_backward(self, dy: Tensor, *, copies: bool) -> None:
        """Once: what autograd keeps of the forward, the caller's x among it, is let go of."""
        assert self._unrecorded is not None
        (y, wanted), memory = self._unrecorded, self._memory
        self._unrecorded = None
        with torch.inference_mode(False):
            self._dy = Input(dy, memory.shared_like if copies else None)
        read, inputs = self._dy.tensor(dy), [one for one in wanted if one.requires_grad]
        with torch.inference_mode(False):
            self.replay_backward, grads = memory.recorded(
                lambda: torch.autograd.grad(y, inputs, read, allow_unused=True), memory.pool
            )
        given = iter(grads)
        self._grads = [next(given) if one.requires_grad else None for one in wanted]

    def _places_of(self, parameters: Sequence[Tensor]) -> tuple[list[int], list[int | None]]:
        into = [addable(p) for p, adds in zip(parameters, self._added, strict=True) if adds]
        lie = [parameter.data_ptr() for parameter in parameters]
        return lie, [None if grad is None else grad.data_ptr() for grad in into]


def told(error: BaseException) -> str:
    """An error in a line. The error itself would hold the tensors of every frame."""
    if isinstance(error, torch.OutOfMemoryError):
        return "there was no memory for it"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _over() -> None:
    return None


def _unwatched(tensor: Tensor) -> Tensor:
    """The same memory with a version of its own: what is written there before a backward is
    recorded is of no concern to it, which computes nothing then."""
    return tensor.data


def _buffer_like(x: Tensor) -> Tensor:
    return torch.zeros_like(x, requires_grad=False)


def _one(y: Any) -> Tensor:
    if not isinstance(y, Tensor):
        raise BackendError(f"graphs: the block returns a {type(y).__name__}, not one tensor.")
    return y


class Call(NamedTuple):
    """One replayed call, for its node: what its backward needs beside x and the parameters. again:
    the gradients by Python, of x, parameters, dy and which of them are wanted."""

    graph: Training
    lock: threading.Lock
    again: Callable[..., Sequence[Tensor | None]]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *parameters: Tensor) -> Tensor:
        y, ctx.pending = call.graph.output()
        ctx.call = call
        # For torch's own refusals: written to since, or freed by a backward before.
        ctx.save_for_backward(x, *parameters)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        refuse_second_order("a block replayed from CUDA graphs", "graphs=0")
        x, *parameters = ctx.saved_tensors
        call, grads = ctx.call, None
        # By Python where vmap asks for several gradients at once, or another thread replays.
        one = direct(dy) and not torch._C._functorch.is_legacy_batchedtensor(dy)
        outside = torch.cuda.is_current_stream_capturing()
        if one and not outside and call.lock.acquire(blocking=False):
            try:
                grads = call.graph.gradients(x, dy, parameters, ctx.pending)
            finally:
                call.lock.release()
        if grads is None:
            grads = call.again(x, parameters, dy, ctx.needs_input_grad[1:])
        return (None, *grads)


replayed = node(_Replayed)
