"""A cell for real: batches, model, training, causality, and a user's router beside the TOML."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from moetk.errors import ConfigError, SweepMismatchError
from moetk.io import seal
from moetk.routers import MixtralRouter
from moetk.routing import TokenChoice
from moetk.sweep import cell as cell_module
from moetk.sweep import code as code_module
from moetk.sweep import load_config, parse_config, run_sweep
from moetk.sweep.causality import is_causal
from moetk.sweep.code import running_code
from moetk.sweep.data import Corpus, load_corpus
from moetk.sweep.parts import arm_controllers, arm_losses, router_factory
from moetk.sweep.train import LoadLog, build_arm, stream, train_arm, warmup_then_cosine

TINY = {
    "sweep": {"name": "tiny", "seeds": [0], "steps": 6, "baseline": "a", "timeout": 120},
    "model": {"hidden_size": 16, "experts": 4, "intermediate_size": 16, "layers": 2},
    "data": {"max_bytes": 600_000},
    "train": {"batch_size": 2, "sequence_length": 16, "eval_every": 3, "eval_batches": 2},
}


def cell_of(**arm):
    arm = {"name": "a", "router": "DeepSeekV3Router", **arm}
    sweep = {**TINY["sweep"], "baseline": arm["name"]}
    config = parse_config({**TINY, "sweep": sweep, "arm": [arm]}, Path("."))
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


class SeesTheNextToken(SeesTheFuture):
    """Each token is routed by the token after it: of 256 places, one meets the change."""

    def forward(self, x_TH, ctx):
        x_BSH = x_TH.view(*ctx.batch_shape, -1)
        ahead_BSH = torch.cat((x_BSH[:, 1:], x_BSH[:, -1:]), 1)
        return self.inner(ahead_BSH.flatten(0, 1), ctx)


@pytest.mark.parametrize("seed", [0, 1])
def test_one_place_in_many_that_sees_the_next_token(corpus, seed):
    from moetk import replace_moe

    cell = cell_of()
    cell = replace(cell, train=replace(cell.train, sequence_length=512))
    (ids_BS,) = corpus.held_out_batches(1, 8, 500)
    model, _ = build_arm(cell, seed=seed)
    assert is_causal(model, ids_BS)
    replace_moe(model, SeesTheNextToken)
    assert not is_causal(model, ids_BS)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"router": "MixtralRoute"}, "a router = 'MixtralRoute'; did you mean 'MixtralRouter'"),
        ({"router": "kimi_k3"}, "did you mean 'kimi_k2'"),
        ({"router": "LinearRouter"}, "a router = 'LinearRouter'"),
        ({"router": "SoftMoERouter"}, "a router = 'SoftMoERouter'"),
        (
            {"losses": [{"name": "RouterZLoss", "coefficient": "0.01"}]},
            r"^\[\[arm\]\] a losses: RouterZLoss coefficient is '0.01'; a finite number is needed",
        ),
        (
            {"controllers": [{"name": "BiasUpdate", "rate": -1}]},
            r"^\[\[arm\]\] a controllers: BiasUpdate\(rate=-1\): RouterConfigError: ",
        ),
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


def test_what_is_said_about_a_router_that_cannot_be_built():
    for groups, words in (
        (3, r"\(groups=3\): RouterConfigError: "),
        (True, " groups is True; a whole"),
    ):
        arm = {"router": "DeepSeekV3Router", "args": {"groups": groups}}
        with pytest.raises(ConfigError, match="a router: DeepSeekV3Router" + words):
            build_arm(cell_of(**arm), seed=0)


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
    print("built for", spec.name, flush=True)
    made = MixtralRouter(spec.hidden_size, spec.num_experts, spec.top_k)
    made.weight.data *= scale * SCALE
    return made
"""


