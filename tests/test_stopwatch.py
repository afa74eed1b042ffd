"""dreml/stopwatch.py: parts of a loop, by the clock and by CUDA's events."""

from types import SimpleNamespace

import pytest
import torch

from dreml import stopwatch
from dreml.stopwatch import Stopwatch


def test_parts_add_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: clock[0])
    watch = Stopwatch(torch.device("cpu"))
    for name, seconds in (("teacher", 2.0), ("student", 0.5), ("teacher", 4.0)):
        clock[0] += 100  # what is timed as nothing
        with watch.time(name):
            clock[0] += seconds
    assert [watch.seconds(name) for name in ("teacher", "student", "nobody")] == [6, 0.5, 0]


def test_on_cuda_it_waits_only_when_it_is_asked(monkeypatch):
    """Its events lie in the device's queue, whose times count, in milliseconds."""
    events = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            events.append(self)

        def record(self):
            self.place, self.waited = 250.0 * len(events), False

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, end):
            assert end.waited
            return end.place - self.place

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(Event=Event))
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(3):
        with watch.time("teacher"):
            pass
    with watch.time("student"):
        pass
    assert len(events) == 8 and not any(event.waited for event in events)
    assert watch.seconds("teacher") == pytest.approx(0.75) and not events[-1].waited
