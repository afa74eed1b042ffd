"""dreml/runs/checkpoint.py: the state of a member's training. test_faults.py kills and goes on."""

import contextlib
import errno
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from dreml import checkpoint, files
from dreml.checkpoint import Copies, Progress, has_room, progress_file, remove_progress, snapshot

NEVER = 1e6  # seconds between writes

# ------------------------------------------------------------------------------------------------ copies


def test_a_snapshot_does_not_change_with_what_it_was_taken_of():
    """At any depth; numbers, None and strings are as they were. The copy has no gradient."""
    for copy_of in (lambda value: snapshot(value, "cpu"), Copies().of, Copies("cpu").of):
        weight = torch.ones(2, requires_grad=True)
        value = {"model": {"weight": weight}, "groups": [{"lr": 0.1, "params": [0, 1]}], "best": None, "owner": "a"}
        copy = copy_of(value)
        with torch.no_grad():
            weight += 1
        value["groups"][0]["lr"] = 0.2
        value["groups"][0]["params"].append(2)
        assert copy["model"]["weight"].tolist() == [1, 1] and not copy["model"]["weight"].requires_grad
        assert copy["groups"] == [{"lr": 0.1, "params": [0, 1]}] and copy["best"] is None and copy["owner"] == "a"
    assert snapshot([weight], "meta")[0].device.type == "meta"


def test_copies_use_their_memory_again():
    """Also where one of them was left out in between. Another shape or type has memory of its own."""
    copies, images = Copies(), torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    (first, best) = copies.of([images, torch.ones(5)])
    expected = images.clone()
    assert torch.equal(first, images) and first.stride() == images.stride()
    images += 1
    assert torch.equal(first, expected)
    (second, none) = copies.of([images, None])
    assert torch.equal(second, images) and second.data_ptr() == first.data_ptr() and none is None
    assert copies.of([images, torch.zeros(5)])[1].data_ptr() == best.data_ptr()
    others = copies.of([torch.zeros(5), torch.ones(5, dtype=torch.int64)])
    assert [each.tolist() for each in others] == [[0] * 5, [1] * 5] and others[1].dtype == torch.int64
    assert {tensor.data_ptr() for tensor in others}.isdisjoint({first.data_ptr(), best.data_ptr()})


class OnGpu(torch.Tensor):
    """A tensor that says that it lies on a GPU. What is done with it is noted in `calls`."""

    is_cuda, calls = True, []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.__name__ in ("empty_like", "copy_"):
            cls.calls.append((function.__name__, kwargs.get("pin_memory"), kwargs.get("non_blocking")))
        kwargs.pop("pin_memory", None)  # there is none without a GPU
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
            return result.as_subclass(cls) if function.__name__ == "detach" else result


def test_nobody_waits_for_a_gpu_but_the_thread_that_writes(tmp_path, monkeypatch):
    """The copy goes through pinned memory, which is pinned once; the thread waits until it is there."""
    order, save, tensor = [], torch.save, torch.ones(3).as_subclass(OnGpu)
    event = SimpleNamespace(synchronize=lambda: order.append(("waited", threading.current_thread())))
    stream = SimpleNamespace(record_event=lambda: order.append(("copied", threading.current_thread())) or event)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24, 1000))
    monkeypatch.setattr(torch, "save", lambda *args: order.append(("saved", threading.current_thread())) or save(*args))
    OnGpu.calls.clear()
    with Progress(tmp_path, 1, "run", NEVER) as progress:
        progress.end_of_epoch({"model": tensor})
        assert OnGpu.calls == [("empty_like", False, None), ("copy_", None, True)]
        progress.interval = 0
        for new_memory in ([("empty_like", True, None)], []):
            OnGpu.calls.clear(), order.clear()
            progress.end_of_epoch({"model": tensor})
            assert OnGpu.calls == [*new_memory, ("copy_", None, True)]
            progress.writing.result()
            assert [name for name, _ in order] == ["copied", "waited", "saved"]
            main, *threads = [thread for _, thread in order]
            assert main is threading.main_thread() and main not in threads
    assert progress.read()["model"].tolist() == [1, 1, 1]


def test_a_gpu_that_is_short_of_memory_keeps_no_copy(tmp_path, monkeypatch):
    """Twice a copy has to be free; on the CPU nothing is asked. What is written does not need it."""
    asked, free = [], [23]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (free[0], 1000))
    tensor = torch.ones(3).as_subclass(OnGpu)
    assert has_room({"model": [torch.ones(999)]}) and not asked
    assert not has_room({"model": [tensor, torch.ones(999)]}) and asked == [tensor.device]
    with Progress(tmp_path, 1, "run", NEVER) as progress:
        progress.end_of_epoch({"model": tensor})
        assert progress.kept is None and not progress.on_device.memory
        free[0] = 24
        progress.end_of_epoch({"model": tensor})
        assert progress.kept is not None
        free[0] = 0  # its memory is used again
        progress.end_of_epoch({"model": tensor.add(1).as_subclass(OnGpu)})
        assert progress.kept["model"].tolist() == [2, 2, 2]
        progress.kept = None
    assert progress.read() is None


