"""Two whole models: each mixture-of-experts layer on equal inputs, and all that lies between them.

Nothing is handed down from one judgement to the next. The second model's layer gets what the first
one's saw, and whatever stands around it (attention, norms, embeddings) gets the first one's values
too: what differs is named where it is, and not in all that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.equivalence.cause import deviation
from moetk.equivalence.chance import same_chance
from moetk.equivalence.comparison import compare
from moetk.equivalence.double import InDouble
from moetk.equivalence.model_report import LayerReport, ModelReport, tensors_apart
from moetk.equivalence.model_settings import settings_apart
from moetk.equivalence.passes import NO_TWIN
from moetk.equivalence.sides.untouched import copied, untouched
from moetk.errors import EquivalenceError, ReplaceError
from moetk.layers.families import family_of
from moetk.layers.find import root_of
from moetk.layers.replacement import replacement_of
from moetk.layers.swap import own_class

Progress = Callable[[str, int, int], None]
"""Called before each piece of work with (what, pieces done, pieces in all)."""


def compare_models(
    a: nn.Module,
    b: nn.Module,
    ids_BS: Tensor,
    *,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> ModelReport:
    """Compare two Transformers causal models, layer by layer.

    >>> report = compare_models(theirs, mine, ids)
    >>> report.ok, report.first
    >>> print(report)

    a: the reference. Both may be stock or replaced, of one family or two, with equally many
    mixture-of-experts layers, one hidden size, vocabulary and dtype. ids_BS: int64 token ids.
    seed: of the gradient that enters each layer's backward.

    Neither model changes; both run in evaluation mode. What lies between the layers is judged in
    fp64, on a copy of one model at a time.
    Not compared: the loss (Transformers adds the load of all layers to it where it is told to
    return router logits) and what else happens in training alone; settings of that which the two
    do not share are in the report's notes. Losses that replace_moe attached to a layer are.
    Raises EquivalenceError where the two cannot be set against each other, naming both values.
    """
    blocks_a, blocks_b = _blocks_of(a, "a"), _blocks_of(b, "b")
    _check_alike(a, b, blocks_a, blocks_b)
    total = 3 + len(blocks_a)
    progress("own runs", 0, total)
    own_a, own_b = _run(a, ids_BS), _run(b, ids_BS)
    progress("around the layers", 1, total)
    notes = settings_apart(a, b)
    around = _around(a, b, ids_BS, notes)
    ctx = _context(ids_BS)
    layers = []
    for index, (one, other) in enumerate(zip(blocks_a, blocks_b, strict=True)):
        progress(one.name, 2 + index, total)
        layers.append(
            LayerReport(
                index,
                one.name,
                other.name,
                compare(one.block, other.block, own_a.inputs[index], ctx=ctx, seed=seed),
                around[index],
                deviation(own_b.inputs[index], own_a.inputs[index]),
                deviation(own_b.outputs[index], own_a.outputs[index]),
            )
        )
    progress("parameters", total - 1, total)
    return ModelReport(
        _name(a),
        _name(b),
        tuple(layers),
        around[-1],
        deviation(own_b.logits, own_a.logits),
        tensors_apart(a, b),
        ids_BS,
        tuple(notes),
        layers[0].report.environment,
    )


@dataclass(frozen=True, eq=False)
class Block:
    """A mixture-of-experts block and the decoder layer that it lies in."""

    name: str
    block: nn.Module
    layer: nn.Module


def moe_blocks(model: nn.Module) -> tuple[Block, ...]:
    """Blocks with a router and experts, of a family that moetk has a row for or of another."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    root = root_of(model)
    modules = dict(root.named_modules())
    found = []
    for name, module in modules.items():
        if not _routes(module):
            continue
        layer = name
        while layer and not isinstance(modules[layer], GradientCheckpointingLayer):
            layer = layer.rpartition(".")[0]
        found.append(Block(name, module, modules[layer] if layer else module))
    return tuple(found)


def _routes(module: nn.Module) -> bool:
    if family_of(module) is not None:
        return True
    children = module._modules
    has_router = any(isinstance(children.get(name), nn.Module) for name in ("gate", "router"))
    stock = own_class(module).__module__.startswith("transformers.models.")
    return stock and has_router and isinstance(children.get("experts"), nn.Module)


def _blocks_of(model: nn.Module, which: str) -> tuple[Block, ...]:
    blocks = moe_blocks(model)
    if not blocks:
        raise EquivalenceError(
            f"{which}, a {_name(model)}, holds no mixture-of-experts layer: there is nothing to "
            "compare layer by layer."
        )
    return blocks


