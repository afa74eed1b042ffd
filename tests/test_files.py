"""Files that are never half written: atomic writes, locks, checksums, records."""

import errno
import hashlib
import os
import re
import signal
import stat
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dreml.cli import InputError, run_main
from dreml.files import (
    atomic_open,
    crc32,
    flush_folder,
    json_sha256,
    make_folder,
    read_record,
    remove_leftovers,
    sha256,
    take_lock,
    temporary_name,
    writable,
    write_csv,
    write_record,
)

# ------------------------------------------------------------------------------------------------ writing


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
    make_folder(tmp_path / "results")
    assert calls[3:] == ["folder"]


def test_text_is_utf8_with_the_line_ends_as_given_and_bytes_are_bytes(tmp_path):
    for mode, content in (("w", "Ü\r\n\n"), ("wb", b"\xff\r\n\n")):
        with atomic_open(tmp_path / "file", mode) as file:
            file.write(content)
        expected = content.encode() if mode == "w" else content
        assert (tmp_path / "file").read_bytes() == expected


def test_a_failed_write_names_its_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*/log.csv'$"), atomic_open(tmp_path / "log.csv"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_temporary_names_are_taken_once_and_found_again(tmp_path):
    """Processes of other machines and containers may share the folder and the process number."""
    path = tmp_path / "log.csv"
    names = {temporary_name(path), temporary_name(path)}
    assert len(names) == 2
    for name in names:
        assert name.parent == tmp_path and re.fullmatch(rf"\.log\.csv\.tmp-.*-{os.getpid()}-[0-9a-f]{{8}}", name.name)
        name.write_text("half")
    written = []
    with atomic_open(path) as file:
        written.append(Path(file.name))
    assert re.fullmatch(rf"\.log\.csv\.tmp-.*-{os.getpid()}-[0-9a-f]{{8}}", written[0].name)
    other = tmp_path / ".other.csv.tmp-1"
    other.write_text("half")
    remove_leftovers(tmp_path, "log.csv")
    assert sorted(tmp_path.iterdir()) == [other, path]


@pytest.mark.parametrize(("number", "passes"), [("EINVAL", True), ("ENOTSUP", True), ("EIO", False)])
def test_file_systems_that_cannot_flush_folders_are_put_up_with(tmp_path, monkeypatch, number, passes):
    """A disk that fails is not."""
    opened = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None

    def fsync(descriptor):
        raise OSError(getattr(errno, number), "no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        if passes:
            flush_folder(tmp_path)
        else:
            with pytest.raises(OSError, match="no"):
                flush_folder(tmp_path)
    assert opened is None or len(os.listdir("/proc/self/fd")) == opened


def test_a_folder_that_cannot_be_written_into_names_the_option(tmp_path):
    with writable(tmp_path / "new" / "folder", "--output"):
        (tmp_path / "new" / "folder" / "file").write_text("")
    make_folder(tmp_path / "new")  # which exists
    with pytest.raises(InputError, match=r"^cannot write the results: .*File exists"):
        make_folder(tmp_path / "new" / "folder" / "file")
    message = f"^cannot write into {tmp_path} \\(OSError: .*full.*\\); --output names another folder$"
    with pytest.raises(InputError, match=message), writable(tmp_path, "--output"):
        raise OSError(errno.ENOSPC, "full")


def test_tables_are_written_alike_everywhere(tmp_path):
    write_csv(tmp_path / "table.csv", pd.DataFrame({"name": ["Ü", "a,b"], "share": [0.5, 1 / 3]}), float_format="%.2f")
    assert (tmp_path / "table.csv").read_bytes() == 'name,share\nÜ,0.50\n"a,b",0.33\n'.encode()


# ------------------------------------------------------------------------------------------------ locks


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

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", flock)
        with pytest.raises(InputError, match="is on a file system without file locks"):
            take_lock(tmp_path / ".lock")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="cannot write"):
        take_lock(tmp_path / "file" / ".lock")


def test_waiting_for_a_lock_ends_at_a_signal(tmp_path):
    def run():
        os.kill(os.getpid(), signal.SIGTERM)
        take_lock(tmp_path / ".lock")

    with take_lock(tmp_path / ".lock"):
        assert run_main("script.py", run, "less") == 143


# ------------------------------------------------------------------------------------------------ checksums


@pytest.mark.parametrize("num_bytes", [0, 1, 2**22, 2**22 + 1])
def test_checksums_are_those_of_the_whole_file(tmp_path, num_bytes):
    path, content = tmp_path / "array.npy", np.random.default_rng(0).bytes(num_bytes)
    path.write_bytes(content)
    assert crc32(path) == zlib.crc32(content) and sha256(path) == hashlib.sha256(content).hexdigest()


def test_the_checksum_of_a_value_does_not_depend_on_the_order_of_its_entries():
    value = {"a": [1, 2.5, None], "b": {"c": "Ü", "d": True}}
    same = {"b": {"d": True, "c": "Ü"}, "a": [1, 2.5, None]}
    assert (
        json_sha256(value)
        == json_sha256(same)
        == hashlib.sha256(rb'{"a": [1, 2.5, null], "b": {"c": "\u00dc", "d": true}}').hexdigest()
    )
    assert json_sha256(value) != json_sha256(value | {"a": [2.5, 1, None]})


# ------------------------------------------------------------------------------------------------ records

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


@pytest.mark.parametrize("record", [{"a": 1}, RECORD | {"d": 1}])
def test_a_record_of_another_version_is_refused(tmp_path, record):
    write_record(tmp_path / "record.json", record)
    with pytest.raises(ValueError, match="of another version"):
        read_record(tmp_path / "record.json", Kind)


def test_a_changed_record_is_noticed(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, RECORD)
    whole = path.read_text()
    for text in (whole.replace("1.5", "2.5"), whole[:-9], "", "[]", '{"a": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"its checksum does not fit|Expecting|Unterminated"):
            read_record(path)
