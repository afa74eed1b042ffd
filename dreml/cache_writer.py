"""Raw data set -> cache: every image is decoded and resized once, and its pixels are appended to one file a split."""

import collections
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from dreml.cache import ARRAYS, CACHE_VERSION, Cache, CacheMeta, Holdout, cache_folder, read_cache
from dreml.cli import InputError, RunError, counted, format_problems, progress_bar
from dreml.datasets import PUBLISHED, count_images, hold_out, list_data_set, warn_of_changes
from dreml.files import (
    atomic_open,
    crc32,
    flush_to_disk,
    remove_leftovers,
    replace_folder,
    take_lock,
    temporary_name,
    write_record,
)
from dreml.images import BadImage, ImageSpec, read_pixels, read_resized
from dreml.lists import Listing

CHUNK_IMAGES = 32  # that a worker is given at a time
JUDGED_AFTER = 1000  # images: from their size, that of the whole cache is estimated
SECONDS_FOR_A_LOCK = 10  # the workers of a run that was just killed hold it until they notice


def build_cache(
    data_path: Path,
    name: str,
    spec: ImageSpec,
    num_workers: int,
    force: bool = False,
    skip_bad: bool = False,
    holdout: Holdout | None = None,
) -> Cache:
    """Turn the raw data set data_path/name into its cache, unless a good one is there and `force` is not set.

    With `holdout`, its training images alone become that of NAME_holdout, see `hold_out`. The new cache is made under a
    temporary name and renamed when it is whole; until then an earlier one stays as it was. Raises UnknownLayout if
    there is no data set, InputError with all problems found in it.
    """
    cache_name = name if holdout is None else holdout.name_of(name)
    target = cache_folder(data_path, cache_name, spec)
    if not force and (target / "meta.json").exists():
        try:
            cache = read_cache(data_path, cache_name, spec)
        except InputError as error:
            print(f"{cache_name}: making the cache again: {error}", file=sys.stderr)
        else:
            say_what_is_there(cache, holdout)
            return cache
    data_set = list_data_set(name, data_path / name)
    if holdout is not None:
        hold_out(data_set, holdout)
    require_writable(target.parent if target.parent.exists() else data_path)
    target.parent.mkdir(exist_ok=True)
    held = take_lock(target.with_name(f".{target.name}.lock"), SECONDS_FOR_A_LOCK)
    if held is None:
        raise InputError(f"{target} is being made by another process")
    with held:
        skipped_list = target.with_name(f"{target.name}_skipped.txt")
        for leftover in target.parent.glob(f".{target.name}.*-*"):  # of a run that was killed
            shutil.rmtree(leftover)
        remove_leftovers(target.parent, skipped_list.name)
        new = temporary_name(target, "new")
        try:
            new.mkdir()
            skipped = write_cache(new, data_set, data_path / name, spec, num_workers, skip_bad)
            skipped_list.unlink(missing_ok=True)
            if skipped:
                with atomic_open(skipped_list) as file:
                    file.write("\n".join(skipped) + "\n")
                text = f"{counted(len(skipped), 'bad image')} left out, listed in {skipped_list}"
                print(text, file=sys.stderr)
            replace_folder(new, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return read_cache(data_path, cache_name, spec)


def require_writable(folder: Path) -> None:
    """Raise InputError, with a way on, if a folder that is there cannot be written to."""
    if folder.exists() and not os.access(folder, os.W_OK):
        remedy = f"make {folder.name}/ in another --data_path, with links in it to what is in {folder} (ln -s)"
        raise InputError(f"{folder} is read-only, and caches lie beside the images: {remedy}")


def say_what_is_there(cache: Cache, holdout: Holdout | None) -> None:
    """Say that a cache is kept, and what changed since. Raises InputError if it has another share of the classes."""
    num_train = cache.counts["train"][0]
    num_test = cache.counts["test"][0]
    if holdout is not None and num_test != round(holdout.share * (num_train + num_test)):
        raise InputError(
            f"{cache.folder} holds out {num_test} of {num_train + num_test} classes, not --holdout {holdout.share:g}; "
            "--force makes it again"
        )
    print(f"{cache.name}: {cache.folder} is there already (--force makes it again)")
    warn_of_changes(cache)


def write_cache(
    folder: Path, data_set: Listing, source: Path, spec: ImageSpec, num_workers: int, skip_bad: bool
) -> list[str]:
    """Fill `folder` with a whole cache of the images in `source`. Returns what is wrong with those left out."""
    name = source.name
    listed = count_images(data_set.images)
    for part, (num_classes, num_images) in listed.items():
        counts = f"{counted(num_classes, 'class')}, {counted(num_images, 'image')}"
        print(f"{name}: {part} lists {counts}", flush=True)
    for warning in data_set.warnings:
        print(f"{name}: warning: {warning}", file=sys.stderr)
    refuse(name, data_set.problems)

    try:
        facts, bad, histogram = store_pixels(folder, data_set.images, source, spec, num_workers)
    except BrokenProcessPool:
        time.sleep(0.1)  # a SIGTERM to the whole group reaches this process at about the same time
        raise RunError("a worker process was killed, for lack of memory perhaps; try fewer --num_workers") from None
    is_good = facts["shape"][:, 0] > 0
    images = data_set.images[is_good]
    warn_of_leaks(name, images, facts["file_id"][is_good])
    if not skip_bad:
        refuse(name, bad, "; --skip_bad goes on without bad images")
    found = count_images(images)
    refuse(name, [f"no image is left in {part}" for part in listed if listed[part][1] > 0 and found[part][1] == 0])

    sizes = facts["shape"][is_good & (data_set.images["split"] == "train")]
    np.save(folder / "train_sizes.npy", sizes)
    np.save(folder / "train_offsets.npy", offsets_of(3 * sizes.prod(1, dtype=np.int64)))
    splits = {}
    for split in ("train", "test"):
        splits[split] = write_split(folder, split, images[images["split"] == split], data_set)
    with atomic_open(folder / "raw_files.npz", "wb") as file:
        left_out = data_set.images["path"][~is_good].to_numpy(str)
        stats = np.concatenate([facts["stat"][is_good], facts["stat"][~is_good]])
        np.savez(file, left_out=left_out, stats=stats)
    mean, std = channel_statistics(histogram, name)
    meta = CacheMeta(CACHE_VERSION, spec.size, spec.resize, mean, std, **splits, arrays=seal(folder))
    write_record(folder / "meta.json", meta)
    return bad


def refuse(name: str, problems: list[str], remedy: str = "") -> None:
    """Raise InputError if there are problems."""
    if problems:
        what = counted(len(problems), "problem")
        raise InputError(f"{name}: {what}, nothing written{remedy}:{format_problems(problems)}")


def warn_of_leaks(name: str, images: pd.DataFrame, file_ids: np.ndarray) -> None:
    """Warn of test images that are the same file as a training image, by whatever path or link."""
    is_test = (images["split"] == "test").to_numpy()
    leaks = is_test & np.isin(file_ids, file_ids[~is_test])
    if leaks.any():
        number = len(np.unique(file_ids[leaks]))
        text = f"{counted(number, 'image')} {'is' if number == 1 else 'are'} in both train and test"
        print(f"{name}: warning: {text}, such as {images['path'][leaks].iloc[0]}: scores are too high", file=sys.stderr)


class Chunk(NamedTuple):
    """Images of one split, one after the other, as a worker process is given them."""

    split: str
    paths: list[str]
    file: Path  # for their pixels: a worker that is killed while it sends much through a pipe would block its parent


# Of an image: (height, width) in the cache, 0 of a bad one, which has no pixels there; size and time of change of its
# file, and a number that is the same for all paths of the file.
FACTS = np.dtype([("shape", np.int32, 2), ("stat", np.float64, 2), ("file_id", np.int64)])


def worker_pool(num_workers: int) -> ProcessPoolExecutor:
    """A pool of worker processes. Its futures raise BrokenProcessPool if one is killed or crashes."""
    return ProcessPoolExecutor(num_workers, initializer=end_with_parent)


def end_with_parent() -> None:
    """Prepare a worker: Ctrl-C is left to the parent, and the worker ends when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by it, a pool of which one worker died ends the others

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def store_pixels(
    folder: Path, images: pd.DataFrame, source: Path, spec: ImageSpec, num_workers: int
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Write the pixels of all images, in their order. Worker processes decode them, this process joins their chunks.

    Returns FACTS of each image, what is wrong with the bad ones, and a histogram `(3, 256) int64`: how often a channel
    of the training images has each value.
    """
    is_train = (images["split"] == "train").to_numpy()
    num_chunks = sum(-(-number // CHUNK_IMAGES) for number in images["split"].value_counts())
    facts = np.zeros(len(images), FACTS)
    bad = []
    histogram = np.zeros((3, 256), np.int64)
    done = 0
    num_workers = max(1, min(num_workers, num_chunks, 61))  # 61: the most that Windows can wait for
    with (
        open(folder / "train_pixels.npy", "wb") as train_file,
        open(folder / "test_images.npy", "wb") as test_file,
        worker_pool(num_workers) as pool,
    ):
        write_header(train_file, (0,))
        write_header(test_file, (0, spec.size, spec.size, 3))
        results = map_ahead(pool, partial(decode_chunk, source, spec), chunks_of(images, folder), 2 * num_workers)
        for chunk, part in progress_bar(results, f"{source.name}: pixels", num_chunks, f" x {CHUNK_IMAGES} images"):
            with open(chunk.file, "rb") as pixels:
                shutil.copyfileobj(pixels, train_file if chunk.split == "train" else test_file)
            chunk.file.unlink()
            was_judged = done >= JUDGED_AFTER
            facts_of_chunk, bad_of_chunk, histogram_of_chunk = part
            facts[done : done + len(chunk.paths)] = facts_of_chunk
            bad += bad_of_chunk
            histogram += histogram_of_chunk
            done += len(chunk.paths)
            if done >= JUDGED_AFTER and not was_judged:
                written = train_file.tell() + test_file.tell()
                test_bytes = 3 * spec.size**2 * (~is_train).sum()
                check_room(folder, written, written / done * is_train.sum() + test_bytes)
        num_pixels = facts["shape"].prod(1, dtype=np.int64)
        train_file.seek(0)
        write_header(train_file, (3 * int(num_pixels[is_train].sum()),))
        test_file.seek(0)
        write_header(test_file, (int(np.count_nonzero(num_pixels[~is_train])), spec.size, spec.size, 3))
    return facts, bad, histogram


def map_ahead(pool: ProcessPoolExecutor, function: Callable, tasks: Iterable, ahead: int) -> Iterator[tuple]:
    """Yield (task, function(task)) in the order of the tasks. `pool.map` would take all of them at once."""
    waiting = collections.deque()
    for task in tasks:
        waiting.append((task, pool.submit(function, task)))
        if len(waiting) > ahead:
            done, future = waiting.popleft()
            yield done, future.result()
    for task, future in waiting:
        yield task, future.result()


def chunks_of(images: pd.DataFrame, folder: Path) -> Iterator[Chunk]:
    """Yield all images, in their order."""
    for split in ("train", "test"):
        paths = images["path"][images["split"] == split].tolist()
        for start in range(0, len(paths), CHUNK_IMAGES):
            yield Chunk(split, paths[start : start + CHUNK_IMAGES], folder / f"{split}_chunk_{start}")


def decode_chunk(source: Path, spec: ImageSpec, chunk: Chunk) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Decode some images, in a worker process, and write their pixels to the file of the chunk. See `store_pixels`."""
    facts = np.zeros(len(chunk.paths), FACTS)
    bad = []
    histogram = np.zeros(3 * 256, np.int64)
    with open(chunk.file, "wb") as file:
        for fact, path in zip(facts, chunk.paths, strict=True):
            try:
                if chunk.split == "test":
                    pixels = read_pixels(source / path, spec)
                else:
                    image = read_resized(source / path, spec, spec.train_size)
                    histogram += image.histogram()
                    pixels = np.asarray(image)
                file.write(pixels.tobytes())
                fact["shape"] = pixels.shape[:2]
            except BadImage as error:
                bad.append(str(error))
            with contextlib.suppress(OSError, ValueError):  # a missing file, or a path that cannot be one
                stat = os.stat(source / path)
                fact["stat"] = stat.st_size, stat.st_mtime
                fact["file_id"] = hash((stat.st_dev, stat.st_ino))
    return facts, bad, histogram.reshape(3, 256)


def check_room(folder: Path, written: int, needed: float) -> None:
    """Raise InputError if the disk is too small for the bytes that a cache needs, of which some are written."""
    free = written + shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"about {tqdm.format_sizeof(needed, 'B')}, only {tqdm.format_sizeof(free, 'B')} are free"
        raise InputError(f"{folder.parent}: the cache needs {sizes}")


def write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Write the header of a .npy file of uint8. It takes as many bytes whatever the first number of the shape is."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def write_split(folder: Path, split: str, images: pd.DataFrame, data_set: Listing) -> dict[str, list[str] | int]:
    """Write the labels, roles and paths of the images of a split. Returns their classes and their number."""
    labels = images["label"].cat.remove_unused_categories()
    np.save(folder / f"{split}_labels.npy", labels.cat.codes.to_numpy(np.int64))
    if split == "test":
        np.save(folder / "test_is_query.npy", images["is_query"].to_numpy())
        np.save(folder / "test_is_gallery.npy", images["is_gallery"].to_numpy())
    # A line each, and where each begins: a reader takes the rows that it needs
    lines = [f"{path}\n".encode() for path in images["path"]]
    np.save(folder / f"{split}_path_offsets.npy", offsets_of(np.fromiter(map(len, lines), np.int64, len(lines))))
    np.save(folder / f"{split}_paths.npy", np.frombuffer(b"".join(lines), np.uint8))
    return {"classes": [data_set.class_name(label) for label in labels.cat.categories], "images": len(images)}


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where each piece of these lengths begins, one after the other, and where the last one ends: `(N + 1,) int64`."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def channel_statistics(histogram: np.ndarray, data_set: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in 0..1: published, or over the pixels of all training images."""
    if data_set in PUBLISHED:
        return list(PUBLISHED[data_set].mean), list(PUBLISHED[data_set].std)
    values, num_pixels = np.arange(256), histogram[0].sum()
    mean = histogram @ values / num_pixels  # of integers: exact, in whatever order they were added
    variance = histogram @ values**2 / num_pixels - mean**2
    std = np.sqrt(np.maximum(variance, 1.0))  # at least one grey level: images of one colour do not divide by zero
    return (mean / 255).round(6).tolist(), (std / 255).round(6).tolist()


def seal(folder: Path) -> dict[str, dict[str, int]]:
    """Flush all finished arrays to disk. Returns the size and the checksum of each."""
    arrays = {}
    for name in sorted(ARRAYS):
        path = folder / f"{name}.npy"
        with open(path, "r+b") as file:
            flush_to_disk(file)
        arrays[name] = {"bytes": path.stat().st_size, "crc32": crc32(path)}
    return arrays
