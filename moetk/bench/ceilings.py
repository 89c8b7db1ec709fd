"""What the device can do at all: the lines of the roofline, measured in the same run."""

from __future__ import annotations

import torch

from moetk.bench.meter import Meter, spread
from moetk.bench.rows import Row

DENSE, COPY = "ceiling dense product", "ceiling copy"


def ceilings(
    meter: Meter, dtype: torch.dtype = torch.bfloat16, side: int | None = None, rounds: int = 20
) -> list[Row]:
    """TFLOP/s of one square matrix product, TB/s of a copy (read and write) of 16 operands of it.

    side: of the operands, as large as fills the device: 8192 on a GPU, 512 elsewhere.
    """
    side = side or (8192 if meter.device.type == "cuda" else 512)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn((2, side, side), generator=generator).to(meter.device, dtype).unbind()
    source = a.repeat(16, 1)
    target = torch.empty_like(source)
    rates = {
        (DENSE, "TFLOP/s"): (2 * side**3 / 1e12, lambda: a @ b),
        (COPY, "TB/s"): (2 * source.nbytes / 1e12, lambda: target.copy_(source)),
    }
    rows = []
    for (what, unit), (work, call) in rates.items():
        times = [meter.milliseconds(call) / 1e3 for _ in range(3 + rounds)][3:]
        dtype_name = str(dtype).removeprefix("torch.")
        found = spread([work / time for time in times])
        rows.append(Row.of(what, "torch", f"side={side} dtype={dtype_name}", found, unit))
    return rows
