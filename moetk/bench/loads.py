"""How a layer's tokens spread over its experts, brought about by the router's own weights.

A qwen3 gate has no bias. So every token gets the same component along one direction, and each row
of the gate a component along it too: the product is a shift of that expert's logit, the same for
all tokens. The layer, its router included, runs as it always does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from moetk.errors import ConfigError

Load = Callable[[Tensor, Tensor, int, Generator], None]
# The mean of a token's entries. Small beside their standard deviation of one, so that the experts
# see nearly the same tokens under every load.
MEAN = 0.5


def balanced(weight_EH: Tensor, x_TH: Tensor, top_k: int, generator: Generator) -> None:
    """The random gate as it is: experts differ by what chance gives them."""


def zipf(weight_EH: Tensor, x_TH: Tensor, top_k: int, generator: Generator) -> None:
    """Zipf 1.0 over a random permutation of the experts: see `zipf_rates`."""
    rates_E = zipf_rates(len(weight_EH), top_k).to(x_TH.device)
    rates_E = rates_E[torch.randperm(len(rates_E), generator=generator, device=x_TH.device)]
    logits_TE = _make_room(weight_EH, x_TH)
    _shift(weight_EH, solve_shift(logits_TE, rates_E, top_k))


def same(weight_EH: Tensor, x_TH: Tensor, top_k: int, generator: Generator) -> None:
    """Every token chooses the same K experts, which are random ones."""
    chosen_K = torch.randperm(len(weight_EH), generator=generator, device=x_TH.device)[:top_k]
    logits_TE = _make_room(weight_EH, x_TH)
    shift_E = logits_TE.new_zeros(len(weight_EH))
    shift_E[chosen_K] = logits_TE.max() - logits_TE.min() + 1
    _shift(weight_EH, shift_E)


LOADS: dict[str, Load] = {"balanced": balanced, "zipf": zipf, "same": same}


def load_named(name: str) -> Load:
    """Raises ConfigError for a name that LOADS lacks."""
    if name not in LOADS:
        raise ConfigError(f"routing {name!r} is not one of {', '.join(LOADS)}.")
    return LOADS[name]


def zipf_rates(num_experts: int, top_k: int) -> Tensor:
    """Share of tokens (E,) that choose the expert of each rank: s / rank, K in all, at most 1.

    A token names an expert once, so that where K / (1 + 1/2 + ... + 1/E) exceeds one (K = 8 of
    E = 128: 1.47) the first ranks are full and the rest follows Zipf's law among themselves.
    """
    rank_E = torch.arange(1, num_experts + 1, dtype=torch.float64)
    for full in range(top_k):
        scale = (top_k - full) / (1 / rank_E[full:]).sum()
        if scale / rank_E[full] <= 1:
            break
    else:
        full, scale = top_k, torch.zeros((), dtype=torch.float64)
    rates_E = scale / rank_E
    rates_E[:full] = 1
    return rates_E


def solve_shift(logits_TE: Tensor, rates_E: Tensor, top_k: int, steps: int = 200) -> Tensor:
    """A shift (E,) of the logits under which a share rates_E of the tokens chooses each expert.

    Each step moves an expert by the difference of the wanted and the measured log-odds, damped by
    the logits' spread: a Gaussian's log-odds have a slope of one to three over its deviation.
    """
    tokens = len(logits_TE)
    least = 0.5 / tokens
    wanted_E = rates_E.to(logits_TE.dtype).clamp(least, 1 - least).logit()
    shift_E = torch.zeros_like(wanted_E)
    damping = 0.3 * logits_TE.std()
    for _ in range(steps):
        measured_E = choice_rates(logits_TE + shift_E, top_k).clamp(least, 1 - least).logit()
        shift_E = shift_E + damping * (wanted_E - measured_E)
    return shift_E - shift_E.mean()


def choice_rates(logits_TE: Tensor, top_k: int) -> Tensor:
    """Share of the tokens (E,) that has each expert among its best K."""
    experts_TK = logits_TE.topk(top_k, dim=-1).indices
    chosen_TE = torch.zeros_like(logits_TE).scatter_(1, experts_TK, 1.0)
    return chosen_TE.mean(0)


@torch.no_grad()
def _make_room(weight_EH: Tensor, x_TH: Tensor) -> Tensor:
    """Give every token the mean MEAN and every row of the gate the mean zero, in place; returns
    the fp32 logits (T, E)."""
    x_TH += MEAN - x_TH.float().mean(-1, keepdim=True)
    weight_EH -= weight_EH.float().mean(-1, keepdim=True)
    return x_TH.float() @ weight_EH.float().T


@torch.no_grad()
def _shift(weight_EH: Tensor, shift_E: Tensor) -> None:
    weight_EH += shift_E[:, None] / (MEAN * weight_EH.shape[1])
