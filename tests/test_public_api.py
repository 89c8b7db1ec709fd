"""The 24 public names: pinned, each from where its table says, and all of them loaded lazily."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import moetk

PUBLIC = [
    "AutoModelForCausalLM",
    "BlockSpec",
    "ExpertBank",
    "ExpertChoice",
    "LinearRouter",
    "MoELayer",
    "MoetkError",
    "Replacement",
    "RouterContext",
    "Routing",
    "SoftChoice",
    "TokenChoice",
    "compare",
    "controllers",
    "dispatch",
    "losses",
    "metrics",
    "record",
    "register",
    "replace_moe",
    "replay",
    "routers",
    "speed_up",
    "trace",
]


def names_in_the_type_checking_block() -> dict[str, str]:
    tree = ast.parse(Path(moetk.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def test_all_is_pinned() -> None:
    assert moetk.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_each_name_resolves(name: str) -> None:
    assert getattr(moetk, name) is not None


@pytest.mark.parametrize("name", PUBLIC)
def test_a_name_is_a_room_or_comes_from_one_place(name: str) -> None:
    value = getattr(moetk, name)
    if isinstance(value, ModuleType):
        assert value.__name__ == f"moetk.{name}"
    else:
        assert value is getattr(importlib.import_module(moetk._MODULE_OF[name]), name)


def test_no_function_is_hidden_by_a_module_of_the_same_name() -> None:
    """Importing `moetk.record` as a module would set `moetk.record` and hide the function."""
    root = Path(moetk.__file__).parent
    modules = {path.stem for path in root.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert modules & set(PUBLIC) == moetk._ROOMS


def test_type_checkers_see_what_runs() -> None:
    rooms = dict.fromkeys(moetk._ROOMS | moetk._UNLISTED, "moetk")
    assert names_in_the_type_checking_block() == moetk._MODULE_OF | rooms
    assert set(PUBLIC) == moetk._MODULE_OF.keys() | moetk._ROOMS


def test_what_messages_name_is_there_after_import_moetk_alone() -> None:
    code = (
        "import moetk; print(moetk.parallel.sum_over_ranks.__name__, 'parallel' in moetk.__all__)"
    )
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert said.split() == ["sum_over_ranks", "False"]


def test_dir_lists_every_public_name_before_it_is_touched() -> None:
    code = "import moetk; print(*dir(moetk))"
    listed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert {*PUBLIC, "__version__"} <= set(listed.split())


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'moetk' has no attribute 'MoeLayer'"):
        _ = moetk.MoeLayer  # type: ignore[attr-defined]
    assert not hasattr(moetk, "equivalences")


def test_star_import_gives_all_of_it() -> None:
    namespace: dict[str, object] = {}
    exec("from moetk import *", namespace)
    assert set(PUBLIC) <= namespace.keys()
