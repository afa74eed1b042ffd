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
from typing import TYPE_CHECKING, TypeVar

import filelock

from dreml.cli import InputError, one_line, progress_bar

if TYPE_CHECKING:
    import pandas as pd

Record = TypeVar("Record")

# ------------------------------------------------------------------------------------------------ writing


def temporary_name(path: Path, word: str = "tmp") -> Path:
    """A new hidden name beside `path`. Processes on other machines or in other containers take other names."""
    return path.with_name(f".{path.name}.{word}-{platform.node()[:20]}-{os.getpid()}-{secrets.token_hex(4)}")


@contextlib.contextmanager
def atomic_open(path: Path, mode: str = "w") -> Iterator:
    """Open a temporary file beside `path` that takes its place, flushed to disk, when the block ends without an error.

    So `path` is never half written, whenever the process dies.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as file:
            yield file
            flush_to_disk(file)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not know its file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what killed processes left of writing the files that match `name`. Call it while none can be writing."""
    for leftover in folder.glob(f".{name}.tmp-*"):
        leftover.unlink(missing_ok=True)


def flush_to_disk(file) -> None:
    """Return when what was written to the open `file` would survive a power loss."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make renames inside `folder` durable, where the system can."""
    with contextlib.suppress(OSError):  # Windows cannot open folders; some network file systems flush files only
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder in its place. If that fails, an earlier one stays there."""
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
    """Make the folder that the block writes into. Raises InputError, naming the option to change, where it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"cannot write into {folder} ({one_line(error)}); {option} names another folder") from None


def write_csv(path: Path, table: "pd.DataFrame", **kwargs) -> None:
    """Write a table without its index."""
    with atomic_open(path) as file:
        table.to_csv(file, index=False, lineterminator="\n", **kwargs)


# ------------------------------------------------------------------------------------------------ locks


def take_lock(path: Path, timeout: float = -1) -> contextlib.AbstractContextManager | None:
    """Take an advisory file lock. Leaving the context frees it, and so does the kernel when its holder dies.

    Waits `timeout` seconds for another process that holds it; -1 waits without end. Returns None if it is still held.
    """
    try:
        return filelock.FileLock(path, timeout, fallback_to_soft=False).acquire()  # a soft one stays after a death
    except filelock.Timeout:
        return None
    except OSError as error:
        if error.errno != errno.ENOSYS:  # "Function not implemented"
            raise
        raise InputError(f"{path.parent} is on a file system without file locks (flock): use another one") from None


# ------------------------------------------------------------------------------------------------ checksums, records


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def crc32(path: Path) -> int:
    """The CRC-32 of a file, with a progress bar."""
    crc, step = 0, 2**22
    num_bytes = path.stat().st_size
    with open(path, "rb") as file:
        for _ in progress_bar(range(0, num_bytes, step), f"checksum of {path.name}", -(-num_bytes // step), " x 4 MiB"):
            crc = zlib.crc32(file.read(step), crc)
    return crc


def json_sha256(value: object) -> str:
    """The SHA-256 of a value of plain dicts, lists, strings and numbers."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_record(path: Path, record: object) -> None:
    """Write a dataclass or dict of plain values as JSON, with a checksum of its own."""
    content = asdict(record) if is_dataclass(record) else record
    with atomic_open(path) as file:
        json.dump(content | {"checksum": json_sha256(content)}, file, indent=1)


def read_record(path: Path, kind: type[Record] = dict) -> Record:
    """Read what `write_record` wrote, as a `kind`. Raises ValueError for a damaged file or one of another version."""
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict) or content.pop("checksum", None) != json_sha256(content):
        raise ValueError("its checksum does not fit")
    try:
        return kind(**content)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"its entries are those of another version: {one_line(error)}") from None