# ------------------------------------------------------------------------------------------------ reading


def test_what_was_written_last_is_read(tmp_path):
    """Also when it is smaller than what was written before, and changes while it is written."""
    with Progress(tmp_path, 7, "run", 0) as progress:
        assert progress.read() is None and progress.path == progress_file(tmp_path, 7)
        for size in (1000, 1):
            weight = torch.full((size,), float(size))
            progress.end_of_epoch({"model": {"weight": weight}}, history=[{"epoch": size}], best_model=None)
            weight.zero_()
    assert [path.name for path in tmp_path.iterdir()] == ["progress_007.pt"]
    with Progress(tmp_path, 7, "run") as again:
        state = again.read()
    assert state["model"]["weight"].tolist() == [1] and state["history"] == [{"epoch": 1}]
    assert state["best_model"] is None and set(state) == {"model", "history", "best_model"}


@pytest.mark.parametrize(("run", "member"), [("another", 7), ("run", 8), ("run, member 7", 7)])
def test_the_state_of_another_is_not_used(tmp_path, capsys, run, member):
    with Progress(tmp_path, member, run) as other:
        other.end_of_epoch({})
    other.path.rename(path := progress_file(tmp_path, 7))
    with Progress(tmp_path, 7, "run") as progress:
        assert progress.read() is None
    line = f"warning: {path} is damaged or of another run: the member is begun anew\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("place", [0, 31, 32, -1, None])
def test_a_damaged_state_is_not_used(tmp_path, capsys, place):
    """A bit of the checksum, one of the content, or the end missing."""
    with Progress(tmp_path, 7, "run") as progress:
        progress.end_of_epoch({}, history=[1])
    content = bytearray(progress.path.read_bytes())
    if place is None:
        content = content[:-1]
    else:
        content[place] ^= 1
    progress.path.write_bytes(content)
    assert progress.read() is None
    assert "is damaged or of another run: the member is begun anew" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ when it is written


def test_it_is_written_when_the_last_one_is_old(tmp_path, monkeypatch):
    """30 seconds, and 20 times what it took: the second write takes 4 seconds. So do the seconds before the first."""
    clock, durations, open_file, found = [0], iter([0, 4, 0, 0]), checkpoint.atomic_open, []

    def slow_open(path, mode):
        clock[0] += next(durations)
        return open_file(path, mode)

    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(checkpoint, "atomic_open", slow_open)
    with Progress(tmp_path, 1, "run") as progress:
        for now in (29, 30, 59, 60, 139, 140, 169, 170):
            clock[0] = now
            progress.end_of_epoch({}, history=[now])
            if progress.writing:
                progress.writing.result()
            found.append((progress.read() or {"history": None})["history"])
    assert found == [None, [30], [30], [60], [60], [140], [140], [170]]


@pytest.fixture
def may_write(monkeypatch) -> threading.Event:
    """Writes wait for it."""
    event, open_file = threading.Event(), checkpoint.atomic_open

    def slow_open(path, mode):
        assert event.wait(10)
        return open_file(path, mode)

    monkeypatch.setattr(checkpoint, "atomic_open", slow_open)
    return event


def test_training_does_not_wait_for_the_disk_but_leaving_does(tmp_path, may_write):
    """The epochs that end while an earlier one is written are kept, and the last of them is written too."""
    weight = torch.zeros(2)
    with Progress(tmp_path, 1, "run", 1e-9) as progress:
        for epoch in (1, 2, 3):
            weight.fill_(epoch)
            progress.end_of_epoch({"model": weight}, history=[epoch])
        weight.fill_(4)
        assert not progress.path.exists() and not progress.writing.done()
        may_write.set()
        assert progress.writing.result() is None and progress.read()["history"] == [1]
        assert progress.read()["model"].tolist() == [1, 1]
    assert progress.read()["history"] == [3] and progress.read()["model"].tolist() == [3, 3]


def test_with_an_interval_of_0_an_epoch_waits_for_the_one_before(tmp_path, may_write):
    threading.Timer(0.1, may_write.set).start()
    with Progress(tmp_path, 1, "run", 0) as progress:
        progress.end_of_epoch({}, history=[1])
        assert not progress.path.exists()
        progress.end_of_epoch({}, history=[2])
        assert progress.path.exists()
    assert progress.read()["history"] == [2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, None])
def test_the_last_end_of_an_epoch_is_written_on_leaving(tmp_path, error):
    weight, progress = torch.ones(2), Progress(tmp_path, 1, "run", NEVER)
    try:
        with progress:
            for epoch in (1, 2):
                weight.fill_(epoch)
                progress.end_of_epoch({"model": weight}, history=[epoch])
            assert not progress.path.exists()
            weight.fill_(3)
            if error:
                raise error
    except (KeyboardInterrupt, RuntimeError) as raised:
        assert type(raised) is error
    assert progress.read()["model"].tolist() == [2, 2] and progress.read()["history"] == [2]


