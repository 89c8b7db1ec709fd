"""Right banks keep the laws, and each law is broken by a part that has the bug it is about."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moetk import ExpertBank, TokenChoice
from moetk.errors import LawBrokenError, RouterConfigError, UnsupportedRoutingError
from moetk.experts import BankSpec, ClampedGated, GptOssGated, Plain
from moetk.routing import Routing
from moetk.testing.check_banks import BANK_LAWS, check_expert_bank
from moetk.testing.law import judge_law
from moetk.testing.laws.banks_subject import bank_under_test
from tests.testing.drawn import drawn

H, E, I = 6, 4, 5
OSS = GptOssGated(1.7, 0.5)
SPECS: dict[str, tuple[BankSpec, bool]] = {
    "gated": (BankSpec(E, H, I), False),
    "clamped": (BankSpec(E, H, I, ClampedGated(0.4)), True),
    "gpt_oss": (BankSpec(E, H, I, OSS, transposed=True, interleaved=True), True),
    "plain": (BankSpec(E, H, I, Plain()), True),
    "input": (BankSpec(E, H, I, scale="input"), True),
    "special": (BankSpec(E, H, I, special=("zero", "copy", "copy")), False),
}


def bank_of(name: str, backend: str = "auto") -> ExpertBank:
    spec, bias = SPECS[name]
    torch.manual_seed(0)
    return ExpertBank(H, E, I, spec=spec, bias=bias, backend=backend)


class OneLayerEach(nn.Module):
    """A user's bank: a list of experts behind one shared matrix; nothing of it is declared."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(H, H)
        self.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(E))

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        if not isinstance(routing, TokenChoice):
            raise UnsupportedRoutingError("OneLayerEach takes what tokens choose.")
        h_TH, y_TH = self.shared(x_TH), torch.zeros_like(x_TH)
        for expert, layer in enumerate(self.experts):
            here_TK = routing.experts_TK == expert
            if routing.kept_TK is not None:
                here_TK = here_TK & routing.kept_TK
            t, k = here_TK.nonzero(as_tuple=True)
            y_TH = y_TH.index_add(
                0, t, (layer(h_TH[t]).tanh() * routing.weights_TK[t, k, None]).to(y_TH.dtype)
            )
        return y_TH


class DenseStack(OneLayerEach):
    """The same kind of bank, all experts on all tokens, with one (E, H, H) parameter."""

    hidden_size, num_experts = H, E

    def __init__(self) -> None:
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.weight_EHH = nn.Parameter(torch.randn(E, H, H))

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        if not isinstance(routing, TokenChoice):
            raise UnsupportedRoutingError("DenseStack takes what tokens choose.")
        out_TEH = torch.einsum("th,ehg->teg", x_TH, self.weight_EHH).relu()
        used_TK = routing.experts_TK >= 0
        if routing.kept_TK is not None:
            used_TK = used_TK & routing.kept_TK
        ids_TKH = routing.experts_TK.clamp(min=0)[..., None].expand(-1, -1, H)
        weights_TK = (routing.weights_TK * used_TK).to(x_TH.dtype)
        return (out_TEH.gather(1, ids_TKH) * weights_TK[..., None]).sum(1)


def doubled(x_TH: Tensor, routing: Routing) -> Tensor:
    """A plain function: expert e multiplies by e + 1."""
    if not isinstance(routing, TokenChoice):
        raise UnsupportedRoutingError("doubled takes what tokens choose.")
    used_TK = routing.experts_TK >= 0
    if routing.kept_TK is not None:
        used_TK = used_TK & routing.kept_TK
    share_TK = (routing.weights_TK * used_TK).to(x_TH.dtype) * (routing.experts_TK + 1)
    return x_TH * share_TK.sum(-1, keepdim=True)


@pytest.mark.parametrize("backend", ["reference", "grouped"])
@pytest.mark.parametrize("name", SPECS)
def test_moetk_banks_keep_every_law(name: str, backend: str) -> None:
    report = check_expert_bank(bank_of(name, backend), **drawn())
    silent = {one.law.number for one in report.having("not applicable")}
    assert (
        silent
        == {
            "gated": {"B27"},
            "clamped": {"B27"},
            "gpt_oss": {"B27"},
            "plain": {"B27", "B28"},  # no gate
            "input": {"B4", "B6", "B10", "B18", "B24", "B27"},  # not linear in the weights
            "special": {"B9", "B10", "B25"},  # special ids take tokens that choose them
        }[name]
    )


