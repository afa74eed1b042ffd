"""What the scripts share: command-line manners, safe writing, seeded draws, batches, meta-classes, Recall@K, mAP@R."""

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
from dataclasses import dataclass
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


def run_main(script: str, run: Callable[[], None], with_less_memory: str, goes_on: bool = True) -> int:
    """Runs `run` and returns the exit code. `with_less_memory` names the options to change when memory runs out;
    `goes_on` says that the same command, after an interruption, does.

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
        remedy = "; run the same command again to go on" * goes_on
        what, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        print(f"{script}: {what}{' in ' * bool(where)}{where}{remedy}", file=sys.stderr)
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


def member_file(member: int | str, suffix: str, kind: str = "member") -> str:
    """The name of a member's file in its run folder: `member_007.pth`; "*" for the pattern of all members'."""
    return f"{kind}_{member:03d}.{suffix}" if isinstance(member, int) else f"{kind}_{member}.{suffix}"


def member_numbers(folder: Path) -> list[int]:
    """The members of which a run folder has a record, sound or not, in order."""
    found = (path.stem.removeprefix("member_") for path in folder.glob(member_file("*", "json")))
    numbers = {int(number) for number in found if number.isascii() and number.isdigit()}
    return sorted(number for number in numbers if (folder / member_file(number, "json")).exists())


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
POOLED_RECORD = {  # pooled_007.json
    "member": int,
    "run": str,
    "weights": str,  # SHA-256 of the member_007.pth that it was made from
    "sha256": str,  # of pooled_007.npy
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


LATER_SETTINGS = {"optimizer": "adam", "resize": "crop"}  # runs begun before these options existed go on


def run_identity(record: dict) -> str:
    """What the members of a run must share: a checksum of all in its `args.json` that defines them."""
    settings = {name: value for name, value in record["settings"].items() if LATER_SETTINGS.get(name) != value}
    return text_sha256({"settings": settings, "fingerprint": record["data"]["fingerprint"]})


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


# ------------------------------------------------------------------------------------------------ Recall@K, mAP@R


@torch.inference_mode()
def recall_at_k(
    embeddings: torch.Tensor | Sequence[torch.Tensor],
    labels: torch.Tensor,
    ks: Sequence[int],
    max_bytes: int = 2**30,
    is_query: torch.Tensor | None = None,
    is_gallery: torch.Tensor | None = None,
) -> torch.Tensor:
    """Recall@K of every ensemble size in one pass; every query against all other images of the gallery.

    The rank of a query is the number of images of *other* classes whose similarity (the cosines summed over the first
    l parts) is at least its best own-class similarity, itself excluded by index, minus 1e-6 * l. It is a hit at K if
    rank < K. So ties count against the query: a constant embedding scores 0, not 1. A query whose class has no other
    image in the gallery is a miss; a warning counts them.

    Args:
        embeddings: one `(N, d)` tensor, or a sequence of L tensors `(N, d_l)`, of any float dtype and on one device;
            each row is scaled to length 1 here.
        labels: `(N,)` integers.
        ks: positive integers.
        max_bytes: bound on the memory used beside the arguments, for any class sizes, but for 12 bytes an image and
            part (16 where queries and gallery differ), some 100 bytes an image, and blocks of at least 16 rows. No
            N x N matrix is made; a sorted, scaled copy of the embeddings only where it fits into half of the bound,
            else blocks of rows are gathered, cast and scaled when needed.
        is_query, is_gallery: `(N,) bool`; None: every image. An image may be both, or neither.

    Returns:
        `(L, len(ks)) float32` on the CPU, in [0, 1]; row l-1 is the ensemble of the first l parts.

    Raises:
        ValueError: shapes that do not fit, a K below 1, no query, no gallery, or embeddings that are not finite.

    The images are sorted by class, so that pairs of one class lie in a band. One pass over that band gives each query's
    best own-class similarity; a second pass counts. Where queries and gallery are the same images, it computes each
    block of the symmetric similarity matrix once and uses it for its rows and for its columns. Members' similarities
    add up, so the sum after l parts gives row l on the way.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"every K has to be a positive integer, not {list(ks)}")
    # Similarities are computed in blocks of `block` x `4 * block`, of which three are held.
    pairs = _sorted_pairs(embeddings, labels, is_query, is_gallery, max_bytes, lambda block: 12 * block)
    queries, gallery, block, device = pairs.queries, pairs.gallery, pairs.block, pairs.queries.order.device
    num_parts, num_queries, first, last = len(queries.parts), len(queries.order), pairs.first, pairs.last
    has_match = pairs.has_match("misses")
    best = torch.full((num_parts, num_queries), -torch.inf, device=device)
    ranks = torch.zeros((num_parts, num_queries), dtype=torch.int32, device=device)

    def add_parts(sums: torch.Tensor, query_rows: list[torch.Tensor], start: int, stop: int) -> Iterator[int]:
        """Adds the parts' cosines to `sums`, one part after the other; yields the part's index after each.

        Pairs to leave out start at -inf and so stay there.
        """
        for index, rows in enumerate(query_rows):
            sums.addmm_(rows, gallery.rows(index, start, stop).T)
            yield index

    with _full_float32(device.type):
        # 1. The best own-class similarity of each query.
        for start, stop in spans(0, num_queries, min(block, 256)):
            query_rows = [queries.rows(index, start, stop) for index in range(num_parts)]
            for left, right in spans(first[start], last[stop - 1], block):
                sums = _zeros_at(pairs.own(start, stop, left, right))
                for index in add_parts(sums, query_rows, left, right):
                    best[index, start:stop] = torch.maximum(best[index, start:stop], sums.amax(1))
        allowed = TIE_TOLERANCE * torch.arange(1, num_parts + 1, device=device)
        thresholds = best.sub_(allowed[:, None])

        # 2. How many images of other classes reach it.
        symmetric = queries is gallery
        for start, stop in spans(0, num_queries, block):
            query_rows = [queries.rows(index, start, stop) for index in range(num_parts)]
            for left, right in spans(start if symmetric else 0, len(gallery.order), 4 * block):
                sums = torch.zeros((stop - start, right - left), device=device)
                if left < last[stop - 1] and right > first[start]:  # else no pair of one class lies in the block
                    sums.masked_fill_(pairs.same_class(start, stop, left, right), -torch.inf)
                reached = torch.empty_like(sums)
                for index in add_parts(sums, query_rows, left, right):
                    # 0.0 and 1.0 in place of bool: on the CPU their sums took a twentieth of the time.
                    torch.ge(sums, thresholds[index, start:stop, None], out=reached)
                    ranks[index, start:stop] += reached.sum(1).int()
                    # Of the square on the diagonal, both halves have been counted; all else counts the other way too.
                    rest = max(stop, left)
                    if symmetric and rest < right:
                        torch.ge(sums, thresholds[index, left:right], out=reached)
                        ranks[index, rest:right] += reached[:, rest - left :].sum(0).int()

    hits = torch.stack([((ranks < k) & has_match).sum(1) for k in ks], dim=1)
    return (hits.cpu().double() / num_queries).float()


