"""What the scripts share: command-line manners, safe writing, seeded draws, batches, meta-classes and Recall@K."""

import argparse
import collections
import contextlib
import hashlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import torch

TIE_TOLERANCE = 1e-6  # a member: below it, two summed cosines count as equal (float32 rounding decides nothing)

# ------------------------------------------------------------------------------------------------- command line


class InputError(Exception):
    """Bad input or options. `run_main` prints it as one line and returns 2."""


class RunError(Exception):
    """A run that failed for a known reason. `run_main` prints it as one line and returns 1."""


class Terminated(BaseException):
    """SIGTERM: what a scheduler sends before it takes the machine away. `run_main` returns 143."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations whose errors are one line."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str):
        message = re.sub(r"(\S{60})\S{60,}", r"\1…", " ".join(message.split()))
        raise InputError(f"{message} (see python {self.prog} --help)")


def run_main(script: str, run: Callable[[], None], with_less_memory: str) -> int:
    """Runs `run` and returns the exit code. `with_less_memory` names the options to change when memory runs out.

    0 done, 2 refused input or options, 1 failed while running, 130 Ctrl-C, 143 SIGTERM. The notes of what ended the
    run (`add_note`) say in what it was, the innermost first.
    """
    formatwarning, handlers = warnings.formatwarning, {}
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    _signals.clear()
    if threading.current_thread() is threading.main_thread():  # only there signals can be handled
        names = ("SIGINT", "SIGTERM", "SIGALRM")  # Windows has no SIGALRM
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        handlers = {number: signal.signal(number, _notice) for number in numbers}
    try:
        run()
        return 0
    except InputError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(f"{script}: failed: out of memory; try {with_less_memory}", file=sys.stderr)
        return 1
    except (RunError, OSError) as error:  # OSError: disk full, no permission, ...
        print(f"{script}: failed: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Terminated) as stop:
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)  # it has been heard
        where = ", ".join(reversed(getattr(stop, "__notes__", [])))
        what, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        print(f"{script}: {what}{' in ' * bool(where)}{where}; run the same command again to go on", file=sys.stderr)
        return code
    finally:
        warnings.formatwarning = formatwarning
        _set_alarm(0)
        _signals.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)


_signals: list[int] = []  # Ctrl-C and SIGTERM that have come since the run began


def stop_here() -> None:
    """Ends the run if Ctrl-C or SIGTERM has come, by KeyboardInterrupt or Terminated. Long loops call it.

    An exception right out of the signal's handler could hit a library between two steps that belong together.
    """
    if _signals:
        _set_alarm(0)
        raise Terminated if _signals[0] == signal.SIGTERM else KeyboardInterrupt


def _notice(signum: int, frame: object) -> None:
    """Handles a signal. Without a `stop_here` within 3 seconds, or at a second Ctrl-C, the run ends where it is."""
    first = not _signals
    if signum in (signal.SIGINT, signal.SIGTERM):
        _signals.append(signum)
    if first:
        _set_alarm(3)
    elif signum != signal.SIGTERM:  # schedulers send it twice
        stop_here()


def _set_alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again: Python drops what a destructor raises


def out_of_memory(error: Exception) -> bool:
    """Whether the machine or the device had too little memory; cpu and mps say so by a plain RuntimeError."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    texts = ("allocate memory", "out of memory", "ALLOC_FAILED")  # the last: cuBLAS and cuDNN
    return isinstance(error, kinds) or any(text in str(error) for text in texts)


def one_line(error: Exception) -> str:
    """The kind and the text of an exception on one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def natural_number(text: str) -> int:
    """argparse type: an integer in 1..999,999,999."""
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer below 10^9")
    return int(text)


# ------------------------------------------------------------------------------------------------ files


@contextlib.contextmanager
def atomic_open(path: Path, mode: str = "w") -> Iterator:
    """Opens a temporary file beside `path` that takes its place, flushed to disk, when the block ends without an error.

    So `path` is never half written, whenever the process dies.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
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
    """Removes what killed processes left of writing the files that match `name`. Call it while none can be writing."""
    for leftover in folder.glob(f".{name}.tmp-*"):
        leftover.unlink(missing_ok=True)


