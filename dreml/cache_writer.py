"""Raw data set -> cache: every image is decoded and resized once, and its pixels are appended to one file a split."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from dreml.cache import ARRAYS, CACHE_VERSION, Cache, CacheMeta, Holdout, cache_folder, read_cache
from dreml.cli import InputError, RunError, format_problems, progress_bar
from dreml.datasets import PUBLISHED, RawDataSet, count_images, hold_out, list_data_set
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
from dreml.workers import map_ahead, worker_pool

CHUNK_IMAGES = 32  # that a worker is given at a time, at most;
CHUNK_BYTES = 2**21  # fewer where their pixels would be more than about this
JUDGED_AFTER = 1000  # images: from their size, that of the whole cache is estimated
SECONDS_FOR_A_LOCK = 10  # the workers of a run that was just killed hold it until they notice


class CacheJob(NamedTuple):
    """One cache to make: of which data set, for which images, and how."""

    name: str
    source: Path  # data/NAME
    spec: ImageSpec
    num_workers: int  # processes
    skip_bad: bool  # leave out images that cannot be used


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
    job = CacheJob(name, data_path / name, spec, num_workers, skip_bad)
    if holdout is not None:
        name = holdout.name_of(name)
    target = cache_folder(data_path, name, spec)
    lock = target.with_name(f".{target.name}.lock")
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
    data_set = list_data_set(job.name, job.source)
    if holdout is not None:
        data_set = hold_out(data_set, holdout)
        target.parent.mkdir(exist_ok=True)
    held = take_lock(lock, SECONDS_FOR_A_LOCK)
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
            skipped = write_cache(new, data_set, job)
            write_skipped(skipped_list, skipped)
            replace_folder(new, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return read_cache(data_path, name, spec)


def check_share(cache: Cache, holdout: Holdout) -> None:
    """Raise InputError if the cache of a holdout data set has another share of the classes."""
    num_train = cache.counts["train"][0]
    num_test = cache.counts["test"][0]
    if num_test != round(holdout.share * (num_train + num_test)):
        raise InputError(
            f"{cache.folder} holds out {num_test} of {num_train + num_test} classes, not --holdout {holdout.share:g}; "
            "--force makes it again"
        )


def bring_back(target: Path, lock: Path) -> None:
    """Give an earlier cache its name back, if a run was killed between the two renames of `replace_folder`."""
    if target.exists() or not any(target.parent.glob(f".{target.name}.old-*/meta.json")):
        return
    held = take_lock(lock, SECONDS_FOR_A_LOCK)
    if held is None:
        return
    with held:
        for earlier in target.parent.glob(f".{target.name}.old-*/meta.json"):
            if not target.exists():
                os.rename(earlier.parent, target)


def write_cache(folder: Path, data_set: RawDataSet, job: CacheJob) -> list[str]:
    """Fill `folder` with a whole cache. Returns what is wrong with the images that were left out."""
    listed = count_images(data_set.images)
    for split, (num_classes, num_images) in listed.items():
        print(f"{job.name}: {split} lists {num_classes:,} classes, {num_images:,} images", flush=True)
    for warning in data_set.warnings:
        print(f"{job.name}: warning: {warning}", file=sys.stderr)

    try:
        sizes, bad, histogram = store_pixels(folder, data_set.images, job)
    except BrokenProcessPool:
        time.sleep(0.1)  # a SIGTERM to the whole group reaches this process at about the same time
        raise RunError("a worker process was killed, for lack of memory perhaps; try fewer --num_workers") from None
    is_good = sizes[:, 0] > 0
    images = data_set.images[is_good]
    sizes = sizes[is_good]

    problems = list(data_set.problems) if job.skip_bad else data_set.problems + bad
    if not problems:
        for part, (_, number) in count_images(images).items():
            if number == 0 and listed[part][1] > 0:
                problems.append(f"no image is left in {part}")
    if problems:
        only_images = bad and not job.skip_bad and not data_set.problems
        remedy = "; --skip_bad goes on without bad images" if only_images else ""
        raise InputError(f"{job.name}: {len(problems):,} problems, nothing written{remedy}:{format_problems(problems)}")

    write_sizes(folder, sizes[images["split"] == "train"])
    splits = {split: write_split(folder, split, images[images["split"] == split]) for split in ("train", "test")}
    mean, std = channel_statistics(histogram, job.name)
    meta = CacheMeta(CACHE_VERSION, job.spec.size, job.spec.resize, mean, std, **splits, arrays=seal(folder))
    write_record(folder / "meta.json", meta)
    return bad


# ------------------------------------------------------------------------------------------------ pixels


class Chunk(NamedTuple):
    """Images of one split, one after the other, as a worker is given them."""

    split: str
    paths: list[str]
    file: Path  # for their pixels: a worker that is killed while it sends much through a pipe would block its parent


class ChunkResult(NamedTuple):
    """What a worker found in a chunk, whose file has the pixels of the good images, one after the other."""

    sizes: np.ndarray  # (n, 2) int32, (height, width); 0 of a bad image
    bad: list[str]  # what is wrong with the bad images
    histogram: np.ndarray  # (3, 256) int64, how often a channel of the training images has each value


def store_pixels(folder: Path, images: pd.DataFrame, job: CacheJob) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Write the pixels of all images, in their order. Worker processes decode them, this process joins their chunks.

    Returns:
        sizes: `(N, 2) int32`, (height, width) of every image in the cache; 0 of a bad one, which has no pixels there.
        bad: what is wrong with the bad images.
        histogram: `(3, 256) int64`, how often a channel of the training images has each value.
    """
    sizes = np.zeros((len(images), 2), np.int32)
    bad = []
    histogram = np.zeros((3, 256), np.int64)
    chunk_size = min(CHUNK_IMAGES, max(1, CHUNK_BYTES // (3 * job.spec.train_size**2)))
    num_workers = max(1, min(job.num_workers, len(images), 61))  # 61: the most that Windows can wait for
    done = 0
    with (
        open(pixel_file(folder, "train"), "wb") as train_file,
        open(pixel_file(folder, "test"), "wb") as test_file,
        worker_pool(num_workers) as pool,
    ):
        files = {"train": train_file, "test": test_file}
        for split, file in files.items():
            write_header(file, pixel_shape(split, 0, job.spec))
        decode = partial(decode_chunk, job.source, job.spec)
        results = map_ahead(pool, decode, chunks_of(images, chunk_size, folder), ahead=2 * num_workers)
        num_chunks = sum(-(-number // chunk_size) for number in images["split"].value_counts())
        for chunk, result in progress_bar(results, f"{job.name}: pixels", num_chunks, f" x {chunk_size} images"):
            with open(chunk.file, "rb") as pixels:
                shutil.copyfileobj(pixels, files[chunk.split])
            chunk.file.unlink()
            sizes[done : done + len(chunk.paths)] = result.sizes
            bad += result.bad
            histogram += result.histogram
            was_judged = done >= JUDGED_AFTER
            done += len(chunk.paths)
            if done >= JUDGED_AFTER and not was_judged:
                check_room(folder, images, sizes[:done], job.spec)
        for split, file in files.items():
            of_split = sizes[images["split"] == split].prod(1, dtype=np.int64)
            file.seek(0)
            write_header(file, pixel_shape(split, 3 * int(of_split.sum()), job.spec))
    return sizes, bad, histogram


def chunks_of(images: pd.DataFrame, chunk_size: int, folder: Path) -> Iterator[Chunk]:
    """Yield all images, in their order."""
    for split in ("train", "test"):
        paths = images["path"][images["split"] == split]
        for start in range(0, len(paths), chunk_size):
            some = paths.iloc[start : start + chunk_size].tolist()
            yield Chunk(split, some, folder / f"{split}_chunk_{start}")


def decode_chunk(source: Path, spec: ImageSpec, chunk: Chunk) -> ChunkResult:
    """Decode and resize some images, in a worker process."""
    sizes = np.zeros((len(chunk.paths), 2), np.int32)
    bad = []
    histogram = np.zeros(3 * 256, np.int64)
    with open(chunk.file, "wb") as file:
        for place, path in enumerate(chunk.paths):
            try:
                if chunk.split == "test":
                    pixels = read_pixels(source / path, spec)
                else:
                    image = read_resized(source / path, spec, spec.train_size)
                    histogram += image.histogram()
                    pixels = np.asarray(image)
            except BadImage as error:
                bad.append(str(error))
            else:
                file.write(pixels.tobytes())
                sizes[place] = pixels.shape[:2]
    return ChunkResult(sizes, bad, histogram.reshape(3, 256))


def check_room(folder: Path, images: pd.DataFrame, sizes: np.ndarray, spec: ImageSpec) -> None:
    """Raise InputError if the disk is too small for the cache, judged by the sizes of its first images.

    `sizes` `(n, 2) int32`: the (height, width) of those that are written already.
    """
    written = 3 * int(sizes.prod(1, dtype=np.int64).sum())
    num_train = int((images["split"] == "train").sum())
    train_sizes = sizes[:num_train]
    pixels_an_image = train_sizes.prod(1, dtype=np.int64).sum() / max(1, np.count_nonzero(train_sizes[:, 0]))
    train_bytes = 3 * pixels_an_image * num_train
    test_bytes = 3 * spec.size**2 * (len(images) - num_train)
    needed = int(train_bytes + test_bytes) + 128 * len(images)  # with all that is not pixels
    free = written + shutil.disk_usage(folder).free
    if needed > free:
        sizes_text = f"about {tqdm.format_sizeof(needed, 'B')}, only {tqdm.format_sizeof(free, 'B')} are free"
        raise InputError(f"{folder.parent}: the cache needs {sizes_text}")


def pixel_file(folder: Path, split: str) -> Path:
    """The file for the pixels of a split."""
    return folder / {"train": "train_pixels.npy", "test": "test_images.npy"}[split]


def pixel_shape(split: str, num_bytes: int, spec: ImageSpec) -> tuple[int, ...]:
    """The shape of the array in `pixel_file`."""
    if split == "train":
        return (num_bytes,)
    return (num_bytes // (3 * spec.size**2), spec.size, spec.size, 3)


def write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Write the header of a .npy file of uint8. It takes as many bytes whatever the first number of the shape is."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


# ------------------------------------------------------------------------------------------------ what goes beside them


def write_sizes(folder: Path, sizes: np.ndarray) -> None:
    """Write where the pixels of each training image lie. `sizes` `(N, 2) int32`: (height, width)."""
    np.save(folder / "train_sizes.npy", sizes)
    np.save(folder / "train_offsets.npy", offsets_of(3 * sizes.prod(1, dtype=np.int64)))


def write_split(folder: Path, split: str, images: pd.DataFrame) -> dict[str, list[str] | int]:
    """Write the labels, roles and paths of the images of a split. Returns their classes and their number."""
    labels = images["label"].cat.remove_unused_categories()
    names = images.groupby(labels, observed=True)["class_name"].last()
    np.save(folder / f"{split}_labels.npy", labels.cat.codes.to_numpy(np.int64))
    if split == "test":
        np.save(folder / "test_is_query.npy", images["is_query"].to_numpy())
        np.save(folder / "test_is_gallery.npy", images["is_gallery"].to_numpy())
    # A line each, and where each begins: a reader takes the rows that it needs
    lines = [f"{path}\n".encode() for path in images["path"]]
    np.save(folder / f"{split}_path_offsets.npy", offsets_of(np.fromiter(map(len, lines), np.int64, len(lines))))
    np.save(folder / f"{split}_paths.npy", np.frombuffer(b"".join(lines), np.uint8))
    return {"classes": names.tolist(), "images": len(images)}


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where each piece of these lengths begins, one after the other, and where the last one ends: `(N + 1,) int64`."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


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


def write_skipped(path: Path, skipped: list[str]) -> None:
    """List the images that --skip_bad left out of the cache beside it. An earlier list goes if there are none."""
    path.unlink(missing_ok=True)
    if skipped:
        with atomic_open(path) as file:
            file.write("\n".join(skipped) + "\n")
        print(f"{len(skipped):,} bad images were left out; they are listed in {path}", file=sys.stderr)
