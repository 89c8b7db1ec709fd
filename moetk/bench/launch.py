"""How a step gets to the device: kernel by kernel as Python runs it, or replayed from a CUDA graph.

A small layer is as slow as its launches: moetk's of Qwen3's shape took 2.1 ms at 256 tokens on one
H200, 1.4 of them in kernels. The other ways take parts of the host's time away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moetk.bench.race import WARM_UP
from moetk.errors import ConfigError
from moetk.kernels.cuda_graph import recorded


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Step:
    """`call` is what is timed, and returns its output; `before` comes first and is not."""

    call: Callable[[], Tensor]
    before: Callable[[], None] = nothing

    def __call__(self) -> Tensor:
        self.before()
        return self.call()


class Launch(Protocol):
    """`name`: as rows tell it. `allocates`: whether a step takes its memory while it runs, so that
    saved and peak bytes can be read off the allocator."""

    @property
    def name(self) -> str: ...
    @property
    def allocates(self) -> bool: ...
    def ready(self, step: Step) -> Step:
        """The same step, launched this way; it may run a few times first."""
        ...


@dataclass(frozen=True)
class Eager:
    """As Python runs it."""

    name: str = "eager"
    allocates: bool = True

    def ready(self, step: Step) -> Step:
        return step


@dataclass(frozen=True)
class OneThread:
    """Backward in the calling thread. autograd has a thread for each device; on the virtual machine
    of that H200 the way there and back cost about 0.5 ms."""

    name: str = "one-thread"
    allocates: bool = True

    def ready(self, step: Step) -> Step:
        def call() -> Tensor:
            with torch.autograd.set_multithreading_enabled(False):
                return step.call()

        return Step(call, step.before)


@dataclass(frozen=True)
class Captured:
    """Recorded once in a CUDA graph that is replayed since: no Python, no allocation.

    What the step reads and writes stays where it is, gradients too: those that are there when the
    step is recorded are added to by every replay, those that are not are written anew.
    """

    name: str = "captured"
    allocates: bool = False

    def ready(self, step: Step) -> Step:
        """Raises what keeps the step from being recorded; the process can go on afterwards."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # Around the capture too: where that cannot be ended it leaves its stream the current one.
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step()
            step.before()
            replay, y = recorded(step.call)

        def call() -> Tensor:
            replay()
            return y

        return Step(call)


EAGER, ONE_THREAD, CAPTURED = Eager(), OneThread(), Captured()


def launches(device: torch.device, *, one_thread: bool, captured: bool) -> list[Launch]:
    """Eager, and the others that are wanted. Raises ConfigError for a capture without a GPU."""
    if captured and device.type != "cuda":
        raise ConfigError(f"--captured records CUDA graphs; device {device.type} has none.")
    return [EAGER, *([ONE_THREAD] if one_thread else []), *([CAPTURED] if captured else [])]
