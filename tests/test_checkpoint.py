"""dreml/checkpoint.py: the state of a member's training. test_faults.py kills and goes on."""

import errno
from types import SimpleNamespace

import pytest
import torch
from builders import flip_a_bit

from dreml import checkpoint, files
from dreml.checkpoint import Progress, remove_progress


def test_what_was_written_last_is_read(tmp_path):
    """Also when it is smaller than what was written before, and changes afterwards."""
    progress = Progress(tmp_path, 7, "run", 0)
    assert progress.read() is None
    for size in (1000, 1):
        weight = torch.full((size,), float(size))
        progress.end_of_epoch({"model": {"weight": weight}, "history": [{"epoch": size}], "best_model": None})
        weight.zero_()
    assert [path.name for path in tmp_path.iterdir()] == ["progress_007.pt"]
    state = Progress(tmp_path, 7, "run").read()
    assert state["model"]["weight"].tolist() == [1] and state["history"] == [{"epoch": 1}]
    assert state["best_model"] is None and set(state) == {"model", "history", "best_model"}


@pytest.mark.parametrize("damage", ["another run", "another member", "a bit", "truncated", "empty"])
def test_a_state_that_is_damaged_or_of_another_is_not_used(tmp_path, capsys, damage):
    other = Progress(tmp_path, 8 if damage == "another member" else 7, "b" if damage == "another run" else "a", 0)
    other.end_of_epoch({"history": [1]})
    path = tmp_path / "progress_007.pt"
    other.path.rename(path)
    if damage == "a bit":
        flip_a_bit(path)
    if damage in ("truncated", "empty"):
        path.write_bytes(path.read_bytes()[:-1] if damage == "truncated" else b"")
    assert Progress(tmp_path, 7, "a").read() is None
    line = f"warning: {path} is damaged or from another run: the member is begun anew\n"
    assert capsys.readouterr().err == line


def test_it_is_written_when_the_last_one_is_old(tmp_path, monkeypatch):
    """30 seconds, and 20 times what it took: the second write takes 4 seconds. So do the seconds before the first."""
    clock, durations, open_file, found = [0], iter([0, 4, 0, 0]), checkpoint.atomic_open, []

    def slow_open(path, mode):
        clock[0] += next(durations)
        return open_file(path, mode)

    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(checkpoint, "atomic_open", slow_open)
    progress = Progress(tmp_path, 1, "run")
    for now in (29, 30, 59, 60, 143, 144, 173, 174):
        clock[0] = now
        progress.end_of_epoch({"history": [now]})
        found.append((progress.read() or {"history": None})["history"])
    assert found == [None, [30], [30], [60], [60], [144], [144], [174]]
    progress = Progress(tmp_path, 2, "run", interval=1)
    clock[0] += 0.5
    progress.end_of_epoch({"history": []})
    assert progress.read() is None


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_keeps_the_earlier_file(tmp_path, monkeypatch, capsys, error):
    """A full disk is said, and training goes on; the next file is written when there is room."""

    def fail(file):
        raise error

    progress = Progress(tmp_path, 1, "run", 0)
    progress.end_of_epoch({"history": [1]})
    with monkeypatch.context() as patch:
        patch.setattr(files, "flush_to_disk", fail)
        if isinstance(error, OSError):
            progress.end_of_epoch({"history": [2]})
            line = capsys.readouterr().err
            assert line.startswith(f"warning: cannot write {progress.path}, training goes on without it: ")
            assert "No space left" in line and line.count("\n") == 1
        else:
            with pytest.raises(KeyboardInterrupt):
                progress.end_of_epoch({"history": [2]})
    assert progress.read()["history"] == [1] and list(tmp_path.iterdir()) == [progress.path]
    progress.end_of_epoch({"history": [3]})
    assert progress.read()["history"] == [3]


def test_the_state_of_a_finished_member_goes(tmp_path):
    """With what a killed process left. Other members' stay."""
    names = ["progress_001.pt", ".progress_001.pt.tmp-123", "progress_002.pt", ".progress_002.pt.tmp-123"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    remove_progress(tmp_path, 1)
    assert [(tmp_path / name).exists() for name in names] == [False, False, True, True]
