"""Every law of banks and routers that the kernels can touch, on the kernels.

Banks are judged with the rounding of bfloat16; routers run in float32 and are judged as ever.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from moetk.experts import BankSpec, ClampedGated, ExpertBank, GptOssGated, Plain
from moetk.routers import DeepSeekV3Router, DeepSeekV4Router, GptOssRouter, MixtralRouter
from moetk.testing.check_banks import BANK_LAWS
from moetk.testing.check_routers import ROUTER_LAWS
from moetk.testing.law import judge_law, raise_if_broken, untouched_random
from moetk.testing.laws import banks_subject
from moetk.testing.laws.banks_subject import BankUnderTest, bank_under_test
from moetk.testing.laws.routers_subject import RouterSubject, router_subject
from tests.gpu.device import EXAMPLES
from tests.gpu.there import BankThere, router_there

TOKENS = (1, 7, 256)
ROUNDINGS = 16  # of bfloat16, in some twenty steps that do not all round in one direction
H, E = 16, 4
BANKS = {
    "swiglu": (BankSpec(E, H, 24), False),
    "gpt_oss": (
        BankSpec(E, H, 24, GptOssGated(1.7, 0.5), transposed=True, interleaved=True),
        True,
    ),
    "clamped": (BankSpec(E, H, 24, ClampedGated(0.4)), True),
    "plain": (BankSpec(3, H, 16, Plain()), False),
    "zero and copy": (BankSpec(E, H, 24, special=("zero", "copy")), False),
}
SMOOTH = ("swiglu", "zero and copy")
ROUTERS = {
    "mixtral": lambda: MixtralRouter(H, 8, 2),
    "olmoe, K = E": lambda: MixtralRouter(H, 6, 6, renormalise=False),
    "loss-free": lambda: MixtralRouter(H, 8, 3, choice_bias=True),
    "deepseek_v3": lambda: DeepSeekV3Router(H, 8, 2, groups=4, top_groups=2, scale=2.5),
    "deepseek_v4": lambda: DeepSeekV4Router(H, 8, 3, scale=1.5),
    "gpt_oss": lambda: GptOssRouter(H, 8, 2),
}


def speaks(number: str, bank: str) -> bool:
    """B19 takes slopes with steps that bfloat16 rounds away. B23 and B29 compare gradients at one h
    and at a slightly other one: where the activation has a kink, rounding may lie between them."""
    return number != "B19" and (number not in ("B23", "B29") or bank in SMOOTH)


@functools.cache
def bank_subject(name: str) -> BankUnderTest:
    spec, bias = BANKS[name]
    with untouched_random():
        bank = ExpertBank(
            spec.hidden_size, spec.num_experts, spec.intermediate_size, spec=spec, bias=bias
        )
        return bank_under_test(BankThere(bank), float64=False)


@functools.cache
def subject_of_router(name: str) -> RouterSubject:
    with untouched_random():
        router = ROUTERS[name]()
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.normal_(std=0.4)
        return router_subject(router_there(router))


@pytest.fixture
def in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Banks are judged with its rounding, on the numbers of tokens that tiles are chosen by."""
    drawn = banks_subject.routed_rows

    def with_tokens(*args, tokens=TOKENS, **kwargs):
        return drawn(*args, tokens=tokens if tokens == (0,) else TOKENS, **kwargs)

    bound = ROUNDINGS * torch.finfo(torch.bfloat16).eps
    monkeypatch.setattr(banks_subject, "rounding", lambda subject, num_rows: bound)
    monkeypatch.setattr(banks_subject, "routed_rows", with_tokens)


@pytest.mark.parametrize("name", BANKS)
@pytest.mark.parametrize("law", BANK_LAWS, ids=lambda law: law.number)
def test_banks_keep_the_laws(law, name, in_bfloat16):
    if not speaks(law.number, name):
        pytest.skip("bfloat16 says nothing about it")
    if law.number == "B30":  # in the two dtypes that the kernels take
        low, cases = ("bfloat16", "float16"), law.cases
        law = replace(law, cases=lambda s: cases(s).filter(lambda c: c.settings["dtype"] in low))
    raise_if_broken(name, [judge_law(law, bank_subject(name), examples=EXAMPLES)])


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("law", ROUTER_LAWS, ids=lambda law: law.number)
def test_routers_keep_the_laws(law, name):
    raise_if_broken(name, [judge_law(law, subject_of_router(name), examples=EXAMPLES)])
