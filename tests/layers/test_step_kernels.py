"""Norm and rotation: the twin against transformers' own, the Triton kernels against their twins."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, apply_rotary_pos_emb

from moetk.kernels.rope import Norm, rotated


def written_out(x: Tensor, cos: Tensor, sin: Tensor, norm: Norm | None) -> Tensor:
    """x (B, S, N, D) by transformers' own norm and rotation."""
    if norm is not None:
        module = Qwen3MoeRMSNorm(len(norm.weight_W), eps=norm.eps)
        del module.weight
        module.weight = norm.weight_W  # a plain tensor: the gradient reaches the drawn one
        per_head = len(norm.weight_W) == x.shape[-1]
        x = (module(x) if per_head else module(x.flatten(2))).view_as(x)
    x = x.transpose(1, 2)
    return apply_rotary_pos_emb(x, x, cos, sin)[0].transpose(1, 2)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    B=st.integers(1, 3),
    S=st.integers(1, 4),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    D=st.sampled_from([2, 6, 8]),
    shared=st.booleans(),
    kind=st.sampled_from(["none", "head", "row"]),
)
def test_twin_equals_transformers(
    seed: int, B: int, S: int, heads: tuple[int, int], D: int, shared: bool, kind: str
) -> None:
    xs = [draw(seed + n, B, S, N, D).requires_grad_() for n, N in enumerate(heads)]
    tables = [draw(seed + 2 + n, 1 if shared else B, S, D) for n in range(2)]
    norms: list[Norm | None] = [None, None]
    leaves = list(xs)
    if kind != "none":
        widths = [D if kind == "head" else N * D for N in heads]
        weights = [draw(seed + 4 + n, W).requires_grad_() for n, W in enumerate(widths)]
        norms = [Norm(weights[0], 1e-6), Norm(weights[1], 1e-3)]
        leaves += weights
    ours = rotated(*xs, *tables, *norms)
    theirs = [written_out(x, *tables, norm) for x, norm in zip(xs, norms, strict=True)]
    into = [draw(seed + 6, *y.shape) for y in ours]
    mine = (*ours, *torch.autograd.grad(ours, leaves, into))
    want = (*theirs, *torch.autograd.grad(theirs, leaves, into))
    for a, b in zip(mine, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["head", "row"])
def test_bf16_is_as_near_to_fp64_as_transformers_is(kind: str) -> None:
    """Stock rounds five times between norm and rotation, the twin once."""
    B, S, N, D = 2, 16, 4, 16
    leaves = [
        draw(0, B, S, N, D, dtype=torch.bfloat16).requires_grad_(),
        draw(1, D if kind == "head" else N * D, dtype=torch.bfloat16).requires_grad_(),
    ]
    cos, sin = (draw(n, 1, S, D, dtype=torch.bfloat16) for n in (2, 3))
    into = draw(4, B, S, N, D, dtype=torch.bfloat16)

    def run(function: object, dtype: torch.dtype) -> list[Tensor]:
        x, weight = (leaf.detach().to(dtype).requires_grad_() for leaf in leaves)
        tables, norm = (cos.to(dtype), sin.to(dtype)), Norm(weight, 1e-6)
        y = (
            rotated(x, x, *tables, norm, norm)[0]
            if function is rotated
            else written_out(x, *tables, norm)
        )
        return [y.detach(), *torch.autograd.grad(y, (x, weight), into.to(dtype))]

    truth = run(written_out, torch.float64)
    theirs, ours = run(written_out, torch.bfloat16), run(rotated, torch.bfloat16)
    for name, t, s, o in zip(("y", "dx", "dweight"), truth, theirs, ours, strict=True):
        assert (o.double() - t).norm() <= 2 * (s.double() - t).norm(), name


def test_no_tokens() -> None:
    q, k = torch.zeros(0, 3, 4, 8), torch.zeros(0, 3, 2, 8)
    table, norm = torch.ones(1, 3, 8), Norm(torch.ones(8), 1e-6)
    ours = rotated(q, k, table, table, norm, norm)
    assert [y.shape for y in ours] == [q.shape, k.shape]


def test_a_nan_token_spoils_no_other() -> None:
    x, norm = draw(0, 1, 4, 2, 8), Norm(torch.ones(8, dtype=torch.float64), 1e-6)
    cos, sin = draw(1, 1, 4, 8), draw(2, 1, 4, 8)
    clean = rotated(x, x, cos, sin, norm, norm)[0]
    x[0, 2, 1] = float("nan")
    spoiled = rotated(x, x, cos, sin, norm, norm)[0]
    assert spoiled[0, 2, 1].isnan().all()
    finite = spoiled.isfinite()
    assert int((~finite).sum()) == 8
    assert torch.equal(spoiled[finite], clean[finite])