@torch.inference_mode()
def map_at_r(
    embeddings: torch.Tensor | Sequence[torch.Tensor],
    labels: torch.Tensor,
    is_query: torch.Tensor | None = None,
    is_gallery: torch.Tensor | None = None,
    max_bytes: int = 2**30,
) -> tuple[torch.Tensor, torch.Tensor]:
    """mAP@R and R-Precision of every ensemble size (Musgrave et al., "A Metric Learning Reality Check", 2020).

    R is the number of images of the query's class in the gallery, itself excluded by index. R-Precision is the share of
    them among the R most similar images. mAP@R adds up, over those, the precision at their positions, and divides by R.
    The mean is over the queries with R > 0, as in pytorch-metric-learning; a warning counts the others, which Recall@K
    takes for misses. Without any such query, both are NaN.

    As in `recall_at_k`, ties count against the query: the position of its i-th most similar own-class image is i plus
    the number of images of *other* classes whose similarity is at least that image's minus 1e-6 * l. So the numbers do
    not depend on the order of the images, and a constant embedding scores 0 unless R reaches beyond the other classes.

    Args:
        embeddings, labels, is_query, is_gallery: as for `recall_at_k`.
        max_bytes: as for `recall_at_k`, but blocks hold whole rows of the similarity matrix, at least 16.

    Returns:
        (mAP@R, R-Precision), each `(L,) float64` on the CPU, in [0, 1]; item l-1 is the ensemble of the first l parts.

    Raises:
        ValueError: shapes that do not fit, no query, no gallery, or embeddings that are not finite.
    """
    # A row holds its similarities to the gallery, those of its own class once more, and what is computed from the R
    # nearest of both: in all 16 floats a gallery image, if its class is nearly the whole gallery.
    num_images = len(labels)
    pairs = _sorted_pairs(embeddings, labels, is_query, is_gallery, max_bytes, lambda block: 16 * num_images)
    queries, gallery, block, device = pairs.queries, pairs.gallery, pairs.block, pairs.queries.order.device
    num_parts, num_queries, num_gallery = len(queries.parts), len(queries.order), len(gallery.order)
    counted = pairs.has_match("left out")
    scores = torch.zeros((2, num_parts, num_queries), device=device)

    with _full_float32(device.type):
        for start, stop in spans(0, num_queries, block):
            num_own = pairs.num_own[start:stop, None]
            most = int(num_own.max())
            left, right = pairs.first[start], pairs.last[stop - 1]  # outside lie other classes only
            own = _zeros_at(pairs.own(start, stop, left, right))
            others = _zeros_at(~pairs.same_class(start, stop, 0, num_gallery))
            ordinal = torch.arange(1, most + 1, device=device)
            for index in range(num_parts):
                rows = queries.rows(index, start, stop)
                for sums, begin, end in ((own, left, right), (others, 0, num_gallery)):
                    for near, far in spans(begin, end, 4 * block):
                        sums[:, near - begin : far - begin].addmm_(rows, gallery.rows(index, near, far).T)
                # Both sorted, nearest first; the negative values ascend, as searchsorted wants them. The others beyond
                # the `most` nearest need no count: an image behind so many is beyond R anyway.
                reach = own.topk(most).values - TIE_TOLERANCE * (index + 1)
                ahead = torch.searchsorted(-others.topk(most).values, -reach, right=True)
                position = ordinal + ahead
                found = position <= num_own
                scores[0, index, start:stop] = (found * ordinal / position).sum(1) / num_own[:, 0]
                scores[1, index, start:stop] = found.sum(1) / num_own[:, 0]

    mean = scores[:, :, counted].cpu().double().mean(2)
    return mean[0], mean[1]


