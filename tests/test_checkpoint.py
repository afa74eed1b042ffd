"""dreml/runs/checkpoint.py: the state of a member's training. test_faults.py kills and goes on."""

import threading
import time

import pytest
import torch

from dreml.runs import checkpoint
from dreml.runs.checkpoint import Progress, progress_file, remove_progress, snapshot


def test_a_snapshot_does_not_change_with_what_it_was_taken_of():
    """At any depth; numbers, None and strings are as they were. The copy has no gradient."""
    weight = torch.ones(2, requires_grad=True)
    value = {"model": {"weight": weight}, "groups": [{"lr": 0.1, "params": [0, 1]}], "best": None, "owner": "a"}
    copy = snapshot(value, "cpu")
    with torch.no_grad():
        weight += 1
    value["groups"][0]["lr"] = 0.2
    value["groups"][0]["params"].append(2)
    assert copy["model"]["weight"].tolist() == [1, 1] and not copy["model"]["weight"].requires_grad
    assert copy["groups"] == [{"lr": 0.1, "params": [0, 1]}] and copy["best"] is None and copy["owner"] == "a"
    assert snapshot([weight], "meta")[0].device.type == "meta"


def test_what_was_written_last_is_read(tmp_path):
    """Also when it is smaller than what was written before, and changes while it is written."""
    with Progress(tmp_path, 7, "run") as progress:
        assert progress.read() is None and progress.path == progress_file(tmp_path, 7)
        for size in (1000, 1):
            weight = torch.full((size,), float(size))
            progress.write(model={"weight": weight}, history=[{"epoch": size}], best_model=None)
            weight.zero_()
    assert [path.name for path in tmp_path.iterdir()] == ["progress_007.pt"]
    with Progress(tmp_path, 7, "run") as again:
        state = again.read()
    assert state["model"]["weight"].tolist() == [1] and state["history"] == [{"epoch": 1}]
    assert state["best_model"] is None and set(state) == {"model", "history", "best_model"}


@pytest.mark.parametrize(("run", "member"), [("another", 7), ("run", 8), ("run, member 7", 7)])
def test_the_state_of_another_is_not_used(tmp_path, capsys, run, member):
    with Progress(tmp_path, member, run) as other:
        other.write(history=[])
    other.path.rename(path := progress_file(tmp_path, 7))
    with Progress(tmp_path, 7, "run") as progress:
        assert progress.read() is None
    line = f"warning: {path} is damaged or of another run: the member is begun anew\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("place", [0, 31, 32, -1, None])
def test_a_damaged_state_is_not_used(tmp_path, capsys, place):
    """A bit of the checksum, one of the content, or the end missing."""
    with Progress(tmp_path, 7, "run") as progress:
        progress.write(history=[1])
        progress.writing.result()
        content = bytearray(progress.path.read_bytes())
        if place is None:
            content = content[:-1]
        else:
            content[place] ^= 1
        progress.path.write_bytes(content)
        assert progress.read() is None
    assert "is damaged or of another run: the member is begun anew" in capsys.readouterr().err


def test_training_does_not_wait_for_the_disk_but_leaving_does(tmp_path, monkeypatch):
    may_write, write = threading.Event(), checkpoint.atomic_open

    def slow_open(path, mode):
        assert may_write.wait(10)
        return write(path, mode)

    monkeypatch.setattr(checkpoint, "atomic_open", slow_open)
    with Progress(tmp_path, 1, "run") as progress:
        progress.write(history=[1])
        assert not progress.path.exists() and not progress.writing.done()
        may_write.set()
    assert progress.read() == {"history": [1]}


def test_a_write_that_failed_is_an_error_at_the_next_one(tmp_path):
    """Unless the member is finished in the meantime."""
    with Progress(tmp_path / "nowhere", 1, "run") as progress:
        progress.write(history=[])
        with pytest.raises(OSError, match="No such file"):
            progress.write(history=[])
        progress.remove()


def test_the_state_of_a_finished_member_goes(tmp_path, monkeypatch):
    """Also one that is still being written, and what a killed process left."""
    names = ["progress_001.pt", ".progress_001.pt.tmp-123", "progress_002.pt", ".progress_002.pt.tmp-123"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    remove_progress(tmp_path, 1)
    assert [(tmp_path / name).exists() for name in names] == [False, False, True, True]
    open_file = checkpoint.atomic_open

    def slow_open(path, mode):
        time.sleep(0.1)
        return open_file(path, mode)

    monkeypatch.setattr(checkpoint, "atomic_open", slow_open)
    with Progress(tmp_path, 2, "run") as progress:
        progress.write(history=[])
        progress.remove()
    assert not progress.path.exists()
