"""The store keeps what was written, says what was damaged, and survives a kill at any byte."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetk.errors import MoetkError, SaveFailedError, ShardCorruptError, UnsafePathError
from moetk.io import (
    FileLock,
    Locked,
    RowFile,
    canonical,
    inside,
    read_rows,
    remove_temporaries,
    seal,
    sha256,
    sha256_file,
    unseal,
    write_file,
    write_folder,
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
rows = st.dictionaries(st.text().filter(lambda key: key != "sha256"), json_values, max_size=4)


@given(rows)
def test_what_is_sealed_comes_back(row):
    line = seal(row)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert unseal(line, "row") == row


@given(rows, st.data())
def test_a_changed_byte_never_passes(row, data):
    line = bytearray(seal(row))
    place = data.draw(st.integers(0, len(line) - 2))
    line[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != line[place]))
    try:
        assert unseal(bytes(line), "row") == row  # "1E5" for "1e5" says the same
    except ShardCorruptError as error:
        assert "row" in str(error)


def test_what_a_damaged_line_is_called():
    for line, words in (
        (b'{"a": 1', "not JSON"),
        (b'{"a":1}', "carries no sha256"),
        (b'{"a":1,"sha256":"00"}', "differs from its checksum"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "carries no sha256"),
        (b'{"a":NaN,"sha256":"00"}', "not JSON"),
        (b'{"a":1e999,"sha256":"00"}', "not JSON"),
        (b'{"a":"\\udce9","sha256":"00"}', "differs from its checksum"),
        (b"[" * 100_000, "not JSON"),
    ):
        with pytest.raises(ShardCorruptError, match=words):
            unseal(line, "results.jsonl, line 3,")


def test_equal_values_have_one_text_and_nan_has_none():
    assert (
        canonical({"b": 1, "a": (1, 2)}) == canonical({"a": [1, 2], "b": 1}) == b'{"a":[1,2],"b":1}'
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(float("nan"))


def test_any_text_fits_into_a_row(tmp_path):
    row = {"error": "cannot open 'caf\udce9'", "\ud800": "é"}
    RowFile(tmp_path / "rows").append(row)
    assert read_rows(tmp_path / "rows") == ([row], b"")


def test_a_value_with_a_seal_of_its_own_is_refused():
    with pytest.raises(ValueError, match="a 'sha256' of its own, 'x'; rename"):
        seal({"sha256": "x"})


def test_checksum_of_a_file(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(b"x" * 3_000_000)
    assert sha256_file(path) == sha256(b"x" * 3_000_000)


@given(st.lists(rows, min_size=1, max_size=4), st.data())
def test_a_torn_append_costs_only_its_own_row(tmp_path_factory, written, data):
    path = tmp_path_factory.mktemp("rows") / "results.jsonl"
    file = RowFile(path)
    for row in written[:-1]:
        file.append(row)
    torn = seal(written[-1])
    torn = torn[: data.draw(st.integers(1, len(torn) - 1))]
    with open(path, "ab") as stream:
        stream.write(torn)

    assert read_rows(path) == (written[:-1], torn)
    again = RowFile(path)
    assert again.rows == written[:-1] and again.quarantined == len(torn)
    assert path.with_name("results.jsonl.quarantine").read_bytes() == torn + b"\n"
    again.append(written[-1])
    assert read_rows(path) == (written, b"") and RowFile(path).quarantined == 0


def test_damage_in_the_middle_is_not_healed_silently(tmp_path):
    path = tmp_path / "results.jsonl"
    file = RowFile(path)
    file.append({"a": 1})
    file.append({"a": 2})
    path.write_bytes(path.read_bytes().replace(b'"a":1', b'"a":7'))
    before = path.read_bytes()
    with pytest.raises(ShardCorruptError, match="line 1, differs"):
        RowFile(path)
    assert path.read_bytes() == before


def test_no_file_is_no_rows(tmp_path):
    assert read_rows(tmp_path / "none") == ([], b"")


def _full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path, rows_path = tmp_path / "file", tmp_path / "rows.jsonl"
    write_file(path, b"old")
    file = RowFile(rows_path)
    file.append({"a": 1})
    before = rows_path.read_bytes()
    monkeypatch.setattr(os, "fsync", _full_disk)
    for write in (
        lambda: write_file(path, b"new"),
        lambda: write_folder(tmp_path / "folder", {"a": b"1"}),
        lambda: file.append({"a": 2}),
    ):
        with pytest.raises(SaveFailedError, match="No space left") as caught:
            write()
        assert caught.value.errno == errno.ENOSPC
        assert isinstance(caught.value, MoetkError) and isinstance(caught.value, OSError)
    assert path.read_bytes() == b"old" and rows_path.read_bytes() == before
    assert file.rows == [{"a": 1}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "rows.jsonl"]


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    write_file(path, b"1")
    write_file(path, b"2")
    assert path.read_bytes() == b"2" and list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_and_only_once(tmp_path):
    target = tmp_path / "cell"
    write_folder(target, {"row.json": b"1", "below/other": b"2"})
    assert (target / "below" / "other").read_bytes() == b"2"
    with pytest.raises(SaveFailedError, match="was not written"):
        write_folder(target, {"row.json": b"3"})
    assert (target / "row.json").read_bytes() == b"1" and list(tmp_path.iterdir()) == [target]


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from moetk.io import write_folder;"
        "os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "write_folder(Path(sys.argv[1]) / 'cell', {'row.json': b'1'})"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert [path.name.startswith(".moetk-") for path in tmp_path.iterdir()] == [True]
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["", "a\0b", "/etc/x", "../x", "a/../../x", "C:\\x", "\\\\host\\x", "..\\x", "link/x"]
)
def test_stored_names_stay_inside(tmp_path, name):
    outside = tmp_path / "outside"
    folder = tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    with pytest.raises(UnsafePathError, match="stored name"):
        inside(folder, name)


def test_ordinary_names_pass(tmp_path):
    assert inside(tmp_path, "a/b.json") == tmp_path / "a" / "b.json"
    with pytest.raises(UnsafePathError):
        write_folder(tmp_path / "new", {"../x": b""})
    assert list(tmp_path.iterdir()) == []


def test_the_lock_names_its_holder_and_outlives_it_in_children(tmp_path):
    path = tmp_path / "lock"
    lock = FileLock(path)
    with pytest.raises(Locked) as caught:
        FileLock(path, patience=0)
    assert caught.value.pid == os.getpid()

    child = subprocess.Popen(["sleep", "60"], pass_fds=(lock.fd,))
    lock.release()
    with pytest.raises(Locked):
        FileLock(path, patience=0)
    child.kill()
    child.wait()
    FileLock(path, patience=0).release()


def test_a_lock_file_with_anything_in_it(tmp_path):
    path = tmp_path / "lock"
    path.write_text("not a number")
    lock = FileLock(path, patience=0)
    assert json.loads(Path(path).read_text()) == os.getpid()
    lock.release()
