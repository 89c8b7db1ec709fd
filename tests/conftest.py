"""One world for every test: offline, one thread, fixed examples, poisoned uninitialised memory."""

import os

# Read when torch and huggingface_hub are first imported, so they are set before that.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

settings.register_profile(
    "ci", max_examples=50, derandomize=True, deadline=None, print_blob=True, database=None
)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of layers/ meet Transformers' own modules: they run on every supported version."""
    for item in items:
        if item.path.is_relative_to(TESTS / "layers"):
            item.add_marker(pytest.mark.v5)


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`allocate` with its result filled: NaN, or the lowest integer, which no index survives."""

    @wraps(allocate)
    def fill(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor  # the traced graph stays the user's own
        with torch.no_grad():
            if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
                tensor.fill_(float("nan"))
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(torch.iinfo(tensor.dtype).min)
        return tensor

    return fill


@pytest.fixture(autouse=True, scope="session")
def poison_uninitialised_memory() -> Iterator[None]:
    """Fresh memory often happens to be zero, and then a kernel that forgets a row looks right."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ]:
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """CUDA graphs, stood in for."""
    from tests.driver import installed

    return installed(monkeypatch)


@pytest.fixture
def gpu(driver: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A driver, and what a block that may be replayed asks the GPU. streams: the current one."""
    from tests.driver import Graph

    for room in ("block", "captured"):
        monkeypatch.setattr(
            f"moetk.layers.graphs.{room}.direct",
            lambda x: (
                type(x) is torch.Tensor
                and not torch.compiler.is_compiling()
                and not torch._C._are_functorch_transforms_active()
            ),
        )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(driver.recording))
    streams = {"now": 0}
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda device: streams["now"], raising=False
    )
    monkeypatch.setattr(driver, "streams", streams, raising=False)
    monkeypatch.setattr(Graph, "replays", 0)
    return driver
