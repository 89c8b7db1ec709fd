"""Where the time of a call goes, by kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from moetk.bench.meter import Meter


@dataclass(frozen=True)
class Kernel:
    """One kernel's share of a call: its name, launches and milliseconds on the device."""

    name: str
    calls: int
    milliseconds: float
    share: float


def largest_kernels(call: Callable[[], object], meter: Meter, count: int = 25) -> list[Kernel]:
    """The `count` kernels that take most of the device's time in one call; on a CPU, torch's
    operators. Call it warm: what compiles in the call is not told apart."""
    cuda = meter.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    meter.synchronize()
    with profile(activities=activities) as found:
        call()
        meter.synchronize()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    times = [
        (event.self_device_time_total if cuda else event.self_cpu_time_total, event)
        for event in found.key_averages()
        if event.device_type == wanted
    ]
    total = sum(time for time, _ in times) or 1
    times.sort(key=lambda entry: -entry[0])
    return [
        Kernel(event.key, event.count, time / 1e3, time / total) for time, event in times[:count]
    ]
