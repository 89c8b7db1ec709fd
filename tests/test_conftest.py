"""The tests' own world: uninitialised memory is poisoned wherever Python asks for it."""

import os

import pytest
import torch
from hypothesis import settings
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_floats_are_nan(dtype: torch.dtype) -> None:
    like = torch.zeros(3, dtype=dtype)
    for tensor in (
        torch.empty(2, 3, dtype=dtype),
        torch.empty_like(like),
        torch.empty_strided((2, 3), (3, 1), dtype=dtype),
        like.new_empty(3),
        like.new_empty_strided((3,), (1,)),
    ):
        assert tensor.dtype == dtype
        assert tensor.isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_are_no_index(dtype: torch.dtype) -> None:
    index = torch.empty(1, dtype=dtype)
    with pytest.raises((IndexError, RuntimeError)):
        torch.arange(4)[index]


def test_leaves_and_meta_and_fake_tensors_are_left_usable() -> None:
    leaf = torch.empty(2, requires_grad=True)
    assert leaf.is_leaf and leaf.requires_grad and leaf.isnan().all()
    assert torch.empty(2, device="meta").is_meta
    with FakeTensorMode():
        assert torch.empty(2).shape == (2,)


def test_a_forgotten_row_is_seen() -> None:
    out_TH = torch.empty(3, 4)
    out_TH[:2] = 1
    assert out_TH.sum().isnan()


def test_a_compiled_graph_is_the_users_own() -> None:
    def ones(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x).copy_(x) + 1

    x = torch.zeros(3)
    compiled = torch.compile(ones, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), torch.ones(3))


def test_examples_are_the_same_each_time_and_nothing_is_downloaded() -> None:
    if os.environ.get("HYPOTHESIS_PROFILE", "ci") == "ci":
        assert settings().derandomize and settings().max_examples == 50
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
