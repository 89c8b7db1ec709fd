"""The pass rule for what a device computes, and bitwise sameness."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moetk.equivalence.judge import Verdict, judge, judge_together

Tensors = Mapping[str, Tensor]


def verdict(name: str, ours: Tensor, eager: Tensor, truth: Tensor, reduction: int) -> Verdict:
    """`judge`, where a result may also be as far off as rounding it once can bring it: of a few
    numbers, eager's may all have fallen near."""
    assert ours.dtype == eager.dtype, (name, ours.dtype, eager.dtype)
    judged = judge(name, ours, eager, truth, reduction=reduction)
    return replace(judged, floor=max(judged.floor, torch.finfo(ours.dtype).eps / 2))


def assert_passes(draws: Iterable[tuple[Tensors, Tensors, Tensors]], *, reduction: int) -> None:
    """Each name over all draws of (ours, eager, truth): one draw of a few numbers says little."""
    verdicts: dict[str, list[Verdict]] = {}
    for ours, eager, truth in draws:
        assert ours.keys() == truth.keys()
        for name, true in truth.items():
            one = verdict(name, ours[name], eager[name], true, reduction)
            verdicts.setdefault(name, []).append(one)
    together = {name: judge_together(found)[0] for name, found in verdicts.items()}
    broken = {name: judged for name, judged in together.items() if not judged.ok}
    assert verdicts and not broken, broken


def assert_bitwise(found: Tensors, want: Tensors) -> None:
    assert found.keys() == want.keys()
    differ = [name for name, tensor in want.items() if not torch.equal(found[name], tensor)]
    assert not differ, differ


def grown(leaves: Tensors, outputs: Tensors, cotangents: Iterable[Tensor]) -> dict[str, Tensor]:
    """The outputs and, as "dname", the gradient of each leaf that wants one."""
    asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    into = [g.to(y.dtype) for g, y in zip(cotangents, outputs.values(), strict=True)]
    found = torch.autograd.grad(
        list(outputs.values()), list(asked.values()), into, materialize_grads=True
    )
    values = {name: y.detach() for name, y in outputs.items()}
    return {**values, **{f"d{n}": g for n, g in zip(asked, found, strict=True)}}
