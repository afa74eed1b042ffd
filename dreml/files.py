"""Files that are never half written: atomic writes, locks, checksums, JSON records."""

import contextlib
import errno
import hashlib
import json
import os
import platform
import secrets
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TypeVar

import filelock
import pandas as pd

from dreml.cli import InputError, one_line, progress_bar

Record = TypeVar("Record")


def temporary_name(path: Path, word: str = "tmp") -> Path:
    """Make a hidden name beside `path`, unique across processes, machines and containers."""
    return path.with_name(f".{path.name}.{word}-{platform.node()[:20]}-{os.getpid()}-{secrets.token_hex(4)}")


@contextlib.contextmanager
def atomic_open(path: Path, mode: str = "w") -> Iterator:
    """Open a temporary file. If the block ends without an error, flush it to disk and rename it to `path`.

    So `path` is never half written, even if the process is killed.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as file:
            yield file
            flush_to_disk(file)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # the error of a write names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove temporary files that killed processes left of files matching `name`. Call it while nobody writes them."""
    for leftover in folder.glob(f".{name}.tmp-*"):
        leftover.unlink(missing_ok=True)


def flush_to_disk(file) -> None:
    """Flush the open `file`, so that its content survives a power loss."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flush renames inside `folder` to disk, if the system can."""
    with contextlib.suppress(OSError):  # Windows cannot open folders; some network file systems flush files only
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_folder(new: Path, target: Path) -> None:
    """Rename the folder `new` to `target`, replacing it. If that fails, the earlier folder is kept."""
    old = temporary_name(target, "old")
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
        flush_folder(target.parent)
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def writable(folder: Path, option: str) -> Iterator[None]:
    """Make the folder that the block writes into. Turns any OSError into an InputError that names `option`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"cannot write into {folder} ({one_line(error)}); {option} names another folder") from None


def write_csv(path: Path, table: pd.DataFrame, **kwargs) -> None:
    """Write a table as CSV, without its index."""
    with atomic_open(path) as file:
        table.to_csv(file, index=False, lineterminator="\n", **kwargs)


def take_lock(path: Path, timeout: float = -1) -> contextlib.AbstractContextManager | None:
    """Take an advisory file lock. Leaving the context frees it; so does the kernel when the process dies.

    Waits `timeout` seconds while another process holds it; -1 waits forever. Returns None if it is still held.
    """
    try:
        return filelock.FileLock(path, timeout, fallback_to_soft=False).acquire()  # a soft lock outlives its process
    except filelock.Timeout:
        return None
    except OSError as error:
        if error.errno != errno.ENOSYS:  # "Function not implemented"
            raise
        raise InputError(f"{path.parent} is on a file system without file locks (flock): use another one") from None


def wait_for_lock(path: Path, name: Path) -> contextlib.AbstractContextManager:
    """Take a file lock. If another process holds it, print a line that begins with `name`, and wait."""
    lock = take_lock(path, timeout=2)
    if lock is None:
        print(f"{name}: waiting for another process", flush=True)
        lock = take_lock(path)
    return lock


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def crc32(path: Path) -> int:
    """Return the CRC-32 of a file. Shows a progress bar."""
    crc = 0
    step = 2**22
    num_bytes = path.stat().st_size
    with open(path, "rb") as file:
        for _ in progress_bar(range(0, num_bytes, step), f"checksum of {path.name}", -(-num_bytes // step), " x 4 MiB"):
            crc = zlib.crc32(file.read(step), crc)
    return crc


def json_sha256(value: object) -> str:
    """Return the SHA-256 of a value of plain dicts, lists, strings and numbers."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_record(path: Path, record: object) -> None:
    """Write a dataclass or dict of plain values as JSON, with a checksum inside."""
    content = asdict(record) if is_dataclass(record) else record
    with atomic_open(path) as file:
        json.dump(content | {"checksum": json_sha256(content)}, file, indent=1)


def read_record(path: Path, kind: type[Record] = dict) -> Record:
    """Read a file of `write_record` as a `kind`. Raises ValueError if it is damaged or of another version."""
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict) or content.pop("checksum", None) != json_sha256(content):
        raise ValueError("its checksum does not fit")
    try:
        return kind(**content)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"its entries are those of another version: {one_line(error)}") from None
