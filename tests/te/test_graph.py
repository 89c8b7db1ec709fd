"""The bank on Transformer Engine's products against the loop over experts, in Triton's interpreter
and with the library in plain torch.

The interpreter is chosen where Triton is first imported, so this file runs itself in a process of
its own. It is trusted with float32 and whole numbers alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetk.equivalence.judge import judge, relative_error
from moetk.errors import BackendError, SecondOrderError
from moetk.experts import Activation, BankSpec, BankWeights, ClampedGated, Gated, GptOssGated, Plain
from moetk.experts.fused import form_of
from moetk.experts.reference import reference
from moetk.experts.te import te
from moetk.kernels import fused_mlp
from moetk.kernels.sort_plan import sort_plan
from moetk.routing import TokenChoice
from tests.banks import gradients, make_weights
from tests.interpreted import outcomes_of, tell
from tests.te import fake

# Each activation once, and each pair of layouts and biases with some activation.
ONE_OF_EACH: list[tuple[Activation, bool, bool, bool]] = [  # transposed, interleaved, bias
    (Gated(), False, False, False),
    (Gated(F.gelu), True, False, True),
    (ClampedGated(0.4), False, True, True),
    (GptOssGated(1.7, 0.5), True, True, True),
    (Plain(), False, False, True),
    (Plain(F.gelu), True, False, False),
]
CURRENT, BLOCK = fake.Float8CurrentScaling(), fake.Float8BlockScaling()
RECIPES = {"one scale a tensor": CURRENT, "blocks": BLOCK}


def a_case(
    spec: BankSpec, tokens: int, k: int, *, bias: bool = False, drops: bool = False
) -> tuple[BankWeights, Tensor, TokenChoice]:
    """Weights and rows of which every product is about as large as its rows."""
    torch.manual_seed(0)
    weights = make_weights(spec, bias, torch.float32)
    for matrix, width in (
        (weights.up, spec.hidden_size),
        (weights.down, spec.intermediate_size),
    ):
        matrix.data *= 2 * width**-0.5
    ids_TK = torch.rand(tokens, spec.num_experts).argsort(-1)[:, :k]
    weights_TK, kept_TK = torch.rand(tokens, k), None
    if drops:
        kept_TK = torch.rand(tokens, k) < 0.7
        ids_TK[:1] = -1
        weights_TK = weights_TK.masked_fill(~kept_TK | (ids_TK < 0), 0)
    routing = TokenChoice(ids_TK, weights_TK.requires_grad_(), spec.num_experts, kept_TK=kept_TK)
    return weights, torch.randn(tokens, spec.hidden_size).requires_grad_(), routing


def raised(weights: BankWeights, x_TH: Tensor, routing: TokenChoice):  # type: ignore[no-untyped-def]
    """The same numbers in float64."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_()

    held = {name: wide(t) for name, t in vars(weights).items() if isinstance(t, Tensor)}
    wide_routing = replace(routing, weights_TK=wide(routing.weights_TK))
    return replace(weights, **held), wide(x_TH), wide_routing


def agree(spec: BankSpec, *case: object) -> None:
    """Values and every gradient under the pass rule, beside the loop in float32."""
    ours = gradients(te(spec, *case), *case)  # type: ignore[arg-type]
    eager = gradients(reference(spec, *case), *case)  # type: ignore[arg-type]
    exact = raised(*case)  # type: ignore[arg-type]
    truth = gradients(reference(spec, *exact), *exact)
    assert ours.keys() == truth.keys()
    terms = 4 * max(spec.up_width, spec.hidden_size, len(exact[1]))
    for name, tensor in truth.items():
        assert ours[name].dtype == eager[name].dtype, name
        verdict = judge(name, ours[name], eager[name], tensor, reduction=terms)
        assert verdict.ok, verdict


