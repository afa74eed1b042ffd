"""Files that are never half written: atomic writes, locks, checksums, records."""

import errno
import hashlib
import os
import stat
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dreml.cli import InputError
from dreml.files import (
    atomic_open,
    crc32,
    read_record,
    remove_leftovers,
    sha256,
    take_lock,
    temporary_name,
    writable,
    write_csv,
    write_record,
)


def test_atomic_open_replaces_only_when_all_went_well(tmp_path):
    path = tmp_path / "log.csv"
    with atomic_open(path) as file:
        file.write("whole\n")
        assert not path.exists()
    assert path.read_text() == "whole\n"
    with pytest.raises(RuntimeError), atomic_open(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "whole\n"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_open_flushes_before_the_rename(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size)
        fsync(descriptor)

    def noted_replace(source, target):
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with atomic_open(tmp_path / "log.csv") as file:
        file.write("whole")
    assert calls == [len("whole"), "replace", "folder"]


def test_what_is_written(tmp_path):
    """Text is UTF-8 with the line ends as given; bytes are bytes; tables are alike everywhere."""
    for mode, content in (("w", "Ü\r\n\n"), ("wb", b"\xff\r\n\n")):
        with atomic_open(tmp_path / "file", mode) as file:
            file.write(content)
        assert (tmp_path / "file").read_bytes() == (content.encode() if mode == "w" else content)
    write_csv(tmp_path / "table.csv", pd.DataFrame({"name": ["Ü", "a,b"], "share": [0.5, 1 / 3]}), float_format="%.2f")
    assert (tmp_path / "table.csv").read_bytes() == 'name,share\nÜ,0.50\n"a,b",0.33\n'.encode()


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    """Processes of other machines and containers may share the folder and the process number."""
    path = tmp_path / "log.csv"
    names = {temporary_name(path), temporary_name(path)}
    assert len(names) == 2
    for name in names:
        name.write_text("half")
    other = tmp_path / ".other.csv.tmp-1"
    for left in (other, path):
        left.write_text("whole")
    remove_leftovers(tmp_path, "log.csv")
    assert sorted(tmp_path.iterdir()) == [other, path]


def test_a_folder_that_cannot_be_written_into_names_the_option(tmp_path):
    with writable(tmp_path / "new" / "folder", "--output"):
        (tmp_path / "new" / "folder" / "file").write_text("")
    blocked = tmp_path / "new" / "folder" / "file"
    message = r"^cannot write into .* \((\w+Error: .*)\); --output names another folder$"
    with pytest.raises(InputError, match=message), writable(blocked, "--output"):
        pass
    with pytest.raises(InputError, match=message), writable(tmp_path, "--output"), take_lock(blocked / ".lock"):
        pass
    with pytest.raises(InputError, match=message), writable(tmp_path, "--output"), atomic_open(tmp_path / "log.csv"):
        raise OSError(errno.ENOSPC, "full")  # a failed write does not know its file
    assert not list(tmp_path.glob("*log*"))


def test_a_lock_is_held_by_one_and_freed_by_its_holders_death(tmp_path):
    held = take_lock(tmp_path / ".lock")
    with held:
        assert take_lock(tmp_path / ".lock", timeout=0) is None
    code = "import sys, pathlib, dreml.files as files; held = files.take_lock(pathlib.Path(sys.argv[1])); "
    process = subprocess.Popen(
        [sys.executable, "-c", code + "print(1, flush=True); input()", str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout.readline() == b"1\n"
    assert take_lock(tmp_path / ".lock", timeout=0) is None
    process.kill()
    process.wait()
    with take_lock(tmp_path / ".lock", timeout=5):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(InputError, match="is on a file system without file locks"):
        take_lock(tmp_path / ".lock")


@pytest.mark.parametrize("num_bytes", [0, 1, 2**22, 2**22 + 1])
def test_checksums_are_those_of_the_whole_file(tmp_path, num_bytes):
    path, content = tmp_path / "array.npy", np.random.default_rng(0).bytes(num_bytes)
    path.write_bytes(content)
    assert crc32(path) == zlib.crc32(content) and sha256(path) == hashlib.sha256(content).hexdigest()


RECORD = {"a": 1, "b": [{"c": 1.5}], "more": None}


@dataclass
class Kind:
    a: int
    b: list[dict]
    more: None = None


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "record.json"
    for record in (RECORD, Kind(**RECORD)):
        write_record(path, record)
        assert read_record(path) == RECORD and read_record(path, Kind) == Kind(**RECORD)


def test_records_that_are_damaged_or_of_another_version_are_refused(tmp_path):
    path = tmp_path / "record.json"
    for record in ({"a": 1}, RECORD | {"d": 1}):
        write_record(path, record)
        with pytest.raises(ValueError, match="of another version"):
            read_record(path, Kind)
    write_record(path, RECORD)
    whole = path.read_text()
    for text in (whole.replace("1.5", "2.5"), whole[:-9], "", "[]", '{"a": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"its checksum does not fit|Expecting|Unterminated"):
            read_record(path)