class _Images:
    """Some of the images, in order of class, and their rows."""

    def __init__(self, parts: Sequence[torch.Tensor], labels: torch.Tensor, chosen: torch.Tensor, block: int):
        order = torch.argsort(labels, stable=True)
        self.order = order[chosen[order]]  # (n,) int64
        self.labels = labels[self.order]  # (n,) int64, ascending
        self.parts = parts
        self.inverse_norms = torch.stack([_inverse_norms(part, self.order, block) for part in parts])  # (L, n)

    def copy(self) -> None:
        """Gathers and scales all rows once, in place of doing so for every block."""
        self.parts = [
            part[self.order].float() * self.inverse_norms[index, :, None] for index, part in enumerate(self.parts)
        ]
        self.inverse_norms = None

    def rows(self, index: int, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop, in order of class, of one part: `(stop - start, d) float32` of length 1."""
        if self.inverse_norms is None:
            return self.parts[index][start:stop]
        return self.parts[index][self.order[start:stop]].float() * self.inverse_norms[index, start:stop, None]


@dataclass
class _Pairs:
    """The pairs of a query and a gallery image, both in order of class: pairs of one class lie in a band."""

    queries: _Images
    gallery: _Images  # the same object if they are the same images
    first: list[int]  # where each query's class starts in the gallery
    last: list[int]  # and where it ends
    num_own: torch.Tensor  # (number of queries,) int64, gallery images of each query's class but itself
    block: int  # rows of a block of similarities

    def same_class(self, start: int, stop: int, left: int, right: int) -> torch.Tensor:
        """Which of queries start:stop and gallery images left:right share a class, `(rows, columns) bool`."""
        return self.queries.labels[start:stop, None] == self.gallery.labels[left:right]

    def own(self, start: int, stop: int, left: int, right: int) -> torch.Tensor:
        """The same without the pairs of an image and itself."""
        other = self.queries.order[start:stop, None] != self.gallery.order[left:right]
        return self.same_class(start, stop, left, right) & other

    def has_match(self, fate: str) -> torch.Tensor:
        """Which queries have another image of their class in the gallery, bool; warns of the others and their fate."""
        result = self.num_own > 0
        lone = len(result) - int(result.sum())
        if lone:
            text = f"{lone} of {len(result)} queries have no other image of their class in the gallery: {fate}"
            warnings.warn(text, stacklevel=1)
        return result


def _sorted_pairs(
    embeddings: torch.Tensor | Sequence[torch.Tensor],
    labels: torch.Tensor,
    is_query: torch.Tensor | None,
    is_gallery: torch.Tensor | None,
    max_bytes: int,
    floats_of_a_row: Callable[[int], int],
) -> _Pairs:
    """Checks the arguments of `recall_at_k` and sorts the images.

    `floats_of_a_row(block)` says how many float32 each row of a block of similarities takes, beside the embeddings.
    """
    parts = [embeddings] if isinstance(embeddings, torch.Tensor) else list(embeddings)
    labels = torch.as_tensor(labels)
    if not parts or any(part.ndim != 2 or len(part) != len(labels) for part in parts) or labels.ndim != 1:
        raise ValueError("embeddings have to be (N, d) tensors and labels (N,), with the same N")
    if len(labels) == 0 or labels.is_floating_point():
        raise ValueError("labels have to be integers, at least one")
    device, num_images = parts[0].device, len(labels)
    masks = []
    for name, mask in (("is_query", is_query), ("is_gallery", is_gallery)):
        mask = torch.ones(num_images, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
        if mask.dtype != torch.bool or mask.shape != labels.shape or not mask.any():
            raise ValueError(f"{name} has to be ({num_images},) bool, with at least one True")
        masks.append(mask.to(device))

    # A block holds the rows of all parts and, of four times as many gallery images, those of one.
    block, width, widest = 1024, sum(part.shape[1] for part in parts), max(part.shape[1] for part in parts)
    while block > 16 and 4 * block * (2 * width + 9 * widest + floats_of_a_row(block)) > max_bytes / 2:
        block //= 2
    labels = labels.to(device).long()
    sides = [_Images(parts, labels, mask, block) for mask in (masks[:1] if torch.equal(*masks) else masks)]
    num_rows = sum(len(side.order) for side in sides)
    if 4 * num_rows * (width + widest) <= max_bytes / 2:  # else rows are gathered and scaled again for every block
        for side in sides:
            side.copy()
    queries, gallery = sides[0], sides[-1]
    first = torch.searchsorted(gallery.labels, queries.labels)
    last = torch.searchsorted(gallery.labels, queries.labels, right=True)
    num_own = last - first - masks[1][queries.order].long()
    return _Pairs(queries, gallery, first.tolist(), last.tolist(), num_own, block)


def _zeros_at(kept: torch.Tensor) -> torch.Tensor:
    """The start of a block's sums: 0 for the pairs that are kept, -inf for the others, float32."""
    return torch.zeros(kept.shape, device=kept.device).masked_fill_(~kept, -torch.inf)


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
