"""Is a replaced model the stock model? Every tensor of a training step, in its dtype.

Three runs of the same rounded weights and tokens: ours; stock with eager experts; and the truth,
ours in fp64 with every declared dtype raised. In low precision two right implementations choose
different experts where scores tie, and from there on compute different functions. So the truth is
run at each one's own choices, and the choices are compared apart, aware of ties. That the truth is
the stock model's function is shown in fp64 first (`parity`), against stock and its own choices.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetk.equivalence.judge import Choices, Verdict, compare_choices, judge, relative_error
from moetk.layers.recording import record, replay
from moetk.layers.replace import replace_moe
from moetk.recorded import Recording
from moetk.routing import TokenChoice

PARITY = 1e-10


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
    """Logits and every gradient of `ours` against stock's under the pass rule, in `dtype`.

    stock: a transformers model; ours: a replaced copy of it with stock routers. Neither changes.
    batches: token ids, (B, S) each; gradients are summed over them.
    """
    eager = _eager(stock).to(dtype)
    candidate = copy.deepcopy(ours).to(dtype)
    truth = copy.deepcopy(eager).double()
    sites = replace_moe(truth, backend="reference").sites
    _raise_declared(truth)

    own = Recording(("choice_TE", "scores_TE", "logits_TE"))
    with _recording_into(candidate, own):
        ours_tensors = _step(candidate, batches)
    eager_choices = Recording()
    with _ids_of_stock(eager, sites, eager_choices):
        eager_tensors = _step(eager, batches)
    exact = Recording(("choice_TE", "scores_TE", "logits_TE"))
    with _recording_into(truth, exact), replay(truth, own):
        truth_of_ours = _step(truth, batches)
    with replay(truth, eager_choices):
        truth_of_eager = _step(truth, batches)

    tokens = max(batch.numel() for batch in batches)
    reduction = max(tokens, *(max(p.shape) for p in stock.parameters()))
    verdicts = tuple(
        judge(
            name,
            ours_tensors[name],
            eager_tensors[name],
            truth_of_ours[name],
            reduction=reduction,
            eager_truth=truth_of_eager[name],
        )
        for name in eager_tensors
    )
    choices = _all_choices(own, eager_choices, exact, dtype, reduction)
    return Equivalence(dtype, verdicts, choices)


def _all_choices(
    ours: Recording, eager: Recording, exact: Recording, dtype: torch.dtype, reduction: int
) -> Choices:
    total = Choices(0, 0, 0, 0, 0)
    for layer in ours:
        for mine, theirs, true in zip(ours[layer], eager[layer], exact[layer], strict=True):
            assert isinstance(mine, TokenChoice) and isinstance(theirs, TokenChoice)
            scores = next(
                getattr(true, name)
                for name in ("choice_TE", "scores_TE", "logits_TE")
                if getattr(mine, name) is not None
            )
            total = total + compare_choices(
                mine, theirs.experts_TK, scores, selection=dtype, reduction=reduction
            )
    return total


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


def _raise_declared(model: nn.Module) -> None:
    """Every dtype that a composed router declares, raised to fp64."""
    for module in model.modules():
        for name in ("gemm_dtype", "score_dtype"):
            if name in vars(module):
                setattr(module, name, torch.float64)


class _recording_into:
    """`moetk.record`, into a recording that exists."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.context = record(model, fields=tuple(recording.fields))
        self.recording = recording

    def __enter__(self) -> None:
        made = self.context.__enter__()
        made._layers = self.recording._layers

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


class _ids_of_stock:
    """Records the ids that unmodified gates return."""

    def __init__(self, model: nn.Module, sites: Sequence[Any], recording: Recording) -> None:
        self.model, self.sites, self.recording = model, sites, recording
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for site in self.sites:
            gate = self.model.get_submodule(f"{site.name}.{site.family.router}")
            self.handles.append(gate.register_forward_hook(self._hook(site)))

    def _hook(self, site: Any) -> Any:
        def note(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
            ids = next(tensor for tensor in output if tensor.dtype == torch.int64)
            weights = torch.zeros_like(ids, dtype=torch.float32)
            self.recording.add(site.layer, TokenChoice(ids, weights, site.spec.num_ids))

        return note

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