def _check_alike(
    a: nn.Module, b: nn.Module, blocks_a: Sequence[Block], blocks_b: Sequence[Block]
) -> None:
    config_a, config_b = (root_of(model).config.get_text_config() for model in (a, b))
    for what, one, other in (
        ("mixture-of-experts layers", len(blocks_a), len(blocks_b)),
        ("vocabulary", config_a.vocab_size, config_b.vocab_size),
        ("hidden size", config_a.hidden_size, config_b.hidden_size),
    ):
        if one != other:
            raise EquivalenceError(
                f"{what}: {one} in a ({_name(a)}), {other} in b ({_name(b)}). Compare two models "
                "that agree in it, or single layers with moetk.compare."
            )
    dtype_a, dtype_b = (next(model.parameters()).dtype for model in (a, b))
    if dtype_a != dtype_b:
        raise EquivalenceError(
            f"a ({_name(a)}) is in {dtype_a}, b ({_name(b)}) in {dtype_b}. Load both in one dtype."
        )


@dataclass(eq=False)
class _Values:
    """What a forward saw: the hidden states that enter and leave each block, and those that leave
    its decoder layer, by index of the block; at the end the logits."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    after: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def _run(model: nn.Module, ids_BS: Tensor, instead: _Values | None = None) -> _Values:
    """One forward. instead: what blocks and decoder layers hand on, for what they made."""
    seen, handles = _Values(), []
    for index, block in enumerate(moe_blocks(model)):
        outputs, after = (instead.outputs, instead.after) if instead else ({}, {})
        handles += [
            block.block.register_forward_pre_hook(_entering(seen.inputs, index), with_kwargs=True),
            block.block.register_forward_hook(_leaving(seen.outputs, outputs, index)),
            block.layer.register_forward_hook(_leaving(seen.after, after, index)),
        ]
    try:
        with untouched(model), torch.no_grad(), same_chance(ids_BS):
            seen.logits = model(input_ids=ids_BS, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _entering(seen: dict[int, Tensor], index: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        seen[index] = next(value for value in given if value.is_floating_point())

    return hook


def _leaving(
    seen: dict[int, Tensor], instead: Mapping[int, Tensor], index: int
) -> Callable[..., Any]:
    """Note the hidden states, and hand on others of the same shape where there are any."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden, rest = (output, None) if isinstance(output, Tensor) else (output[0], output[1:])
        seen[index] = hidden
        if index not in instead or instead[index].shape != hidden.shape:
            return None
        return instead[index] if rest is None else (instead[index], *rest)

    return hook


def _around(a: nn.Module, b: nn.Module, ids_BS: Tensor, notes: list[str]) -> Sequence[float | None]:
    """Error in fp64 of what stands around each block in b, and after the last decoder layer, on a's
    values: (layers + 1) numbers. None where fp64 does not run, which is noted."""
    try:
        with InDouble(next(a.parameters()).dtype):
            exact_a = _run(_in_double(a), ids_BS)
            exact_b = _run(_in_double(b), ids_BS, instead=exact_a)
    except NO_TWIN as error:
        notes.append(
            "what lies around the blocks was not judged, since a model does not run in fp64: "
            f"{type(error).__name__}: {error}"
        )
        return [None] * (len(moe_blocks(a)) + 1)
    around = [
        max(
            deviation(exact_b.inputs[index], entering),
            deviation(exact_b.after[index], exact_a.after[index]),
        )
        for index, entering in exact_a.inputs.items()
    ]
    return [*around, deviation(exact_b.logits, exact_a.logits)]


def _in_double(model: nn.Module) -> nn.Module:
    """A copy in fp64; of a stock model with eager experts, since grouped_mm refuses fp64."""
    twin = copied(model)
    try:
        replacement_of(twin)
    except ReplaceError:
        root_of(twin).set_experts_implementation("eager")
    return twin.double()


def _context(ids_BS: Tensor) -> RouterContext:
    batch, length = ids_BS.shape
    positions = torch.arange(length, device=ids_BS.device).repeat(batch)
    sequences = torch.arange(batch, device=ids_BS.device).repeat_interleave(length)
    return RouterContext(
        token_ids=ids_BS.flatten(),
        positions=positions,
        sequence_ids=sequences,
        batch_shape=(batch, length),
    )


def _name(model: nn.Module) -> str:
    return own_class(root_of(model)).__name__
