"""Raw data set -> cache: every image is decoded and resized once, its pixels written to their place."""

import itertools
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dreml.console import InputError, RunError, format_problems, progress_bar
from dreml.data.cache import ARRAYS, CACHE_VERSION, Cache, CacheMeta, cache_folder, read_cache
from dreml.data.images import BadImage, ImageSpec, bad_image, load_rgb, probe_size, resize_test, resize_train
from dreml.data.known_sets import PUBLISHED, count_images, list_data_set
from dreml.data.lists import Entry, Listing
from dreml.data.workers import WorkerDied, worker_pool
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

SECONDS_FOR_A_LOCK = 10  # the workers of a run that was just killed hold it until they notice


@dataclass(frozen=True)
class CacheJob:
    """One cache to make: of which data set, for which images, and how."""

    name: str
    source: Path  # data/NAME
    spec: ImageSpec
    num_workers: int  # processes
    skip_bad: bool  # leave out images that cannot be used


class Place(NamedTuple):
    """Where the pixels of one image go."""

    file: Path
    offset: int
    num_bytes: int


class StoredImage(NamedTuple):
    """What is known of an image after its pixels were written."""

    height: int
    width: int
    sums: np.ndarray | int = 0  # of a training image: `(3,) int64`, the sum of each channel over its pixels,
    squares: np.ndarray | int = 0  # and the sum of its squares


