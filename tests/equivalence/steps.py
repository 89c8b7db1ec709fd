"""moetk's routers and its bank taken apart, so that a defect can take the place of one step.

Letters: T tokens, H hidden, E experts, K choices a token, I expert width, N rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moetk import RouterContext, TokenChoice
from moetk.experts import BankSpec, ExpertBank
from moetk.kernels.selection import gather, in_best_groups, largest, normalise, softmax_over
from moetk.routers import DeepSeekV3Router, GptOssRouter, LinearRouter, MixtralRouter, SwitchRouter

T, H, E, K, I = 14, 16, 16, 3, 8


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape or (2, T // 2, H), generator=torch.Generator().manual_seed(1))


class InSteps(LinearRouter):
    """product, score, limit, select, weigh, show."""

    def product(self, x_TH: Tensor) -> Tensor:
        return self.logits(x_TH)

    def score(self, logits_TE: Tensor) -> Tensor:
        raise NotImplementedError

    def limit(self, scores_TE: Tensor, logits_TE: Tensor) -> Tensor:
        return self.with_choice_bias(scores_TE)

    def select(self, choice_TE: Tensor) -> Tensor:
        return largest(choice_TE, self.top_k)

    def weigh(
        self, scores_TE: Tensor, ids_TK: Tensor, choice_TE: Tensor, logits_TE: Tensor
    ) -> Tensor:
        raise NotImplementedError

    def show(self, **stages: Tensor) -> dict[str, Tensor]:
        return stages

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.product(x_TH)
        scores_TE = self.score(logits_TE)
        choice_TE = self.limit(scores_TE, logits_TE)
        ids_TK = ctx.replayed(self.select(choice_TE))
        weights_TK = self.weigh(scores_TE, ids_TK, choice_TE, logits_TE)
        shown = self.show(logits_TE=logits_TE, scores_TE=scores_TE, choice_TE=choice_TE)
        return TokenChoice(ids_TK, weights_TK, self.num_experts, **shown)


class V3(InSteps, DeepSeekV3Router):
    def score(self, logits_TE: Tensor) -> Tensor:
        return self.in_score_dtype(logits_TE).sigmoid()

    def limit(self, scores_TE: Tensor, logits_TE: Tensor) -> Tensor:
        biased_TE = self.with_choice_bias(scores_TE)
        return in_best_groups(biased_TE, self.groups, self.top_groups)

    def weigh(
        self, scores_TE: Tensor, ids_TK: Tensor, choice_TE: Tensor, logits_TE: Tensor
    ) -> Tensor:
        return normalise(gather(scores_TE, ids_TK), self.eps) * self.scale


class Mixtral(InSteps, MixtralRouter):
    def score(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(-1, dtype=self.score_dtype)

    def weigh(
        self, scores_TE: Tensor, ids_TK: Tensor, choice_TE: Tensor, logits_TE: Tensor
    ) -> Tensor:
        weights_TK = gather(scores_TE, ids_TK)
        return normalise(weights_TK) if self.renormalise else weights_TK


class GptOss(InSteps, GptOssRouter):
    def score(self, logits_TE: Tensor) -> Tensor:
        return self.in_score_dtype(logits_TE)

    def weigh(
        self, scores_TE: Tensor, ids_TK: Tensor, choice_TE: Tensor, logits_TE: Tensor
    ) -> Tensor:
        return softmax_over(scores_TE, ids_TK)

    def show(self, **stages: Tensor) -> dict[str, Tensor]:
        return {"logits_TE": stages["logits_TE"]}


def router(kind: type[LinearRouter], settings: dict[str, Any], **steps: Any) -> LinearRouter:
    """A router with drawn parameters and biases; steps: methods to put in the place of its own."""
    torch.manual_seed(0)
    top_k = settings.get("top_k", 1 if issubclass(kind, SwitchRouter) else K)
    settings = {name: value for name, value in settings.items() if name != "top_k"}
    made = (type(kind.__name__, (kind,), steps) if steps else kind)(H, E, top_k, **settings)
    with torch.no_grad():
        made.weight.normal_(std=0.6)
        for name in ("bias", "e_score_correction_bias"):
            held = getattr(made, name, None)
            if held is not None:
                held.normal_(mean=-1.0, std=0.6)  # many biased scores are negative
    return made


GROUPED = {"groups": 4, "top_groups": 2, "scale": 2.5}


def v3(**steps: Any) -> LinearRouter:
    return router(V3 if steps else DeepSeekV3Router, GROUPED, **steps)


def mixtral(renormalise: bool = True, **steps: Any) -> LinearRouter:
    return router(Mixtral if steps else MixtralRouter, {"renormalise": renormalise}, **steps)


def gpt_oss(**steps: Any) -> LinearRouter:
    return router(GptOss if steps else GptOssRouter, {}, **steps)


class Loop(nn.Module):
    """Expert after expert, as eager code has it."""

    def __init__(self, bank: ExpertBank) -> None:
        super().__init__()
        self.spec = bank.spec
        self.is_transposed = bank.spec.transposed
        self.is_concatenated = not bank.spec.interleaved
        for name, parameter in bank.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))

    def up(self, x_NH: Tensor, expert: int) -> Tensor:
        weight = self.gate_up_proj[expert]
        return x_NH @ (weight if self.is_transposed else weight.T)

    def up_bias(self, hidden_NJ: Tensor, expert: int) -> Tensor:
        bias_EJ = getattr(self, "gate_up_proj_bias", None)
        return hidden_NJ if bias_EJ is None else hidden_NJ + bias_EJ[expert]

    def split(self, hidden_NJ: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_concatenated:
            gate_NI, up_NI = hidden_NJ.chunk(2, -1)
            return gate_NI, up_NI
        return hidden_NJ[:, ::2], hidden_NJ[:, 1::2]

    def activate(self, gate_NI: Tensor, up_NI: Tensor) -> Tensor:
        return self.spec.activation(gate_NI, up_NI)  # type: ignore[call-arg]

    def down(self, inner_NI: Tensor, expert: int) -> Tensor:
        weight = self.down_proj[expert]
        return inner_NI @ (weight if self.is_transposed else weight.T)

    def down_bias(self, y_NH: Tensor, expert: int) -> Tensor:
        bias_EH = getattr(self, "down_proj_bias", None)
        return y_NH if bias_EH is None else y_NH + bias_EH[expert]

    def expert(self, x_NH: Tensor, expert: int) -> Tensor:
        hidden_NJ = self.up_bias(self.up(x_NH, expert), expert)
        inner_NI = self.activate(*self.split(hidden_NJ))
        return self.down_bias(self.down(inner_NI, expert), expert)

    def weigh(self, y_NH: Tensor, weights_N: Tensor) -> Tensor:
        return y_NH * weights_N[:, None]

    def add(self, y_TH: Tensor, tokens_N: Tensor, y_NH: Tensor) -> Tensor:
        return y_TH.index_add(0, tokens_N, y_NH.to(y_TH))

    def taken(self, routing: TokenChoice, expert: int) -> tuple[Tensor, Tensor]:
        tokens_N, slots_N = (routing.experts_TK == expert).nonzero(as_tuple=True)
        return tokens_N, routing.weights_TK[tokens_N, slots_N]

    def forward(self, x_TH: Tensor, routing: TokenChoice) -> Tensor:
        y_TH = torch.zeros_like(x_TH)
        for expert in range(routing.num_experts):
            tokens_N, weights_N = self.taken(routing, expert)
            if len(tokens_N):
                y_NH = self.expert(x_TH[tokens_N], expert)
                y_TH = self.add(y_TH, tokens_N, self.weigh(y_NH, weights_N))
        return y_TH


def bank(inner: int = I, bias: bool = False, **spec: Any) -> ExpertBank:
    """An expert bank with drawn parameters."""
    torch.manual_seed(2)
    made = ExpertBank(H, E, inner, spec=BankSpec(E, H, inner, **spec), bias=bias)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    return made


def loop(right: ExpertBank, **steps: Any) -> Loop:
    """The same bank as a loop; steps: methods to put in the place of its own."""
    return type("Loop", (Loop,), steps)(right)


def routing(duplicates: bool = False) -> TokenChoice:
    """Choices of distinct experts; or some tokens name one twice."""
    generator = torch.Generator().manual_seed(3)
    ids_TK = torch.rand(T, E, generator=generator).argsort(-1)[:, :K]
    if duplicates:
        ids_TK[::3, 2] = ids_TK[::3, 0]
    weights_TK = torch.rand(T, K, generator=generator) + 0.1
    return TokenChoice(ids_TK, weights_TK, E)


class Dense(nn.Module):
    """Every expert on every token, weighed by a (T, E) matrix: nothing inside can be overheard."""

    def __init__(self, bank: ExpertBank) -> None:
        super().__init__()
        self.spec = bank.spec
        for name, parameter in bank.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))

    def weights(self, routing: TokenChoice) -> Tensor:
        empty_TE = routing.weights_TK.new_zeros(len(routing.experts_TK), E)
        return empty_TE.scatter_add(1, routing.experts_TK, routing.weights_TK)

    def outputs(self, x_TH: Tensor) -> Tensor:
        hidden_TEJ = torch.einsum("th,ejh->tej", x_TH, self.gate_up_proj)
        inner_TEI = self.spec.activate(self.with_bias(hidden_TEJ, "gate_up_proj_bias"))
        y_TEH = torch.einsum("tei,ehi->teh", inner_TEI, self.down_proj)
        return self.with_bias(y_TEH, "down_proj_bias")

    def with_bias(self, values_TEN: Tensor, name: str) -> Tensor:
        bias_EN = getattr(self, name, None)
        return values_TEN if bias_EN is None else values_TEN + bias_EN

    def combine(self, y_TEH: Tensor, weights_TE: Tensor) -> Tensor:
        return torch.einsum("teh,te->th", y_TEH, weights_TE)

    def forward(self, x_TH: Tensor, routing: TokenChoice) -> Tensor:
        return self.combine(self.outputs(x_TH), self.weights(routing).to(x_TH))


def dense(right: ExpertBank, **steps: Any) -> Dense:
    return type("Dense", (Dense,), steps)(right)


def with_parameters(made: nn.Module, **changes: Callable[[Tensor], Tensor]) -> nn.Module:
    """The module with parameters changed in place, as a wrongly read checkpoint does."""
    with torch.no_grad():
        for name, change in changes.items():
            made.get_parameter(name).copy_(change(made.get_parameter(name)).clone())
    return made
