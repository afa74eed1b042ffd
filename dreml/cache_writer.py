"""Raw data set -> cache: every image is decoded and resized once, its pixels written to their place."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from dreml.cache import ARRAYS, CACHE_VERSION, Cache, CacheMeta, Holdout, cache_folder, read_cache
from dreml.cli import InputError, RunError, format_problems, progress_bar
from dreml.datasets import PUBLISHED, count_images, hold_out, list_data_set
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
from dreml.images import BadImage, ImageSpec, bad_image, load_rgb, probe_size, resize_test, resized
from dreml.lists import GALLERY, QUERY, Entries, Listing
from dreml.workers import WorkerDied, map_ahead, worker_pool

SECONDS_FOR_A_LOCK = 10  # the workers of a run that was just killed hold it until they notice
CHUNK = 32  # images that a worker is given at a time


@dataclass(frozen=True)
class CacheJob:
    """One cache to make: of which data set, for which images, and how."""

    name: str
    source: Path  # data/NAME
    spec: ImageSpec
    num_workers: int  # processes
    skip_bad: bool  # leave out images that cannot be used


class Chunk(NamedTuple):
    """Images of one split, one after the other, as a worker is given them."""

    split: str
    rows: np.ndarray  # (n,) int64, of the entries
    paths: list[str]
    sizes: np.ndarray  # (n, 2) int32, (height, width) in the cache; before the headers are read, 0
    offset: int  # where their pixels begin in the file of their split


class ChunkResult(NamedTuple):
    """What a worker found in a chunk."""

    sizes: np.ndarray  # (n, 2) int32, (height, width) in the cache; 0 of a bad image
    bad: dict[int, str]  # place in the chunk -> what is wrong with the image
    histogram: np.ndarray | int = 0  # of training images that were stored: see Images


@dataclass
class Images:
    """What is known of all images, row by row of the entries."""

    sizes: np.ndarray  # (N, 2) int32, (height, width) in the cache; 0 of a bad image
    good: np.ndarray  # (N,) bool, those that were not found to be bad
    bad: dict[int, str] = field(default_factory=dict)  # row -> what is wrong with the image
    histogram: np.ndarray | int = 0  # (3, 256) int64, how often a channel of the training images has each value

    def add(self, chunk: Chunk, result: ChunkResult) -> None:
        """Takes over what a worker found."""
        self.sizes[chunk.rows] = result.sizes
        self.good[chunk.rows] = result.sizes[:, 0] > 0
        self.bad.update((int(chunk.rows[place]), problem) for place, problem in result.bad.items())
        self.histogram += result.histogram

    def good_rows(self, rows: range) -> np.ndarray:
        """Those of some rows whose images are good: `(n,) int64`."""
        return rows.start + np.flatnonzero(self.good[rows.start : rows.stop])

    def num_bytes(self, rows: np.ndarray) -> np.ndarray:
        """How many bytes the pixels of some images take: `(len(rows),) int64`."""
        return 3 * self.sizes[rows].prod(1, dtype=np.int64)


def build_cache(
    data_path: Path,
    name: str,
    spec: ImageSpec,
    num_workers: int,
    force: bool = False,
    skip_bad: bool = False,
    holdout: Holdout | None = None,
) -> Cache:
    """Turns the raw data set data_path/name into its cache, unless a good one is there and `force` is not set.

    With `holdout`, its training images alone into that of NAME_holdout, see `hold_out`. The new cache is made under a
    temporary name and renamed when whole; until then an earlier one stays as it was. Raises UnknownLayout if there is
    no data set, InputError with all problems found in it.
    """
    job = CacheJob(name, data_path / name, spec, num_workers, skip_bad)
    if holdout is not None:
        name = holdout.name_of(name)
    target = cache_folder(data_path, name, spec)
    lock, skipped_list = target.with_name(f".{target.name}.lock"), target.with_name(f"{target.name}_skipped.txt")
    bring_back(target, lock)
    if not force and (target / "meta.json").exists():
        try:
            cache = read_cache(data_path, name, spec)
        except InputError as error:
            print(f"{name}: making the cache again: {error}", file=sys.stderr)
        else:
            if holdout is not None:
                check_share(cache, holdout)
            print(f"{name}: {target} is there already (--force makes it again)")
            return cache
    listing = list_data_set(job.name, job.source)
    if holdout is not None:
        listing = hold_out(listing, holdout)
        target.parent.mkdir(exist_ok=True)
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


def check_share(cache: Cache, holdout: Holdout) -> None:
    """Raises InputError if the cache of a holdout data set has another share of the classes."""
    num_train, num_test = (cache.counts[split][0] for split in ("train", "test"))
    if num_test != round(holdout.share * (num_train + num_test)):
        raise InputError(
            f"{cache.folder} holds out {num_test} of {num_train + num_test} classes, not --holdout {holdout.share:g}; "
            "--force makes it again"
        )


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

    images = store_images(folder, listing.entries, job)
    skipped = [images.bad[row] for row in sorted(images.bad)]
    check_stored(count_images(listing.entries, images.good), skipped, listing, job)
    write_arrays(folder, listing.entries, images, job)
    return skipped


# ------------------------------------------------------------------------------------------------ pixels


def store_images(folder: Path, entries: Entries, job: CacheJob) -> Images:
    """Writes the pixels of all images into two files, in worker processes. Returns how it went."""
    images = Images(np.zeros((len(entries), 2), np.int32), np.ones(len(entries), bool))
    num_workers = max(1, min(job.num_workers, len(entries), 61))  # 61: the most that Windows can wait for
    try:
        with worker_pool(num_workers) as pool:
            # The headers give every image its place before any is decoded, so that workers write in parallel. (A
            # rotation by EXIF, applied later, swaps the sides and keeps the number of pixels.)
            run = partial(each_chunk, partial(map_ahead, pool, ahead=4 * num_workers), entries, images)
            run(f"{job.name}: headers", partial(probe_chunk, job.source, job.spec), {"train": 0, "test": 0})
            while True:
                starts, num_bad = allocate(folder, entries, images, job.spec.size), len(images.bad)
                images.histogram = 0
                run(f"{job.name}: pixels", partial(store_chunk, job.source, job.spec, folder), starts)
                if not job.skip_bad or len(images.bad) == num_bad:
                    return images
                # else once more, without those that turned out to be damaged
    except WorkerDied:
        raise RunError("a worker process was killed, for lack of memory perhaps; try fewer --num_workers") from None


def each_chunk(
    map_in_workers: Callable[[Callable, Iterator[Chunk]], Iterator[tuple[Chunk, ChunkResult]]],
    entries: Entries,
    images: Images,
    title: str,
    function: Callable[[Chunk], ChunkResult],
    starts: dict[str, int],
) -> None:
    """Has function(chunk) called for all images that are not bad, and adds the results to `images`.

    The pixels of the first image of each split begin at `starts` in their file, the others follow.
    """
    rows_of = {split: images.good_rows(entries.rows_of(split)) for split in starts}

    def chunks() -> Iterator[Chunk]:
        for split, rows in rows_of.items():
            offset = starts[split]
            for start in range(0, len(rows), CHUNK):
                some = rows[start : start + CHUNK]
                yield Chunk(split, some, [entries.path(row) for row in some.tolist()], images.sizes[some], offset)
                offset += int(images.num_bytes(some).sum())

    total = sum(-(-len(rows) // CHUNK) for rows in rows_of.values())
    for chunk, result in progress_bar(map_in_workers(function, chunks()), title, total, f" x {CHUNK} images"):
        images.add(chunk, result)


def probe_chunk(source: Path, spec: ImageSpec, chunk: Chunk) -> ChunkResult:
    """Reads the headers of some images."""
    sizes, bad = np.zeros_like(chunk.sizes), {}
    for place, path in enumerate(chunk.paths):
        try:
            if chunk.split == "train":
                sizes[place] = probe_size(source / path, spec, spec.train_size)[::-1]
            else:
                probe_size(source / path, spec, spec.size)
                sizes[place] = spec.size
        except BadImage as error:
            bad[place] = str(error)
    return ChunkResult(sizes, bad)


def allocate(folder: Path, entries: Entries, images: Images, image_size: int) -> dict[str, int]:
    """Makes the two pixel files in their full size. Returns where the pixels begin in that of each split."""
    files = {split: pixel_file(folder, split) for split in ("train", "test")}
    for path in files.values():
        path.unlink(missing_ok=True)  # of the first try, when --skip_bad found damaged images
    sizes = {split: int(images.num_bytes(images.good_rows(entries.rows_of(split))).sum()) for split in files}
    needed, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if needed + 2**24 + 128 * len(entries) > free:  # with all that is not pixels
        sizes_text = f"needs {tqdm.format_sizeof(needed, 'B')}, only {tqdm.format_sizeof(free, 'B')} are free"
        raise InputError(f"{folder.parent}: the cache {sizes_text}")
    starts = {}
    for split, path in files.items():
        shape = (sizes[split],)
        if split == "test":
            shape = (sizes[split] // (3 * image_size**2), image_size, image_size, 3)
        with open(path, "wb") as file:
            write_header(file, shape)
            starts[split] = file.tell()
            file.truncate(file.tell() + sizes[split])
    return starts


def pixel_file(folder: Path, split: str) -> Path:
    """The file for the pixels of a split."""
    return folder / {"train": "train_pixels.npy", "test": "test_images.npy"}[split]


def write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Begins a .npy file of uint8 whose content will follow."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def store_chunk(source: Path, spec: ImageSpec, folder: Path, chunk: Chunk) -> ChunkResult:
    """Decodes some images and writes their pixels to their places."""
    sizes, bad, histogram, offset = np.zeros_like(chunk.sizes), {}, np.zeros(3 * 256, np.int64), chunk.offset
    with open(pixel_file(folder, chunk.split), "r+b") as file:  # a memory map's writer dies of SIGBUS on a full disk
        for place, (path, (height, width)) in enumerate(zip(chunk.paths, chunk.sizes.tolist(), strict=True)):
            try:
                pixels, counts = decode(source / path, spec, chunk.split)
                if pixels.nbytes != 3 * height * width:  # would overwrite the next image
                    raise BadImage(f"{source / path}: unreadable (its header gives another size than its pixels)")
                file.seek(offset)
                file.write(pixels)
                sizes[place] = pixels.shape[:2]
                histogram += counts
            except BadImage as error:
                bad[place] = str(error)
            offset += 3 * height * width
    return ChunkResult(sizes, bad, histogram.reshape(3, 256))


def decode(path: Path, spec: ImageSpec, split: str) -> tuple[np.ndarray, list[int] | int]:
    """The pixels of an image file as they are cached, `(H, W, 3) uint8`, and their histogram if it is for training.

    Raises BadImage.
    """
    try:
        image = load_rgb(path)
        if split == "test":
            return np.ascontiguousarray(resize_test(image, spec)), 0
        image = resized(image, spec, spec.train_size)
        return np.ascontiguousarray(image), image.histogram()
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them raise
        raise bad_image(path, error) from None


# ------------------------------------------------------------------------------------------------ what goes beside them


def check_stored(counts: dict[str, tuple[int, int]], skipped: list[str], listing: Listing, job: CacheJob) -> None:
    """Raises InputError with the problems of the lists, of the images, and with a split that is empty without them."""
    of_lists, listed = listing.problems, count_images(listing.entries)
    problems = of_lists if job.skip_bad else of_lists + skipped
    if not problems:
        empty = (part for part, (_, number) in counts.items() if number == 0 and listed[part][1])
        problems = [f"no image is left in {part}" for part in empty]
    if problems:
        only_images = skipped and not job.skip_bad and not of_lists
        remedy = "; --skip_bad goes on without bad images" if only_images else ""
        raise InputError(f"{job.name}: {len(problems):,} problems, nothing written{remedy}:{format_problems(problems)}")


def write_arrays(folder: Path, entries: Entries, images: Images, job: CacheJob) -> None:
    """Writes all that is not pixels: sizes, labels, roles, paths, and last meta.json."""

    def save(name: str, array: np.ndarray) -> None:
        np.save(folder / f"{name}.npy", array, allow_pickle=False)

    splits = {}
    for split in ("train", "test"):
        rows = images.good_rows(entries.rows_of(split))
        if split == "train":
            save("train_sizes", images.sizes[rows])
            save("train_offsets", offsets_of(images.num_bytes(rows)))
        else:
            save("test_is_query", entries.roles[rows] & QUERY > 0)
            save("test_is_gallery", entries.roles[rows] & GALLERY > 0)
        numbers = entries.class_numbers[rows]
        present = np.bincount(numbers, minlength=len(entries.classes)) > 0
        save(f"{split}_labels", (np.cumsum(present) - 1)[numbers])
        write_paths(folder, split, entries, rows)
        classes = [entries.classes[number].name for number in np.flatnonzero(present)]
        splits[split] = {"classes": classes, "images": len(rows)}
    mean, std = channel_statistics(images.histogram, job.name)
    meta = CacheMeta(CACHE_VERSION, job.spec.size, job.spec.resize, mean, std, **splits, arrays=seal(folder))
    write_record(folder / "meta.json", meta)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where each of some pieces begins that follow one another, and where the last one ends: `(N + 1,) int64`."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def write_paths(folder: Path, split: str, entries: Entries, rows: np.ndarray) -> None:
    """Writes the paths of a split, a line each, and where each begins: a reader takes the rows that it needs."""
    offsets = offsets_of(entries.path_lengths[rows] + 1)
    np.save(folder / f"{split}_path_offsets.npy", offsets, allow_pickle=False)
    with open(folder / f"{split}_paths.npy", "wb") as file:
        write_header(file, (int(offsets[-1]),))
        file.writelines(f"{entries.path(row)}\n".encode() for row in rows)


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
    """Flushes all finished arrays to disk. Returns the size and the checksum of each."""

    def flush(path: Path) -> None:
        with open(path, "r+b") as file:
            flush_to_disk(file)

    names = sorted(ARRAYS)
    paths = [folder / f"{name}.npy" for name in names]
    with ThreadPoolExecutor(2) as disk, ThreadPoolExecutor(2) as threads:  # the two large files at once
        flushed, sums = disk.map(flush, paths), threads.map(crc32, paths)  # while the disk writes, sums are computed
        list(flushed)
        return {n: {"bytes": p.stat().st_size, "crc32": crc} for n, p, crc in zip(names, paths, sums, strict=True)}


def write_skipped(path: Path, skipped: list[str]) -> None:
    """Lists the images that --skip_bad left out of the cache beside it. Removes an earlier list if none was."""
    path.unlink(missing_ok=True)
    if skipped:
        with atomic_open(path) as file:
            file.write("\n".join(skipped) + "\n")
        print(f"{len(skipped):,} bad images were left out; they are listed in {path}", file=sys.stderr)
