"""Blocks of Transformers as sides: each stage against a written-out twin, forward and backward."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetk import RouterContext, TokenChoice, replace_moe
from moetk.controllers import BiasUpdate
from moetk.equivalence.double import InDouble
from moetk.equivalence.judge import judge, relative_error
from moetk.equivalence.sides.block import experts_of, gate_of, is_block
from moetk.equivalence.sides.pick import side_of
from moetk.equivalence.stored import load_trace, save_trace
from moetk.equivalence.trace import EXACT, Side, Trace, observe
from moetk.errors import EquivalenceError, MoeShapeError
from moetk.losses import LoadBalancingLoss, RouterZLoss
from tests.layers.parts import CosineRouter
from tests.layers.plain import Plain
from tests.tiny import FAMILIES, VOCAB, E, H, K, tiny

B, S = 2, 9
T = B * S
CTX = RouterContext(token_ids=torch.arange(T) % VOCAB)
EXACT_TO = 1e-10
families = pytest.mark.parametrize("family", FAMILIES)
forms = pytest.mark.parametrize("form", ["eager", "grouped_mm", "auto", "reference"])


@functools.cache
def model(family: str) -> Any:
    return tiny(family)


def blocks(family: str, form: str) -> list[nn.Module]:
    """Every block of a tiny model: stock with its experts implementation, or replaced."""
    copied = copy.deepcopy(model(family))
    if form in ("eager", "grouped_mm"):
        copied.set_experts_implementation(form)
    else:
        replace_moe(copied, backend=form)
    return [module for module in copied.modules() if is_block(module)]


def batch(seed: int = 0) -> Tensor:
    return torch.randn(B, S, H, generator=torch.Generator().manual_seed(seed))


def twin_of(family: str, block: nn.Module) -> Side:
    return side_of(Plain(family, block, CTX.token_ids), batch())


def sides(family: str, form: str) -> list[tuple[Side, Side]]:
    """(the side, its twin); the twin is built from the stock block."""
    stock = blocks(family, "eager")
    return [
        (side_of(block, batch(), CTX), twin_of(family, plain))
        for block, plain in zip(blocks(family, form), stock, strict=True)
    ]


def drawn(seed: int = 3) -> dict[str, Tensor]:
    """A choice and weights that no router made."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    return {"indices": ids, "weights": torch.rand(T, K, generator=generator)}


def sorted_by_id(trace: Trace) -> dict[str, Tensor]:
    """Stages and gradients with columns in the order of the ids: gates leave them in any."""
    order = trace.values["indices"].argsort(-1)
    shown = dict(trace.values) | {f"grad {name}": g for name, g in trace.grads.items()}
    for name, value in shown.items():
        if name.removeprefix("grad ") in (
            "indices", "weights", "dispatched", "up", "activation", "expert_output",
        ):  # fmt: skip
            at = order.reshape(*order.shape, *[1] * (value.ndim - 2)).expand_as(value)
            shown[name] = value.gather(1, at)
    return shown


def names_of(block: nn.Module, form: str) -> set[str]:
    """What the side of this block must show: nothing goes missing silently."""
    gate = gate_of(block)
    names = {"logits", "indices", "weights", "counts", "dispatched", "up", "activation"}
    names |= {"expert_output", "combined"}
    of_logits = "GptOss" in type(gate).__name__ or "Granite" in type(gate).__name__
    if not of_logits:
        names.add("scores")
    by_table = hasattr(gate, "tid2eid")
    if not by_table and not (of_logits and form in ("auto", "reference")):
        names.add("choice")
    if any(name.startswith("shared_expert") for name in block._modules):
        names.add("output")
    return names


@families
@forms
def test_stages_and_gradients_in_double(family: str, form: str) -> None:
    """At its own choice: equal to the twin, in fp64 throughout."""
    x_TH = batch().flatten(0, 1).double()
    for (side, twin), block in zip(sides(family, form), blocks(family, form), strict=True):
        with InDouble():
            observed = observe(side.in_double(), x_TH)
            mine, want = sorted_by_id(observed), sorted_by_id(observe(twin.in_double(), x_TH))
        assert set(observed.values) == names_of(block, form)
        grads = {name for name in want if name.startswith("grad ")}
        hidden = {"grad expert_output"} if form == "auto" else set()  # inside one autograd node
        absent = {"grad choice"} if "choice" not in observed.values else set()
        assert grads - set(mine) <= hidden | absent, grads - set(mine)
        for name in mine:
            if name in EXACT:
                assert torch.equal(mine[name], want[name]), name
            else:
                value, truth = mine[name].nan_to_num(neginf=0), want[name].nan_to_num(neginf=0)
                assert relative_error(value, truth) <= EXACT_TO, name


