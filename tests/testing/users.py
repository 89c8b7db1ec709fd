"""Routers as users write them: right, and each unlike moetk's own in some way."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetk import RouterContext, TokenChoice
from moetk.routers import gather, normal_like, normalise, top_k, within_capacity


class Cosine(nn.Module):
    """The README's: float32 inside, whatever comes in."""

    def __init__(self, hidden_size: int, num_experts: int, k: int) -> None:
        super().__init__()
        self.weight, self.k = nn.Parameter(torch.randn(num_experts, hidden_size)), k

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        x_TH, weight_EH = x_TH.float(), self.weight.float()
        scores_TE = 10 * F.normalize(x_TH, dim=-1) @ F.normalize(weight_EH, dim=-1).T
        experts_TK = top_k(scores_TE, self.k, ctx)
        weights_TK = gather(scores_TE, experts_TK).softmax(-1)
        return TokenChoice(experts_TK, weights_TK, len(self.weight))


class Float32Only(nn.Module):
    """Casts its input and not its matrix: does not run in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 5, bias=False)

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.gate(x_TH.float())
        scores_TE = logits_TE.softmax(-1)
        experts_TK = top_k(scores_TE, 2, ctx)
        weights_TK = normalise(gather(scores_TE, experts_TK))
        return TokenChoice(experts_TK, weights_TK, 5, logits_TE, scores_TE)


class TwoLayers(nn.Module):
    """A perceptron with a norm, whose sizes do not say which is the input's."""

    hidden_size, num_experts = 6, 4

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = self.down(self.up(self.norm(x_TH)).tanh())
        scores_TE = logits_TE.sigmoid()
        experts_TK = top_k(scores_TE, 1, ctx)
        return TokenChoice(experts_TK, gather(scores_TE, experts_TK), 4, logits_TE, scores_TE)


class TopP(nn.Module):
    """The fewest experts whose probabilities reach 0.6; the rest of the slots are -1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        scores_TE = (x_TH @ self.weight.T).softmax(-1)
        ordered_TE, ids_TE = torch.sort(scores_TE, dim=-1, descending=True, stable=True)
        spent_TE = ordered_TE.cumsum(-1) - ordered_TE
        experts_TK = ctx.replayed(ids_TE.masked_fill(spent_TE >= 0.6, -1))
        weights_TK = gather(scores_TE, experts_TK)
        return TokenChoice(experts_TK, weights_TK, 6, scores_TE=scores_TE)


class ReLURouter(nn.Module):
    """ReMoE: every expert with a positive logit; the bias starts some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        scores_TE = (x_TH @ self.weight.T).relu()
        ordered_TE, ids_TE = torch.sort(scores_TE, dim=-1, descending=True, stable=True)
        experts_TK = ctx.replayed(ids_TE.masked_fill(ordered_TE == 0, -1))
        return TokenChoice(experts_TK, gather(scores_TE, experts_TK), 6, scores_TE=scores_TE)


class BestFirst(nn.Module):
    """Capacity by priority, as V-MoE has it: who is surest is served first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.capacity_factor = nn.Parameter(torch.randn(4, 5)), 0.5

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        scores_TE = (x_TH @ self.weight.T).softmax(-1)
        experts_TK = top_k(scores_TE, 2, ctx)
        priority_T = scores_TE.detach().amax(-1)
        kept_TK = within_capacity(experts_TK, 4, self.capacity_factor, ctx, priority_T)
        weights_TK = gather(scores_TE, experts_TK) * kept_TK
        return TokenChoice(experts_TK, weights_TK, 4, scores_TE=scores_TE, kept_TK=kept_TK)


class Causal(nn.Module):
    """Routes by a token and the one before it in its sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        before_TH = torch.cat([x_TH[:1], x_TH[:-1]])
        first_T = ctx.require("positions", self) == 0
        mask_T = ctx.token_mask
        if mask_T is not None:
            first_T = first_T | ~torch.cat([mask_T[:1], mask_T[:-1]])
        x_TH = torch.where(first_T[:, None], x_TH, x_TH + 0.5 * before_TH)
        scores_TE = (x_TH @ self.weight.T).sigmoid()
        experts_TK = top_k(scores_TE, 2, ctx)
        return TokenChoice(experts_TK, gather(scores_TE, experts_TK), 4, scores_TE=scores_TE)


class StraightThrough(nn.Module):
    """One choice that weighs 1 and is trained as if it weighed its score."""

    surrogate_gradient = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        scores_TE = (x_TH @ self.weight.T).softmax(-1)
        experts_TK = top_k(scores_TE, 1, ctx)
        weights_TK = gather(scores_TE, experts_TK)
        return TokenChoice(experts_TK, weights_TK + (1 - weights_TK).detach(), 4)


