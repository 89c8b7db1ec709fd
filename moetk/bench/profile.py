"""Where the time of a call goes, by kernel, and how long the device waits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from moetk.bench.meter import Meter


@dataclass(frozen=True)
class Kernel:
    """One kernel's share of a call: its name, launches and milliseconds on the device. share: of
    the sum of all kernels."""

    name: str
    calls: int
    milliseconds: float
    share: float


@dataclass(frozen=True)
class Profile:
    """Kernels, the largest first, and three times in milliseconds. total: of all kernels, those
    that are not listed too. span: from the start of the first to the end of the last. idle: of the
    span, when none ran; span - total where kernels do not run side by side."""

    kernels: Sequence[Kernel]
    total: float
    span: float
    idle: float


def largest_kernels(call: Callable[[], object], meter: Meter, count: int = 25) -> Profile:
    """The `count` kernels that take most of the device's time in one call; on a CPU, torch's
    operators, each without those that it calls. Call it warm: what compiles in the call is not told
    apart."""
    cuda = meter.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    meter.synchronize()
    with profile(activities=activities) as found:
        call()
        meter.synchronize()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    # An annotation (an optimizer's step is one) spans kernels that are there themselves.
    events = [e for e in found.events() if e.device_type == wanted and not e.is_user_annotation]
    times: defaultdict[str, list[float]] = defaultdict(list)
    for event in events:
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        times[event.name].append(time / 1e3)
    total = sum(map(sum, times.values()))
    ranges = [(event.time_range.start / 1e3, event.time_range.end / 1e3) for event in events]
    span, idle = gaps(ranges)
    kernels = [
        Kernel(name, len(each), sum(each), sum(each) / (total or 1)) for name, each in times.items()
    ]
    kernels.sort(key=lambda kernel: -kernel.milliseconds)
    return Profile(kernels[:count], total, span, idle)


def gaps(ranges: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """From the first start to the last end, and how much of that lies in none of the ranges."""
    ordered = sorted(ranges)
    if not ordered:
        return 0.0, 0.0
    first = end = ordered[0][0]
    idle = 0.0
    for start, stop in ordered:
        idle += max(start - end, 0.0)
        end = max(end, stop)
    return end - first, idle
