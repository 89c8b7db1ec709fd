"""A sweep's file: what it may say, what is said about what it may not, and what a key covers."""

import copy
import tomllib
from pathlib import Path

import pytest

from moetk.errors import ConfigError
from moetk.sweep import load_config, parse_config
from moetk.sweep.config import CellConfig
from moetk.sweep.plan import World, changes, plan_cells

TOML = """
[sweep]
name = "s"
seeds = [0, 1]
steps = 10
baseline = "a"

[[arm]]
name = "a"
router = "MixtralRouter"

[[arm]]
name = "b"
router = "mine:router"
args = { k = 2 }
losses = [{ name = "RouterZLoss", coefficient = 0.001 }]
controllers = [{ name = "BiasUpdate", rate = 0.001 }]
lr = 1
backend = "grouped"
"""
WORLD = World({"sha256": "d"}, {"moetk": {"a.py": "1"}, "modules": {"m.py": "2"}, "versions": {}})


@pytest.fixture
def raw():
    return tomllib.loads(TOML)


def parsed(raw, **changes):
    raw = copy.deepcopy(raw)
    for path, value in changes.items():
        *tables, key = path.split("__")
        table = raw
        for name in tables:
            table = table[int(name)] if name.isdigit() else table.setdefault(name, {})
        table[key] = value
    return parse_config(raw, Path("."))


def test_a_file_as_it_reads(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(TOML)
    config = load_config(path)
    assert config.folder == tmp_path and config.source == TOML
    assert config.command == f"moetk sweep {path}"
    assert config.limited(3).command == f"moetk sweep {path} --limit-steps 3"
    assert config.sweep.seeds == (0, 1) and config.model.hidden_size == 64
    a, b = config.arms
    assert (a.lr, b.lr) == (None, 1.0) and config.cell(a).lr == config.train.lr
    assert config.cell(b).lr == 1.0 and [part.is_users for part in b.parts] == [True, False, False]
    assert b.router.args == {"k": 2} and b.controllers[0].args == {"rate": 0.001}


def test_a_cell_survives_the_pipe(raw):
    config = parsed(raw)
    for arm in config.arms:
        cell = config.cell(arm)
        assert CellConfig.from_settings(cell.settings()) == cell


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"swep": {}}, r"The file has no setting 'swep'; did you mean 'sweep'\?"),
        ({"train__lrr": 1.0}, r"\[train\] has no setting 'lrr'; did you mean 'lr'\?"),
        (
            {"arm__1__contollers": []},
            r"\[\[arm\]\] b has no setting 'contollers'; did you mean 'contr",
        ),
        ({"model__zzz": 1}, r"\[model\] has no setting 'zzz'; known: family, hidden_size"),
        ({"train__lr": "x"}, r"\[train\] lr is 'x'; a finite number is needed"),
        ({"train__lr": float("nan")}, r"\[train\] lr is nan; a finite number"),
        ({"train__lr": -1.0}, r"\[train\] lr = -1.0; allowed: more than 0"),
        ({"sweep__steps": True}, r"\[sweep\] steps is True; a whole number is needed"),
        ({"sweep__steps": 1.5}, r"\[sweep\] steps is 1.5; a whole number is needed"),
        ({"sweep__seeds": []}, r"\[sweep\] seeds = \[\]; allowed: at least one"),
        ({"sweep__seeds": [1, 1]}, r"seeds = \[1, 1\]; allowed: no seed twice"),
        ({"sweep__seeds": 3}, r"seeds is 3; a list of whole numbers"),
        ({"sweep__name": "../x"}, r"\[sweep\] name = '../x'; allowed: letters"),
        ({"sweep__name": ".."}, r"\[sweep\] name = '..'; allowed: letters"),
        ({"sweep__baseline": "aa"}, r"\[sweep\] baseline = 'aa'; did you mean 'a'\?"),
        ({"model__top_k": 9}, r"\[model\] top_k = 9; allowed: <= experts = 8"),
        ({"model__heads": 3}, r"\[model\] heads = 3; allowed: an even share of hidden_size = 64"),
        ({"model__kv_heads": 3}, r"kv_heads = 3; allowed: a divisor of heads = 4"),
        ({"model__family": "qwen3"}, r"\[model\] family = 'qwen3'; did you mean 'qwen3_moe'\?"),
        ({"data__kind": "x"}, r"\[data\] kind = 'x'; known: python_stdlib"),
        ({"data__held_out": 1.0}, r"held_out = 1.0; allowed: between 0 and 1"),
        ({"arm__1__name": "a"}, r"\[\[arm\]\] name = 'a'; allowed: no name twice"),
        (
            {"arm__1__backend": "groupd"},
            r"\[\[arm\]\] b backend = 'groupd'; did you mean 'grouped'",
        ),
        ({"arm__1__router": 3}, r"\[\[arm\]\] b router is 3; a string is needed"),
        ({"arm__1__router": "a b:c"}, r"'a b:c' is not 'module:function'"),
        ({"arm__1__router": "os.path:"}, r"'os.path:' is not 'module:function'"),
        ({"arm__1__args": {"name": 1}}, r"args has 'name'"),
        ({"arm__1__args": {"x": float("inf")}}, r"\[\[arm\]\] b router x is inf"),
        ({"arm__1__losses": {"name": "x"}}, r"losses is \{'name': 'x'\}; a list of tables"),
        ({"arm__1__losses": [{"coefficient": 1}]}, r"losses: name is None"),
        ({"arm": []}, r"no \[\[arm\]\]"),
    ],
)
def test_what_is_said_about_a_wrong_setting(raw, change, message):
    with pytest.raises(ConfigError, match=message):
        parsed(raw, **change)


