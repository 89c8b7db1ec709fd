"""When Transformer Engine is taken: by name, by auto, and in which words it is refused."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import moetk
from moetk.errors import BackendError, UnsupportedRoutingError
from moetk.experts import BankSpec, Gated, auto_table, bank_forward, pick_backend
from moetk.experts.te import te
from moetk.routing import ExpertChoice, SoftChoice, TokenChoice
from tests.banks import a_case, expert_choice, soft_choice
from tests.te import fake
from tests.tiny import tiny

backends_room = importlib.import_module("moetk.experts.backends")  # its package hides it
te_room = importlib.import_module("moetk.experts.te")
CUDA, BF16 = torch.device("cuda"), torch.bfloat16
MIXTRAL = BankSpec(8, 4096, 14336)
THIN = BankSpec(128, 2048, 768)
ROWS = 2048 * 8
LINE = 'cuda,bfloat16,inf,2048,58720256,te,"few fat experts, the copy of their rows included"\n'


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Hopper GPU with Transformer Engine, on its default stream."""
    fake.install(monkeypatch)
    monkeypatch.setattr(backends_room, "_lacks", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "default")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    te_room._lacks_te.cache_clear()
    yield monkeypatch
    te_room._lacks_te.cache_clear()


@pytest.fixture
def listed(there: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The shipped table, with a row for te of other bounds before all others."""
    shipped = (Path(moetk.__file__).parent / "experts" / "auto_table.csv").read_text()
    header, *rows = shipped.splitlines(keepends=True)
    others = [row for row in rows if ",te," not in row]
    (tmp_path / "auto_table.csv").write_text("".join([header, LINE, *others]))
    there.setattr(backends_room, "files", lambda package: tmp_path)
    backends_room._read_table.cache_clear()
    yield there
    backends_room._read_table.cache_clear()


def auto(
    spec: BankSpec | None = MIXTRAL,
    num_rows: int = ROWS,
    dtype: torch.dtype = BF16,
    routing: type = TokenChoice,
) -> str:
    return pick_backend("auto", dtype, CUDA, num_rows, spec=spec, routing=routing).name


def by_name(spec: BankSpec = MIXTRAL, routing: type = TokenChoice) -> str:
    return pick_backend("te", BF16, CUDA, ROWS, spec=spec, routing=routing).name


def test_the_shipped_table_takes_it_for_mixtral_alone(there: pytest.MonkeyPatch) -> None:
    deepseek = BankSpec(32, 7168, 2048)
    assert auto() == "te" and auto(deepseek, 2**17) == auto(THIN, 2**17) == "fused"
    assert by_name(deepseek) == "te"


def test_auto_takes_it_for_many_rows_of_fat_experts(listed: pytest.MonkeyPatch) -> None:
    assert auto() == auto(num_rows=10 * ROWS) == "te"
    assert auto(num_rows=ROWS - 1) == "fused"
    assert auto(BankSpec(9, 4096, 14336)) == "fused"  # as many rows, for more experts
    assert auto(BankSpec(8, 4096, 14328)) == auto(THIN, 2048 * 128) == auto(None) == "fused"
    assert auto(dtype=torch.float16) == "fused" and auto(dtype=torch.float32) == "grouped"


HERE = "it reads the number of rows of each expert on the host, which "
CIRCUMSTANCES: dict[str, tuple[Callable[[pytest.MonkeyPatch], Any], str]] = {
    "not installed": (
        lambda patch: patch.setattr(importlib.util, "find_spec", lambda name: None),
        "needs the package transformer_engine",
    ),
    "built for another torch": (
        lambda patch: patch.setitem(sys.modules, "transformer_engine.pytorch", None),
        "transformer_engine cannot be imported here (ModuleNotFoundError: import of transformer_",
    ),
    "too old": (
        lambda patch: patch.setattr(sys.modules["transformer_engine"], "__version__", "2.9.0"),
        "transformer_engine 2.9.0, needs 2.12 or later",
    ),
    "captured": (
        lambda patch: patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True),
        HERE + "a CUDA graph cannot",
    ),
    "compiled": (
        lambda patch: patch.setattr(torch.compiler, "is_compiling", lambda: True),
        HERE + "cannot be compiled",
    ),
    "no Hopper": (
        lambda patch: patch.setattr(backends_room, "_lacks", lambda device: "no Hopper"),
        "no Hopper",
    ),
}


@pytest.mark.parametrize("name", CIRCUMSTANCES)
def test_where_it_cannot_run(listed: pytest.MonkeyPatch, name: str) -> None:
    arrange, says = CIRCUMSTANCES[name]
    arrange(listed)
    instead = "grouped" if name == "no Hopper" else "fused"
    assert auto() == instead
    message = f'backend="te" cannot run the bank: {says}'
    with pytest.raises(BackendError, match=re.escape(message)) as caught:
        by_name()
    assert str(caught.value).endswith(
        f'Use backend="auto" (here: "{instead}") or see Replacement.explain().'
    )


SPECS = [
    (BankSpec(8, 4096, 14336, Gated(F.mish)), "it has no kernel for Gated(act=<function mish"),
    (BankSpec(8, 4096, 14336, scale="input"), 'scale="input" multiplies rows before the up'),
    (BankSpec(8, 4100, 14336), "H=4100 is no multiple of 8, 16 bytes of torch.bfloat16"),
]


@pytest.mark.parametrize(("spec", "says"), SPECS, ids=[says[:12] for _, says in SPECS])
def test_specs_it_cannot_compute(listed: pytest.MonkeyPatch, spec: BankSpec, says: str) -> None:
    assert auto(spec) == "grouped"
    with pytest.raises(BackendError, match=re.escape(f"cannot run the bank: {says}")):
        by_name(spec)
    weights, x_TH, routing = a_case(BankSpec(2, 9, 8))
    with pytest.raises(BackendError, match='backend="te": H=9 is no multiple of 2, 16 bytes of'):
        te(BankSpec(2, 9, 8), weights, x_TH, routing)


@pytest.mark.parametrize("kind", [ExpertChoice, SoftChoice])
def test_routings_it_does_not_read(listed: pytest.MonkeyPatch, kind: type) -> None:
    assert auto(routing=kind) == "grouped"
    with pytest.raises(BackendError, match=f"the router returns a {kind.__name__}. Use"):
        by_name(routing=kind)
    spec = BankSpec(5, 32, 16)
    weights, x_TH, _ = a_case(spec)
    other = expert_choice(12, 5, 3) if kind is ExpertChoice else soft_choice(2, 6, 5, 1)
    message = f'backend="te" reads a TokenChoice; this router returns a {kind.__name__}. Use'
    with pytest.raises(UnsupportedRoutingError, match=re.escape(message)):
        te(spec, weights, x_TH, other)


def in_fp8(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fake.State, "recipe", fake.Float8CurrentScaling())


def on_a_side_stream(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "current_stream", lambda device: "side")


def on_several_ranks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.distributed, "is_initialized", lambda: True)
    patch.setattr(torch.distributed, "get_world_size", lambda: 2)


@pytest.mark.parametrize("arrange", [in_fp8, on_a_side_stream, on_several_ranks])
def test_where_it_must_be_asked_for(
    listed: pytest.MonkeyPatch, arrange: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """In FP8 it is another function; the warm-up of a CUDA graph must run what is captured; a wait
    of one rank is a wait of all."""
    assert auto() == "te"
    arrange(listed)
    assert auto() == "fused" and by_name() == "te"


def test_one_rank_is_not_several(listed: pytest.MonkeyPatch) -> None:
    on_several_ranks(listed)
    listed.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert auto() == "te"


def test_one_graph_has_no_place_for_it(listed: pytest.MonkeyPatch) -> None:
    """torch.compile(fullgraph=True) takes auto, and refuses te in its own words."""

    def named(backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            picked = pick_backend(backend, BF16, CUDA, ROWS, spec=MIXTRAL)
            return x + len(picked.name)

        return torch.compile(run, fullgraph=True, backend="eager")

    torch._dynamo.reset()
    assert named("auto")(torch.zeros(1)) == len("fused")
    with pytest.raises(Exception, match="BackendError.*cannot be compiled") as caught:
        named("te")(torch.zeros(1))
    assert 'backend="te" cannot run the bank' in str(caught.value)


def test_it_runs_on_cuda_alone() -> None:
    weights, x_TH, routing = a_case(BankSpec(2, 8, 8), dtype=BF16)
    with pytest.raises(BackendError, match='backend="te" cannot run the bank: device cpu, needs'):
        bank_forward(BankSpec(2, 8, 8), weights, x_TH, routing, "te")


# In a model.


def test_explain_says_that_it_copies_and_waits() -> None:
    text = " ".join(moetk.replace_moe(tiny("mixtral"), backend="te").explain().split())
    assert 'asked for with backend="te"' in text
    assert "each forward copies the number of rows of each expert to the host and waits" in text


def test_explain_says_when_auto_takes_it(listed: pytest.MonkeyPatch) -> None:
    layers = importlib.import_module("moetk.layers.explain")
    listed.setattr(layers, "runs_on", lambda module: CUDA)
    replacement = moetk.replace_moe(tiny("mixtral").to(BF16))
    few = " ".join(replacement.explain().split())
    assert "auto: fused " in few and "copies the number of rows" not in few
    row = backends_room.TableRow("cuda", "bfloat16", float("inf"), "te", "by this test", 2048, 64)
    listed.setattr(backends_room, "auto_table", lambda: (row, *auto_table()))
    both = " ".join(replacement.explain().split())
    assert "auto: fused/te" in both
    assert "each forward copies the number of rows of each expert to the host and waits" in both
    assert "up to inf rows, at least 2048 an expert, experts of H*I >= 64: by this test" in both
    on_several_ranks(listed)
    alone = " ".join(replacement.explain().split())
    assert "auto: fused " in alone
    assert "because te is not taken: several ranks run, and its wait for the device holds" in alone


def test_its_gradients_may_be_added() -> None:
    replacement = moetk.replace_moe(tiny("mixtral"), backend="te", add_to_grad=True)
    assert all(site.add_to_grad for site in replacement.sites)


def test_fake_products_are_products() -> None:
    """The stand-in of the graph's tests, in the three layouts that are asked of it."""
    torch.manual_seed(0)
    rows, matrix = torch.randn(5, 3), torch.randn(4, 3)
    out = torch.empty(5, 4)
    fake.general_grouped_gemm([matrix], [rows], [out], [None], out.dtype, "TN", [5],
                              single_output=True)  # fmt: skip
    torch.testing.assert_close(out, rows @ matrix.T)
    back = torch.empty(5, 3)
    fake.general_grouped_gemm([matrix], [out], [back], [None], out.dtype, "NN", [5],
                              single_output=True)  # fmt: skip
    torch.testing.assert_close(back, out @ matrix)
    summed = torch.ones(4, 3)
    fake.general_grouped_gemm([rows], [out], [summed], [None], out.dtype, "NT", [5], grad=True,
                              accumulate=True)  # fmt: skip
    torch.testing.assert_close(summed, 1 + out.T @ rows)