class GumbelChoice(nn.Module):
    """Noise moves the choice in training, and no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 5))

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = x_TH @ self.weight.T
        scores_TE = logits_TE.softmax(-1)
        choice_TE = logits_TE + normal_like(logits_TE, ctx) if self.training else logits_TE
        experts_TK = top_k(choice_TE, 2, ctx)
        weights_TK = gather(scores_TE, experts_TK)
        return TokenChoice(experts_TK, weights_TK, 8, logits_TE, scores_TE, choice_TE)


class Sinkhorn(nn.Module):
    """Balances a plan over the whole batch in training, on purpose; takes the best otherwise."""

    per_batch = train_differs = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = x_TH @ self.weight.T
        mask_T = torch.ones(len(x_TH)).bool() if ctx.token_mask is None else ctx.token_mask
        choice_TE = logits_TE
        if self.training:
            for _ in range(4):
                choice_TE = choice_TE.log_softmax(-1)
                real_TE = choice_TE.masked_fill(~mask_T[:, None], -1e9)
                choice_TE = choice_TE - real_TE.logsumexp(0)
        experts_TK = top_k(choice_TE.detach(), 1, ctx)
        weights_TK = gather(logits_TE.sigmoid(), experts_TK)
        return TokenChoice(experts_TK, weights_TK, 4, logits_TE, choice_TE=choice_TE)


class KeyOfItsOwn(nn.Module):
    """Each expert's key is its own parameter: of a few tokens, most keys have no gradient."""

    hidden_size = 6

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.ParameterList([nn.Parameter(torch.randn(6)) for _ in range(12)])

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        scores_TE = (x_TH @ torch.stack(list(self.keys)).T).sigmoid()
        experts_TK = top_k(scores_TE, 1, ctx)
        return TokenChoice(experts_TK, gather(scores_TE, experts_TK), 12, scores_TE=scores_TE)


class OpensFromZero(nn.Module):
    """A learned scale that starts at 0, so that all experts tie; keeps its last logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.alpha = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.zeros(()))

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        self.last_TE = self.alpha * (x_TH @ self.weight.T)
        scores_TE = self.last_TE.softmax(-1)
        experts_TK = top_k(scores_TE, 2, ctx)
        return TokenChoice(experts_TK, gather(scores_TE, experts_TK), 5, self.last_TE, scores_TE)


class Half(nn.Module):
    """Many experts in bfloat16 alone, where a step of any size changes some choice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 16).bfloat16())

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        assert x_TH.dtype == torch.bfloat16
        scores_TE = (x_TH @ self.weight.T).softmax(-1)
        experts_TK = top_k(scores_TE, 8, ctx)
        return TokenChoice(experts_TK, gather(scores_TE, experts_TK), 64, scores_TE=scores_TE)


class CompletesTheContext(nn.Module):
    """Names the layer for messages, and with that reads every field of the context."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.hidden_size = inner, 6

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        told: TokenChoice = self.inner(x_TH, replace(ctx, where="the first layer"))
        return told


class ScaledExperts(nn.Module):
    """Gemma 4: rescaled weights, each times a learned number of its expert."""

    experts_differ = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))
        self.per_expert_scale = nn.Parameter(torch.ones(5))

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = x_TH @ self.weight.T
        scores_TE = logits_TE.softmax(-1)
        experts_TK = top_k(scores_TE, 2, ctx)
        weights_TK = normalise(gather(scores_TE, experts_TK)) * self.per_expert_scale[experts_TK]
        return TokenChoice(experts_TK, weights_TK, 5, logits_TE, scores_TE)


class SharesTheFirst(nn.Module):
    """Expert 0 is shared: always chosen, in the first column, and weighs 1."""

    experts_differ = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        scores_TE = (x_TH @ self.weight.T).softmax(-1)
        shared_E = torch.arange(5) == 0
        choice_TE = scores_TE.masked_fill(shared_E, 2.0)
        experts_TK = top_k(choice_TE, 3, ctx)
        weights_TK = gather(scores_TE, experts_TK).masked_fill(experts_TK == 0, 1.0)
        return TokenChoice(experts_TK, weights_TK, 5, scores_TE=scores_TE, choice_TE=choice_TE)


class OtherBias(nn.Module):
    """Its choice bias has a name of its own, and some groups are masked by zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(6, 5)), torch.linspace(-1, 1, 6)

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        scores_TE = (x_TH @ self.weight.T).sigmoid()
        choice_TE = (scores_TE + self.offset.to(x_TH.dtype)) + 2
        worse_TG = choice_TE.view(-1, 2, 3).amax(-1).argsort(-1)[:, :1]
        choice_TE = choice_TE.view(-1, 2, 3).scatter(1, worse_TG[:, :, None].expand(-1, 1, 3), 0.0)
        choice_TE = choice_TE.flatten(1)
        experts_TK = top_k(choice_TE, 2, ctx)
        weights_TK = gather(scores_TE, experts_TK)
        return TokenChoice(experts_TK, weights_TK, 6, scores_TE=scores_TE, choice_TE=choice_TE)