def a_layer(activation: Activation, transposed: bool, interleaved: bool, bias: bool) -> None:
    """Sizes that no block divides, with choices that nobody computes."""
    spec = BankSpec(3, 20, 12, activation, transposed=transposed, interleaved=interleaved)
    agree(spec, *a_case(spec, 7, 2, bias=bias, drops=True))


def few_rows() -> None:
    """No tokens, one, as many choices as experts, experts without rows, and nobody chosen."""
    for experts, tokens, k in ((3, 0, 2), (3, 1, 1), (3, 2, 3), (9, 2, 2)):
        spec = BankSpec(experts, 20, 12)
        agree(spec, *a_case(spec, tokens, k, bias=True))
    weights, x_TH, routing = a_case(spec, 3, 2, bias=True)
    agree(spec, weights, x_TH, replace(routing, experts_TK=torch.full((3, 2), -1)))


def what_lies_beside() -> None:
    """A row of NaN, an expert's NaN and the weight of a choice that nobody computes stay alone."""
    spec = BankSpec(2, 20, 12)
    weights, x_TH, routing = a_case(spec, 6, 1)
    routing = replace(routing, experts_TK=torch.tensor([[0], [0], [0], [1], [0], [-1]]))
    weights_TK = routing.weights_TK.detach().clone()
    weights_TK[5] = torch.nan
    routing = replace(routing, weights_TK=weights_TK.requires_grad_())
    clean = torch.tensor([0, 2, 4, 5])
    found = []
    for value in (1.0, torch.nan):
        weights.up.data[1] = weights.down.data[1] = x_TH.data[1] = value
        y_TH = te(spec, weights, x_TH, routing)
        grads = torch.autograd.grad(y_TH[clean].sum(), (x_TH, routing.weights_TK))
        found.append((y_TH.detach(), *grads))
    for one, spoiled in zip(*found, strict=True):
        assert torch.equal(one[clean], spoiled[clean])
    assert found[1][0][[1, 3]].isnan().all() and not found[1][0][5].any()


def views() -> None:
    """Tensors with other strides are what they show; so is the gradient of a sum, with stride 0."""
    spec = BankSpec(3, 20, 12)
    weights, x_TH, routing = a_case(spec, 7, 2, bias=True, drops=True)

    def strided(tensor: Tensor) -> Tensor:
        wide = torch.full((*tensor.shape, 2), torch.nan)
        wide[..., 0] = tensor.detach()
        return wide[..., 0].requires_grad_()

    held = {name: strided(t) for name, t in vars(weights).items() if isinstance(t, Tensor)}
    others = replace(weights, **held), strided(x_TH)
    other_routing = replace(routing, weights_TK=strided(routing.weights_TK))
    want = gradients(te(spec, weights, x_TH, routing), weights, x_TH, routing)
    found = gradients(te(spec, *others, other_routing), *others, other_routing)
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())
    summed = torch.autograd.grad(te(spec, weights, x_TH, routing).sum(), x_TH)
    ones = torch.autograd.grad(te(spec, weights, x_TH, routing), x_TH, torch.ones(7, 20))
    assert torch.equal(*summed, *ones)


def one_gradient_alone() -> None:
    spec = BankSpec(3, 20, 12)
    weights, x_TH, routing = a_case(spec, 7, 2, bias=True, drops=True)
    held = {"x": x_TH, "weights_TK": routing.weights_TK, **vars(weights)}
    leaves = [leaf for leaf in held.values() if isinstance(leaf, Tensor)]
    dy_TH = torch.randn(7, 20)
    want = torch.autograd.grad(te(spec, weights, x_TH, routing), leaves, dy_TH)
    for trained, gradient in zip(leaves, want, strict=True):
        for leaf in leaves:
            leaf.requires_grad_(leaf is trained)
        (found,) = torch.autograd.grad(te(spec, weights, x_TH, routing), trained, dy_TH)
        assert torch.equal(found, gradient)