def take_lock(path: Path, timeout: float = -1) -> contextlib.AbstractContextManager | None:
    """Takes an advisory file lock, which the kernel frees when its holder dies; leaving the context frees it.

    Waits `timeout` seconds for another process that holds it, -1: without end. Returns None if it is still held then.
    """
    no_locks = f"{path.parent} is on a file system without file locks (flock): use another one"
    end = time.monotonic() + timeout if timeout >= 0 else math.inf
    lock = filelock.FileLock(path)
    try:
        while True:
            stop_here()
            try:
                held = lock.acquire(timeout=max(0, min(1, end - time.monotonic())))
                break
            except filelock.Timeout:
                if time.monotonic() >= end:
                    return None
        if isinstance(lock, filelock.SoftFileLock):  # a mere file, which stays when its holder dies
            lock.release()
            raise InputError(no_locks)
        return held
    except NotImplementedError:
        raise InputError(no_locks) from None
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from None


def flush_to_disk(file) -> None:
    """Returns when what was written to the open `file` would survive a power loss."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable. Windows cannot open folders and needs no such step."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def member_file(member: int | str, suffix: str) -> str:
    """The name of a member's file in its run folder: `member_007.pth`; "*" for the pattern of all members'."""
    return f"member_{member:03d}.{suffix}" if isinstance(member, int) else f"member_{member}.{suffix}"


def size_text(num_bytes: float) -> str:
    """Bytes for people, such as "1.5 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


RUN_RECORD = {  # args.json: `settings` and `data` define the members, `options` are the last command's
    "settings": {"backbone": str, "meta_class_size": int, "image_size": int, "precision": str},
    "data": {"fingerprint": str, "mean": [float], "std": [float], "counts": dict},
    "options": dict,
    "environment": dict,
}
MEMBER_RECORD = {  # member_007.json
    "member": int,
    "run": str,
    "best_epoch": int,
    "history": [
        {"epoch": int, "loss": float, "accuracy": float, "lr": float, "seconds": float, "images_per_second": float}
    ],
    "partition": [int],
    "environment": dict,
    "sha256": dict,
}


def write_record(path: Path, record: dict) -> None:
    """Writes a JSON file with a checksum of its own. Plain dicts, lists, strings and finite numbers only."""
    with atomic_open(path) as file:
        json.dump(record | {"checksum": text_sha256(record)}, file, indent=1)


def read_record(path: Path, pattern: dict) -> dict:
    """Reads what `write_record` wrote. Raises ValueError for a damaged file, or one that does not fit the pattern.

    A pattern is a type, `[pattern]` for a list, or `{key: pattern}` for a dict that has these keys among others.
    """
    try:
        record = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("too deeply nested") from None
    if not isinstance(record, dict) or record.pop("checksum", None) != text_sha256(record):
        raise ValueError("its checksum does not fit")
    if not _fits(record, pattern):
        raise ValueError("its entries are those of another version")
    return record


def _fits(value: object, pattern: type | list | dict) -> bool:
    if isinstance(pattern, dict):
        return isinstance(value, dict) and all(key in value and _fits(value[key], pattern[key]) for key in pattern)
    if isinstance(pattern, list):
        return isinstance(value, list) and all(_fits(item, pattern[0]) for item in value)
    return type(value) is pattern


def run_identity(record: dict) -> str:
    """What the members of a run must share: a checksum of all in its `args.json` that defines them."""
    return text_sha256({"settings": record["settings"], "fingerprint": record["data"]["fingerprint"]})


