"""The corpus: split by file, left-out files left out, one checksum."""

from dataclasses import replace

import pytest

from moetk.errors import ConfigError
from moetk.sweep.config import DataSettings
from moetk.sweep.data import python_stdlib


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