def the_gradient_of_a_gradient() -> None:
    spec = BankSpec(3, 20, 12)
    weights, x_TH, routing = a_case(spec, 4, 2)
    y_TH = te(spec, weights, x_TH, routing)
    with pytest.raises(SecondOrderError, match=re.escape('backend="te": create_graph=True asks')):
        torch.autograd.grad(y_TH.sum(), x_TH, create_graph=True)


def added_gradients(transposed: bool, recipe: fake.Recipe | None) -> None:
    """The first backward makes .grad, the next adds to it in place; a first alone is returned."""
    spec = BankSpec(9, 32, 16, transposed=transposed)  # some without rows
    weights, x_TH, routing = a_case(spec, 4, 2)
    matrices, adding = (weights.up, weights.down), replace(weights, add_to_grad=True)
    with eager_cuda(), fake.autocast(recipe):
        returned = torch.autograd.grad(te(spec, weights, x_TH, routing).sum(), matrices)
        te(spec, adding, x_TH, routing).sum().backward()
        first = [matrix.grad for matrix in matrices]
        assert all(torch.equal(*pair) for pair in zip(first, returned, strict=True))  # type: ignore[arg-type]
        te(spec, adding, x_TH, routing).sum().backward()
    for matrix, grad, once in zip(matrices, first, returned, strict=True):
        assert matrix.grad is grad
        torch.testing.assert_close(grad, 2 * once)


@contextmanager
def eager_cuda() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_mlp, "direct", lambda tensor: True)
        yield


def gradients_that_others_wait_for() -> None:
    spec = BankSpec(3, 20, 12)
    weights, x_TH, routing = a_case(spec, 4, 2)
    adding = replace(weights, add_to_grad=True)
    with pytest.raises(BackendError, match="add_to_grad=True: it needs eager CUDA"):
        te(spec, adding, x_TH, routing)
    with torch.no_grad():  # without a backward there is nothing to add
        te(spec, adding, x_TH, routing)
    weights.down.register_hook(lambda grad: grad)
    with eager_cuda(), pytest.raises(BackendError, match="down has gradient hooks"):
        te(spec, adding, x_TH, routing)