KILLED = """
import sys
from pathlib import Path
from moetk.sweep import load_config, run_sweep
run_sweep(load_config(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def kill_in_training(toml, out):
    """Start the sweep as a user does, and kill -9 it when its first cell trains."""
    runner = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(toml), str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 90
    while not any("built for" in log.read_text() for log in (out / "logs").glob("?" * 64 + ".txt")):
        assert time.monotonic() < deadline and runner.poll() is None
        time.sleep(0.01)
    runner.send_signal(signal.SIGKILL)
    runner.wait()


def test_a_users_router_beside_the_toml(tmp_path, monkeypatch):
    """Processes for real: describe, run, kill -9, resume; the user's code enters the key."""
    toml = """
    [sweep]
    name = "tiny"
    seeds = [0]
    steps = 60
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
    kill_in_training(tmp_path / "sweep.toml", tmp_path / "out")
    assert not (tmp_path / "out" / "results.jsonl").exists()
    (row,) = run_sweep(config, tmp_path / "out")
    assert row["result"]["status"] == "ok", row["result"]
    assert sorted(row["code"]["modules"]) == ["helper.py", "mine.py"]
    assert row["run"]["threads"] == 1 and row["run"]["backend"] in ("reference", "grouped")
    assert row["data"]["kind"] == "python_stdlib" and len(row["data"]["sha256"]) == 64
    assert "mine" not in sys.modules
    log = tmp_path / "out" / "logs" / f"{row['key']}.txt"
    assert "built for model.layers.0.mlp" in log.read_text()

    # What never was interrupted, here in one piece, is equal to the last digit.
    monkeypatch.syspath_prepend(tmp_path)
    whole = train_arm(config.cell(config.arms[0]), 0, load_corpus(config.data), lambda event: None)
    assert json.loads(json.dumps(whole)) == row["result"]
    for name in ("mine", "helper"):
        sys.modules.pop(name)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """What the runner sends; what a cell's process imports is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(*arms, seed=0):
        settings = [cell_of(**arm).settings() for arm in arms]
        job = {"folder_of_toml": str(tmp_path / "toml"), "cells": settings}
        return {**job, "key": "k", "settings": settings[0], "seed": seed}

    (tmp_path / "toml").mkdir()
    yield make
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("mine", "late", "elsewhere"):
            del sys.modules[name]


def test_a_package_from_elsewhere_enters_the_key_whole(job, tmp_path, monkeypatch):
    package = tmp_path / "lib" / "elsewhere"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "ops.py").write_text("SCALE = 1.0\n")
    (package / "routers.py").write_text(ROUTER.replace("from helper", "from elsewhere.ops"))
    monkeypatch.syspath_prepend(tmp_path / "lib")
    found = cell_module.describe(job({"router": "elsewhere.routers:router", "args": {"scale": 2}}))
    names = [name for name in found["code"]["modules"] if name.startswith("elsewhere")]
    assert names == ["elsewhere", "elsewhere.ops", "elsewhere.routers"]
    assert found["places"] == {"elsewhere.routers": str(package / "routers.py")}


def test_code_that_changed_is_met_before_training(job, tmp_path):
    mine = tmp_path / "toml" / "mine.py"
    mine.write_text(ROUTER.replace("from helper import SCALE", "SCALE = 1.0"))
    work = job({"router": "mine:router", "args": {"scale": 2}})
    world = cell_module.describe(work)
    work |= {name: world[name] for name in ("data", "code")}
    steps = []
    row = cell_module.run(work, steps.append)
    assert row["result"]["status"] == "ok" and len(steps) >= 1

    mine.write_text(mine.read_text() + "# edited\n")
    steps.clear()
    with pytest.raises(SweepMismatchError, match=r"sweep ran: code.modules mine.py \w{9}\.\.\. ->"):
        cell_module.run(work, steps.append)
    assert steps == []


def test_a_module_imported_in_training_is_known_before(job, tmp_path):
    (tmp_path / "toml" / "late.py").touch()
    mine = ROUTER.replace("from helper import SCALE", "SCALE = 1.0") + (
        "    made.register_forward_pre_hook(lambda *_: __import__('late') and None)\n"
        "    return made\n"
    )
    (tmp_path / "toml" / "mine.py").write_text(mine.replace("    return made\n", "", 1))
    found = cell_module.describe(job({"router": "mine:router", "args": {"scale": 2}}))
    assert sorted(found["code"]["modules"]) == ["late.py", "mine.py"]


def test_an_arm_that_cannot_take_a_step_is_named(job):
    loss = {"name": "LoadBalancingLoss", "coefficient": 0.01}
    arms = [{}, {"name": "b", "router": "gpt_oss_20b", "losses": [loss]}]
    with pytest.raises(ConfigError, match=r"\[\[arm\]\] b cannot train a step: MissingFieldError"):
        cell_module.describe(job(*arms))


def test_installed_modules_are_known_through_a_link(tmp_path, monkeypatch):
    installed = tmp_path / "real" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "elsewhere.py").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    linked = str(tmp_path / "link" / "site-packages")
    monkeypatch.setattr(code_module.sysconfig, "get_path", lambda name: linked)
    monkeypatch.syspath_prepend(linked)
    __import__("elsewhere")
    assert running_code(tmp_path)["modules"] == {}
    sys.modules.pop("elsewhere")


def test_code_is_listed(tmp_path, monkeypatch):
    (tmp_path / "beside_the_toml.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("beside_the_toml")
    code = running_code(tmp_path, ["html"])
    assert {name.partition(".")[0] for name in code["modules"]} <= {"beside_the_toml", "html"}
    assert "beside_the_toml.py" in code["modules"]
    assert {"routing.py", "layers/replace.py", "sweep/train.py"} <= set(code["moetk"])
    assert "experts/auto_table.csv" in code["moetk"]
    assert set(code["versions"]) == {"python", "torch", "transformers", "numpy"}
    sys.modules.pop("beside_the_toml")
