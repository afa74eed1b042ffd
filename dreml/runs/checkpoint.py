"""Going on within a member: its state after each finished epoch, written in a thread while the next one is trained."""

import contextlib
import hashlib
import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dreml.files import atomic_open, remove_leftovers


def snapshot(value: object, device: torch.device | str) -> object:
    """A copy of nested dicts and lists whose tensors lie on the device."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item, device) for key, item in value.items()}
    return [snapshot(item, device) for item in value] if isinstance(value, list) else value


class Progress:
    """`progress_007.pt`: what the training of a member needs to go on after its last finished epoch.

    A SHA-256 of 32 bytes, then a torch.save of plain tensors, numbers and lists. It is written in a thread, while the
    next epoch is trained; leaving the context waits for that.
    """

    def __init__(self, folder: Path, member: int, settings_hash: str):
        self.path, self.owner = progress_file(folder, member), f"{settings_hash}, member {member}"
        self.writer, self.writing = ThreadPoolExecutor(1), None
        self.buffer = io.BytesIO()  # kept: new memory of this size costs as much as filling it

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.writer.shutdown()

    def read(self) -> dict | None:
        """What was written last, or None. A file that is damaged or of another run is named and not used."""
        if not self.path.exists():
            return None
        content = self.path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            with contextlib.suppress(pickle.UnpicklingError, AttributeError, KeyError):  # somebody else's
                state = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
                if state.pop("owner") == self.owner:
                    return state
        print(f"warning: {self.path} is damaged or of another run: the member is begun anew", file=sys.stderr)
        return None

    def write(self, **state: object) -> None:
        """Starts to write. Raises OSError if the earlier write failed."""
        if self.writing:
            self.writing.result()
        self.writing = self.writer.submit(self._write, snapshot({"owner": self.owner, **state}, "cpu"))

    def _write(self, state: dict) -> None:
        self.buffer.seek(0)
        torch.save(state, self.buffer)
        self.buffer.truncate()
        with self.buffer.getbuffer() as content, atomic_open(self.path, "wb") as file:
            file.write(hashlib.sha256(content).digest())
            file.write(content)

    def remove(self) -> None:
        """The member is finished. Whether the last write went well matters no more."""
        self.writer.shutdown()
        self.path.unlink(missing_ok=True)


def progress_file(folder: Path, member: int) -> Path:
    """The file of `Progress`."""
    return folder / f"progress_{member:03d}.pt"


def remove_progress(folder: Path, member: int) -> None:
    """Removes what a process left that was killed after it had finished this member."""
    path = progress_file(folder, member)
    path.unlink(missing_ok=True)
    remove_leftovers(folder, path.name)