@pytest.mark.parametrize("bank", [OneLayerEach(), DenseStack(), doubled], ids=lambda b: repr(b)[:9])
def test_users_banks_keep_every_law_that_speaks_of_them(bank: object) -> None:
    report = check_expert_bank(bank, hidden_size=H, num_experts=E, examples=4)
    silent = {one.law.number for one in report.having("not applicable")}
    needs_spec = {"B23", "B25", "B27", "B28", "B29", "B30"}
    other_kinds = {"B9", "B10"}
    unknown = set() if isinstance(bank, DenseStack) else {"B24", "B26"}
    unknown |= set() if isinstance(bank, nn.Module) else {"B20"}
    assert silent == needs_spec | other_kinds | unknown
    for one in report.having("not applicable"):
        assert one.reason


class Bends(DenseStack):
    """Its activation is odd, or has its kink at zero rows; it leaves other kinds to Python."""

    def __init__(self, bend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bend = bend

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        used_TK = routing.experts_TK >= 0
        if routing.kept_TK is not None:
            used_TK = used_TK & routing.kept_TK
        weights_TK = torch.where(used_TK, routing.weights_TK, 0).to(x_TH.dtype)
        zeros_TE = x_TH.new_zeros(len(x_TH), self.num_experts)
        weights_TE = zeros_TE.scatter_add(1, routing.experts_TK.clamp(min=0), weights_TK)
        out_TEH = self.bend(torch.einsum("th,ehg->teg", x_TH, self.weight_EHH))
        return torch.einsum("teg,te->tg", out_TEH, weights_TE)


BENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sin": torch.sin,
    "cube": lambda z: z**3,
    "squared_relu": lambda z: z.relu().square(),
    "relu": torch.relu,
    "dropout": nn.Dropout(0.1),
}


@pytest.mark.parametrize("bend", BENDS)
def test_activations_that_are_odd_or_kinked_or_drawn_are_right(bend: str) -> None:
    bank = Bends(BENDS[bend])
    assert bank_under_test(bank).modes == ((False,) if bend == "dropout" else (False, True))
    report = check_expert_bank(bank, examples=12)
    silent = {one.law.number: one.reason for one in report.having("not applicable")}
    assert silent["B9"] == "it refuses the ExpertChoice that it was tried on: AttributeError"