@pytest.mark.parametrize(
    ("intervals", "expected"), [((NEVER, NEVER), None), ((NEVER, 0), 1), ((0, NEVER), 1), ((0, 0), 1)]
)
def test_half_a_copy_is_never_written(tmp_path, monkeypatch, intervals, expected):
    """A second Ctrl-C comes at any place: here between the two tensors of the second epoch."""
    copy, values = Copies._copy, [torch.ones(2), torch.ones(3)]

    def interrupted(self, number, tensor):
        if number == 1:
            monkeypatch.setattr(Copies, "_copy", copy)
            raise KeyboardInterrupt
        return copy(self, number, tensor)

    with pytest.raises(KeyboardInterrupt), Progress(tmp_path, 1, "run", intervals[0]) as progress:
        progress.end_of_epoch({"model": values})
        for value in values:
            value.fill_(2)
        progress.interval = intervals[1]
        monkeypatch.setattr(Copies, "_copy", interrupted)
        progress.end_of_epoch({"model": values})
    state = progress.read()
    assert (state and [value.tolist() for value in state["model"]]) == (expected and [[1] * 2, [1] * 3])


def test_an_interrupt_during_the_last_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt), Progress(tmp_path, 1, "run", 0) as progress:
        progress.end_of_epoch({}, history=[1])
        progress.writing.result()
        progress.interval = NEVER
        progress.end_of_epoch({}, history=[2])
        monkeypatch.setattr(files, "flush_to_disk", interrupt)
    assert progress.read() == {"history": [1]} and [path.name for path in tmp_path.iterdir()] == [progress.path.name]


def interrupt(file):
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------ failures, the end


@pytest.mark.parametrize("interval", [0, 1e-9])
def test_a_write_that_failed_is_an_error_at_the_next_one(tmp_path, interval):
    """And on leaving, unless the member is finished in the meantime."""
    with pytest.raises(OSError, match="nowhere"), Progress(tmp_path / "nowhere", 1, "run", interval) as progress:
        progress.end_of_epoch({})
        assert progress.writing.exception()
        with pytest.raises(OSError, match="nowhere"):
            progress.end_of_epoch({})
    with Progress(tmp_path / "nowhere", 1, "run", interval) as progress:
        progress.end_of_epoch({})
        progress.remove()


@pytest.mark.parametrize("interval", [0, NEVER])
def test_after_a_write_that_failed_the_newest_epoch_is_written_on_leaving(tmp_path, interval):
    """And what ended the training is said: the failure, or Ctrl-C."""
    folder = tmp_path / "gone"
    with pytest.raises(OSError if interval == 0 else KeyboardInterrupt), Progress(folder, 1, "run", 0) as progress:
        progress.end_of_epoch({}, history=[1])
        assert progress.writing.exception()
        folder.mkdir()
        if interval == 0:
            progress.end_of_epoch({}, history=[1, 2])
        progress.kept = {"owner": progress.owner, "history": [1, 2]}
        raise KeyboardInterrupt
    assert progress.read() == {"history": [1, 2]}


@pytest.mark.parametrize("num_writes", [0, 1, 2, 5, 9])
def test_a_full_disk_is_said_and_keeps_the_earlier_file(tmp_path, monkeypatch, num_writes):
    """Wherever in the file it fills up."""

    class Filling:
        def __init__(self, file):
            self.file, self.left = file, num_writes

        def write(self, content):
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.left -= 1
            return self.file.write(content)

        def __getattr__(self, name):
            return getattr(self.file, name)

    @contextlib.contextmanager
    def opened(path, mode):
        with files.atomic_open(path, mode) as file:
            yield Filling(file)

    with pytest.raises(OSError, match="No space left"), Progress(tmp_path, 1, "run", 0) as progress:
        progress.end_of_epoch({"model": [torch.ones(1000)] * 3}, history=[1])
        progress.writing.result()
        monkeypatch.setattr(checkpoint, "atomic_open", opened)
        progress.end_of_epoch({"model": [torch.ones(1000)] * 3}, history=[1, 2])
    assert progress.read()["history"] == [1] and [path.name for path in tmp_path.iterdir()] == [progress.path.name]


def test_a_last_write_that_fails_is_an_error(tmp_path):
    with pytest.raises(OSError, match="nowhere"), Progress(tmp_path / "nowhere", 1, "run", NEVER) as progress:
        progress.end_of_epoch({})
    with Progress(tmp_path / "nowhere", 1, "run", NEVER) as progress:
        progress.end_of_epoch({})
        progress.remove()


def test_the_state_of_a_finished_member_goes(tmp_path, monkeypatch):
    """Also one that is still being written, one that is kept, and what a killed process left."""
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
    for intervals in ((0, 0), (0, NEVER), (NEVER, NEVER)):
        with Progress(tmp_path, 2, "run") as progress:
            for progress.interval in intervals:
                progress.end_of_epoch({})
            progress.remove()
        assert not progress.path.exists()
