"""A block of this Transformers against what the other supported version computed."""

import pytest
import torch

from moetk import compare
from moetk.equivalence.stored import load_trace
from tests.layers.versions import DTYPES, VERSIONS, block_of, path_of, version
from tests.tiny import FAMILIES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_versions_state_the_same_function(family: str, dtype: torch.dtype) -> None:
    block, x, ctx = block_of(family, dtype)
    for other in VERSIONS:
        if other != version():
            stored = load_trace(path_of(family, dtype, other))
            report = compare(stored, block, x, ctx=ctx)
            assert report.ok, str(report)


def test_another_parameter_is_seen() -> None:
    block, x, ctx = block_of("qwen3_moe", torch.float32)
    block.experts.config._experts_implementation = "eager"
    with torch.no_grad():
        block.experts.down_proj[0] *= 1.001
    stored = load_trace(path_of("qwen3_moe", torch.float32, VERSIONS[0]))
    report = compare(stored, block, x, ctx=ctx)
    assert report.first is not None and report.first.stage == "expert_output"
