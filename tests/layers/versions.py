"""Blocks whose parameters are drawn by their names, so that every version of Transformers has the
same ones, and what each version's blocks computed.

    python -m tests.layers.versions     writes the traces of the installed version
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from moetk import RouterContext, replace_moe
from moetk.equivalence.sides.pick import side_of
from moetk.equivalence.stored import save_trace
from moetk.equivalence.trace import observe
from moetk.layers.find import find_blocks
from tests.tiny import FAMILIES, tiny

TRACES = Path(__file__).parent / "traces"
VERSIONS = ("5.17", "5.23")
DTYPES = (torch.float32, torch.bfloat16)
HIDDEN = 16


def version() -> str:
    return ".".join(transformers.__version__.split(".")[:2])


def path_of(family: str, dtype: torch.dtype, written_by: str) -> Path:
    kind = str(dtype).removeprefix("torch.")
    return TRACES / f"{family}.{kind}.{written_by}.safetensors"


def block_of(
    family: str, dtype: torch.dtype, backend: str | None = None
) -> tuple[Any, Tensor, RouterContext]:
    """The last mixture-of-experts block of a tiny model, an input with ties, and its context.

    backend: replaced by moetk's; None = stock.
    """
    model = tiny(family, hidden_size=HIDDEN, moe_intermediate_size=8, intermediate_size=8)
    if backend is not None:
        replace_moe(model, backend=backend)
    block = list(find_blocks(model))[-1].block
    with torch.no_grad():
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            if tensor.is_floating_point():
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    x_BSH = torch.randn(2, 8, HIDDEN, generator=torch.Generator().manual_seed(0))
    x_BSH[:, 3] = x_BSH[:, 4]
    ctx = RouterContext(token_ids=torch.arange(16) % 96, batch_shape=(2, 8))
    return block.to(dtype).eval(), x_BSH.to(dtype), ctx


def write() -> None:
    TRACES.mkdir(exist_ok=True)
    for family in FAMILIES:
        for dtype in DTYPES:
            block, x_BSH, ctx = block_of(family, dtype)
            block.experts.config._experts_implementation = "eager"
            trace = observe(side_of(block, x_BSH, ctx), x_BSH.flatten(0, 1))
            save_trace(
                trace, path_of(family, dtype, version()), transformers=transformers.__version__
            )


if __name__ == "__main__":
    write()
