"""AdamW's kernel: one step against fp64, trajectories beside torch's, no wait, large tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from moetk.kernels.adamw import Numbers, Row, adamw_, step_scales
from moetk.train import AdamW, adamw
from tests.gpu.device import DEVICE, KERNELS, needs_kernels, normal

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(64, 33), (5,), (), (0, 4), (3, 2048)]


@pytest.fixture(autouse=True)
def steps_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a dry run the twin steps, which AdamW would leave to torch on a CPU."""
    if not KERNELS:
        monkeypatch.setattr(adamw, "DEVICES", frozenset((DEVICE.type,)))


@pytest.mark.parametrize(
    "dtypes",
    [
        (BF16,) * 4,
        (FP32,) * 4,
        (FP16,) * 4,
        (FP32, BF16, BF16, FP32),
        (BF16, BF16, FP32, FP32),
    ],
    ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes),
)
@pytest.mark.parametrize(("size", "start"), [(1, 0), (2048 * 5, 0), (2048 * 5 + 3, 0), (40_000, 1)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_one_step_is_fp64s_rounded_once(dtypes, size, start, decay):
    """start: the tensors begin between multiples of 16 bytes."""
    drawn = [normal(n, size + start) for n in range(4)]
    drawn[3] = drawn[3].abs()
    row = Row(*(t.to(dtype)[start:] for t, dtype in zip(drawn, dtypes, strict=True)))
    before = Row(*(t.double() for t in row))
    lr, (beta1, beta2), eps, count = 3e-3, (0.9, 0.95), 1e-8, 7

    param, grad, first, second = before
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad.square()
    update = lr / (1 - beta1**count) / ((second / (1 - beta2**count)).sqrt() + eps)
    param = param * (1 - lr * decay) - update * first

    scales_N2 = step_scales([torch.tensor(float(count), device=DEVICE)], lr, (beta1, beta2))
    adamw_([row], scales_N2, Numbers.of(lr, (beta1, beta2), eps, decay))

    terms1 = beta1 * before.exp_avg.abs() + (1 - beta1) * grad.abs()
    # What the first moment lost where its terms cancel, the update has lost too.
    terms = before.param.abs() + update * (first.abs() + terms1)
    for got, want, size_of_terms in [
        (row.param, param, terms),
        (row.exp_avg, first, terms1),
        (row.exp_avg_sq, second, second),
    ]:
        stored, single = torch.finfo(got.dtype), torch.finfo(FP32)
        bound = want.abs() * stored.eps / 2 + size_of_terms * 8 * single.eps
        assert ((got.double() - want).abs() <= bound + stored.smallest_normal).all()
    assert torch.equal(row.grad.double(), grad)


def parameters(dtype: torch.dtype) -> list[Parameter]:
    return [Parameter(normal(n, *shape, dtype=dtype)) for n, shape in enumerate(SHAPES)]


def give_gradients(params: list[Parameter], seed: int) -> None:
    for n, param in enumerate(params):
        param.grad = normal(100 * seed + n, *param.shape, dtype=param.dtype)


@pytest.mark.parametrize("fused", [None, True])
def test_trajectories_and_checkpoints_are_torchs(fused):
    """In fp32; `fused` keeps the step on the device, and a checkpoint moves it across."""
    mine, theirs = parameters(FP32), parameters(FP32)
    ours = AdamW(mine, 1e-2, weight_decay=0.1, fused=fused)
    stock = torch.optim.AdamW(theirs, 1e-2, weight_decay=0.1, foreach=False)
    assert "kernel steps 5 parameters" in ours.explain() and "torch steps" not in ours.explain()
    for step in range(4):
        if step == 2:
            state = ours.state_dict()
            ours = AdamW(mine, 1.0, fused=None if fused else True)
            ours.load_state_dict(state)
        give_gradients(mine, step)
        give_gradients(theirs, step)
        ours.step()
        stock.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for param, other in zip(mine, theirs, strict=True):
        state = ours.state[param]
        assert state["step"].item() == 4
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[name], stock.state[other][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_twice_the_same_and_nearer_to_fp64_than_torchs_unfused_step(dtype):
    def last(kind: type[torch.optim.AdamW], dtype: torch.dtype) -> Tensor:
        param = Parameter(normal(0, 4000).to(start).to(dtype))
        optimizer = kind([param], 1e-2, foreach=False)
        for seed in range(1, 6):
            param.grad = normal(seed, 4000).to(start).to(dtype)
            optimizer.step()
        return param.detach()

    start = dtype
    ours, exact = last(AdamW, dtype), last(torch.optim.AdamW, torch.float64)
    assert torch.equal(last(AdamW, dtype), ours)
    distances = [
        float((found.double() - exact).norm()) for found in (ours, last(torch.optim.AdamW, dtype))
    ]
    assert distances[0] < distances[1] and math.isfinite(distances[0])


@needs_kernels
def test_what_the_kernel_does_not_take_torch_steps():
    param = Parameter(normal(0, 8, 6).t())
    twin = Parameter(param.detach().clone())
    ours, stock = AdamW([param], 1e-2), torch.optim.AdamW([twin], 1e-2)
    give_gradients([param], 1)
    twin.grad = param.grad.clone()
    assert "not contiguous" in ours.explain()
    ours.step()
    stock.step()
    torch.testing.assert_close(param, twin)


@needs_kernels
@pytest.mark.parametrize("fused", [None, True])
def test_the_host_waits_for_nothing(fused):
    params = parameters(BF16)
    optimizer = AdamW(params, 1e-3, fused=fused)
    for step in range(3):
        give_gradients(params, step)
        if step:
            torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")


@needs_kernels
def test_more_elements_than_an_int32_counts():
    row = Row(*(torch.ones(2**31 + 17, device=DEVICE, dtype=BF16) for _ in range(4)))
    scales_N2 = step_scales([torch.tensor(1.0, device=DEVICE)], 0.5, (0.9, 0.9))
    adamw_([row], scales_N2, Numbers.of(0.5, (0.9, 0.9), 1e-8, 0.0))
    assert bool((row.param == row.param[0]).all()) and bool(row.param[-1] != 1)


def test_a_backward_through_stepped_parameters_raises():
    param = Parameter(normal(0, 4, 4))
    loss = (param * param).sum()
    param.grad = normal(1, 4, 4)
    AdamW([param], 1e-2).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