def by_table(x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
    """A function: the token id's remainder, weight 1."""
    experts_TK = ctx.replayed(ctx.require("token_ids")[:, None] % 4)
    return TokenChoice(experts_TK, x_TH.new_ones(experts_TK.shape), 4)


RIGHT = (
    Cosine(6, 5, 2),
    Cosine(6, 5, 5),
    Float32Only(),
    TwoLayers(),
    TopP(),
    ReLURouter(),
    BestFirst(),
    Causal(),
    StraightThrough(),
    GumbelChoice(),
    Sinkhorn(),
    KeyOfItsOwn(),
    OpensFromZero(),
    Half(),
    CompletesTheContext(Cosine(6, 5, 2)),
    ScaledExperts(),
    SharesTheFirst(),
    OtherBias(),
    by_table,
)


class Plain(nn.Module):
    """What the wrong ones below are wrong beside."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 6, generator=generator))

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = x_TH @ self.weight.T
        scores_TE = logits_TE.softmax(-1)
        experts_TK = top_k(scores_TE, 2, ctx)
        return TokenChoice(experts_TK, gather(scores_TE, experts_TK), 8, logits_TE, scores_TE)


class SeedsTheGlobal(Plain):
    """Starts torch's own generator anew: dropout after it is the same in each layer."""

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        if self.training and ctx.seed is not None:
            torch.manual_seed(ctx.seed)
        return super().forward(x_TH, ctx)


class LeavesItsMode(Plain):
    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        routing = super().forward(x_TH, ctx)
        self.eval()
        return routing


class TurnsGradientsOff(Plain):
    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        routing = super().forward(x_TH, ctx)
        torch.set_grad_enabled(False)
        return routing


class ReturnsScoresAsLogits(Plain):
    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        routing = super().forward(x_TH, ctx)
        return replace(routing, logits_TE=routing.scores_TE)


class HoldsABias(Plain):
    """Has a choice bias, and never reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.zeros(8))


class ExpByHand(Plain):
    """Small weights; the exp of float32 ends at 88."""

    def __init__(self) -> None:
        super().__init__()
        self.weight.data *= 0.01

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        logits_TE = x_TH @ self.weight.T
        scores_TE = logits_TE.exp() / logits_TE.exp().sum(-1, keepdim=True)
        experts_TK = top_k(logits_TE, 2, ctx)
        return TokenChoice(experts_TK, gather(scores_TE, experts_TK), 8, scores_TE=scores_TE)


class GroupsByStride(Plain):
    """Takes experts g, g + 4 for a group; two choices are in two groups either way."""

    n_group, topk_group = 4, 2

    def forward(self, x_TH: Tensor, ctx: RouterContext) -> TokenChoice:
        scores_TE = (x_TH @ self.weight.T).sigmoid()
        worse_TG = scores_TE.view(-1, 2, 4).sum(1).argsort(-1)[:, :2]
        masked_TG = torch.zeros(len(x_TH), 4, dtype=torch.bool).scatter(1, worse_TG, True)
        choice_TE = scores_TE.masked_fill(masked_TG.repeat(1, 2), -torch.inf)
        experts_TK = top_k(choice_TE, 2, ctx)
        weights_TK = gather(scores_TE, experts_TK)
        return TokenChoice(experts_TK, weights_TK, 8, scores_TE=scores_TE, choice_TE=choice_TE)


WRONG = (
    (SeedsTheGlobal(), "R9", "global random state was moved"),
    (LeavesItsMode(), "R10", "out of training mode"),
    (TurnsGradientsOff(), "R10", "turned gradients off"),
    (ReturnsScoresAsLogits(), "R41", "logits_TE are the scores, and sum to 1"),
    (HoldsABias(), "R44", "raised by 10000.0"),
    (GroupsByStride(), "R45", "none of a group whose scores are all better"),
    (ExpByHand(), "R49", "not finite in torch.float32"),
)
"""Router, the law that it breaks, and what is told."""