@families
@forms
def test_stages_and_gradients_by_the_pass_rule(family: str, form: str) -> None:
    """In fp32, at a choice and weights that no router made, and with the gradient that a reference
    got for them: both are obeyed, and rounding is what the twin's rounding is."""
    x_TH, given = batch().flatten(0, 1), drawn()
    upstream = {"weights": torch.randn(T, K, generator=torch.Generator().manual_seed(4))}
    exact = {name: t.double() if t.is_floating_point() else t for name, t in given.items()}
    for side, twin in sides(family, form):
        mine = observe(side, x_TH, given=given, upstream=upstream)
        plain = observe(twin, x_TH, given=given, upstream=upstream)
        with InDouble():
            truth = observe(twin.in_double(), x_TH.double(), given=exact, upstream=upstream)
        assert torch.equal(mine.values["counts"], given["indices"].flatten().bincount(minlength=E))
        own, wanted = mine.values["indices"].sort(-1), plain.values["indices"].sort(-1)
        assert torch.equal(own.values, wanted.values)
        for held in ("values", "grads"):
            for name in getattr(mine, held).keys() & getattr(plain, held).keys() - EXACT:
                ours, eager, true = (
                    getattr(trace, held)[name].nan_to_num(neginf=0)
                    for trace in (mine, plain, truth)
                )
                assert ours.dtype == torch.float32
                verdict = judge(name, ours, eager, true, reduction=max(T, E, 2 * H))
                assert verdict.ok, (held, verdict)


@families
def test_a_given_choice_reaches_the_experts(family: str) -> None:
    """Without given weights they are the gate's own at that choice."""
    x_TH, ids = batch().flatten(0, 1), drawn()["indices"]
    for form in ("eager", "reference"):
        for side, twin in sides(family, form):
            with InDouble():
                mine = observe(side.in_double(), x_TH.double(), given={"indices": ids})
                want = observe(twin.in_double(), x_TH.double(), given={"indices": ids})
            for name in ("weights", "up", "combined"):
                assert relative_error(mine.values[name], want.values[name]) <= EXACT_TO
            assert relative_error(mine.grads["logits"], want.grads["logits"]) <= EXACT_TO


@families
@pytest.mark.parametrize("form", ["eager", "auto"])
def test_the_block_is_left_as_it_was(family: str, form: str) -> None:
    """Mode, hooks, attributes, gradients, buffers; also where the run raises."""
    for block in blocks(family, form):
        block.train()
        gate_of(block).eval()
        before = snapshot(block)
        side = side_of(block, batch(), CTX)
        observe(side, batch().flatten(0, 1), given=drawn())
        assert snapshot(block) == before
        with pytest.raises(EquivalenceError, match="cannot take indices with id 8"):
            observe(side, batch().flatten(0, 1), given={"indices": drawn()["indices"] + 1})
        with pytest.raises((RuntimeError, MoeShapeError)):
            observe(side, batch().flatten(0, 1)[:, :-1])
        assert snapshot(block) == before


def snapshot(block: nn.Module) -> list[Any]:
    return [
        (
            {k: id(v) for k, v in vars(m).items()},
            m.training,
            [(n, id(b), b._version) for n, b in m._buffers.items()],
            [(n, p._version, p.grad) for n, p in m._parameters.items() if p is not None],
            [len(m._forward_hooks), len(m._forward_pre_hooks)],
            vars(m).get("_moetk_bound"),
        )
        for m in block.modules()
    ]


def test_leaves_are_in_the_common_layout() -> None:
    for family in ("qwen3_moe", "gpt_oss"):
        for side, twin in sides(family, "auto"):
            mine, want = side.leaves(), twin.leaves()
            for name in ("up_weight", "down_weight", "router.weight"):
                leaf = mine[name]
                assert torch.equal(leaf.common(leaf.tensor), want[name].tensor), name


def test_facts_of_a_family() -> None:
    (block, _) = blocks("deepseek_v3", "eager")
    (replaced, _) = blocks("deepseek_v3", "auto")
    for side in (side_of(block, batch()), side_of(replaced, batch())):
        facts = side.facts
        assert (facts["groups"], facts["top_groups"], facts["top_k"]) == (4, 2, K)
        assert facts["num_experts"] == E and facts["scale"] == 2.5 and facts["tie"] == "stock"
        assert torch.equal(facts["choice_bias"], gate_of(block).e_score_correction_bias)
    for form in ("eager", "auto"):
        facts = side_of(blocks("gpt_oss", form)[0], batch()).facts
        assert facts["limit"] == 7.0 and facts["interleaved"] and facts["transposed"]
        assert type(facts["activation"]).__name__ == "GptOssGated"


def test_a_gate_that_reads_ids_says_so() -> None:
    block = blocks("deepseek_v4", "eager")[0]
    with pytest.raises(EquivalenceError, match=r"chooses experts by token id: pass ctx="):
        observe(side_of(block, batch()), batch().flatten(0, 1))


def test_a_context_of_other_tokens_is_refused() -> None:
    side = side_of(blocks("mixtral", "eager")[0], batch())
    with pytest.raises(EquivalenceError, match=r"T=4 tokens.*batch_shape=\(2, 9\)"):
        observe(side, batch().flatten(0, 1)[:4])


def test_minus_one_never_reaches_a_stock_gate() -> None:
    given = {"indices": drawn()["indices"].clone()}
    given["indices"][3, 1] = -1
    with pytest.raises(EquivalenceError, match="-1: its gate fills every slot"):
        observe(side_of(blocks("mixtral", "eager")[0], batch()), batch().flatten(0, 1), given=given)


