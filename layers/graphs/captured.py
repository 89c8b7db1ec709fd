"""A block's forward and backward for one size of its input, as a CUDA graph each.

What `torch.cuda.make_graphed_callables` makes, but for four things. What a replay computes is
handed out as a copy, so that nobody's tensor changes under his hands. Its input is read where it
lies as long as it lies there in every call, which is the rule where each step allocates as the one
before, and copied only when it did not. Gradients that backward adds to itself are added to where
they lie. And the graph of a forward is not replayed again while the backward of its last replay is
still to come.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moetk.errors import BackendError
from moetk.kernels.cuda_graph import recorded
from moetk.kernels.direct import node
from moetk.kernels.first_order import refuse_second_order

# Other threads may go on allocating (a loader's pinned memory, NCCL's watchdog).
ERRORS = "thread_local"


class Memory:
    """What graphs have in common that run one after the other, on one stream: what they compute
    with, and where their inputs are put."""

    def __init__(self, device: torch.device) -> None:
        self.side, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        with torch.cuda.stream(self.side):
            # A pool ends with its last graph: this one stays.
            self._stays = recorded(lambda: torch.zeros(1, device=device), self.pool, ERRORS)
        self._inputs: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def input_like(self, tensor: Tensor) -> Tensor:
        key = (tensor.shape, tensor.dtype)
        if key not in self._inputs:
            self._inputs[key] = _buffer_like(tensor)
        return self._inputs[key]


class Memories:
    """A model's, one for each stream of each device."""

    def __init__(self) -> None:
        self._by_place: dict[object, Memory] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Memories, ()  # a copy of the model records its own

    def at(self, place: object, device: torch.device) -> Memory:
        """place: names the device and its current stream."""
        if place not in self._by_place:
            self._by_place[place] = Memory(device)
        return self._by_place[place]


class _Bare(nn.Module):
    """The block without its hooks, which run around its forward, recorded or not."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        return self.block.forward(x)


class Input:
    """What a graph reads. at: None = a buffer, into which each call's x is copied; else the address
    of all calls' x, which belongs to them."""

    def __init__(self, x: Tensor, buffer: Callable[[Tensor], Tensor] | None) -> None:
        self.at = x.data_ptr() if buffer is None else None
        self._buffer = None if buffer is None else buffer(x)

    def tensor(self, x: Tensor) -> Tensor:
        """To record with. Not kept: who holds another's memory sees it move."""
        return x.detach() if self._buffer is None else self._buffer

    def fits(self, x: Tensor) -> bool:
        return self.at is None or (x.data_ptr() == self.at and x.is_contiguous())

    def fill(self, x: Tensor) -> None:
        if self._buffer is not None:
            self._buffer.copy_(x)


class Inference:
    """y of x without gradients: where `fits(x)` and not `flies`, `launch` and then `finish`."""

    flies = False

    def __init__(self, block: nn.Module, x: Tensor, copies: bool, memory: Memory) -> None:
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(memory.side):
            self.input = Input(x, memory.input_like if copies else None)
            read = self.input.tensor(x)
            self.replay, y = recorded(lambda: block.forward(read), memory.pool, ERRORS)
            self.y = _one(y)

    def launch(self, x: Tensor) -> None:
        self.input.fill(x)
        self.replay()

    def finish(self, *_: object) -> Tensor:
        return self.y.clone()


class Flight:
    """From a replayed forward to its backward, or until nobody can ask for that any more."""

    __slots__ = ("__weakref__",)


class Training:
    """y of x, and the gradients of x and of the parameters that require one; used as `Inference`.

    added: names of parameters whose gradients the block's backward adds to itself.
    """

    def __init__(
        self, block: nn.Module, x: Tensor, copies: bool, memory: Memory, added: Sequence[str]
    ) -> None:
        self._flight: Callable[[], Flight | None] = _over
        # Leaves of this graph alone: autograd ties a leaf to the stream that used it first.
        twins: dict[str, Tensor] = {}
        for name, parameter in block.named_parameters():
            twin = parameter.detach().requires_grad_(parameter.requires_grad)
            if name in added:
                twin.grad = parameter.grad
            twins[f"block.{name}"] = twin
        with torch.inference_mode(False), torch.enable_grad(), torch.cuda.stream(memory.side):
            self.input = Input(x, _buffer_like if copies else None)
            leaf = self.input.tensor(x).detach().requires_grad_(x.requires_grad)
            bare = _Bare(block)
            # Its memory is its own: it has to stay as it is until backward.
            self.replay, made = recorded(
                lambda: functional_call(bare, twins, (leaf,)), errors=ERRORS
            )
            y = _one(made)
            wanted = [leaf, *twins.values()]
            inputs = [tensor for tensor in wanted if tensor.requires_grad]
            self.dy = memory.input_like(y)
            self.replay_backward, grads = recorded(
                lambda: torch.autograd.grad(y, inputs, self.dy, allow_unused=True),
                memory.pool,
                ERRORS,
            )
        self.y, given = y.detach(), iter(grads)
        # Of x and of every parameter that requires one, in order; None where nothing is returned.
        self.grads = [
            next(given) if tensor.requires_grad else None
            for n, tensor in enumerate(wanted)
            if n == 0 or tensor.requires_grad
        ]

    @property
    def flies(self) -> bool:
        """A backward may still come that needs what the last forward kept."""
        return self._flight() is not None

    def launch(self, x: Tensor) -> None:
        self.input.fill(x)
        self.replay()

    def finish(self, run: Run, x: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """y with a node, whose backward asks `run`."""
        y: Tensor = _replayed(self, run, x, *leaves)
        return y

    def take_off(self) -> tuple[Tensor, Flight]:
        """y, and what to come back with for the gradients."""
        flight = Flight()
        self._flight = weakref.ref(flight)
        return self.y.clone(), flight

    def backward(self, dy: Tensor, flight: Flight) -> list[Tensor | None] | None:
        """The gradients; None where they have been asked for before, and what they need is gone."""
        if self._flight() is not flight:
            return None
        self._flight = _over
        self.dy.copy_(dy)
        self.replay_backward()
        return [None if grad is None else grad.clone() for grad in self.grads]


class Run(Protocol):
    def backward(self, x: Tensor, dy: Tensor, flight: Flight) -> Sequence[Tensor | None]:
        """The gradients of x and of the leaves."""
        ...


def _over() -> None:
    return None


def _buffer_like(x: Tensor) -> Tensor:
    return torch.zeros_like(x, requires_grad=False)


def _one(y: Any) -> Tensor:
    if not isinstance(y, Tensor):
        raise BackendError(f"graphs: the block returns a {type(y).__name__}, not one tensor.")
    return y


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: Training, run: Run, x: Tensor, *leaves: Tensor) -> Tensor:
        y, ctx.flight = graph.take_off()
        ctx.run = run
        # For torch's own refusals: written to since, or freed by a backward before.
        ctx.save_for_backward(x, *leaves)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        refuse_second_order("a block replayed from CUDA graphs", "graphs=0")
        x, *_ = ctx.saved_tensors
        return (None, None, *ctx.run.backward(x, dy, ctx.flight))


_replayed = node(_Replayed)
