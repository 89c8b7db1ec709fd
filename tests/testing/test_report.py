"""A report prints, draws, stores and runs again; its test file fails until the part is found."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moetk.errors import LawBrokenError, RouterConfigError
from moetk.routers import GptOssRouter, MixtralRouter
from moetk.testing import (
    LawReport,
    check_controller,
    check_dispatcher,
    check_expert_bank,
    check_loss,
    check_router,
)
from moetk.testing.law import Case, Outcome
from moetk.testing.laws import routers_weights
from moetk.testing.laws.routers_gradient import LAWS, reaches_parameters
from moetk.testing.laws.routers_subject import RouterSubject, router_subject
from moetk.testing.repro import importable, load_case, recheck, save_case


def one_choice() -> GptOssRouter:
    """K = 1 and a softmax over the kept: the trap of law R38."""
    torch.manual_seed(0)
    return GptOssRouter(8, 8, 1)


@pytest.fixture(scope="module")
def broken() -> LawReport:
    with pytest.raises(LawBrokenError) as raised:
        check_router(one_choice(), examples=2)
    assert isinstance(raised.value.report, LawReport)
    return raised.value.report


def run(path: Path) -> None:
    """What pytest would: import the file, with its folder on the path, and call its test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        patch.delitem(sys.modules, "parts", raising=False)
        runpy.run_path(str(path))[path.stem]()


def test_the_table_tells_each_law_and_each_reason_once(broken: LawReport) -> None:
    text = str(broken)
    for outcome in broken.outcomes:
        assert outcome.law.title in text
    assert "R38 broken: no gradient of the weights reaches bias, weight (K = 1" in text
    assert text.count("its routing carries no kept_TK") == 1
    assert "R21, R22, R23 not applicable: its routing carries no kept_TK: it drops nothing" in text
    assert "causality: in evaluation causal, in training causal" in text
    assert broken.summary() in text
    assert max(map(len, text.splitlines())) <= 100


def test_json_holds_every_law(broken: LawReport, tmp_path: Path) -> None:
    told = json.loads(broken.to_json(tmp_path / "report.json").read_text())
    assert told["what"] == "GptOssRouter" and told["ok"] is False
    assert told["causal"] == {"evaluation": True, "training": True}
    assert len(told["laws"]) == len(broken.outcomes)
    (one,) = [law for law in told["laws"] if law["status"] == "broken"]
    assert one["number"] == "R38" and one["tensors"]["x_TH"] == "torch.float64 (13, 8)"
    assert one["shown"]["routing_TE"] == "torch.float64 (13, 8)"


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_drawn(broken: LawReport, tmp_path: Path, ending: str) -> None:
    first = broken.plot(tmp_path / f"a.{ending}").read_bytes()
    assert broken.plot(tmp_path / f"b.{ending}").read_bytes() == first
    assert first[:4] == b"\x89PNG" if ending == "png" else b"<svg" in first


def test_a_picture_of_a_kept_report_has_no_matrix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = check_router(MixtralRouter(8, 4, 2), examples=1)
    assert report.ok and report.or_raise() is report
    assert report.plot(tmp_path / "kept.png").stat().st_size > 1000
    assert report.repro(tmp_path) == []


def test_the_test_file_fails_until_it_knows_the_part(broken: LawReport, tmp_path: Path) -> None:
    (path,) = broken.repro(tmp_path)
    with pytest.raises(NotImplementedError, match="Return here the part that was checked"):
        run(path)


def test_the_test_file_finds_the_breach_and_passes_once_it_is_mended(
    broken: LawReport, tmp_path: Path
) -> None:
    (tmp_path / "parts.py").write_text(
        "import torch\nfrom moetk.routers import GptOssRouter\n\n\n"
        "def build():\n    torch.manual_seed(0)\n    return GptOssRouter(8, 8, K)\n\n\nK = 1\n"
    )
    (path,) = broken.repro(tmp_path, build="parts:build")
    with pytest.raises(LawBrokenError, match="R38 the gradient reaches every parameter"):
        run(path)
    mended = tmp_path / "mended"
    mended.mkdir()
    (path,) = broken.repro(mended, build="parts:build")
    (mended / "parts.py").write_text((tmp_path / "parts.py").read_text().replace("K = 1", "K = 2"))
    run(path)


PARTS = '''
import torch
from moetk.controllers import BiasUpdate
from moetk.dispatch import Capacity, Local
from moetk.routers import DeepSeekV3Router, GptOssRouter

sizes = {"num_experts": 4, "examples": 3}


def router():
    torch.manual_seed(0)
    return GptOssRouter(8, 8, 1)


def forgets_the_weights(x_TH, routing):
    return x_TH * (routing.experts_TK >= 0).sum(-1, keepdim=True)


def bank():
    return forgets_the_weights


class Generous:
    """Three times the room that it was given."""

    def __init__(self, factor):
        self.inner = Local(Capacity(3 * factor))

    def dispatch(self, *given):
        return self.inner.dispatch(*given)

    def combine(self, *given):
        return self.inner.combine(*given)


def dispatcher():
    return Generous(1.0), Generous


def mean_of_none(routing, ctx):
    return routing.scores_TE.mean()


def loss():
    return mean_of_none


class Backwards(BiasUpdate):
    def step(self, seen):
        before_E = self._router.e_score_correction_bias.clone()
        super().step(seen)
        moved_E = self._router.e_score_correction_bias - before_E
        self._router.e_score_correction_bias.sub_(2 * moved_E)


def steered():
    return DeepSeekV3Router(6, 4, 2)


def controller():
    return Backwards(1e-3), steered
'''


