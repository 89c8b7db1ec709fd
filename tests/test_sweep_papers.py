"""The reproductions: their files fit together, and their READMEs say what their rows say."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moetk.sweep import load_config

PAPERS = Path(__file__).parent.parent / "papers"
FOLDERS = sorted(path.parent for path in PAPERS.glob("*/sweep.toml"))


def rows_of(folder):
    with open(folder / "results.csv", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_rows_are_those_of_the_sweep(folder):
    config = load_config(folder / "sweep.toml")
    rows = rows_of(folder)
    planned = [(arm.name, str(seed)) for seed in config.sweep.seeds for arm in config.arms]
    assert [(row["arm"], row["seed"]) for row in rows] == planned
    assert {row["status"] for row in rows} == {"ok"} and {row["causal"] for row in rows} == {"True"}
    assert {int(row["steps"]) for row in rows} == {config.sweep.steps}
    for row in rows:
        assert float(row["final_loss"]) < float(row["initial_loss"]) - 0.5
        assert row["commit"] and "dirty" not in row["commit"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_readme_is_made_from_the_rows(folder, tmp_path):
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    subprocess.run([sys.executable, PAPERS / "table.py", copy], check=True)
    text = (folder / "README.md").read_text()
    assert (copy / "README.md").read_text() == text
    for figure in (folder / "figures").iterdir():
        assert figure.read_text().startswith("<svg")


def test_loss_free_balancing_holds_what_it_claims():
    folder = PAPERS / "loss_free_balance"
    config = load_config(folder / "sweep.toml")
    assert len({(arm.router.name, str(arm.router.args)) for arm in config.arms}) == 1
    load = {}
    for row in rows_of(folder):
        load.setdefault(row["arm"], []).append(float(row["train_max_violation"]))
    for sign in ("sign", "sign_centred"):
        assert max(load[sign]) < 0.1 < min(load["aux_loss"]) < max(load["aux_loss"]) < 1
    assert min(load["none"]) > 1