class LosesCrowds(ExpertBank):
    """Works in blocks of 32 rows, and loses the first row of each but the first."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        lost_T1 = (torch.arange(len(x_TH)) % 32 == 0)[:, None]
        lost_T1[:1] = False
        return super().forward(x_TH, routing).masked_fill(lost_T1, 0)


class EightSlots(ExpertBank):
    """Reads no more than eight choices of a token."""

    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        if isinstance(routing, TokenChoice):
            ids_TK = routing.experts_TK.clone()
            ids_TK[:, 8:] = -1
            routing = replace(routing, experts_TK=ids_TK)
        return super().forward(x_TH, routing)


class DetachesInTraining(ExpertBank):
    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        if self.training and isinstance(routing, TokenChoice):
            routing = replace(routing, weights_TK=routing.weights_TK.detach())
        return super().forward(x_TH, routing)


@pytest.mark.parametrize(
    "kind, caught",
    [
        (LosesCrowds, {"B11", "B12", "B29"}),
        (EightSlots, {"B5", "B7", "B29"}),
        (DetachesInTraining, {"B18", "B19", "B29"}),
    ],
)
def test_what_only_large_batches_or_training_show(kind: type[ExpertBank], caught: set[str]) -> None:
    with pytest.raises(LawBrokenError) as raised:
        check_expert_bank(kind(H, E, I), examples=30)
    broken = {one.law.number for one in raised.value.report.having("broken")}
    assert caught <= broken


# What the smallest case of each broken part has to say.
REASONS = {
    "B1": "non-empty TensorList",
    "B2": "an unused slot's weight has a gradient",
    "B3": "the bank computes what kept_TK drops",
    "B4": "duplicate 0 differs",
    "B5": "slot by slot: y_TH differs",
    "B6": "y of a sum of weights, against the sum of the y differs",
    "B7": "slots in another order: y_TH differs",
    "B8": "y_TH is torch.float32, x_TH torch.float64",
    "B9": "ExpertChoice against TokenChoice: y_TH differs",
    "B10": "y_TH of a SoftChoice differs",
    "B11": "tokens in another order: y_TH differs",
    "B12": "the batch in one against",
    "B13": "row 0 is nan, other rows: y_TH differs by nan",
    "B14": "transposed rows and cotangent: y_TH differs",
    "B15": "the call changed x_TH",
    "B16": "y_TH differs between two runs",
    "B17": "d x_TH of call 1 of 2, backward in reverse differs",
    "B18": "dL/dw of slot 0 differs",
    "B19": "the slope along x_TH is",
    "B20": "has no gradient (None) when experts",
    "B21": "d weights_TK where nothing else needs a gradient differs",
    "B22": "recomputed in backward",
    "B23": "all tokens at expert 0: y_TH differs",
    "B24": "y of identical experts, mixed against the first one alone differs",
    "B25": "down projection times -3: y_TH differs",
    "B26": "experts renamed: y_TH differs",
    "B27": "special experts apart: y_TH differs",
    "B28": "y_TH with gate and up exchanged differs",
    "B29": "against reference: d x_TH differs",
    "B30": "in torch.bfloat16 is",
    "B31": "torch.get_rng_state() differs after the call",
}


@pytest.mark.parametrize("law", BANK_LAWS, ids=lambda law: law.number)
def test_each_law_is_broken_by_its_broken_part(law: object) -> None:
    outcome = judge_law(law, law.broken(), examples=30)
    assert outcome.status == "broken"
    assert REASONS[law.number] in outcome.reason
    assert outcome.case is not None and law.formula and law.source


def test_numbers_name_one_law_each() -> None:
    numbers = [law.number for law in BANK_LAWS]
    assert len(numbers) == len(set(numbers)) and set(numbers) == set(REASONS)


class Halves(ExpertBank):
    def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
        return super().forward(x_TH, routing) / 2


def test_a_broken_bank_raises_with_every_law_and_its_case() -> None:
    with pytest.raises(LawBrokenError, match=r"Halves breaks \d+ of 31 laws") as caught:
        check_expert_bank(Halves(H, E, I), examples=5)
    report = caught.value.report
    assert {one.law.number for one in report.having("broken")} == {"B23", "B28", "B29", "B30"}


def test_the_bank_that_is_checked_stays_as_it_is() -> None:
    bank = bank_of("gated").bfloat16().train().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    check_expert_bank(bank, examples=1)
    assert bank.training and not any(p.requires_grad for p in bank.parameters())
    for name, tensor in bank.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, before[name])


def test_a_bank_without_float64_is_checked_in_float32() -> None:
    class Single(DenseStack):
        def forward(self, x_TH: Tensor, routing: Routing) -> Tensor:
            if x_TH.dtype == torch.float64:
                raise TypeError("no float64 here")
            return super().forward(x_TH, routing)

    with pytest.raises(RouterConfigError, match="no float64 here. Check .* float64=False"):
        check_expert_bank(Single())
    report = check_expert_bank(Single(), float64=False, examples=8)
    silent = {one.law.number: one.reason for one in report.having("not applicable")}
    assert silent["B19"] == "finite differences need float64"


@pytest.mark.parametrize("bank", [None, ExpertBank])
def test_what_is_no_bank(bank: object) -> None:
    with pytest.raises(RouterConfigError, match="is no bank; give it an object or a function"):
        check_expert_bank(bank)


def test_the_callers_random_numbers_stay() -> None:
    bank = bank_of("gated")
    before = torch.get_rng_state()
    check_expert_bank(bank, examples=1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_size_that_nobody_knows() -> None:
    message = (
        "doubled: hidden_size=None; the bank has no whole number of that name. Give it: "
        "check_expert_bank(bank, hidden_size=...)."
    )
    with pytest.raises(RouterConfigError, match=re.escape(message)):
        check_expert_bank(doubled)
    with pytest.raises(RouterConfigError, match="OneLayerEach: num_experts=None"):
        check_expert_bank(OneLayerEach(), hidden_size=H)


def test_sizes_are_read_from_the_bank() -> None:
    special = bank_under_test(bank_of("special"))
    assert (special.hidden_size, special.num_experts, special.real_experts) == (H, E + 3, E)
    assert set(special.per_expert) == {"gate_up_proj", "down_proj"}
    assert set(bank_under_test(DenseStack()).per_expert) == {"weight_EHH"}
    mixed = bank_under_test(OneLayerEach(), hidden_size=H, num_experts=E)
    assert mixed.per_expert == {} and len(mixed.parameters) == 2 * (E + 1)
