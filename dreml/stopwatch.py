"""How long the parts of a loop take on a device, without waiting for it."""

import contextlib
import time
from collections.abc import Iterator

import torch


class Stopwatch:
    """Adds up the seconds of named parts. On CUDA by events in its queue, elsewhere by the clock."""

    def __init__(self, device: torch.device):
        self.device, self.parts = device, []

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Times the block as (some of) the part `name`."""
        start = self._now()
        yield
        self.parts.append((name, start, self._now()))

    def _now(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, name: str) -> float:
        """The seconds of this part up to now. On CUDA, waits for them to have passed."""
        total = 0.0
        for part, start, end in self.parts:
            if part == name and self.device.type == "cuda":
                end.synchronize()
                total += start.elapsed_time(end) / 1000
            elif part == name:
                total += end - start
        return total