def text_sha256(value: object) -> str:
    """The SHA-256 of a value of plain dicts, lists, strings and numbers."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ randomness


def draws(seed: int, member: int, epoch: int, purpose: str) -> np.random.Generator:
    """The random generator of one purpose in one epoch of one member.

    Nothing but the four arguments goes in, so that member 7 is the same whether or not members 1-6 were trained before
    it, and an epoch can be repeated. `seed`, `member` and `epoch` are below 2**32.
    """
    return np.random.default_rng(np.random.SeedSequence((seed, member, epoch, zlib.crc32(purpose.encode()))))


def meta_class_partition(num_classes: int, num_meta_classes: int, generator: np.random.Generator) -> np.ndarray:
    """A random, balanced partition of the training classes into meta-classes (the paper's random "meta-classes").

    Returns `(num_classes,) int64`: the meta-class, 0..num_meta_classes-1, of every class. Each meta-class gets
    floor(N/D) or ceil(N/D) classes. Raises ValueError unless 2 <= num_meta_classes <= num_classes.
    """
    if not 2 <= num_meta_classes <= num_classes:
        raise ValueError(f"cannot divide {num_classes} classes into {num_meta_classes} meta-classes")
    rounds = -(-num_classes // num_meta_classes)
    partition = np.concatenate([generator.permutation(num_meta_classes) for _ in range(rounds)])[:num_classes]
    generator.shuffle(partition)
    return partition.astype(np.int64)


# ------------------------------------------------------------------------------------------------ batches


def image_batches(
    fill: Callable[[int, int, np.ndarray], None],
    batches: Iterable[tuple[int, int]],
    image_size: int,
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """Yields a batch `(stop - start, S, S, 3) uint8` on the device for each (start, stop) of `batches`.

    `fill(start, stop, out)` writes its pixels. It runs in a thread, two batches ahead: copying rows from a memory map
    releases Python's lock, and a DataLoader's processes, which pass every batch on through shared memory, were slower
    (benchmarks/training.py).
    """

    def load(start: int, stop: int) -> torch.Tensor:
        shape = (stop - start, image_size, image_size, 3)
        # Nobody waits for a copy from pinned memory; PyTorch reuses it when the copy is done.
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        fill(start, stop, batch.numpy())
        return batch

    with ThreadPoolExecutor(1) as loader:
        waiting, loading = collections.deque(batches), collections.deque()
        while waiting or loading:
            stop_here()
            while waiting and len(loading) < 3:  # the one to yield and two ahead
                loading.append(loader.submit(load, *waiting.popleft()))
            yield loading.popleft().result().to(device, non_blocking=device.type == "cuda")


def spans(start: int, stop: int, step: int) -> list[tuple[int, int]]:
    """start..stop in pieces of at most `step`."""
    return [(left, min(left + step, stop)) for left in range(start, stop, step)]


# ------------------------------------------------------------------------------------------------ Recall@K


@torch.inference_mode()
def recall_at_k(
    embeddings: torch.Tensor | Sequence[torch.Tensor],
    labels: torch.Tensor,
    ks: Sequence[int],
    max_bytes: int = 2**30,
) -> torch.Tensor:
    """Recall@K of every ensemble size in one pass; every image is a query against all others.

    The rank of a query is the number of images of *other* classes whose similarity (the cosines summed over the first
    l parts) is at least its best own-class similarity, itself excluded by index, minus 1e-6 * l. It is a hit at K if
    rank < K. So ties count against the query: a constant embedding scores 0, not 1. A query whose class has no other
    image is a miss; a warning counts them.

    Args:
        embeddings: one `(N, d)` tensor, or a sequence of L tensors `(N, d_l)`, of any float dtype and on one device;
            each row is scaled to length 1 here.
        labels: `(N,)` integers.
        ks: positive integers.
        max_bytes: bound on the memory used beside the arguments, for any class sizes, but for 12 bytes an image and
            part, some 100 bytes an image, and blocks of at least 16 rows. No N x N matrix is made; a sorted, scaled
            copy of the embeddings only where it fits into half of the bound, else blocks of rows are gathered, cast
            and scaled when needed.

    Returns:
        `(L, len(ks)) float32` on the CPU, in [0, 1]; row l-1 is the ensemble of the first l parts.

    Raises:
        ValueError: shapes that do not fit, a K below 1, or embeddings that are not finite.

    The images are sorted by class, so that pairs of one class lie near the diagonal. One pass over that band gives each
    query's best own-class similarity; a second pass counts, computing each block of the symmetric similarity matrix
    once and using it for its rows and for its columns. Members' similarities add up, so the sum after l parts gives
    row l on the way.
    """
    parts = [embeddings] if isinstance(embeddings, torch.Tensor) else list(embeddings)
    labels = torch.as_tensor(labels)
    if not parts or any(part.ndim != 2 or len(part) != len(labels) for part in parts) or labels.ndim != 1:
        raise ValueError("embeddings have to be (N, d) tensors and labels (N,), with the same N")
    if len(labels) == 0 or labels.is_floating_point():
        raise ValueError("labels have to be integers, at least one")
    if any(k < 1 for k in ks):
        raise ValueError(f"every K has to be a positive integer, not {list(ks)}")
    device, num_images = parts[0].device, len(labels)

    # Images in order of class; `first` and `last` bound each image's class in that order.
    order = torch.argsort(labels.to(device), stable=True)
    _, class_of, sizes = torch.unique_consecutive(labels.to(device)[order], return_inverse=True, return_counts=True)
    last = sizes.cumsum(0)[class_of]
    first, last = (last - sizes[class_of]).tolist(), last.tolist()
    has_match = sizes[class_of] > 1
    if not has_match.all():
        lone = num_images - int(has_match.sum())
        warnings.warn(f"{lone} of {num_images} queries have no other image of their class: misses", stacklevel=1)

    # Similarities are computed in blocks of `block` x `4 * block`, of which three are held, with the rows of all parts
    # and the columns of one. Narrow blocks waste little on the diagonal, wide ones feed the matrix product.
    block, width, widest = 1024, sum(part.shape[1] for part in parts), max(part.shape[1] for part in parts)
    while block > 16 and 4 * block * (2 * width + 9 * widest + 12 * block) > max_bytes / 2:
        block //= 2
    inverse_norms = torch.stack([_inverse_norms(part, order, block) for part in parts])  # (L, N)
    if 4 * num_images * (width + widest) <= max_bytes / 2:  # else rows are gathered and scaled again for every block
        parts = [part[order].float() * inverse_norms[index, :, None] for index, part in enumerate(parts)]
        order, inverse_norms = None, None
    best = torch.full((len(parts), num_images), -torch.inf, device=device)
    ranks = torch.zeros((len(parts), num_images), dtype=torch.int32, device=device)

    def rows(index: int, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop, in order of class, of one part: `(stop - start, d) float32` of length 1."""
        if order is None:
            return parts[index][start:stop]
        return parts[index][order[start:stop]].float() * inverse_norms[index, start:stop, None]

    def add_parts(sums: torch.Tensor, queries: list[torch.Tensor], start: int, stop: int) -> Iterator[int]:
        """Adds the parts' cosines to `sums`, one part after the other; yields the part's index after each.

        Pairs to leave out start at -inf and so stay there.
        """
        for index, query_rows in enumerate(queries):
            sums.addmm_(query_rows, rows(index, start, stop).T)
            yield index

    with _full_float32(device.type):
        # 1. The best own-class similarity of each query.
        for start, stop in spans(0, num_images, min(block, 256)):
            queries = [rows(index, start, stop) for index in range(len(parts))]
            indices = torch.arange(start, stop, device=device)[:, None]
            for left, right in spans(first[start], last[stop - 1], block):
                columns = torch.arange(left, right, device=device)
                own = (class_of[start:stop, None] == class_of[left:right]) & (indices != columns)
                sums = torch.zeros(own.shape, device=device).masked_fill_(~own, -torch.inf)
                for index in add_parts(sums, queries, left, right):
                    best[index, start:stop] = torch.maximum(best[index, start:stop], sums.amax(1))
        allowed = TIE_TOLERANCE * torch.arange(1, len(parts) + 1, device=device)
        thresholds = best.sub_(allowed[:, None])

        # 2. How many images of other classes reach it.
        for start, stop in spans(0, num_images, block):
            queries = [rows(index, start, stop) for index in range(len(parts))]
            for left, right in spans(start, num_images, 4 * block):
                sums = torch.zeros((stop - start, right - left), device=device)
                if left < last[stop - 1]:  # the only blocks in which pairs of one class can lie
                    sums.masked_fill_(class_of[start:stop, None] == class_of[left:right], -torch.inf)
                reached = torch.empty_like(sums)
                for index in add_parts(sums, queries, left, right):
                    # 0.0 and 1.0 in place of bool: on the CPU their sums took a twentieth of the time.
                    torch.ge(sums, thresholds[index, start:stop, None], out=reached)
                    ranks[index, start:stop] += reached.sum(1).int()
                    # Of the square on the diagonal, both halves have been counted; all else counts the other way too.
                    rest = max(stop, left)
                    if rest < right:
                        torch.ge(sums, thresholds[index, left:right], out=reached)
                        ranks[index, rest:right] += reached[:, rest - left :].sum(0).int()

    hits = torch.stack([((ranks < k) & has_match).sum(1) for k in ks], dim=1)
    return (hits.cpu().double() / num_images).float()


def _inverse_norms(part: torch.Tensor, order: torch.Tensor, block: int) -> torch.Tensor:
    """1 / length of each row in the given order, `(N,) float32`; 0 for a row of zeros, which is similar to nothing."""
    # In float64, the squares of any finite float32 neither overflow nor vanish; mps has no float64.
    dtype = torch.float32 if part.device.type == "mps" else torch.float64
    blocks = (part[order[start:stop]].float() for start, stop in spans(0, len(order), block))
    lengths = torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=dtype) for rows in blocks])
    if not torch.isfinite(lengths).all():
        raise ValueError(f"embeddings are not finite: {int((~torch.isfinite(lengths)).sum())} of {len(order)} rows")
    inverse = (1 / lengths).float()
    return torch.where(inverse.isfinite(), inverse, 0)  # a row below float32's range counts as zeros


@contextlib.contextmanager
def _full_float32(device_type: str) -> Iterator[None]:
    """Matrix products in full float32, without autocast, TF32 or bfloat16; the caller's settings return afterwards."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