@pytest.mark.parametrize("kind", ["router", "bank", "dispatcher", "loss", "controller"])
def test_each_kind_of_part_is_built_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "parts", raising=False)
    parts = importlib.import_module("parts")
    check: dict[str, Callable[[Any], object]] = {
        "router": lambda router: check_router(router, examples=2),
        "bank": lambda bank: check_expert_bank(bank, hidden_size=3, **parts.sizes),
        "dispatcher": lambda pair: check_dispatcher(pair[0], with_capacity=pair[1], **parts.sizes),
        "loss": lambda loss: check_loss(loss, **parts.sizes),
        "controller": lambda pair: check_controller(pair[0], router=pair[1], **parts.sizes),
    }
    with pytest.raises(LawBrokenError) as raised:
        check[kind](getattr(parts, kind)())
    folder = tmp_path / "found"
    folder.mkdir()
    (folder / "parts.py").write_text(PARTS)
    # One file is run; the others differ from it in the law's number alone.
    path, *_ = raised.value.report.repro(folder, build=f"parts:{kind}")
    with pytest.raises(LawBrokenError, match=path.stem[5:].upper()):
        run(path)
    monkeypatch.delitem(sys.modules, "parts", raising=False)


def test_a_pair_that_cannot_be_imported_is_asked_for(tmp_path: Path) -> None:
    outcome = Outcome(LAWS[0], "broken", "told", Case())
    pair = LawReport("mine", (outcome,), subject_of=router_subject, part=(one_choice(), one_choice))
    (path,) = pair.repro(tmp_path)
    with pytest.raises(NotImplementedError, match="the pair that was checked, the part and what"):
        runpy.run_path(str(path))["part"]()


def test_a_pair_that_can_be_imported_needs_no_build(tmp_path: Path) -> None:
    outcome = Outcome(LAWS[0], "broken", "told", Case())
    pair = LawReport("mine", (outcome,), subject_of=router_subject, part=(one_choice, GptOssRouter))
    (path,) = pair.repro(tmp_path)
    assert runpy.run_path(str(path))["part"]() == (one_choice, GptOssRouter)


def test_what_can_be_imported_needs_no_build() -> None:
    assert importable(one_choice) == f"{__name__}:one_choice"
    assert importable(one_choice()) is None
    assert importable(lambda: None) is None


def test_the_case_is_stored_with_what_it_shows(broken: LawReport, tmp_path: Path) -> None:
    broken.repro(tmp_path)
    case = load_case(tmp_path / "r38.safetensors")
    (outcome,) = broken.having("broken")
    assert outcome.case is not None
    assert torch.equal(case["x_TH"], outcome.case["x_TH"])
    assert dict(case.settings) == dict(outcome.case.settings)
    assert set(case.tensors) == set(outcome.case.tensors)
    with safe_open(tmp_path / "r38.safetensors", framework="pt") as stored:
        assert "shown.routing_TE" in stored.keys()  # noqa: SIM118


def test_a_case_of_views_and_scalars_is_stored(tmp_path: Path) -> None:
    x_TH = torch.arange(6.0).view(2, 3)
    case = Case({"x_TH": x_TH.T, "y": x_TH, "one": torch.tensor(3)}, {"name": "a", "none": None})
    save_case(tmp_path / "case.safetensors", case, {})
    again = load_case(tmp_path / "case.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in case.tensors.items())
    assert dict(again.settings) == dict(case.settings)


def test_recheck_refuses_a_law_that_does_not_speak() -> None:
    soft = routers_weights.soft_sums
    with pytest.raises(RouterConfigError, match="Law R29 does not speak about this part"):
        recheck(soft, RouterSubject(one_choice()), Case())


def test_recheck_tells_a_part_that_raises(broken: LawReport) -> None:
    case = Case({"x_TH": torch.zeros(2, 3)}, {"batch": 1, "length": 2, "seed": 0})
    with pytest.raises(LawBrokenError, match="R38 .*KeyError|R38 .*MoeShapeError"):
        recheck(reaches_parameters, RouterSubject(one_choice()), case)


def test_a_build_that_names_nothing_is_refused(broken: LawReport, tmp_path: Path) -> None:
    with pytest.raises(RouterConfigError, match="build='parts'; need \"module:function\""):
        broken.repro(tmp_path, build="parts")


def test_a_report_that_cannot_build_its_subject_says_so(tmp_path: Path) -> None:
    outcome = Outcome(LAWS[0], "broken", "told", Case())
    with pytest.raises(RouterConfigError, match="holds no subject_of"):
        LawReport("mine", (outcome,)).repro(tmp_path)


def test_reasons_cannot_end_the_docstring(tmp_path: Path) -> None:
    outcome = Outcome(LAWS[0], "broken", 'told """ and \\n', Case())
    report = LawReport("mine", (outcome,), subject_of=router_subject)
    (path,) = report.repro(tmp_path)
    compile(path.read_text(), str(path), "exec")


def test_the_readme_tells_the_report_of_its_own_router() -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "scripts" / "readme_laws.py"), "--check"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    assert subprocess.run(command, check=False, env=environment).returncode == 0