def test_missing_settings_and_files(raw, tmp_path):
    del raw["sweep"]["steps"], raw["sweep"]["name"]
    with pytest.raises(ConfigError, match=r"\[sweep\] lacks name, steps"):
        parse_config(raw, tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = ")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(tmp_path / "bad.toml")


def test_fewer_steps(raw):
    config = parsed(raw)
    assert config.limited(3).sweep.steps == 3 and config.limited(99).sweep.steps == 10
    with pytest.raises(ConfigError, match="--limit-steps 0"):
        config.limited(0)


def test_a_key_covers_what_a_result_depends_on_and_no_more(raw):
    def keys(raw_changes=(), world=WORLD):
        return {(c.arm, c.seed): c.key for c in plan_cells(parsed(raw, **dict(raw_changes)), world)}

    base = keys()
    assert len(set(base.values())) == 4
    assert keys({"sweep__timeout": 5.0, "sweep__baseline": "b", "sweep__name": "t"}) == base
    more = keys({"sweep__seeds": [1, 0, 2]})
    assert all(more[cell] == key for cell, key in base.items()) and len(more) == 6
    one_arm = keys({"arm__1__controllers": []})
    assert {arm for (arm, seed), key in one_arm.items() if base[arm, seed] != key} == {"b"}
    for change in ({"sweep__steps": 11}, {"train__lr": 0.1}, {"data__max_bytes": 1}):
        assert not set(keys(change).values()) & set(base.values())
    for world in (
        World({"sha256": "e"}, WORLD.code),
        World(WORLD.data, {**WORLD.code, "moetk": {"a.py": "3"}}),
        World(WORLD.data, {**WORLD.code, "modules": {}}),
        World(WORLD.data, {**WORLD.code, "versions": {"torch": "3"}}),
    ):
        assert not set(keys(world=world).values()) & set(base.values())


def test_code_and_data_that_a_key_covers():
    def differences(data=WORLD.data, **code):
        return WORLD.differences(data, {**WORLD.code, **code})

    assert differences() == differences(modules={}) == []
    assert differences(modules={"late.py": "1"}) == ["code.modules late.py nothing -> 1"]
    assert differences(modules={"m.py": "other"}) == ["code.modules m.py 2 -> other"]
    assert differences(moetk={}) == ["code.moetk a.py 1 -> nothing"]
    assert differences(versions={"torch": "3"}) == ["code.versions torch nothing -> 3"]
    assert differences({"sha256": "e"}) == ["data sha256 d -> e"]


def test_differences_read_as_a_person_would_say_them(raw):
    old, new = parsed(raw), parsed(raw, arm__1__controllers=[{"name": "BiasUpdate", "rate": 0.01}])
    lines = changes(old.settings(), new.settings())
    assert lines == ["arms.b.controllers rate 0.001 -> 0.01"]
    lines = changes(old.settings(), parsed(raw, train__lr=0.5, sweep__seeds=[0]).settings())
    assert lines == ["sweep seeds [0, 1] -> [0]", "train lr 0.003 -> 0.5"]
    two = [{"name": "A", "x": 1}, {"name": "B", "x": 1}]
    old = parsed(raw, arm__1__losses=two)
    new = parsed(raw, arm__1__losses=[two[0], {"name": "B", "x": 2}])
    assert changes(old.settings(), new.settings()) == ["arms.b.losses[1] x 1 -> 2"]
    old, new = parsed(raw), parsed(raw, arm__1__controllers=[])
    assert changes(old.settings(), new.settings()) == [
        "arms.b controllers nothing -> []",
        "arms.b.controllers name BiasUpdate -> nothing",
        "arms.b.controllers rate 0.001 -> nothing",
    ]
    assert changes({"data": {"sha256": "0" * 64}}, {"data": {"sha256": "1" * 64}}) == [
        "data sha256 000000000... -> 111111111..."
    ]
