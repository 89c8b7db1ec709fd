"""AdamW: torch's in state, settings and checkpoints; a step is fp64's, rounded once.

The kernel's twin runs here in the kernel's place. The kernel itself is met in Triton's interpreter,
which is chosen where Triton is first imported, so this file also runs itself in a process of its
own; it is trusted with float32 and float16 alone.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from moetk.kernels.adamw import DTYPES, Numbers, Row, adamw_, adamw_plain_, step_scales
from moetk.train import AdamW, adamw
from tests.interpreted import outcomes_of, tell

FLOATS = sorted(DTYPES, key=str)
SHAPES = [(5, 3), (), (0, 4), (17,)]


@contextmanager
def kernel_on_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw, "DEVICES", frozenset(("cpu", "cuda")))
        yield


@pytest.fixture
def on_cpu() -> Iterator[None]:
    with kernel_on_cpu():
        yield


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(normal(i, *shape, dtype=dtype)) for i, shape in enumerate(SHAPES)]


def give_gradients(params: list[Parameter], seed: int) -> None:
    for i, param in enumerate(params):
        param.grad = normal(100 * seed + i, *param.shape, dtype=param.dtype)


def run(optimizer: torch.optim.Optimizer, steps: range) -> list[Parameter]:
    params: list[Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    for seed in steps:
        give_gradients(params, seed)
        optimizer.step()
    return params


def state_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return state


def assert_near(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """The same parameters and state, but for the rounding of a few steps in float32."""
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        torch.testing.assert_close(group["params"], other["params"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state_of(ours), state_of(theirs), rtol=1e-5, atol=1e-6)


hyper = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-5, 3e-3, 0.5]),
        "betas": st.tuples(st.sampled_from([0.0, 0.4, 0.9]), st.sampled_from([0.0, 0.95, 0.999])),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.01, 1.0]),
        "maximize": st.booleans(),
    }
)


@settings(max_examples=60)
@given(
    hyper, st.tuples(*[st.sampled_from(FLOATS)] * 4), st.sampled_from([1, 2, 7, 5000]), st.data()
)
def test_one_step_is_torchs_in_fp64_rounded_once(
    given: dict[str, Any], dtypes: tuple[torch.dtype, ...], count: int, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 1000))
    row = Row(*(normal(seed + i, 6, 4, dtype=dtype) for i, dtype in enumerate(dtypes)))
    row.exp_avg_sq.square_()
    wide = Parameter(row.param.double())
    exact = torch.optim.AdamW([wide], foreach=False, **given)
    wide.grad = row.grad.double()
    moments = {"exp_avg": row.exp_avg.double(), "exp_avg_sq": row.exp_avg_sq.double()}
    exact.state[wide] = {"step": torch.tensor(float(count - 1)), **moments}
    before = Row(*(tensor.double() for tensor in row))
    exact.step()

    scales_N2 = step_scales([torch.tensor(float(count))], given["lr"], given["betas"])
    adamw_([row], scales_N2, Numbers.of(**given))

    (beta1, beta2), lr = given["betas"], given["lr"]
    update = lr * (1 - beta1**count) ** -1 * moments["exp_avg"].abs()
    update /= moments["exp_avg_sq"].sqrt() * (1 - beta2**count) ** -0.5 + given["eps"]
    terms1 = beta1 * before.exp_avg.abs() + (1 - beta1) * before.grad.abs()
    terms2 = beta2 * before.exp_avg_sq + (1 - beta2) * before.grad.square()
    # What the first moment lost where its terms cancel, the update has lost too.
    lost = torch.nan_to_num(update * terms1 / moments["exp_avg"].abs())
    terms = before.param.abs() * (1 + lr * given["weight_decay"]) + update + lost
    for got, want, size in [
        (row.param, wide.detach(), terms),
        (row.exp_avg, moments["exp_avg"], terms1),
        (row.exp_avg_sq, moments["exp_avg_sq"], terms2),
    ]:
        stored, single = torch.finfo(got.dtype), torch.finfo(torch.float32)
        bound = want.abs() * stored.eps / 2 + size * 8 * single.eps + stored.smallest_normal
        assert ((got.double() - want).abs() <= bound).all(), (got, want)
    assert torch.equal(row.grad.double(), before.grad)


@settings(max_examples=25)
@given(hyper, st.integers(1, 4), st.sampled_from([None, True]))
def test_trajectories_and_state_are_torchs(
    given: dict[str, Any], steps: int, fused: bool | None
) -> None:
    theirs = torch.optim.AdamW(parameters(), fused=fused, **given)
    run(theirs, range(steps))
    with kernel_on_cpu():
        ours = AdamW(parameters(), fused=fused, **given)
        assert "steps 4 parameters (33 elements)" in ours.explain()
        run(ours, range(steps))
    assert_near(ours, theirs)
    mine, their = ours.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == their["param_groups"]
    for number, state in their["state"].items():
        assert list(mine["state"][number]) == list(state)
        assert torch.equal(mine["state"][number]["step"], state["step"])
        assert all(mine["state"][number][k].dtype == v.dtype for k, v in state.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_nearer_to_fp64_than_torchs_unfused_step(
    dtype: torch.dtype, on_cpu: None
) -> None:
    def start(kind: type[torch.optim.AdamW], wide: bool = False) -> torch.optim.AdamW:
        param = normal(0, 400, dtype=dtype)
        return kind([Parameter(param.double() if wide else param)], 1e-2, foreach=False)

    def distance(kind: type[torch.optim.AdamW]) -> float:
        narrow, exact = start(kind), start(torch.optim.AdamW, wide=True)
        for seed in range(5):
            grad = normal(seed, 400, dtype=dtype)
            for optimizer in (narrow, exact):
                (param,) = optimizer.param_groups[0]["params"]
                param.grad = grad.to(param.dtype)
                optimizer.step()
        (got,), (want,) = (o.param_groups[0]["params"] for o in (narrow, exact))
        return float((got.double() - want).detach().norm())

    assert distance(AdamW) < distance(torch.optim.AdamW)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("ours_first", [True, False])
def test_checkpoints_go_both_ways(ours_first: bool, fused: bool | None, on_cpu: None) -> None:
    kinds = [AdamW, torch.optim.AdamW]
    first, second = kinds if ours_first else kinds[::-1]
    straight = torch.optim.AdamW(parameters(), 1e-2)
    run(straight, range(6))
    begun = first(parameters(), 1e-2, fused=fused)
    params = run(begun, range(3))
    goes_on = second([Parameter(p.detach().clone()) for p in params], 1.0)
    goes_on.load_state_dict(copy.deepcopy(begun.state_dict()))
    run(goes_on, range(3, 6))
    for got, want in zip(
        goes_on.param_groups[0]["params"], straight.param_groups[0]["params"], strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert goes_on.state_dict()["param_groups"][0]["lr"] == 1e-2
    assert all(state["step"] == 6 for state in state_of(goes_on).values())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True},
    {"capturable": False, "maximize": True},
    {"foreach": True},
    {"fused": True},
    {"lr": torch.tensor(1e-2), "foreach": False},
    {"differentiable": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_where_the_kernel_does_not_run_the_step_is_torchs_to_the_bit(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    optimizers = [kind(parameters(dtype), **options) for kind in (AdamW, torch.optim.AdamW)]
    if options.get("differentiable"):  # steps tensors of a graph, not leaves
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.requires_grad_(False)
    for optimizer in optimizers:
        run(optimizer, range(3))
    ours, theirs = optimizers
    for got, want in zip(
        ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True
    ):
        assert torch.equal(got, want)
    torch.testing.assert_close(state_of(ours), state_of(theirs), rtol=0, atol=0)


def test_a_group_whose_decay_is_coupled_is_torchs(on_cpu: None) -> None:
    ours, theirs = AdamW(parameters()), torch.optim.AdamW(parameters())
    for optimizer in (ours, theirs):
        optimizer.param_groups[0].update(decoupled_weight_decay=False, weight_decay=0.5)
        run(optimizer, range(3))
    for got, want in zip(
        ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True
    ):
        assert torch.equal(got, want)
    assert "of group 0: decoupled_weight_decay=False" in ours.explain()


def test_groups_keep_their_settings_and_schedulers_move_them(on_cpu: None) -> None:
    def build(kind: type[torch.optim.AdamW]) -> torch.optim.AdamW:
        a, b, c, d = parameters()
        slow = {"params": [c, d], "lr": 1e-4, "weight_decay": 0.0, "betas": (0.5, 0.9)}
        return kind([{"params": [a, b], "maximize": True}, slow], lr=1e-2, weight_decay=0.3)

    ours, theirs = build(AdamW), build(torch.optim.AdamW)
    for optimizer in (ours, theirs):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for seed in range(3):
            run(optimizer, range(seed, seed + 1))
            scheduler.step()
    assert_near(ours, theirs)


def test_an_lr_that_is_a_tensor_on_the_host_is_read_each_step(on_cpu: None) -> None:
    rate = torch.tensor(1e-2)
    ours, theirs = AdamW(parameters(), rate), torch.optim.AdamW(parameters(), 1e-2)
    run(ours, range(1))
    run(theirs, range(1))
    rate.fill_(0.1)
    theirs.param_groups[0]["lr"] = 0.1
    run(ours, range(1, 3))
    run(theirs, range(1, 3))
    assert_near(ours, theirs)


def test_hooks_run_once_and_closures_see_gradients(on_cpu: None) -> None:
    torch.optim.AdamW(parameters()).step()  # torch wraps its own class's step, too
    param = Parameter(torch.ones(3))
    optimizer = AdamW([param], 0.1)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3 and seen == ["before", "after"]
    assert (param < 1).all() and param.grad is not None


def test_parameters_without_gradient_are_left_alone(on_cpu: None) -> None:
    still, moved = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = AdamW([still, moved])
    moved.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(still.detach(), torch.ones(3)) and still not in optimizer.state
    assert optimizer.state[moved]["step"] == 1
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.state[moved]["step"] == 1


def test_a_graph_that_saved_the_old_values_refuses_its_backward(on_cpu: None) -> None:
    param = Parameter(torch.ones(3))
    optimizer = AdamW([param])
    loss = param.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_step_on_their_own(on_cpu: None) -> None:
    optimizer = AdamW(parameters(), 1e-2)
    run(optimizer, range(2))
    twin = copy.deepcopy(optimizer)
    run(twin, range(2, 4))
    assert all(state["step"] == 2 for state in state_of(optimizer).values())
    run(optimizer, range(2, 4))
    assert_near(twin, optimizer)


def test_sparse_gradients_are_refused_as_torch_refuses_them(on_cpu: None) -> None:
    param = Parameter(torch.ones(3, 2))
    param.grad = torch.ones(3, 2).to_sparse()
    optimizer = AdamW([param])
    assert "gradient is not contiguous" in optimizer.explain()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


class Marked(Tensor):
    """A subclass whose operations the kernel would go past."""


def test_what_the_kernel_does_not_take_is_torchs_and_said(on_cpu: None) -> None:
    def build() -> list[dict[str, Any]]:
        slanted, wide = normal(1, 4, 3).t(), normal(2, 5, dtype=torch.float64)
        marked = normal(3, 2).as_subclass(Marked)
        plain = [Parameter(normal(0, 2, 2)), Parameter(slanted), Parameter(wide), Parameter(marked)]
        return [{"params": plain}, {"params": [Parameter(normal(4, 6))], "amsgrad": True}]

    ours, theirs = AdamW(build(), 1e-2), torch.optim.AdamW(build(), 1e-2)
    for optimizer in (ours, theirs):
        run(optimizer, range(3))
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for i, (got, want) in enumerate(zip(group["params"], other["params"], strict=True)):
            torch.testing.assert_close(got, want, rtol=1e-5 if i == 0 else 0, atol=0)
    assert ours.explain().splitlines() == [
        "AdamW: moetk's kernel steps 1 parameters (4 elements)",
        "- torch steps 1 parameters (12 elements) of group 0: parameter is not contiguous",
        "- torch steps 1 parameters (5 elements) of group 0: parameter is torch.float64",
        "- torch steps 1 parameters (2 elements) of group 0: parameter is a Marked",
        "- torch steps 1 parameters (6 elements) of group 1: amsgrad=True",
    ]


def test_explain_says_why_torch_steps_everything() -> None:
    optimizer = AdamW([Parameter(torch.ones(2))])
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-3, device="meta")
    assert "1 parameters (2 elements) of group 0: lr is a tensor on meta" in optimizer.explain()
    optimizer = AdamW([Parameter(torch.ones(2))])
    assert "of group 0: parameter is on cpu" in optimizer.explain()


@pytest.mark.parametrize("unscaled", [False, True])
def test_what_a_grad_scaler_leaves_to_the_step_is_torchs(unscaled: bool, on_cpu: None) -> None:
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        param = Parameter(normal(0, 8))
        optimizer = kind([param], 1e-2, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for factor in (1.0, math.inf, 2.0):  # the second step is skipped, without a wait
            optimizer.zero_grad()
            scaler.scale((factor * param).sum()).backward()
            if unscaled:  # as before gradients are clipped
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append((param.detach(), optimizer.state[param]["step"]))
    assert results[0][1] == 2 and all(map(torch.equal, *results))


def test_moments_of_another_shape_are_refused_by_torch(on_cpu: None) -> None:
    optimizer = AdamW([Parameter(torch.ones(3))])
    (param,) = run(optimizer, range(1))
    param.data = torch.ones(5)
    param.grad = torch.ones(5)
    assert "exp_avg is (3,)" in optimizer.explain()
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()


def test_a_compiled_step_is_torchs(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "adamw_", None)  # never called
    ours, theirs = AdamW(parameters(), 1e-2), torch.optim.AdamW(parameters(), 1e-2)
    compiled = torch.compile(ours.step, backend="eager")
    for seed in range(3):
        give_gradients(ours.param_groups[0]["params"], seed)
        compiled()
    run(theirs, range(3))
    assert_near(ours, theirs)


def test_scales_are_the_corrections_of_each_step() -> None:
    steps = [torch.tensor(float(count)) for count in (1, 3, 10**6)]
    scales_N2 = step_scales(steps, 1e-2, (0.9, 0.999))
    for (first, root), count in zip(scales_N2.tolist(), (1, 3, 10**6), strict=True):
        assert first == pytest.approx(1e-2 / (1 - 0.9**count), rel=2e-7)
        assert root == pytest.approx((1 - 0.999**count) ** -0.5, rel=2e-7)
    assert scales_N2.dtype == torch.float32


# In Triton's interpreter ------------------------------------------------------------------------


def rows(dtype: torch.dtype, sizes: list[int]) -> list[Row]:
    made = []
    for seed, size in enumerate(sizes):
        row = Row(*(normal(10 * seed + i, size + 1, dtype=dtype) for i in range(4)))
        row.exp_avg_sq.square_()
        made.append(Row(*(tensor[:size] for tensor in row)))  # one element behind is not theirs
    return made


def behind(tensor: Tensor) -> Tensor:
    """The element of memory that follows a tensor's last."""
    return tensor.as_strided((), (), tensor.numel())


