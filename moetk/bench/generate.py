"""Generation with a cache; contenders in turn, from the same weights and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moetk.bench.meter import Meter
from moetk.bench.race import Racer, race, told
from moetk.bench.shapes import ModelShape
from moetk.bench.step import StepContender, load_libraries, stock_causal_model, token_ids


@dataclass(eq=False)
class GenerateResult:
    """times: milliseconds of each timed call of generate(). same: the share of new tokens that are
    the first contender's; a greedy choice turns where two logits are closer than rounding, and
    everything behind it. about: what ran, in the contender's own words."""

    name: str
    times: list[float] = field(default_factory=list)
    same: float | None = None
    about: str = ""
    error: str | None = None


def measure_generate(
    shape: ModelShape,
    contenders: Sequence[StepContender],
    meter: Meter,
    *,
    new_tokens: int = 64,
    rounds: int = 10,
    cache: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> list[GenerateResult]:
    """Greedy generation of `new_tokens` behind shape.batch prompts of shape.length random tokens,
    in evaluation. All models are held side by side.

    cache: transformers' `cache_implementation`; None = its default, which grows; "static" makes
    transformers compile each token's forward on a GPU. A contender that raises has the reason in
    its result, and the others go on.
    """
    load_libraries(contenders)
    shape = replace(shape, changes={**shape.changes, "use_cache": True})
    runs, model = [_Run(contender.name) for contender in contenders], None
    for run, contender in zip(runs, contenders, strict=True):
        try:
            model = stock_causal_model(shape, meter, dtype, seed).eval()
            run.model, run.prepared = model, contender.prepare(model)
        except Exception as error:  # a part that is missing: it belongs in the row
            run.racer.error = told(error)
        run.prompts = token_ids(shape, shape.config().vocab_size, seed).to(meter.device)
        run.settings = _greedy(run.prompts, new_tokens)
        if cache is not None:
            run.settings["cache_implementation"] = cache
    model = None
    race([run.racer for run in runs], rounds, meter)
    results = [run.result(runs[0].tokens) for run in runs]
    del runs, run
    meter.release()
    return results


def _greedy(prompts: Tensor, new_tokens: int) -> dict[str, Any]:
    return {
        "attention_mask": torch.ones_like(prompts),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }


class _Run:
    """One contender's model; a call is one generate()."""

    prompts: Tensor
    settings: dict[str, Any]

    def __init__(self, name: str) -> None:
        self.racer = Racer(name, self, lambda: None)
        self.model: Any = None
        self.prepared: Any = None
        self.tokens: Tensor | None = None

    def __call__(self) -> None:
        generated = self.model.generate(self.prompts, **self.settings)
        self.tokens = generated[:, self.prompts.shape[1] :]

    def result(self, first: Tensor | None) -> GenerateResult:
        result = GenerateResult(self.racer.name, self.racer.times, error=self.racer.error)
        if self.racer.error is None:
            result.about = getattr(self.prepared, "explain", str)()
            if first is not None and self.tokens is not None:
                result.same = float((self.tokens == first).double().mean())
        return result