def build_cache(
    data_path: Path, name: str, spec: ImageSpec, num_workers: int, force: bool = False, skip_bad: bool = False
) -> Cache:
    """Turns the raw data set data_path/name into its cache, unless a good one is there and `force` is not set.

    The new cache is made under a temporary name and renamed when whole; until then an earlier one stays as it was.
    Raises UnknownLayout if there is no data set, InputError with all problems found in it.
    """
    job = CacheJob(name, data_path / name, spec, num_workers, skip_bad)
    target = cache_folder(data_path, name, spec)
    lock, skipped_list = target.with_name(f".{target.name}.lock"), target.with_name(f"{target.name}_skipped.txt")
    bring_back(target, lock)
    if not force and (target / "meta.json").exists():
        try:
            cache = read_cache(data_path, name, spec)
            print(f"{name}: {target} is there already (--force makes it again)")
            return cache
        except InputError as error:
            print(f"{name}: making the cache again: {error}", file=sys.stderr)
    listing = list_data_set(name, job.source)
    held = take_lock(lock, SECONDS_FOR_A_LOCK)
    if held is None:
        raise InputError(f"{target} is being made by another process")
    with held:
        for leftover in target.parent.glob(f".{target.name}.*-*"):  # of a run that was killed
            shutil.rmtree(leftover)
        remove_leftovers(target.parent, skipped_list.name)
        new = temporary_name(target, "new")
        try:
            new.mkdir()
            skipped = write_cache(new, listing, job)
            write_skipped(skipped_list, skipped)
            replace_folder(new, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return read_cache(data_path, name, spec)


def bring_back(target: Path, lock: Path) -> None:
    """Gives an earlier cache its name back, if a run was killed between the two renames of `replace_folder`."""
    if target.exists() or not any(target.parent.glob(f".{target.name}.old-*/meta.json")):
        return
    held = take_lock(lock, SECONDS_FOR_A_LOCK)
    if held is None:
        return
    with held:
        for earlier in target.parent.glob(f".{target.name}.old-*/meta.json"):
            if not target.exists():
                os.rename(earlier.parent, target)


def write_cache(folder: Path, listing: Listing, job: CacheJob) -> list[str]:
    """Fills `folder` with a whole cache. Memory: a few images a worker.

    Returns what is wrong with the images that were left out.
    """
    for split, (num_classes, num_images) in count_images(listing.entries).items():
        print(f"{job.name}: {split} lists {num_classes:,} classes, {num_images:,} images", flush=True)
    for warning in listing.warnings:
        print(f"{job.name}: warning: {warning}", file=sys.stderr)

    results = store_images(folder, listing.entries, job)
    skipped = [str(result) for result in results if isinstance(result, BadImage)]
    stored = [
        (entry, result)
        for entry, result in zip(listing.entries, results, strict=True)
        if isinstance(result, StoredImage)
    ]
    check_stored([entry for entry, _ in stored], skipped, listing.problems, job)
    write_arrays(folder, stored, job)
    return skipped


# ------------------------------------------------------------------------------------------------ pixels


def store_images(folder: Path, entries: list[Entry], job: CacheJob) -> list[StoredImage | BadImage]:
    """Writes the pixels of all images into two files, in worker processes. Returns how each image went."""
    num_workers = max(1, min(job.num_workers, len(entries), 61))  # 61: the most that Windows can wait for
    try:
        with worker_pool(num_workers) as pool:
            # The headers give every image its place before any is decoded, so that workers write in parallel. (A
            # rotation by EXIF, applied later, swaps the sides and keeps the number of pixels.)
            probe = partial(probe_image, job.source, job.spec)
            sizes = map_images(pool, f"{job.name}: headers", probe, entries)
            results: list = list(sizes)
            store = partial(store_image, job.source, job.spec)
            while True:
                good = [number for number, result in enumerate(results) if not isinstance(result, BadImage)]
                images = [entries[number] for number in good]
                places = allocate(folder, images, [sizes[number] for number in good], job.spec.size)
                stored = map_images(pool, f"{job.name}: pixels", store, images, places)
                for number, result in zip(good, stored, strict=True):
                    results[number] = result
                if not job.skip_bad or not any(isinstance(result, BadImage) for result in stored):
                    return results
                # else once more, without those that turned out to be damaged
    except WorkerDied:
        raise RunError("a worker process was killed, for lack of memory perhaps; try fewer --num_workers") from None


def map_images(pool: ProcessPoolExecutor, title: str, function: Callable, *columns: list) -> list:
    """Calls function(entry, ...) for every image in the pool. Returns the results, or a BadImage in their place."""
    results = pool.map(partial(outcome, function), *columns, chunksize=32)
    return list(progress_bar(results, title, len(columns[0])))


def outcome(function: Callable, *args: object) -> object:
    """function(*args), or the BadImage that it raises: a raised one would end the whole `pool.map`."""
    try:
        return function(*args)
    except BadImage as bad:
        return bad


def probe_image(source: Path, spec: ImageSpec, entry: Entry) -> int:
    """Reads one image's header: the bytes that its pixels will take. Raises BadImage."""
    if entry.split == "test":
        probe_size(source / entry.path, spec, spec.size)
        return spec.size**2 * 3
    width, height = probe_size(source / entry.path, spec, spec.train_size)
    return width * height * 3


def allocate(folder: Path, entries: list[Entry], sizes: list[int], image_size: int) -> list[Place]:
    """Makes the two pixel files in their full size, for images of these sizes in bytes, training images first.

    Returns each image's place.
    """
    files = {"train": folder / "train_pixels.npy", "test": folder / "test_images.npy"}
    for path in files.values():
        path.unlink(missing_ok=True)  # of the first try, when --skip_bad found damaged images
    needed, free = sum(sizes), shutil.disk_usage(folder).free
    if needed + 2**24 > free:  # 16 MiB for all that is not pixels
        sizes_text = f"needs {tqdm.format_sizeof(needed, 'B')}, only {tqdm.format_sizeof(free, 'B')} are free"
        raise InputError(f"{folder.parent}: the cache {sizes_text}")
    places = []
    for split, path in files.items():
        of_split = [size for size, entry in zip(sizes, entries, strict=True) if entry.split == split]
        shape = (sum(of_split),) if split == "train" else (len(of_split), image_size, image_size, 3)
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            *starts, end = itertools.accumulate(of_split, initial=file.tell())
            file.truncate(end)
        places += [Place(path, start, size) for start, size in zip(starts, of_split, strict=True)]
    return places


def store_image(source: Path, spec: ImageSpec, entry: Entry, place: Place) -> StoredImage:
    """Decodes one image and writes its pixels to their place. Raises BadImage."""
    path = source / entry.path
    try:
        resize = resize_train if entry.split == "train" else resize_test
        pixels = resize(load_rgb(path), spec)
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them raise
        raise bad_image(path, error) from None
    if pixels.nbytes != place.num_bytes:  # would overwrite the next image
        raise BadImage(f"{path}: unreadable (its header gives another size than its pixels)")
    with open(place.file, "r+b") as file:  # not a memory map, whose writer dies of SIGBUS when the disk is full
        file.seek(place.offset)
        file.write(np.ascontiguousarray(pixels))
    height, width, _ = pixels.shape
    if entry.split == "test":
        return StoredImage(height, width)
    rows = pixels.reshape(height, -1)  # sums along three channels at a time would be slow
    sums, squares = rows.sum(0, dtype=np.int64), np.einsum("ij,ij->j", rows, rows, dtype=np.int64)
    return StoredImage(height, width, sums.reshape(-1, 3).sum(0), squares.reshape(-1, 3).sum(0))  # integers: exact


# ------------------------------------------------------------------------------------------------ what goes beside them


def check_stored(entries: list[Entry], skipped: list[str], of_lists: list[str], job: CacheJob) -> None:
    """Raises InputError with the problems of the lists, of the images, and with a split that is empty without them."""
    problems = of_lists if job.skip_bad else of_lists + skipped
    if not problems:
        problems = [f"no image is left in {part}" for part, (_, number) in count_images(entries).items() if number == 0]
    if problems:
        only_images = skipped and not job.skip_bad and not of_lists
        remedy = "; --skip_bad goes on without bad images" if only_images else ""
        raise InputError(f"{job.name}: {len(problems):,} problems, nothing written{remedy}:{format_problems(problems)}")


def write_arrays(folder: Path, stored: list[tuple[Entry, StoredImage]], job: CacheJob) -> None:
    """Writes all that is not pixels: sizes, labels, roles, and last meta.json."""
    train, test = ([pair for pair in stored if pair[0].split == split] for split in ("train", "test"))
    sizes = [(image.height, image.width) for _, image in train]
    arrays = {
        "train_sizes": np.array(sizes, np.int32),
        "train_offsets": np.cumsum([0] + [height * width * 3 for height, width in sizes], dtype=np.int64),
        "test_is_query": np.array([entry.is_query for entry, _ in test], bool),
        "test_is_gallery": np.array([entry.is_gallery for entry, _ in test], bool),
    }
    splits = {}
    for split, pairs in (("train", train), ("test", test)):
        # In the order of the entries, which are sorted by class.
        classes = {entry.class_key: entry.class_name for entry, _ in pairs}
        label_of = {key: label for label, key in enumerate(classes)}
        splits[split] = {"classes": list(classes.values()), "paths": [entry.path for entry, _ in pairs]}
        arrays[f"{split}_labels"] = np.array([label_of[entry.class_key] for entry, _ in pairs], np.int64)
    for array_name, array in arrays.items():
        np.save(folder / f"{array_name}.npy", array, allow_pickle=False)
    with ThreadPoolExecutor(2) as threads:  # the two large files at once
        sealed = threads.map(seal, [folder / f"{array_name}.npy" for array_name in sorted(ARRAYS)])
        sums = dict(zip(sorted(ARRAYS), sealed, strict=True))
    mean, std = channel_statistics([image for _, image in train], job.name)
    meta = CacheMeta(CACHE_VERSION, job.spec.size, job.spec.resize, mean, std, **splits, arrays=sums)
    write_record(folder / "meta.json", meta)


def channel_statistics(images: list[StoredImage], data_set: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in 0..1: published, or over the pixels of all training images."""
    if data_set in PUBLISHED:
        return list(PUBLISHED[data_set].mean), list(PUBLISHED[data_set].std)
    num_pixels = sum(image.height * image.width for image in images)
    mean = sum(image.sums for image in images) / num_pixels
    variance = sum(image.squares for image in images) / num_pixels - mean**2
    std = np.sqrt(np.maximum(variance, 1.0))  # at least one grey level: images of one colour do not divide by zero
    return (mean / 255).round(6).tolist(), (std / 255).round(6).tolist()


def seal(path: Path) -> dict[str, int]:
    """Flushes a finished array to disk and returns its size and checksum."""
    with open(path, "r+b") as file:
        flush_to_disk(file)
    return {"bytes": path.stat().st_size, "crc32": crc32(path)}


def write_skipped(path: Path, skipped: list[str]) -> None:
    """Lists the images that --skip_bad left out of the cache beside it. Removes an earlier list if none was."""
    path.unlink(missing_ok=True)
    if skipped:
        with atomic_open(path) as file:
            file.write("\n".join(skipped) + "\n")
        print(f"{len(skipped):,} bad images were left out; they are listed in {path}", file=sys.stderr)
