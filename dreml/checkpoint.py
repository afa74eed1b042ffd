"""Going on within a member: the end of an epoch on disk, written now and then in a thread while training goes on."""

import contextlib
import hashlib
import io
import itertools
import pickle
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch

from dreml.files import atomic_open, remove_leftovers

SECONDS_BETWEEN_WRITES = 30.0
CHECKSUM_BYTES = 32

# ------------------------------------------------------------------------------------------------ copies


def map_tensors(call: Callable[[torch.Tensor], object], value: object) -> object:
    """Nested dicts and lists with `call(tensor)` in the place of every tensor."""
    if isinstance(value, torch.Tensor):
        return call(value)
    if isinstance(value, dict):
        return {key: map_tensors(call, item) for key, item in value.items()}
    return [map_tensors(call, item) for item in value] if isinstance(value, list) else value


def snapshot(value: object, device: torch.device | str) -> object:
    """A copy of nested dicts and lists whose tensors lie on the device."""
    return map_tensors(lambda tensor: tensor.detach().to(device, copy=True), value)


def has_room(value: object) -> bool:
    """Whether a GPU has room for a copy of the tensors that lie on it, and for as much again, so that training has."""
    tensors = []
    map_tensors(tensors.append, value)
    on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
    return not on_gpu or torch.cuda.mem_get_info(on_gpu[0].device)[0] >= 2 * sum(tensor.nbytes for tensor in on_gpu)


class Copies:
    """Copies of nested dicts and lists whose tensors lie in memory that the next copy uses again.

    New memory costs as much as filling it. `device`: where the copies lie; None: each where its original does. The host
    never waits for a GPU: copies from there to the host lie in pinned memory, and are whole after `wait`.
    """

    def __init__(self, device: str | None = None):
        self.device, self.memory, self.copied = device, {}, None

    def of(self, value: object) -> object:
        numbers = itertools.count()
        copy = map_tensors(lambda tensor: self._copy(next(numbers), tensor), value)
        if torch.cuda.is_initialized():
            self.copied = torch.cuda.current_stream().record_event()
        return copy

    def _copy(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        key = number, tensor.shape, tensor.dtype
        if key not in self.memory:
            pinned = tensor.is_cuda and self.device == "cpu"
            self.memory[key] = torch.empty_like(tensor, device=self.device, pin_memory=pinned)
        return self.memory[key].copy_(tensor.detach(), non_blocking=tensor.is_cuda)

    def wait(self) -> None:
        if self.copied:
            self.copied.synchronize()


# ------------------------------------------------------------------------------------------------ progress


class Hashed:
    """A file whose content is hashed while it is written.

    A full disk is kept as `error`, not raised: within torch.save, it can come out as a RuntimeError about positions.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.error = file, hashlib.sha256(), None

    def write(self, content: bytes) -> int:
        try:
            if self.error is None:
                self.sha256.update(content)
                self.file.write(content)
        except OSError as error:
            self.error = error
        return len(content)

    def flush(self) -> None:
        """For torch.save; the file is flushed when it is whole."""


class Progress:
    """`progress_007.pt`: what the training of a member needs to go on after an epoch.

    A SHA-256 of 32 bytes, then a torch.save of plain tensors, numbers and lists. At the end of an epoch it is written
    if the one on disk is older than `interval` seconds and than 20 times the time that it took to write. Otherwise the
    end of the epoch is kept on the device, and leaving the context by whatever error writes it. So Ctrl-C and SIGTERM
    lose the epoch in hand only; `kill -9` loses what an interval, an epoch and a write take. With `interval` 0, every
    epoch is written, and waits until the one before is.
    """

    def __init__(self, folder: Path, member: int, settings_hash: str, interval: float = SECONDS_BETWEEN_WRITES):
        self.path, self.owner = progress_file(folder, member), f"{settings_hash}, member {member}"
        self.interval = interval
        self.started, self.took = time.monotonic(), 0.0  # of the last write, in seconds
        self.writer, self.writing = ThreadPoolExecutor(1), None
        self.kept = None  # the end of the last epoch, if it was not given to the writer
        self.on_device, self.on_host = Copies(), Copies("cpu")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        """Raises OSError if the last end of an epoch could not be written."""
        self.writer.shutdown()  # waits for it
        if self.kept:  # newer than what was given to the writer
            self._write(self.on_host.of(self.kept))
        elif self.writing:
            self.writing.result()

    def read(self) -> dict | None:
        """What was written last, or None. A file that is damaged or of another run is named and not used."""
        if not self.path.exists():
            return None
        content = self.path.read_bytes()
        if hashlib.sha256(content[CHECKSUM_BYTES:]).digest() == content[:CHECKSUM_BYTES]:
            with contextlib.suppress(pickle.UnpicklingError, AttributeError, KeyError):  # somebody else's
                state = torch.load(io.BytesIO(content[CHECKSUM_BYTES:]), map_location="cpu", weights_only=True)
                if state.pop("owner") == self.owner:
                    return state
        print(f"warning: {self.path} is damaged or of another run: the member is begun anew", file=sys.stderr)
        return None

    def end_of_epoch(self, state: dict, **rest: object) -> None:
        """Starts to write the end of an epoch, or keeps it. Raises OSError if the earlier write failed.

        `state`: what training changes in place, which is copied. `rest`: what it does not; it must stay as it is.
        """
        try:
            is_time = self._is_time()
        except Exception:
            self._keep(state, rest)  # leaving the context tries once more
            raise
        if is_time:
            on_host = self.on_host.of({"owner": self.owner, **state, **rest})
            self.writing = self.writer.submit(self._write, on_host)
            self.kept = None
        else:
            self._keep(state, rest)

    def _keep(self, state: dict, rest: dict) -> None:
        if self.on_device.memory or has_room(state):
            self.kept = None  # first: whatever interrupts the copy, half of it is not written
            self.kept = {"owner": self.owner, **self.on_device.of(state), **rest}

    def _is_time(self) -> bool:
        """Whether the next write is to start. With an interval of 0, waits for the last one; raises if that failed."""
        if self.writing and not self.writing.done() and self.interval > 0:
            return False
        if self.writing:
            self.writing.result()
        age = time.monotonic() - self.started
        return self.interval == 0 or age >= max(self.interval, 20 * self.took)

    def _write(self, state: dict) -> None:
        started = time.monotonic()
        self.on_host.wait()
        with atomic_open(self.path, "wb") as file:
            content = Hashed(file)
            file.seek(CHECKSUM_BYTES)
            torch.save(state, content)
            if content.error:
                raise content.error
            file.seek(0)
            file.write(content.sha256.digest())
        self.started, self.took = started, time.monotonic() - started

    def remove(self) -> None:
        """The member is finished. Whether the last write went well matters no more."""
        self.writer.shutdown()
        self.writing = self.kept = None
        self.path.unlink(missing_ok=True)


def progress_file(folder: Path, member: int) -> Path:
    """The file of `Progress`."""
    return folder / f"progress_{member:03d}.pt"


def remove_progress(folder: Path, member: int) -> None:
    """Removes what a process left that was killed after it had finished this member."""
    path = progress_file(folder, member)
    path.unlink(missing_ok=True)
    remove_leftovers(folder, path.name)
