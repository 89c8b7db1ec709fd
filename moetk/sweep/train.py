"""Train one small language model and measure what its routers do. Deterministic for a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from moetk.errors import NonFiniteRoutingError
from moetk.io import sha256
from moetk.layers.recording import record
from moetk.layers.replace import replace_moe
from moetk.layers.replacement import Replacement
from moetk.metrics import drop_fraction, max_violation, tokens_per_expert, unserved_fraction
from moetk.routing import TokenChoice
from moetk.sweep.causality import is_causal
from moetk.sweep.config import CellConfig, ModelSettings, TrainSettings
from moetk.sweep.data import Corpus
from moetk.sweep.parts import arm_controllers, arm_losses, router_factory

VOCABULARY = 256
WINDOWS = 60
CAUSAL_SEQUENCES = 8

OnStep = Callable[[dict[str, Any]], None]


def build_model(settings: ModelSettings, length: int) -> nn.Module:
    """A Transformers model with random weights from torch's current seed. length: positions."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.hidden_size // settings.heads,
        intermediate_size=settings.intermediate_size,
        moe_intermediate_size=settings.intermediate_size,
        num_experts=settings.experts,
        num_experts_per_tok=settings.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model: nn.Module = Qwen3MoeForCausalLM(config)
    return model


def stream(seed: int, name: str) -> int:
    """A seed of its own for each use of chance, so that one more draw here moves nothing there."""
    return int(sha256(f"{name} {seed}".encode())[:15], 16)


def build_arm(config: CellConfig, seed: int) -> tuple[nn.Module, Replacement]:
    """The arm's model. Equal seeds give every arm the same stock weights, and routers of one shape
    the same weights too. Raises ConfigError, and what replace_moe raises."""
    arm = config.arm
    torch.manual_seed(stream(seed, "model"))
    model = build_model(config.model, config.train.sequence_length)
    torch.manual_seed(stream(seed, "router"))
    replacement = replace_moe(
        model,
        router_factory(arm),
        losses=arm_losses(arm),
        controllers=arm_controllers(arm),
        backend=arm.backend,
        seed=stream(seed, "noise"),
    )
    return model, replacement


def rehearse(config: CellConfig, corpus: Corpus) -> None:
    """All that a cell does, on one sequence and for one step: what will raise, raises now."""
    short = replace(config.train, batch_size=1, eval_batches=1)
    train_arm(replace(config, steps=1, train=short), 0, corpus, lambda event: None)


def train_arm(config: CellConfig, seed: int, corpus: Corpus, on_step: OnStep) -> dict[str, Any]:
    """Train the arm; returns `row.result`: losses in nats a byte, balance, drops, causality.

    status "diverged" = a loss or a routing weight was not finite; the run ends there, and what was
    measured until then is kept.
    """
    torch.use_deterministic_algorithms(True)
    settings, steps = config.train, config.steps
    model, replacement = build_arm(config, seed)
    torch.manual_seed(stream(seed, "noise"))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=settings.weight_decay
    )
    schedule = LambdaLR(optimizer, warmup_then_cosine(settings, steps))
    replacement.step_after(optimizer)
    batches = corpus.batches(settings.batch_size, settings.sequence_length, stream(seed, "data"))
    held_out = corpus.held_out_batches(
        settings.eval_batches, settings.batch_size, settings.sequence_length
    )

    load = LoadLog()
    losses: list[float] = []
    curve: list[tuple[int, float]] = []
    try:
        for step in range(1, steps + 1):
            if (step - 1) % settings.eval_every == 0:
                curve.append((step - 1, evaluate(model, held_out)["loss"]))
            model.train()
            ids_BS = next(batches)
            with record(model) as recording:
                loss = model(input_ids=ids_BS, labels=ids_BS).loss
            losses.append(_finite(loss, f"training step {step}"))
            load.add({layer: tokens_per_expert(last) for layer, (*_, last) in recording.items()})
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            schedule.step()
            on_step({"step": step, "steps": steps, "loss": losses[-1]})
        final = evaluate(model, held_out)
        curve.append((steps, final.pop("loss")))
        (ids_BS,) = corpus.held_out_batches(1, CAUSAL_SEQUENCES, settings.sequence_length)
        causal = is_causal(model, ids_BS, VOCABULARY)
    except (Diverged, NonFiniteRoutingError) as error:
        ending: dict[str, Any] = {"status": "diverged", "error": str(error), "final_loss": None}
    else:
        ending = {"status": "ok", "final_loss": curve[-1][1], "causal": causal, **final}
    return {
        "initial_loss": curve[0][1] if curve else None,
        "train_loss": losses,
        "held_out": curve,
        **load.result(),
        **ending,
    }


