"""Is a replaced model the stock model? Every tensor of a training step, in its dtype.

Three runs of the same rounded weights and tokens: ours; stock with eager experts; and the truth,
in fp64 throughout, whatever dtype the code asks for on the way. In low precision two right
implementations choose different experts where scores tie, and from there on compute different
functions. So the truth is run at each one's own choices; the scores that the choices were made from
are judged like every other tensor, and the choices are compared apart, aware of ties. That the
truth is the stock model's function is shown first, in fp64 against stock and its own choices
(`parity`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetk.equivalence.double import InDouble
from moetk.equivalence.judge import (
    Choices,
    Verdict,
    compare_choices,
    judge,
    judge_together,
    largest_error,
    relative_error,
)
from moetk.layers.recording import record, replay
from moetk.layers.replace import replace_moe
from moetk.layers.replacement import replacement_of
from moetk.recorded import Recording
from moetk.routing import Routing, TokenChoice

PARITY = 1e-10
FEW = 8  # numbers: the error of fewer is what chance gives them, and they are judged together
SCORES = ("choice_TE", "scores_TE", "logits_TE")


@dataclass(frozen=True)
class Equivalence:
    """The verdicts of one dtype, one a tensor, and how the choices compare."""

    dtype: torch.dtype
    verdicts: tuple[Verdict, ...]
    choices: Choices

    @property
    def ok(self) -> bool:
        return self.choices.ok and all(verdict.ok for verdict in self.verdicts)

    @property
    def worst(self) -> Verdict:
        return max(self.verdicts, key=lambda verdict: (not verdict.ok, verdict.ratio))


@dataclass(frozen=True)
class Parity:
    """Relative errors in fp64, by tensor; ok within 1e-10."""

    errors: dict[str, float]

    @property
    def ok(self) -> bool:
        return all(error <= PARITY for error in self.errors.values())

    @property
    def worst(self) -> tuple[str, float]:
        name = max(self.errors, key=lambda key: self.errors[key])
        return name, self.errors[name]


def parity(stock: nn.Module, ours: nn.Module, batches: Sequence[Tensor]) -> Parity:
    """Ours against stock, both in fp64 with the dtypes the family declares kept."""
    a = _eager(stock).double()
    b = copy.deepcopy(ours).double()
    tensors_a, tensors_b = _step(a, batches), _step(b, batches)
    return Parity({name: relative_error(tensors_b[name], tensors_a[name]) for name in tensors_a})


def against_stock(
    stock: nn.Module, ours: nn.Module, batches: Sequence[Tensor], dtype: torch.dtype
) -> Equivalence:
    """Logits, scores and every gradient of `ours` against stock's under the pass rule, in `dtype`.

    stock: a transformers model; ours: a replaced copy of it with stock routers. Neither changes.
    batches: token ids, (B, S) each; gradients are summed over them.
    """
    eager = _eager(stock).to(dtype)
    eager_tensors, eager_ids = _run_stock(eager, batches)
    # The scores behind stock's choices: its own experts and activations, our router reading them.
    witness = copy.deepcopy(eager)
    replace_moe(witness, backend="stock")
    _, of_eager = _run(witness, batches)
    ours_tensors, of_ours = _run(copy.deepcopy(ours).to(dtype), batches)

    truth = copy.deepcopy(eager).double()
    replace_moe(truth, backend="reference")
    with InDouble():
        at_ours, exact_ours = _run(truth, batches, of_ours)
        at_eager, exact_eager = _run(truth, batches, eager_ids)

    tokens = max(batch.numel() for batch in batches)
    reduction = max(tokens, *(max(p.shape) for p in stock.parameters()))
    pairs = {
        name: (ours_tensors[name], eager_tensors[name], at_ours[name], at_eager[name])
        for name in eager_tensors
    }
    choices = Choices(0, 0, 0, 0, 0)
    for layer in of_ours:
        mine, theirs = _scores(of_ours, layer), _scores(of_eager, layer)
        true, true_theirs = _scores(exact_ours, layer), _scores(exact_eager, layer)
        finite = [t.masked_fill(~t.isfinite(), 0) for t in (mine, theirs, true, true_theirs)]
        pairs[f"scores of layer {layer}"] = (finite[0], finite[1], finite[2], finite[3])
        choices = choices + compare_choices(
            _ids(of_ours, layer),
            _ids(eager_ids, layer),
            true,
            mine,
            error=largest_error(theirs, true_theirs),
        )
    verdicts = {
        name: judge(name, a, b, true_a, reduction=reduction, eager_truth=true_b)
        for name, (a, b, true_a, true_b) in pairs.items()
    }
    few = [name for name, (value, *_) in pairs.items() if value.numel() <= FEW]
    together = judge_together([verdicts.pop(name) for name in few]) if few else ()
    return Equivalence(dtype, (*verdicts.values(), *together), choices)


def _scores(recording: Recording, layer: int) -> Tensor:
    """What the layer chose from, over all forwards: (T, E)."""
    entries = recording[layer]
    name = next(name for name in SCORES if getattr(entries[0], name) is not None)
    return torch.cat([getattr(entry, name) for entry in entries])


def _ids(recording: Recording, layer: int) -> Tensor:
    return torch.cat([entry.experts_TK for entry in recording[layer]])  # type: ignore[union-attr]


def _eager(model: nn.Module) -> Any:
    model = copy.deepcopy(model)
    model.set_experts_implementation("eager")  # type: ignore[operator]
    return model


def _step(model: Any, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Logits of every batch and the gradient of every parameter, by name."""
    model.train()
    model.zero_grad()
    logits = []
    for batch in batches:
        out = model(input_ids=batch, labels=batch)
        out.loss.backward()
        logits.append(out.logits.detach())
    tensors = {"logits": torch.cat([row.flatten(0, 1) for row in logits])}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            tensors[f"grad {name}"] = parameter.grad.clone()
    return tensors


def _run(
    model: nn.Module, batches: Sequence[Tensor], choices: Recording | None = None
) -> tuple[dict[str, Tensor], Recording]:
    """A step of a replaced model, at the given choices where there are any."""
    with record(model, fields=SCORES) as recording:
        if choices is None:
            return _step(model, batches), recording
        with replay(model, choices):
            return _step(model, batches), recording


def _run_stock(model: nn.Module, batches: Sequence[Tensor]) -> tuple[dict[str, Tensor], Recording]:
    """A step of an unmodified model, and the ids its gates returned."""
    located = copy.deepcopy(model)
    replace_moe(located)
    sites = replacement_of(located).sites
    recording, forward = Recording(), dict[int, list[Routing]]()

    def note(layer: int, num_experts: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
            ids = next(tensor for tensor in output if tensor.dtype == torch.int64)
            weights = torch.zeros_like(ids, dtype=torch.float32)
            forward[layer] = [TokenChoice(ids, weights, num_experts)]

        return hook

    def close(*_: Any) -> None:
        recording.append(forward)

    with _hooks(
        {
            model.get_submodule(f"{site.name}.{site.family.router}"): note(
                site.layer, site.spec.num_ids
            )
            for site in sites
        }
        | {model: close}
    ):
        return _step(model, batches), recording


@contextmanager
def _hooks(hooks: Mapping[nn.Module, Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