def assert_same(row: Row, twin: Row) -> None:
    """Moments to the bit; the parameter but for the last bit of torch's square root on a CPU."""
    rtol = 2 * torch.finfo(row.param.dtype).eps
    torch.testing.assert_close(row.param, twin.param, rtol=rtol, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(row[1:], twin[1:], rtol=0, atol=0, equal_nan=True)


def kernel_is_twin(dtype: torch.dtype, weight_decay: float, maximize: bool) -> None:
    from moetk.kernels.gpu.adamw import BLOCK, adamw_fused_

    numbers = Numbers.of(3e-3, (0.9, 0.95), 1e-8, weight_decay, maximize=maximize)
    sizes = [1, 0, 16, 17, BLOCK, 2 * BLOCK + 5]
    mine, twins = rows(dtype, sizes), rows(dtype, sizes)
    for made in (mine, twins):
        made[-1].grad[3], made[-1].param[BLOCK] = math.nan, math.inf
    steps = [torch.tensor(float(n + 1)) for n in range(len(sizes))]
    scales_N2 = step_scales(steps, 3e-3, (0.9, 0.95))
    versions = [row.param._version for row in mine]
    beyond = [[float(behind(tensor)) for tensor in row] for row in mine]
    adamw_fused_(mine, scales_N2, numbers)
    assert beyond == [[float(behind(tensor)) for tensor in row] for row in mine]
    for row, twin, scales_2, version in zip(mine, twins, scales_N2, versions, strict=True):
        assert row.param._version > version
        adamw_plain_(twin, scales_2, numbers)
        assert_same(row, twin)
    assert bool(mine[-1].param[BLOCK].isinf()) == (weight_decay == 0)


def mixed_dtypes() -> None:
    from moetk.kernels.gpu.adamw import adamw_fused_

    numbers = Numbers.of(3e-3, (0.9, 0.95), 1e-8, 0.1)
    half, single = torch.float16, torch.float32
    for dtypes in [(half, single, single, half), (single, half, half, single)]:
        row = Row(*(normal(i, 40, dtype=dtype) for i, dtype in enumerate(dtypes)))
        row.exp_avg_sq.square_()
        twin = Row(*(tensor.clone() for tensor in row))
        scales_N2 = step_scales([torch.tensor(2.0)], 3e-3, (0.9, 0.95))
        adamw_fused_([row], scales_N2, numbers)
        adamw_plain_(twin, scales_N2[0], numbers)
        assert_same(row, twin)


CASES: dict[str, Callable[[], None]] = {
    "float32": lambda: kernel_is_twin(torch.float32, 0.1, False),
    "float32, no decay, maximised": lambda: kernel_is_twin(torch.float32, 0.0, True),
    "float16": lambda: kernel_is_twin(torch.float16, 0.1, False),
    "mixed dtypes": mixed_dtypes,
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return outcomes_of(__file__)


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_its_twin(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "", outcomes[name]


if __name__ == "__main__":
    tell(CASES)
