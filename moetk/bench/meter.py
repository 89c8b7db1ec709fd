"""What a bench reads off a device: times and, on a GPU, memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Protocol, TypeVar

import torch

Value = TypeVar("Value")


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements and how far they lie apart: median, p20 and p80."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, p20 and p80 of one or more values."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, *_, high = quantiles(values, n=5, method="inclusive")
    return Spread(median(values), low, high)


class Meter(Protocol):
    """Times and memory of one device. `has_memory`: whether its allocator tells bytes.

    `milliseconds` is the device's own clock around a call; `wall` is the host's, idle device to
    idle device, and returns the call's value too.
    """

    device: torch.device
    name: str
    has_memory: bool

    def synchronize(self) -> None: ...
    def milliseconds(self, call: Callable[[], object]) -> float: ...
    def wall(self, call: Callable[[], Value]) -> tuple[float, Value]: ...
    def allocated(self) -> int: ...
    def peak(self) -> int: ...
    def reset_peak(self) -> None: ...
    def release(self) -> None: ...


class HostMeter:
    """A CPU: wall-clock time, no memory."""

    has_memory = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = "none"

    def synchronize(self) -> None:
        pass

    def milliseconds(self, call: Callable[[], object]) -> float:
        return self.wall(call)[0]

    def wall(self, call: Callable[[], Value]) -> tuple[float, Value]:
        return _wall(call, self.synchronize)

    def allocated(self) -> int:
        return 0

    def peak(self) -> int:
        return 0

    def reset_peak(self) -> None:
        pass

    def release(self) -> None:
        gc.collect()


class CudaMeter:
    """A GPU: time between two events, bytes of torch's own allocator.

    Each call starts on an idle GPU, so that what the host cannot hide counts: a small layer is
    as slow as its launches. The host asks whether the GPU is done instead of sleeping, so that the
    next call does not begin with the host's waking up.
    """

    has_memory = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = torch.cuda.get_device_name(device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def milliseconds(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        while not end.query():
            pass
        self.synchronize()  # other streams
        return float(start.elapsed_time(end))

    def wall(self, call: Callable[[], Value]) -> tuple[float, Value]:
        return _wall(call, self.synchronize)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def _wall(call: Callable[[], Value], wait: Callable[[], None]) -> tuple[float, Value]:
    wait()
    start = time.perf_counter()
    value = call()
    wait()
    return (time.perf_counter() - start) * 1e3, value


def meter_for(device: torch.device | str | None = None) -> Meter:
    """The meter of a device, of the GPU where there is one and none is named; a wall clock for
    whatever is no GPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    return CudaMeter(device) if device.type == "cuda" else HostMeter(device)


class Phases:
    """The largest allocation within each phase of a step, in bytes.

    The allocator counts when the host asks for memory, not when the GPU runs, so that a phase
    begins and ends without waiting for the GPU.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.peaks: dict[str, int] = {}
        self._now: str | None = None

    def enter(self, name: str) -> None:
        self.leave()
        self.meter.reset_peak()
        self._now = name

    def leave(self) -> None:
        if self._now is not None:
            self.peaks[self._now] = max(self.peaks.get(self._now, 0), self.meter.peak())
            self._now = None

    def largest(self) -> tuple[str, int]:
        """The phase of the peak, and the peak."""
        name = max(self.peaks, key=lambda phase: self.peaks[phase])
        return name, self.peaks[name]
