"""What the fused bank refuses, in which words, and what runs in its place."""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import moetk.kernels.fused_mlp as room
from moetk import ExpertBank
from moetk.errors import BackendError, UnsupportedRoutingError
from moetk.experts import BankSpec, ClampedGated, Gated, bank_forward, pick_backend
from moetk.experts.backends import TableRow
from moetk.experts.fused import fused, why_not_fused
from moetk.routing import ExpertChoice, SoftChoice, TokenChoice
from tests.banks import a_case, expert_choice, gradients, soft_choice, token_choice

backends_room = importlib.import_module("moetk.experts.backends")  # its package hides it
PLAIN = BankSpec(5, 32, 24)


REFUSED = [
    (BankSpec(2, 8, 8, Gated(F.mish)), "it has no kernel for Gated(act=<function mish"),
    (BankSpec(2, 8, 8, Gated(partial(F.gelu))), "it has no kernel for Gated(act=functools.partial"),
    (BankSpec(2, 8, 8, scale="input"), 'scale="input" multiplies rows before the up product'),
    (BankSpec(2, 9, 8), "H=9 is no multiple of 2, 16 bytes of torch.float64"),
    (BankSpec(2, 8, 7), "I=7 is no multiple of 2, 16 bytes of torch.float64"),
]


@pytest.mark.parametrize(("spec", "says"), REFUSED, ids=[says[:12] for _, says in REFUSED])
def test_specs_without_a_kernel(spec: BankSpec, says: str) -> None:
    weights, x_TH, routing = a_case(spec)
    with pytest.raises(BackendError, match=re.escape(f'backend="fused": {says}')) as caught:
        fused(spec, weights, x_TH, routing)
    assert str(caught.value).endswith('Use backend="auto" or "grouped".')


def test_sixteen_bytes_are_counted_in_the_weights_dtype() -> None:
    spec = BankSpec(2, 12, 16)
    assert why_not_fused(spec, torch.float32) is None
    assert why_not_fused(spec, torch.bfloat16) == "H=12 is no multiple of 8, 16 bytes of " + str(
        torch.bfloat16
    )


@pytest.mark.parametrize("kind", [ExpertChoice, SoftChoice])
def test_routings_it_does_not_read(kind: type) -> None:
    weights, x_TH, _ = a_case(PLAIN)
    other = expert_choice(12, 5, 3) if kind is ExpertChoice else soft_choice(2, 6, 5, 1)
    message = f'backend="fused" reads a TokenChoice; this router returns a {kind.__name__}. Use'
    with pytest.raises(UnsupportedRoutingError, match=re.escape(message)):
        fused(PLAIN, weights, x_TH, other)


