"""What `moetk compare` does: make two parts or models from their sources, and compare them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moetk.context import RouterContext
from moetk.equivalence.comparison import compare
from moetk.equivalence.model_report import ModelReport
from moetk.equivalence.models import Progress, compare_models
from moetk.equivalence.report import Report
from moetk.equivalence.source import Source
from moetk.errors import ConfigError


@dataclass(frozen=True)
class Inputs:
    """What both get: `batch` sequences of `length` tokens, drawn from `seed`, or the first bytes of
    the file `text` as token ids modulo the vocabulary. hidden_size, dtype: of the x that parts
    get; None = read off them."""

    batch: int = 2
    length: int = 32
    seed: int = 0
    text: Path | None = None
    hidden_size: int | None = None
    dtype: torch.dtype | None = None

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def ids(self, vocabulary: int) -> Tensor:
        """(B, S) int64. Raises ConfigError for a text that cannot be read or is too short."""
        if self.text is None:
            shape = (self.batch, self.length)
            return torch.randint(vocabulary, shape, generator=self.generator)
        try:
            data = self.text.read_bytes()
        except OSError as error:
            raise ConfigError(f"{self.text} cannot be read ({error.strerror}).") from None
        need = self.batch * self.length
        if len(data) < need:
            raise ConfigError(
                f"{self.text} has {len(data)} bytes; {self.batch} sequences of {self.length} need "
                f"{need}. Give a longer text, or a smaller batch or length."
            )
        return torch.tensor(list(data[:need])).view(self.batch, self.length) % vocabulary

    def hidden(self, a: Any, b: Any) -> Tensor:
        """x (B, S, H). Raises ConfigError where H is not to be found, or not one."""
        sizes = [self.hidden_size or hidden_size_of(part) for part in (a, b)]
        found = {size for size in sizes if size is not None}
        if len(found) > 1:
            raise ConfigError(f"a has hidden size {sizes[0]}, b has {sizes[1]}: no x fits both.")
        if not found:
            raise ConfigError("Neither a nor b tells its hidden size; give it by --hidden-size.")
        dtype = self.dtype or dtype_of(a) or dtype_of(b) or torch.float32
        shape = (self.batch, self.length, found.pop())
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)


def compare_sources(
    a: Source,
    b: Source,
    inputs: Inputs,
    progress: Progress = lambda what, done, total: None,
) -> Report | ModelReport:
    """Make both and compare them: models layer by layer, parts stage by stage. The report calls
    them by their sources: two checkpoints are of one class as a rule.

    Raises ConfigError where one is a model and the other is not, where one cannot be made, and
    where there is no input for them; EquivalenceError as compare and compare_models do.
    """
    progress(f"making {a.name}", 0, 3)
    part_a = _made(a)
    progress(f"making {b.name}", 1, 3)
    part_b = _made(b)
    kinds = [_is_model(part) for part in (part_a, part_b)]
    if all(kinds):
        vocabularies = [part.config.get_text_config().vocab_size for part in (part_a, part_b)]
        ids = inputs.ids(min(vocabularies))
        models = compare_models(part_a, part_b, ids, seed=inputs.seed, progress=progress)
        return replace(models, a=a.name, b=b.name)
    if any(kinds):
        words = ["a model" if kind else "no model" for kind in kinds]
        raise ConfigError(
            f"{a.name} is {words[0]}, {b.name} is {words[1]}: compare two models, or two parts."
        )
    if inputs.text is not None:
        raise ConfigError("--text gives token ids, and parts are compared on hidden states.")
    x = inputs.hidden(part_a, part_b)
    progress("comparing", 2, 3)
    ctx = RouterContext(batch_shape=(inputs.batch, inputs.length))
    report = compare(part_a, part_b, x, ctx=ctx, seed=inputs.seed)
    return replace(report, a=a.name, b=b.name)


def hidden_size_of(part: Any) -> int | None:
    """What a module says its hidden size is, or its router's matrix shows; None = neither."""
    if not isinstance(part, nn.Module):
        return None
    for module in part.modules():
        for holder in (module, getattr(module, "spec", None)):
            size = getattr(holder, "hidden_size", None) or getattr(holder, "hidden_dim", None)
            if isinstance(size, int):
                return size
    for module in part.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            return weight.shape[1]
    return None


def dtype_of(part: Any) -> torch.dtype | None:
    """Of a module's first floating parameter."""
    if not isinstance(part, nn.Module):
        return None
    floating = (p.dtype for p in part.parameters() if p.is_floating_point())
    return next(floating, None)


def _made(source: Source) -> Any:
    try:
        return source.make()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{source.name} cannot be made: {type(error).__name__}: {error}"
        ) from error


def _is_model(part: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(part, PreTrainedModel)
