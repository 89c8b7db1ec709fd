"""Which calls of a mixture-of-experts block are replayed from CUDA graphs, and which run as Python.

A block of few tokens is as slow as the Python that launches it. A replay does the same work
without; it must not do what that Python would not have done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, update_wrapper
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from moetk.errors import ReplaceError
from moetk.experts import pick_backend
from moetk.experts.backends import FUSED
from moetk.kernels.direct import direct, on_device_of
from moetk.layers.carrier import ModelForward, Visit
from moetk.layers.find import runs_on
from moetk.layers.graphs.captured import (
    Bare,
    Call,
    Inference,
    Memories,
    Output,
    Training,
    replayed,
    told,
    twin,
)
from moetk.layers.graphs.sizes import Last, Size, key_of
from moetk.layers.graphs.watch import Parts, Watch, is_custom
from moetk.layers.shells import BOUND, Site, recomputing
from moetk.layers.swap import extend, withdraw

GRAPHS = "_moetk_graphs"
WARM_UP = 2  # calls of a size before it is recorded: by then its kernels are compiled
SIZES = 8  # recorded at once for each block
_SEEN = 64  # sizes that are counted at once


class Calls(NamedTuple):
    """Which calls are replayed: of at most so many tokens, with gradients too or without alone, by
    these backends. recordings: of a block, in all."""

    tokens: int
    gradients: bool
    backends: tuple[str, ...]
    recordings: float

    def __str__(self) -> str:
        return f"up to {self.tokens} tokens{'' if self.gradients else ' without gradients'}"


# What decoding calls, by the backend of which it is known that it can be recorded.
UNASKED = Calls(64, False, ("fused",), 32)


def asked(tokens: int) -> Calls:
    """Transformer Engine copies the number of rows to the host; the others are tried."""
    return Calls(tokens, True, ("reference", "grouped", "fused"), math.inf)


def put_in(blocks: Sequence[tuple[Parts, Site]], calls: Calls) -> None:
    """Let these calls of these blocks of one model be replayed. Unasked only where `fused` could
    run, and no Python of the user's would be in the way."""
    memories = Memories()
    for parts, site in blocks:
        if calls == UNASKED and (site.backend not in ("auto", "fused") or is_custom(parts, site)):
            continue
        with suppress(ReplaceError):  # a forward on the instance, of which `explain` tells
            extend(parts.block, BlockShell)
        vars(parts.block)[GRAPHS] = Graphs(parts, site, memories, calls)


def take_out(block: nn.Module) -> None:
    vars(block).pop(GRAPHS, None)
    withdraw(block)


class BlockShell:
    """In front of a mixture-of-experts block."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        original = vars(cls).get("_moetk_original")
        if original is not None:  # and not a class that another library puts on top
            cls.forward = _in_front_of(original.forward)  # type: ignore[attr-defined]


def _in_front_of(stock: Any) -> Any:
    """Of this forward's signature, from which callers read what to pass."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, BlockShell):  # who kept this method, and called it after `restore`
            return stock(self, *args, **kwargs)
        graphs: Graphs | None = self.__dict__.get(GRAPHS)
        plain = super(BlockShell, self).forward  # type: ignore[misc]
        if graphs is None or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            return plain(*args, **kwargs)
        if not direct(args[0]) or not graphs.of(self):
            return plain(args[0])
        return graphs(args[0], plain)

    # One of its own for each class: torch.compile counts what it compiled by it.
    forward.__code__ = forward.__code__.replace()
    return update_wrapper(forward, stock, updated=())