def test_it_runs_on_cuda_alone() -> None:
    message = (
        'backend="fused" cannot run the bank: dtype float32, needs bfloat16 or float16; device '
        'cpu, needs cuda. Use backend="auto" (here: "grouped") or see Replacement.explain().'
    )
    bank, routing = ExpertBank(8, 2, 4, backend="fused"), token_choice(3, 2, 1, "random")
    with pytest.raises(BackendError, match=re.escape(message)):
        bank(torch.randn(3, 8), routing)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device of the kind that the kernels need, whose table names `fused`."""
    monkeypatch.setattr(backends_room, "_lacks", lambda device: None)
    row = TableRow("cuda", "bfloat16", float("inf"), "fused", "by this test")
    monkeypatch.setattr(backends_room, "auto_table", lambda: (row,))
    return torch.device("cuda")


@pytest.mark.parametrize("routing", [TokenChoice, ExpertChoice, SoftChoice])
@pytest.mark.parametrize(
    "spec",
    [BankSpec(2, 16, 16), *(spec for spec, _ in REFUSED)],
    ids=["runs", *(says[:12] for _, says in REFUSED)],
)
def test_auto_takes_grouped_where_it_cannot(
    hopper: torch.device, spec: BankSpec, routing: type
) -> None:
    given_ = (torch.bfloat16, hopper, 8, "the bank", spec, routing)
    runs = spec == BankSpec(2, 16, 16) and routing is TokenChoice
    assert pick_backend("auto", *given_).name == ("fused" if runs else "grouped")
    if runs:
        assert pick_backend("fused", *given_).name == "fused"
        return
    with pytest.raises(BackendError, match=re.escape('(here: "grouped")')) as caught:
        pick_backend("fused", *given_)
    if routing is not TokenChoice:
        message = f"it reads a TokenChoice, the router returns a {routing.__name__}"
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("triton", "capability", "says"),
    [
        (None, (9, 0), "needs the package triton"),
        ("here", (8, 0), "compute capability 8.0, needs 9 or 10"),
        ("here", (12, 0), "compute capability 12.0, needs 9 or 10"),
    ],
)
def test_devices_without_its_kernels(
    monkeypatch: pytest.MonkeyPatch, triton: str | None, capability: tuple[int, int], says: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    backends_room._lacks.cache_clear()
    with pytest.raises(BackendError, match=f"cannot run the bank: {says}. Use"):
        pick_backend("fused", torch.bfloat16, torch.device("cuda"), 8)
    assert pick_backend("auto", torch.bfloat16, torch.device("cuda"), 8).name == "grouped"
    backends_room._lacks.cache_clear()


def test_gradients_that_are_added_need_eager_cuda() -> None:
    weights, x_TH, routing = a_case(PLAIN)
    weights = replace(weights, add_to_grad=True)
    message = "add_to_grad=True: it needs eager CUDA (no torch.compile, no dispatch mode). Leave"
    with pytest.raises(BackendError, match=re.escape(message)):
        fused(PLAIN, weights, x_TH, routing)
    with torch.no_grad():  # without a backward there is nothing to add
        want = fused(PLAIN, replace(weights, add_to_grad=False), x_TH, routing)
        assert torch.equal(fused(PLAIN, weights, x_TH, routing), want)


def test_gradients_that_others_wait_for_are_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "direct", lambda tensor: True)
    weights, x_TH, routing = a_case(PLAIN)
    weights = replace(weights, add_to_grad=True)
    computed = replace(weights, up=weights.up * 1)
    with pytest.raises(BackendError, match="up is no parameter but computed"):
        fused(PLAIN, computed, x_TH, routing)
    handle = weights.down.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(BackendError, match="down has gradient hooks"):
        fused(PLAIN, weights, x_TH, routing)
    handle.remove()
    weights.up.register_hook(lambda grad: grad)
    with pytest.raises(BackendError, match="up has gradient hooks"):
        fused(PLAIN, weights, x_TH, routing)


def test_other_backends_return_gradients_that_may_be_added() -> None:
    weights, x_TH, routing = a_case(PLAIN)
    found, want = (
        gradients(bank_forward(PLAIN, held, x_TH, routing, "grouped"), weights, x_TH, routing)
        for held in (replace(weights, add_to_grad=True), weights)
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())


def test_gradients_are_not_added_where_several_ranks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x_TH, _ = a_case(PLAIN)
    monkeypatch.setattr(room, "direct", lambda tensor: True)
    monkeypatch.setattr(room, "several_ranks", lambda: True)
    with pytest.raises(BackendError, match="several ranks run, and who reduces gradients"):
        room.check_adds(x_TH, weights.up, weights.down)


def test_gradients_are_added_only_where_the_copy_engine_reaches() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 8, dtype=torch.bfloat16))
    assert room.addable(weight) is None
    lying = torch.zeros(33, dtype=torch.bfloat16)
    for start, addable in ((0, True), (1, False)):
        weight.grad = lying[start : start + 32].view(4, 8)
        assert (room.addable(weight) is not None) == addable
    weight.grad = torch.zeros(8, 4, dtype=torch.bfloat16).t()
    assert room.addable(weight) is None


def test_a_clamp_at_zero_is_no_kernels() -> None:
    spec = BankSpec(2, 16, 16, activation=ClampedGated(0.0))
    assert why_not_fused(spec, torch.bfloat16) == f"it has no kernel for {spec.activation}"