KERNELS = """
import torch
from moetk.errors import SecondOrderError
from moetk.kernels.cross_entropy import plain_cross_entropy_
from moetk.kernels.gpu import cross_entropy, launch, norm, rope, there
from moetk.kernels.gpu.cross_entropy import cross_entropy_
from moetk.kernels.gpu.norm import added_rms_norm_fused, forked_rms_norm_fused, rms_norm_fused
from moetk.kernels.norm import added_rms_norm_plain, rms_norm_plain
from moetk.kernels.rope import Norm, rotated_plain

torch.manual_seed(0)
norm.PROGRAMS = rope.PROGRAMS = 3  # fewer than rows: each sums several
guarded, launched = [], []


class Guard(torch.cuda.device_of):
    def __enter__(self):
        guarded.append(self)
        return super().__enter__()

    def __exit__(self, *raised):
        guarded.pop()
        return super().__exit__(*raised)


def inside(kernel, *args, **settings):
    assert guarded, f"{kernel} is launched on whichever device is current"
    launched.append(kernel)
    launch.launch(kernel, *args, **settings)


torch.cuda.device_of = there.on_device_of = Guard
there.launch = inside


def close(ours, theirs, name):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=5e-6, msg=lambda text: f"{name}: {text}")


def refuses_a_second_derivative(y, x, name):
    # The incoming gradient has no graph of its own.
    try:
        torch.autograd.grad(y.sum(), x, create_graph=True)
    except SecondOrderError as error:
        assert str(error).startswith(f"{name}: create_graph=True asks"), error
    else:
        raise AssertionError(f"{name} took its gradient for a constant")


def strided(x):
    # The same values, with others between them.
    return torch.stack((x, torch.full_like(x, 7)), -1).flatten(-2)[..., ::2]


def check_rotation(B, S, NQ, NK, D, kind, tables):
    q, k = torch.randn(B, S, NQ, D), torch.randn(B, S, NK, D)
    cos, sin = torch.randn(tables, S, D), torch.randn(tables, S, D)
    leaves, norms = [q, k], (None, None)
    if kind != "none":
        widths = (D, D) if kind == "head" else (NQ * D, NK * D)
        norms = tuple(Norm(strided(torch.randn(W)), eps) for W, eps in zip(widths, (1e-6, 1e-2)))
        leaves += [norm.weight_W for norm in norms]
    for leaf in leaves:
        leaf.requires_grad_()
    ours = rope.rotated_fused(q, k, cos, sin, *norms)
    theirs = tuple(rotated_plain(x, cos, sin, norm) for x, norm in zip((q, k), norms))
    # As attention hands gradients back: not contiguous.
    into = [torch.randn_like(y.transpose(1, 2)).transpose(1, 2) for y in ours]
    refuses_a_second_derivative(rope.rotated_fused(q, k, cos, sin, *norms)[0], q, "rotated")
    mine = torch.autograd.grad(ours, leaves, into)
    want = torch.autograd.grad(theirs, leaves, into)
    close((*ours, *mine), (*theirs, *want), (B, S, NQ, NK, D, kind, tables))


for shape in ((2, 3, 4, 2, 8), (1, 5, 3, 1, 6), (0, 3, 4, 2, 8)):
    for kind in ("none", "head", "row"):
        for tables in {1, shape[0]}:
            check_rotation(*shape, kind, tables)

for R, W in ((4, 8), (5, 6), (1, 9), (0, 8)):
    for offset, rounds_first in ((0.0, True), (1.0, False)):
        x, weight = strided(torch.randn(R, W)), strided(torch.randn(W))
        x.requires_grad_(), weight.requires_grad_()
        settings = (x, weight, 1e-3, offset, rounds_first)
        ours, theirs, into = rms_norm_fused(*settings), rms_norm_plain(*settings), torch.randn(R, W)
        refuses_a_second_derivative(rms_norm_fused(*settings), x, "rms_norm")
        mine = torch.autograd.grad(ours, (x, weight), into)
        want = torch.autograd.grad(theirs, (x, weight), into)
        close((ours, *mine), (theirs, *want), (R, W))

        def forked_plain(x, *settings):
            return x, rms_norm_plain(x, *settings)

        branch = strided(torch.randn(R, W)).requires_grad_()
        for fused, plain, summands in (
            (forked_rms_norm_fused, forked_plain, (x,)),
            (added_rms_norm_fused, added_rms_norm_plain, (x, branch)),
        ):
            leaves = *summands, weight
            ours, theirs = (f(*leaves, 1e-3, offset, rounds_first) for f in (fused, plain))
            name = fused.__name__.removesuffix("_fused")
            for y in fused(*leaves, 1e-3, offset, rounds_first):
                refuses_a_second_derivative(y, x, name)
            into = [strided(torch.randn(R, W)), torch.randn(W, R).T]
            mine = torch.autograd.grad(ours, leaves, into)
            want = torch.autograd.grad(theirs, leaves, into)
            close((*ours, *mine), (*theirs, *want), (name, R, W))
            for one in (0, 1):  # the other goes nowhere
                y, true = (f(*leaves, 1e-3, offset, rounds_first)[one] for f in (fused, plain))
                mine = torch.autograd.grad(y, leaves, into[one], materialize_grads=True)
                want = torch.autograd.grad(true, leaves, into[one], materialize_grads=True)
                close(mine, want, (name, one, R, W))

for C, V in ((5, 7), (3, 9000)):
    logits, labels = 3 * torch.randn(C, V), strided(torch.randint(0, V, (C,)))
    labels[0], labels[1], labels[2], logits[2, V // 2] = V - 1, -100, 0, float("-inf")
    logits[0, : V - 3] = float("-inf")  # at V = 9000 the whole first block and more
    for items in (torch.tensor(7), torch.tensor(2.5)):
        ours, theirs, kept = logits.clone(), logits.clone(), logits.clone()
        losses = cross_entropy_(ours, labels, items, -100, True)
        close((losses, ours), (plain_cross_entropy_(theirs, labels, items, -100, True), theirs), V)
        assert losses.isfinite().all() and ours.isfinite().all()
        assert not ours[1].any()
        close((cross_entropy_(kept, labels, items, -100, False), kept), (losses, logits), V)
    for wrong in (-1, V, 1 << 40):
        ours, theirs = logits.clone(), logits.clone()
        labels[0] = wrong
        losses = cross_entropy_(ours, labels, items, -100, True)
        want = plain_cross_entropy_(theirs, labels, items, -100, True)
        assert losses[0].isnan() and ours[0].isnan().all() and losses[1:].isfinite().all()
        torch.testing.assert_close((losses, ours), (want, theirs), equal_nan=True)
    labels[0], logits[0, 1] = 0, float("nan")
    losses = cross_entropy_(logits, labels, items, -100, True)
    assert losses[0].isnan() and logits[0].isnan().all() and logits[1:].isfinite().all()
assert {str(kernel) for kernel in launched} == {
    str(kernel)
    for kernel in (norm._forward, norm._backward, rope._forward, rope._backward)
    + (cross_entropy._cross_entropy,)
}
print("every kernel equals its twin")
"""


