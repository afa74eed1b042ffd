"""Progress files: a member's training state after an epoch, from which a killed run resumes."""

import hashlib
import io
import sys
import time
from pathlib import Path

import torch

from dreml.files import atomic_open, remove_leftovers

SECONDS_BETWEEN_WRITES = 30.0
CHECKSUM_BYTES = 32


class Progress:
    """`progress_007.pt`: the state from which the training of a member can resume after an epoch.

    It is a SHA-256 of 32 bytes, then a torch.save of plain tensors, numbers and lists. Training waits while it is
    written. So it is written only if the last write is more than `interval` seconds ago, and more than 20 times its own
    duration: at most 5 % of the time is spent on it. If `interval` is 0, it is written after every epoch. A killed run
    loses the time since the last write.
    """

    def __init__(self, folder: Path, member: int, settings_hash: str, interval: float = SECONDS_BETWEEN_WRITES):
        self.path = folder / f"progress_{member:03d}.pt"
        self.owner = f"{settings_hash}, member {member}"
        self.interval = interval
        self.last_write = time.monotonic()  # or the start of training
        self.write_seconds = 0.0  # what the last write took

    def read(self) -> dict | None:
        """Read the last state, with tensors on the CPU. None if missing; warns if damaged or from another run."""
        if not self.path.exists():
            return None
        content = self.path.read_bytes()
        saved = content[CHECKSUM_BYTES:]
        if hashlib.sha256(saved).digest() == content[:CHECKSUM_BYTES]:
            state = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
            if state.pop("owner") == self.owner:
                return state
        print(f"warning: {self.path} is damaged or from another run: the member is begun anew", file=sys.stderr)
        return None

    def end_of_epoch(self, state: dict) -> None:
        """Write the state if it is time to. If the disk is full, warn and keep the earlier file."""
        started = time.monotonic()
        is_recent = started - self.last_write < max(self.interval, 20 * self.write_seconds)
        if is_recent and self.interval > 0:
            return
        buffer = io.BytesIO()  # torch.save would report a full disk as a RuntimeError
        torch.save({"owner": self.owner, **state}, buffer)
        content = buffer.getbuffer()
        try:
            with atomic_open(self.path, "wb") as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
        except OSError as error:
            print(f"warning: cannot write {self.path}, training goes on without it: {error}", file=sys.stderr)
        self.last_write = time.monotonic()
        self.write_seconds = self.last_write - started


def remove_progress(folder: Path, member: int) -> None:
    """Remove a finished member's progress file, and temporary files of it that killed processes left."""
    path = folder / f"progress_{member:03d}.pt"
    path.unlink(missing_ok=True)
    remove_leftovers(folder, path.name)