def test_weights_of_another_shape_are_refused() -> None:
    given = {"weights": torch.rand(T, K + 1)}
    for form in ("eager", "auto"):
        with pytest.raises(EquivalenceError, match=r"cannot take weights \(18, 5\)"):
            observe(side_of(blocks("olmoe", form)[0], batch()), batch().flatten(0, 1), given=given)


class SortingGate(nn.Module):
    """Chooses by a full sort, which cannot be told what to choose."""

    def __init__(self, gate: Any) -> None:
        super().__init__()
        self.weight, self.top_k = gate.weight, gate.top_k

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden_states.reshape(-1, H) @ self.weight.T
        values, ids = logits.softmax(-1).sort(-1, descending=True)
        return logits, values[:, : self.top_k], ids[:, : self.top_k]


def test_any_block_with_a_gate_and_experts() -> None:
    """Also one that has no row; what it hides is absent, and cannot be forced."""
    stock = blocks("olmoe", "eager")[0]
    strange = copy.deepcopy(stock)
    strange.gate = SortingGate(strange.gate)
    x_TH = batch().flatten(0, 1)
    mine, want = observe(side_of(strange, batch()), x_TH), observe(side_of(stock, batch()), x_TH)
    assert set(want.values) - set(mine.values) == {"choice", "scores"}
    for name in mine.values:
        assert torch.allclose(mine.values[name], want.values[name]), name
    with pytest.raises(EquivalenceError, match="neither by a topk nor from a table"):
        observe(side_of(strange, batch()), x_TH, given=drawn())


def test_losses_and_committed_counts() -> None:
    """One number a loss, with its gradient; counts are what the controller was given."""
    ours = copy.deepcopy(model("deepseek_v3"))
    losses = [LoadBalancingLoss(0.1), RouterZLoss(0.01)]
    replace_moe(ours, losses=losses, controllers=[BiasUpdate(1e-3)])
    block = next(module for module in ours.modules() if is_block(module))
    x_TH = batch().flatten(0, 1)
    trace = observe(side_of(block, batch(), CTX), x_TH)
    logits = trace.values["logits"].clone().requires_grad_()
    routing = TokenChoice(
        trace.values["indices"], trace.values["weights"], E, logits, logits.sigmoid()
    )
    want = torch.stack([loss(routing, CTX) for loss in losses])
    assert torch.allclose(trace.values["losses"], want)
    (gradient,) = torch.autograd.grad(want.sum(), logits)
    assert torch.allclose(trace.grads["losses"], gradient, atol=1e-7)
    ids = trace.values["indices"]
    assert torch.equal(trace.values["counts"], ids.flatten().bincount(minlength=E))
    masked = RouterContext(token_mask=torch.arange(T) % 3 > 0)
    trace = observe(side_of(block, batch(), masked), x_TH)
    ids = trace.values["indices"][masked.token_mask]
    assert torch.equal(trace.values["counts"], ids.flatten().bincount(minlength=E))


def test_a_counter_that_counts_in_forward_counts_twice_under_recompute() -> None:
    block = blocks("mixtral", "eager")[0]
    experts_of(block).register_buffer("never_moves", torch.full((E,), 5))

    def count(gate: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        gate.tally += output[2].flatten().bincount(minlength=E)

    gate = gate_of(block)
    gate.register_buffer("tally", torch.full((E,), 7))
    gate.register_forward_hook(count)
    trace = observe(side_of(block, batch()), batch().flatten(0, 1))
    once = trace.values["indices"].flatten().bincount(minlength=E)
    assert torch.equal(trace.values["counts"], 2 * once)
    assert torch.equal(gate.tally, torch.full((E,), 7))


def test_a_replaced_block_with_a_router_of_ones_own() -> None:
    ours = copy.deepcopy(model("qwen3_moe"))
    replace_moe(ours, router=lambda spec: CosineRouter(spec.hidden_size, spec.num_experts, K))
    block = next(module for module in ours.modules() if is_block(module))
    side = side_of(block, batch())
    assert "router.weight" in side.leaves()
    trace = observe(side, batch().flatten(0, 1), given={"indices": drawn()["indices"]})
    assert trace.grads["router.weight"].norm() > 0
    assert not torch.equal(trace.values["indices"], drawn()["indices"])


def test_a_trace_travels_between_versions(tmp_path: Any) -> None:
    side = side_of(blocks("granitemoe", "eager")[0], batch())
    trace = observe(side, batch().flatten(0, 1))
    save_trace(trace, tmp_path / "trace.safetensors", scale=2.5, bias=torch.ones(3))
    stored = load_trace(tmp_path / "trace.safetensors")
    assert stored.facts["scale"] == 2.5 and torch.equal(stored.facts["bias"], torch.ones(3))
    again = observe(side_of(stored, batch()), batch().flatten(0, 1))
    for held, kept in ((again.values, trace.values), (again.grads, trace.grads)):
        assert held.keys() == kept.keys()
        assert all(torch.equal(held[name], kept[name]) for name in kept)