class Graphs:
    """Of one block: the sizes that were recorded, and what they were recorded with.

    calls: others are left to Python, as is every call in which something else may have a part: a
    hook or a class of the user's within the block, a router of his own, losses and controllers in
    training, a recording or a replay of routings, activation checkpointing, autocast, a mode of
    torch's, torch.compile, an outer capture, another thread's call at the same time. (Two threads
    that train one block at once are not provided for.)
    """

    def __init__(self, parts: Parts, site: Site, memories: Memories, calls: Calls) -> None:
        self.parts, self.site, self.memories, self.calls = parts, site, memories, calls
        self._watch: Watch | None = None
        self._sizes: dict[Any, Size] = {}
        self._last: Last | None = None
        self._why: str | None = None
        self._calls = self._recordings = 0
        self._not_fused: object = None  # dtype and device on which `fused` does not run

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model records its own; this may run before the block itself is copied.
        return Graphs, (self.parts, self.site, self.memories, self.calls)

    def of(self, block: object) -> bool:
        """Whether they are this block's, and not those that a shallow copy came with."""
        return self.parts.block is block

    def __call__(self, x: Tensor, plain: Callable[[Tensor], Any]) -> Any:
        """The block's output. x: of which `direct` holds. plain: the block's own forward."""
        if not self._few(x):
            self._why = "it was none of these"
            return plain(x)
        if self._not_fused == (x.dtype, x.device):
            return plain(x)
        if not self.memories.lock.acquire(blocking=False):
            return plain(x)  # another thread's call, whose memory this one would overwrite
        try:
            y = self._replayed(x)
        finally:
            self.memories.lock.release()
        if isinstance(y, Size):
            return _counted(y, x, plain) if y.reason is None else plain(x)
        return plain(x) if y is None else y

    def _few(self, x: Tensor) -> bool:
        if not self.calls.gradients and torch.is_grad_enabled():
            return False
        return x.dim() == 3 and 0 < x.numel() <= self.calls.tokens * x.shape[-1]

    def _replayed(self, x: Tensor) -> Output | Size | None:
        """The output; or the size to be counted, None for a call that does not count."""
        key, watch, last, ahead = key_of(x), self._watch, self._last, None
        self._last = None
        with_grad = torch.is_grad_enabled()
        state = None if watch is None else watch.state(with_grad)
        # What the last call replayed is launched before all else is asked: meanwhile the device
        # computes. In vain where the answer is another; but never into memory that is not there.
        if last is not None and last.holds(key, state, x):
            last.graph.launch(x)
            ahead = last
        self._why = self._why_not(x)
        if self._why is not None:
            return None
        assert self._watch is not None
        if watch is not self._watch:
            watch, ahead = self._watch, None
            state = watch.state(with_grad)
        if state is None:
            self._why = "the experts train, without gradients that are there to be added to"
            return None
        size = self._size(key)
        if size.state != state:
            size.move(state)
        if size.graph is not None:
            size.look(size.graph, x)
        if size.graph is None and size.seen >= WARM_UP and size.reason is None:
            self._record(size, key, x, watch)
        graph = size.graph
        if graph is None:
            self._why = size.reason or "its size has not come often enough"
            return size
        if ahead is None or ahead.graph is not graph:
            if graph.pending:
                self._why = "the backward of the forward before was still to come"
                return None
            graph.launch(x)
            ahead = Last(key, state, graph)
        self._last = ahead
        if isinstance(graph, Inference):
            return graph.output()
        then = _Then(watch, watch.buffers(), [module.training for module in watch.modules])
        call = Call(graph, self.memories.lock, partial(self._again, then))
        return replayed(call, x, *watch.parameters())  # type: ignore[no-any-return]

    def _why_not(self, x: Tensor) -> str | None:
        """Why this call runs as Python; None where a replay can stand for it."""
        if not self.site.active:
            return "the model was restored"
        if torch.cuda.is_current_stream_capturing():
            return "it was captured from outside"
        if torch.is_autocast_enabled("cuda"):
            return "autocast was on"
        if recomputing() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return "what backward needs was kept elsewhere (checkpointing)"
        if _in_a_function_mode():
            return "a mode of torch's was on"
        visit: Visit | None = vars(self.parts.experts).get(BOUND)
        if visit is not None:
            forward = visit.forward
            if visit.sealed or forward.recordings or forward.replay is not None:
                return "routings were recorded or replayed"
        block = self.parts.block
        if block.training and (self.site.attachment or vars(block).get("jitter_noise")):
            return "losses, controllers or noise act in training"
        watch = self._watch
        if watch is None or watch.changed():
            self._sizes.clear()
            watch = self._watch = Watch(self.parts, self.site)
        if watch.reason is None and watch.hooked():
            return "a hook within the block acts"
        return watch.reason

    def _again(
        self,
        then: _Then,
        x: Tensor,
        parameters: Sequence[Tensor],
        dy: Tensor,
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients of x and of the parameters by Python, for the block that the forward found.

        Raises RuntimeError where it is another by now: what it chose could be, too.
        """
        written = [buffer._version for buffer in then.buffers] != then.versions
        if written or then.watch.changed() or then.watch.hooked():
            what = "a buffer has been modified by an inplace operation" if written else "it changed"
            raise RuntimeError(
                f"{self.site.name}: what its forward kept is gone, or lies elsewhere, and {what} "
                "since, so that it cannot be computed again. Go back once, and before the next "
                "forward; or graphs=0."
            )
        leaf, names, added = (
            x.detach().requires_grad_(wanted[0]),
            then.watch.names,
            then.watch.added,
        )
        triples = zip(parameters, wanted[1:], names, strict=True)
        leaves = [leaf, *(twin(p, want, name in added) for p, want, name in triples)]
        plainly = torch.autocast("cuda", enabled=False)
        with self._as(then), torch.inference_mode(False), torch.enable_grad(), plainly:
            y = Bare(self.parts.block).with_parameters(names, leaves[1:], leaf)
        asked = [one for one, want in zip(leaves, wanted, strict=True) if want]
        grads = iter(torch.autograd.grad(y, asked, dy, allow_unused=True))
        return [next(grads) if want else None for want in wanted]

    @contextmanager
    def _as(self, then: _Then) -> Iterator[None]:
        """The block trains as it did, and runs in a forward of its own, of which the family's own
        router reads nothing."""
        visit, modules = Visit(ModelForward(), 0), then.watch.modules
        shells = (vars(self.parts.gate), vars(self.parts.experts))
        before = [{key: held[key] for key in (BOUND,) if key in held} for held in shells]
        trained = [module.training for module in modules]
        kept, self._last = (self._last, self._why), None  # or the last would be launched
        try:
            for held in shells:
                held[BOUND] = visit
            _set_training(modules, then.training)
            yield
        finally:
            for held, was in zip(shells, before, strict=True):
                del held[BOUND]
                held.update(was)
            _set_training(modules, trained)
            self._last, self._why = kept

    def explain(self) -> str | None:
        """Which calls are to be replayed, and what is by now, or why nothing is. None where nobody
        asked for it, and there is no GPU."""
        experts = self.parts.experts
        if self._watch is None and self.calls == UNASKED and not _on_gpu(experts):
            return None
        if self._watch is None and (device := runs_on(experts)).type != "cuda":
            return f"CUDA graphs, {self.calls}: none: device {device.type}, needs cuda"
        return f"CUDA graphs, {self.calls}: {self._told()}"

    def _told(self) -> str:
        watch = self._watch
        if watch is None or watch.changed():
            watch = Watch(self.parts, self.site)
        if watch.reason is not None:
            return f"none: {watch.reason}"
        recorded = sum(size.graph is not None for size in self._sizes.values())
        reasons = dict.fromkeys(one.reason for one in self._sizes.values() if one.reason)
        last = [f"the last call ran as Python: {self._why}"] if self._why else []
        return "; ".join((f"sizes recorded: {recorded}", *reasons, *last))

    def _size(self, key: Any) -> Size:
        sizes = self._sizes
        size = sizes.get(key)
        if size is None:
            if len(sizes) >= _SEEN:
                idle = [known for known, one in sizes.items() if one.graph is None]
                # Those that cannot be recorded last: they would be tried again.
                del sizes[min(idle, key=lambda known: sizes[known].reason is not None)]
            size = sizes[key] = Size()
        self._calls += 1
        size.used = self._calls
        return size

    def _record(self, size: Size, key: tuple[Any, ...], x: Tensor, watch: Watch) -> None:
        if self._recordings >= self.calls.recordings:
            size.reason = f"its block has been recorded {self._recordings} times"
            return
        recorded = [one for one in self._sizes.values() if one.graph is not None]
        if len(recorded) >= SIZES:
            min(recorded, key=lambda one: one.used).drop("its block is called with too many sizes")
        site, block = self.site, self.parts.block
        try:
            parameters = watch.parameters()
            trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
            rows = x.numel() // x.shape[-1] * site.top_k
            # On the stream that is recorded on, auto would take another.
            backend = pick_backend(site.backend, x.dtype, x.device, rows, spec=site.spec).name
            if backend not in self.calls.backends:
                size.reason = f"{backend} may wait for the host"
                never = FUSED.why_not(x.dtype, x.device, site.spec) is not None
                if never and self.calls == UNASKED:
                    self._not_fused = x.dtype, x.device
                return
            self._recordings += 1
            with on_device_of(x):
                memory = self.memories.at(key[:2], x.device)
                copies = size.copies or not x.is_contiguous()
                if trains:
                    names, added, copies_dy = watch.names, watch.added, size.copies_dy
                    size.graph = Training(
                        block, x, copies, copies_dy, memory, names, parameters, added
                    )
                else:
                    size.graph = Inference(block, x, copies, memory)
        except torch.OutOfMemoryError as error:
            size.drop(told(error))  # which may be there the next time
        except Exception as error:  # whatever keeps it from a graph: Python goes on without
            size.reason = told(error)


def _on_gpu(module: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in module.parameters())


class _Then:
    """What a replayed forward found, for a backward by Python."""

    def __init__(self, watch: Watch, buffers: list[Tensor], training: list[bool]) -> None:
        self.watch, self.buffers, self.training = watch, buffers, training
        self.versions = [buffer._version for buffer in buffers]


def _set_training(modules: Sequence[nn.Module], training: Sequence[bool]) -> None:
    for module, trains in zip(modules, training, strict=True):
        module.training = trains


def _counted(size: Size, x: Tensor, plain: Callable[[Tensor], Any]) -> Any:
    """The block by Python; counted when it has run, backward included."""
    # Its gradient comes last, and once.
    inner = x.view_as(x) if torch.is_grad_enabled() and x.requires_grad else x
    y = plain(inner)
    last = y if inner is x else inner
    if isinstance(last, Tensor) and last.requires_grad:
        last.register_hook(size.count)
    else:
        size.count()
    return y


def _in_a_function_mode() -> bool:
    """Beside torch.set_default_device, which asks only where tensors are made."""
    number = torch._C._len_torch_function_stack()
    return any(type(torch._C._get_function_stack_at(n)) is not DeviceContext for n in range(number))