def padded_rows(align: int) -> None:
    """Every used choice keeps its place among its expert's rows, and nothing else is there."""
    from moetk.kernels.gpu.te_rows import expert_rows

    for counts in ([1, 0, 17, 16], [0, 0, 5], [16, 32], [0, 0]):
        torch.manual_seed(0)
        used, experts = sum(counts), len(counts)
        ids = torch.arange(experts).repeat_interleave(torch.tensor(counts))
        ids_TK = torch.cat([ids, torch.tensor([-1, -1, -1])])[torch.randperm(used + 3)][:, None]
        plan = sort_plan(ids_TK, None, experts)
        rows = expert_rows(plan, align)
        assert rows.counts == [-(-count // align) * align for count in counts]
        assert rows.total == sum(rows.counts)
        assert rows.ends_E.tolist() == torch.tensor(rows.counts).cumsum(0).tolist()
        for token, (expert, slot) in enumerate(zip(ids_TK.flatten(), rows.slot_TK, strict=True)):
            if expert < 0:
                assert slot >= rows.total
                continue
            assert rows.source_U[slot] == rows.choice_U[slot] == token
            begin = sum(rows.counts[:expert])
            assert begin <= slot < begin + counts[expert]
        padding = rows.source_U == -1
        assert padding.sum() == rows.total - used
        assert (rows.choice_U[padding] == len(ids_TK)).all()


def gathers_and_activates() -> None:
    from moetk.kernels.gpu.te_rows import activate, gather

    torch.manual_seed(0)
    x_TB, source_U = torch.randn(5, 20), torch.tensor([4, -1, 0, 0, -1], dtype=torch.int32)
    for numbers in (x_TB, x_TB.view(torch.uint8)):
        want = torch.cat([numbers, torch.zeros_like(numbers[:1])])[source_U.long()]
        assert torch.equal(gather(numbers, source_U), want)
    for activation, _, interleaved, _ in ONE_OF_EACH:
        form = form_of(BankSpec(1, 8, 300, activation, interleaved=interleaved))
        assert form is not None
        h_UJ = torch.randn(3, 600 if form.gated else 300)
        torch.testing.assert_close(activate(h_UJ, form), form.activate(h_UJ))


def in_fp8(recipe: fake.Recipe, transposed: bool) -> None:
    """Within the largest relative error of one rounding to E5M2, or of two to E4M3: those of many
    numbers average out to less; and not nearer than rounding leaves it."""
    spec = BankSpec(5, 160, 144, transposed=transposed)
    for case in (
        a_case(spec, 13, 3, bias=True, drops=True),
        a_case(spec, 2, 1),
        a_case(spec, 3, 5, bias=True),
    ):
        with fake.autocast(recipe):
            ours = gradients(te(spec, *case), *case)
        exact = raised(*case)
        for name, tensor in gradients(reference(spec, *exact), *exact).items():
            assert relative_error(ours[name], tensor) <= 0.125, name
        assert relative_error(ours["y"], reference(spec, *exact)) > 0.01


def in_fp8_nobody() -> None:
    spec = BankSpec(4, 32, 16)
    weights, x_TH, routing = a_case(spec, 3, 2)
    with fake.autocast(CURRENT):
        agree(spec, weights, x_TH, replace(routing, experts_TK=torch.full((3, 2), -1)))


def refused_in_fp8() -> None:
    spec = BankSpec(4, 32, 16)
    case = a_case(spec, 3, 2)
    for recipe in (fake.DelayedScaling(), fake.MXFP8BlockScaling()):
        message = (
            f'backend="te": recipe {type(recipe).__name__} is none of Float8CurrentScaling and'
        )
        with fake.autocast(recipe), pytest.raises(BackendError, match=re.escape(message)):
            te(spec, *case)
    for sizes, says in (((24, 16), "H=24"), ((32, 24), "I=24")):
        spec = BankSpec(4, *sizes)
        message = f'backend="te" in FP8: {says} is no multiple of 16. Leave'
        with fake.autocast(CURRENT), pytest.raises(BackendError, match=re.escape(message)):
            te(spec, *a_case(spec, 3, 2))
        agree(spec, *a_case(spec, 3, 2))


CASES: dict[str, Callable[[], None]] = {
    **{
        f"layer: {type(a).__name__} {i}": partial(a_layer, a, *layout)
        for i, (a, *layout) in enumerate(ONE_OF_EACH)
    },
    "layer: few rows": few_rows,
    "layer: what lies beside": what_lies_beside,
    "layer: views": views,
    "layer: one gradient alone": one_gradient_alone,
    "layer: the gradient of a gradient": the_gradient_of_a_gradient,
    "layer: added gradients": partial(added_gradients, False, None),
    "layer: added gradients, transposed": partial(added_gradients, True, None),
    "layer: gradients that others wait for": gradients_that_others_wait_for,
    "rows: padded": partial(padded_rows, 16),
    "rows: as they are": partial(padded_rows, 1),
    "rows: gathered and activated": gathers_and_activates,
    **{
        f"FP8: {name}{', transposed' * transposed}": partial(in_fp8, recipe, transposed)
        for name, recipe in RECIPES.items()
        for transposed in (False, True)
    },
    "FP8: added gradients": partial(added_gradients, False, BLOCK),
    "FP8: nobody": in_fp8_nobody,
    "FP8: refused": refused_in_fp8,
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return outcomes_of(__file__)


@pytest.mark.parametrize("name", CASES)
def test_bank_is_the_loops(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "", outcomes[name]


if __name__ == "__main__":
    from tests.conftest import poisoned

    torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)  # type: ignore[method-assign]
    torch.empty_like = poisoned(torch.empty_like)
    with pytest.MonkeyPatch.context() as patch:
        fake.install(patch)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        tell(CASES)
