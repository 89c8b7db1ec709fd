"""Tests of this folder are marked gpu, and skipped where their device is not there."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.gpu.device import DEVICE, KERNELS, why_not

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True, scope="session")
def device() -> torch.device:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    return DEVICE


@pytest.fixture(autouse=True, scope="session")
def twins_stand_in(device: torch.device) -> Iterator[None]:
    """In a dry run backend="fused" is taken on the CPU, where its operators are their twins."""
    backends = import_module("moetk.experts.backends")  # the package has a function of that name
    with pytest.MonkeyPatch.context() as patch:
        if not KERNELS:
            here = replace(backends.FUSED, device_types=(device.type,))
            patch.setitem(backends._BACKENDS, "fused", here)
            patch.setattr(backends, "_lacks_hopper", lambda device: None)
        yield


@pytest.fixture(autouse=True)
def errors_stay_in_their_test(device: torch.device) -> Iterator[None]:
    """The device reports them later, to whoever waits for it next."""
    yield
    if KERNELS:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