TRACED = """
import torch
import torch.utils._triton
from torch._dynamo.exc import BackendCompilerFailed
from moetk.kernels.gpu.cross_entropy import cross_entropy_
from moetk.kernels.gpu.norm import added_rms_norm_fused, forked_rms_norm_fused, rms_norm_fused
from moetk.kernels.gpu.rope import rotated_fused
from moetk.kernels.rope import Norm

torch.utils._triton.has_triton = lambda *_: True  # traced only: no kernel runs


def count(graph, _):
    names = [str(n.target) for m in graph.modules() if hasattr(m, "graph") for n in m.graph.nodes]
    raise RuntimeError(f"launches: {sum('triton_kernel_wrapper' in name for name in names)}")


def traced(function, launches, *args):
    try:
        torch.compile(function, backend=count, fullgraph=True)(*args)
    except BackendCompilerFailed as error:
        assert f"launches: {launches}" in str(error), error
    else:
        raise AssertionError("no graph")


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def rotation(q, k, cos, sin, q_weight, k_weight):
    return rotated_fused(q, k, cos, sin, Norm(q_weight, 1e-6), Norm(k_weight, 1e-6))


table = torch.randn(1, 3, 8)
traced(lambda x, w: rms_norm_fused(x, w, 1e-6, 0.0, True), 2, leaf(4, 8), leaf(8))
traced(lambda x, w: forked_rms_norm_fused(2 * x, w, 1e-6, 0.0, True), 2, leaf(4, 8), leaf(8))
summands = leaf(4, 8), leaf(4, 8)
traced(lambda x, y, w: added_rms_norm_fused(x, y, w, 1e-6, 0.0, True), 2, *summands, leaf(8))
traced(rotation, 2, leaf(2, 3, 4, 8), leaf(2, 3, 2, 8), table, table + 1, leaf(8), leaf(8))
labels, items = torch.zeros(4, dtype=torch.int64), torch.tensor(4.0)
traced(lambda x: cross_entropy_(x, labels, items, -100, True), 1, torch.randn(4, 8))
print("every launch is in the graph")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton on this platform")
@pytest.mark.parametrize(
    ("code", "interpreted", "says"),
    [(KERNELS, "1", "every kernel equals its twin"), (TRACED, "0", "every launch is in the graph")],
    ids=["in Triton's interpreter", "under torch.compile"],
)
def test_kernels(code: str, interpreted: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "TRITON_INTERPRET": interpreted, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == says


def test_no_triton_kernel_is_imported_on_the_cpu() -> None:
    code = (
        "import sys, torch; from moetk.layers.step import speed_up; "
        "from moetk.kernels.rope import rotated; "
        "x = torch.ones(1, 1, 1, 2); rotated(x, x, x[0], x[0]); "
        "print([name for name in sys.modules if name.startswith('moetk.kernels.gpu')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=dict(os.environ),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
