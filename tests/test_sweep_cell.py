"""A cell for real: text, model, training, causality, and a user's router beside the TOML."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from moetk.errors import ConfigError
from moetk.io import seal
from moetk.routers import MixtralRouter
from moetk.routing import TokenChoice
from moetk.sweep import load_config, parse_config, run_sweep
from moetk.sweep.causality import is_causal
from moetk.sweep.code import running_code
from moetk.sweep.config import DataSettings
from moetk.sweep.data import Corpus, python_stdlib
from moetk.sweep.parts import arm_controllers, arm_losses, router_factory
from moetk.sweep.train import LoadLog, build_arm, stream, train_arm, warmup_then_cosine

TINY = {
    "sweep": {"name": "tiny", "seeds": [0], "steps": 6, "baseline": "a", "timeout": 120},
    "model": {"hidden_size": 16, "experts": 4, "intermediate_size": 16, "layers": 2},
    "data": {"max_bytes": 200_000},
    "train": {"batch_size": 2, "sequence_length": 16, "eval_every": 3, "eval_batches": 2},
}


def cell_of(**arm):
    arm = {"name": "a", "router": "DeepSeekV3Router", **arm}
    config = parse_config({**TINY, "arm": [arm]}, Path("."))
    return config.cell(config.arms[0])


@pytest.fixture(scope="module")
def corpus():
    text = torch.arange(4000).remainder(97).to(torch.uint8)
    return Corpus(text, text[:500], {"kind": "toy", "sha256": "d"})


@pytest.fixture(autouse=True)
def determinism():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def write_tree(root, count=40):
    for index in range(count):
        folder = root / ("package" if index % 2 else ".")
        folder.mkdir(exist_ok=True)
        (folder / f"m{index}.py").write_text(f"x = {index}\n" * (index + 1))
    for left_out in ("test", "idlelib", "site-packages"):
        (root / left_out).mkdir()
        (root / left_out / "secret.py").write_text("no = 1\n")
    (root / "_sysconfigdata_x.py").write_text("no = 1\n")
    (root / "notes.txt").write_text("no = 1\n")


def test_the_corpus_is_split_by_file_and_sealed(tmp_path):
    write_tree(tmp_path)
    settings = DataSettings(max_bytes=10**6, held_out=0.3)
    corpus = python_stdlib(settings, tmp_path)
    train, held_out = (bytes(side.numpy()) for side in (corpus.train, corpus.held_out))
    assert b"no = 1" not in train + held_out
    files = [set(side.split(b"\0")) - {b""} for side in (train, held_out)]
    assert not files[0] & files[1] and len(files[0]) + len(files[1]) == 40 == corpus.about["files"]
    assert corpus.about["train_bytes"] == len(train)
    assert python_stdlib(settings, tmp_path).about == corpus.about

    (tmp_path / "m0.py").write_text("x = 1\n")  # one byte of one file
    other = python_stdlib(settings, tmp_path)
    assert other.about["sha256"] != corpus.about["sha256"]
    small = python_stdlib(replace(settings, max_bytes=2000), tmp_path)
    assert len(small.train) + len(small.held_out) <= 2000 + small.about["files"]
    # A file keeps its side when the corpus shrinks.
    assert set(bytes(small.held_out.numpy()).split(b"\0")) - {b""} <= files[1]


def test_a_corpus_without_one_side_is_refused(tmp_path):
    write_tree(tmp_path, count=2)
    with pytest.raises(ConfigError, match=r"max_bytes = 3 and held_out = 0.5 leave no train file"):
        python_stdlib(DataSettings(max_bytes=3, held_out=0.5), tmp_path)


def test_batches_follow_their_seed(corpus):
    def first(seed):
        return next(corpus.batches(4, 16, seed))

    assert first(1).shape == (4, 16) and first(1).dtype == torch.int64
    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))
    whole = next(corpus.batches(1, 4000, 0))
    assert torch.equal(whole[0], corpus.train.long())
    pieces = corpus.held_out_batches(3, 2, 16)
    assert pieces.shape == (3, 2, 16)
    assert torch.equal(pieces[-1, -1], corpus.held_out[-16:].long())
    with pytest.raises(ConfigError, match="train text has 4000 bytes"):
        next(corpus.batches(1, 4001, 0))
    with pytest.raises(ConfigError, match="held-out text has 500 bytes"):
        corpus.held_out_batches(1, 1, 501)


def test_the_learning_rate_rises_and_falls():
    settings = cell_of().train
    share = warmup_then_cosine(replace(settings, warmup=4, final_lr=0.1), 24)
    values = [share(step) for step in range(25)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0] and values[4] == 1.0
    assert values[14] == pytest.approx(0.55) and values[24] == pytest.approx(0.1)
    assert warmup_then_cosine(replace(settings, warmup=0), 2)(0) == 1.0


def test_a_load_log_against_plain_counting():
    log = LoadLog()
    steps = [torch.tensor([step, 2, 0, 1]) for step in range(130)]
    for counts in steps:
        log.add({3: counts})
    found = log.result()
    ends = found["load"]["steps"]
    assert len(ends) == 60 and ends[-1] == 130
    windows = torch.tensor(found["load"]["layers"]["3"])
    assert torch.equal(windows.sum(0), torch.stack(steps).sum(0))
    last = torch.stack(steps[-33:]).sum(0).double()
    assert found["train_max_violation"] == pytest.approx(float(last.max() / last.mean() - 1))
    assert found["batch_max_violation"][9] == pytest.approx(9 / 3 - 1)
    assert LoadLog().result()["train_max_violation"] is None


def test_equal_seeds_pair_the_arms():
    one, _ = build_arm(cell_of(), seed=3)
    two, _ = build_arm(cell_of(controllers=[{"name": "BiasUpdate", "rate": 0.01}]), seed=3)
    other, _ = build_arm(cell_of(), seed=4)
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert len({stream(seed, use) for seed in (0, 1) for use in ("model", "data", "noise")}) == 6


def test_a_cell_gives_the_same_result_twice(corpus):
    cell = cell_of(
        losses=[{"name": "LoadBalancingLoss", "coefficient": 0.01}],
        controllers=[{"name": "BiasUpdate", "rate": 0.01}],
    )
    events = []
    first, second = (train_arm(cell, 0, corpus, events.append) for _ in range(2))
    assert first == second and len(events) == 12
    assert first["status"] == "ok" and first["causal"] is True and first["drop_fraction"] == 0.0
    assert [step for step, _ in first["held_out"]] == [0, 3, 6]
    assert first["final_loss"] < first["initial_loss"] and len(first["train_loss"]) == 6
    loads = first["load"]["layers"]
    assert list(loads) == ["0", "1"] and all(sum(w) == 2 * 16 * 2 for w in loads["0"])
    assert train_arm(cell, 1, corpus, events.append)["initial_loss"] != first["initial_loss"]


@pytest.mark.parametrize("lr", [1e30, 1e18])
def test_a_loss_that_is_not_finite_ends_the_cell(corpus, lr):
    result = train_arm(cell_of(lr=lr), 0, corpus, lambda event: None)
    assert result["status"] == "diverged" and result["final_loss"] is None
    assert "not finite" in result["error"] or "the loss of" in result["error"]
    assert len(result["train_loss"]) < 6 and result["initial_loss"] > 0
    assert seal(result)  # NaN would not be JSON


class SeesTheFuture(nn.Module):
    """Scores shifted by the mean over the sequence, later tokens included."""

    def __init__(self, spec):
        super().__init__()
        self.inner = MixtralRouter(spec.hidden_size, spec.num_experts, spec.top_k)

    def forward(self, x_TH, ctx):
        routing = self.inner(x_TH + x_TH.mean(0), ctx)
        return TokenChoice(routing.experts_TK, routing.weights_TK, routing.num_experts)


def test_causality_is_measured(corpus):
    from moetk import replace_moe

    ids_BS = corpus.held_out_batches(1, 4, 16)[0]
    model, _ = build_arm(cell_of(), seed=0)
    with torch.no_grad():  # larger weights, so that experts matter
        for parameter in model.parameters():
            parameter.mul_(3)
    assert is_causal(model, ids_BS) and model.training
    replace_moe(model, SeesTheFuture)
    assert not is_causal(model, ids_BS)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"router": "MixtralRoute"}, "a router = 'MixtralRoute'; did you mean 'MixtralRouter'"),
        ({"router": "kimi_k3"}, "did you mean 'kimi_k2'"),
        ({"router": "top_k"}, "a router = 'top_k'; known: DeepSeekV3Router, "),
        (
            {"args": {"group": 1}},
            r"DeepSeekV3Router\(hidden_size.*unexpected keyword argument 'group'",
        ),
        ({"losses": [{"name": "RouterZLoss"}]}, "missing a required argument: 'coefficient'"),
        ({"losses": [{"name": "BiasUpdate"}]}, "a losses = 'BiasUpdate'; known: "),
        ({"controllers": [{"name": "BiasUpdat"}]}, "did you mean 'BiasUpdate'"),
        ({"router": "no_such_module:f"}, "cannot be imported: No module named 'no_such_module'"),
        ({"router": "json:no_such"}, "module 'json' has no 'no_such'"),
        ({"router": "sys:path"}, "'sys:path' is a list, not a function"),
        (
            {"router": "json:dumps", "args": {"zzz": 1, "obj": 2}},
            "multiple values for argument 'obj'",
        ),
    ],
)
def test_what_is_said_about_a_wrong_part(arm, message):
    arm = cell_of(**arm).arm
    with pytest.raises(ConfigError, match=message):
        router_factory(arm)
        arm_losses(arm)
        arm_controllers(arm)


def test_stock_and_published_routers():
    assert router_factory(cell_of(router="stock").arm) is None
    model, _ = build_arm(cell_of(router="kimi_k2"), seed=0)
    assert "scale=2.827" in repr(model) or any(
        "DeepSeekV3Router" in repr(m) for m in model.modules()
    )


ROUTER = """
from helper import SCALE
from moetk.io import seal
from moetk.routers import MixtralRouter

