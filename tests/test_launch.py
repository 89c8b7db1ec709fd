"""Launches below Triton's own looks at their arguments hand over what Triton itself would."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="pip installs Triton on Linux alone")

from triton.backends.nvidia import driver

from moetk.kernels.gpu import launch as room
from moetk.kernels.gpu.launch import Tiled

GRID, STREAM = (5, 1, 1), 7
SIGNATURE = {0: "*bf16", 1: "tensordesc<bf16[2, 8]>", 2: "i32", 3: "tensordesc<bf16[1, 4, 8]>"}
X, Y = torch.zeros(6, 8), torch.ones(12, 16)
ARGS = (X, Tiled(X, (6, 8), (2, 8)), 3, Tiled(Y, (3, 4, 16), (1, 4, 8)))
CONSTANTS = (16, "silu")


def made(launch: Any, **changes: Any) -> tuple[Any, list[tuple[Any, ...]]]:
    """A compiled kernel as Triton 3.6 makes it, around a launcher, and the calls of its `run`."""
    called: list[tuple[Any, ...]] = []

    class Launcher(driver.CudaLauncher):
        global_scratch_size = profile_scratch_size = 0
        launch_cooperative_grid, launch_pdl = False, True

        def __init__(self) -> None:
            pass  # it would compile

        def __call__(self, *args: Any) -> None:
            called.append(args)

    run = Launcher()
    vars(run).update(launch=launch, **changes)
    return SimpleNamespace(run=run, function=11, packed_metadata=(8, 1, 64)), called


def flat() -> list[Any]:
    return [X.data_ptr(), *ARGS[1:]]


def test_descriptors_are_expanded_as_by_triton() -> None:
    got: list[tuple[Any, ...]] = []
    inner = driver.wrap_handle_tensordesc(lambda *args: got.append(args), SIGNATURE, None)
    head = (*GRID, STREAM, 11, False, True, None, None, (8, 1, 64), None, None, None)
    inner(*head, *room._described(ARGS), *CONSTANTS)
    compiled, called = made(inner)
    below = room._Compiled(compiled)
    for _ in range(2):  # remembered the second time
        below.run(GRID, STREAM, flat(), ARGS, CONSTANTS)
    assert not called
    by_triton, *ours = got
    for mine in ours:
        assert len(mine) == len(by_triton)
        place = len(head)
        assert mine[place] == X.data_ptr() and by_triton[place] is X
        assert all(
            a is b if isinstance(b, torch.Tensor) else a == b
            for a, b in zip(
                mine[:place] + mine[place + 1 :],
                by_triton[:place] + by_triton[place + 1 :],
                strict=True,
            )
        )


def test_a_remembered_descriptor_is_that_of_its_address_and_shape() -> None:
    expanded = room._Expanded(lambda descriptor, metadata: [descriptor.shape, metadata], "how")
    first = expanded(ARGS[1])
    assert expanded(Tiled(X.view(6, 8), (6, 8), (2, 8))) is first
    assert expanded(Tiled(X, (3, 16), (2, 8))) == [[3, 16], "how"]
    assert expanded(Tiled(Y, (6, 8), (2, 8))) is not first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_MOST_REMEMBERED", 3)
        expanded(Tiled(Y, (24, 8), (2, 8)))
        assert len(expanded.known) == 1


@pytest.mark.parametrize(
    "launch, changes",
    [
        (lambda *args: None, {}),  # no descriptors, but no C function either
        (print, {"global_scratch_size": 64}),
        (print, {"profile_scratch_size": 64}),
    ],
)
def test_a_launcher_that_is_built_otherwise_is_left_to_triton(
    launch: Any, changes: dict[str, int]
) -> None:
    compiled, called = made(launch, **changes)
    room._Compiled(compiled).run(GRID, STREAM, flat(), ARGS, CONSTANTS)
    [args] = called
    assert args[:9] == (*GRID, STREAM, 11, (8, 1, 64), None, None, None)
    assert args[9] is X and args[10].block_shape == [2, 8] and args[12].strides == [64, 16, 1]
    assert args[-2:] == CONSTANTS


@pytest.mark.parametrize("version", ["3.5.1", "3.7.0", "3.60.0"])
def test_another_triton_is_left_alone(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.triton, "__version__", version)
    compiled, called = made(max)
    room._Compiled(compiled).run(GRID, STREAM, flat(), ARGS, CONSTANTS)
    assert len(called) == 1


def test_another_launcher_is_left_alone() -> None:
    compiled, called = made(max)
    compiled.run = lambda *args: called.append(args)
    room._Compiled(compiled).run(GRID, STREAM, flat(), ARGS, CONSTANTS)
    assert len(called) == 1


def test_a_c_function_is_called_as_it_is() -> None:
    compiled, called = made(max)
    below = room._Compiled(compiled)
    assert below.call is max and not below.tiled and not called