class Diverged(Exception):
    """A loss is not a finite number."""


def _finite(loss: Tensor, where: str) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise Diverged(f"the loss of {where} is {value}")
    return float(value)


def warmup_then_cosine(settings: TrainSettings, steps: int) -> Callable[[int], float]:
    """The share of lr at a step, counted from 0."""

    def share(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / settings.warmup
        done = (step - settings.warmup) / max(1, steps - settings.warmup)
        return settings.final_lr + (1 - settings.final_lr) * (1 + math.cos(math.pi * done)) / 2

    return share


@torch.no_grad()
def evaluate(model: nn.Module, batches_NBS: Tensor) -> dict[str, Any]:
    """Loss (nats a byte), balance and drops over held-out batches.

    max_violation: of the counts over all batches together (MaxVio_global of arXiv 2408.15664), the
    mean over layers; max_violation_by_layer has each. drop_fraction: choices that found no room,
    None where experts choose. unserved_fraction: tokens that no expert served. Both of all layers.
    Raises Diverged.
    """
    model.eval()
    losses = []
    with record(model) as recording:
        for ids_BS in batches_NBS:
            loss = model(input_ids=ids_BS, labels=ids_BS).loss
            losses.append(_finite(loss, "a held-out batch"))
    counts = {
        layer: torch.stack([tokens_per_expert(entry) for entry in entries]).sum(0)
        for layer, entries in recording.items()
    }
    violations = [float(max_violation(counts_E)) for counts_E in counts.values()]
    routings = [entry for _, entries in recording.items() for entry in entries]
    drops = [float(drop_fraction(entry)) for entry in routings if isinstance(entry, TokenChoice)]
    return {
        "loss": mean(losses),
        "max_violation": mean(violations),
        "max_violation_by_layer": violations,
        "drop_fraction": mean(drops) if drops else None,
        "unserved_fraction": mean(float(unserved_fraction(entry)) for entry in routings),
    }


class LoadLog:
    """How often each expert was chosen, step by step, kept small enough for a row."""

    def __init__(self) -> None:
        self.violations: list[float] = []
        self.counts: list[Mapping[int, Tensor]] = []

    def add(self, counts: Mapping[int, Tensor]) -> None:
        """One step's counts (E,) of every layer."""
        self.counts.append(counts)
        values = [float(max_violation(counts_E)) for counts_E in counts.values()]
        self.violations.append(mean(values))

    def result(self) -> dict[str, Any]:
        """batch_max_violation: one value a step, the mean over layers. train_max_violation: of the
        counts over the last quarter of the steps together. load: counts summed over at most 60
        windows of steps; `steps` has each window's last step."""
        total = len(self.counts)
        windows = min(WINDOWS, total)
        ends = [round((index + 1) * total / windows) for index in range(windows)]
        starts = [0, *ends[:-1]]
        layers = self.counts[0] if self.counts else {}
        return {
            "batch_max_violation": self.violations,
            "train_max_violation": self._over(total - -(-total // 4), total),
            "load": {
                "steps": ends,
                "layers": {
                    str(layer): [
                        torch.stack([step[layer] for step in self.counts[start:end]])
                        .sum(0)
                        .tolist()
                        for start, end in zip(starts, ends, strict=True)
                    ]
                    for layer in layers
                },
            },
        }

    def _sum(self, layer: int, start: int, end: int) -> Tensor:
        return torch.stack([step[layer] for step in self.counts[start:end]]).sum(0)

    def _over(self, start: int, end: int) -> float | None:
        if start == end:
            return None
        return mean(float(max_violation(self._sum(layer, start, end))) for layer in self.counts[0])