def router(spec, scale):
    print("built for", spec.name)
    made = MixtralRouter(spec.hidden_size, spec.num_experts, spec.top_k)
    made.weight.data *= scale * SCALE
    return made
"""


def test_a_users_router_beside_the_toml(tmp_path):
    """Processes for real: describe, run, resume; the user's code enters the key."""
    toml = """
    [sweep]
    name = "tiny"
    seeds = [0]
    steps = 3
    baseline = "mine"
    [model]
    hidden_size = 16
    experts = 4
    intermediate_size = 16
    [data]
    max_bytes = 600_000
    [train]
    batch_size = 2
    sequence_length = 16
    eval_batches = 1
    [[arm]]
    name = "mine"
    router = "mine:router"
    args = { scale = 2.0 }
    """
    (tmp_path / "sweep.toml").write_text(toml)
    (tmp_path / "mine.py").write_text(ROUTER)
    (tmp_path / "helper.py").write_text("SCALE = 1.0\n")
    config = load_config(tmp_path / "sweep.toml")
    (row,) = run_sweep(config, tmp_path / "out")
    assert row["result"]["status"] == "ok", row["result"]
    assert sorted(row["code"]["modules"]) == ["helper.py", "mine.py"]
    assert row["run"]["threads"] == 1 and row["run"]["backend"] in ("reference", "grouped")
    assert row["data"]["kind"] == "python_stdlib" and len(row["data"]["sha256"]) == 64
    assert "mine" not in sys.modules
    log = tmp_path / "out" / "logs" / f"{row['key']}.txt"
    assert "built for model.layers.0.mlp" in log.read_text()


def test_code_is_listed(tmp_path, monkeypatch):
    (tmp_path / "beside_the_toml.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("beside_the_toml")
    code = running_code(tmp_path, ["html"])
    assert set(code["modules"]) <= {"beside_the_toml.py", "html"}
    assert "beside_the_toml.py" in code["modules"]
    assert {"routing.py", "layers/replace.py", "sweep/train.py"} <= set(code["moetk"])
    assert set(code["versions"]) == {"python", "torch", "transformers", "numpy"}
    sys.modules.pop("beside_the_toml")
