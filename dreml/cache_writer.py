"""Raw data set -> cache: every image is decoded and resized once, and its pixels are appended to one file a split."""

import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd

from dreml.cache import ARRAYS, CACHE_VERSION, Cache, CacheMeta, cache_folder, read_cache
from dreml.cli import InputError, RunError, ahead, counted, progress_bar
from dreml.datasets import OTHER_DATA_PATH, PUBLISHED, count_images, list_data_set, refuse
from dreml.files import crc32, flush_to_disk, replace_folder, take_lock, temporary_name, writable, write_record
from dreml.images import ImageSpec, bad_image, load_rgb, resize_test, resized
from dreml.lists import LISTED, list_files, warn_of_changes

CHUNK_IMAGES = 32  # that a worker is given at a time
FACTS = ("height", "width", "file_id")  # of an image: its size in the cache, 0 of a bad one; the same for any path
SKIPPED = "skipped.txt"  # in a cache: what is wrong with the bad images
SECONDS_FOR_A_LOCK = 10  # the workers of a run that was just killed hold it until they notice


def build_cache(
    data_path: Path, name: str, spec: ImageSpec, num_workers: int, force: bool = False, skip_bad: bool = False
) -> Cache:
    """Turn the raw data set data_path/name into its cache, unless a good one is there and `force` is not set.

    The new cache is made under a temporary name and renamed when it is whole; until then an earlier one stays as it
    was. Raises UnknownLayout if there is no data set, InputError with all problems found in it.
    """
    source = data_path / name
    target = cache_folder(data_path, name, spec)
    if not force and (target / "meta.json").exists():
        try:
            cache = read_cache(data_path, name, spec)
        except InputError as error:
            print(f"{name}: making the cache again: {error}", file=sys.stderr)
        else:
            print(f"{name}: {target} is there already (--force makes it again)")
            warn_of_changes(cache)
            return cache
    images = list_data_set(name, source)
    with writable(source, OTHER_DATA_PATH):
        held = take_lock(target.with_name(f".{target.name}.lock"), SECONDS_FOR_A_LOCK)
    if held is None:
        raise InputError(f"{target} is being made by another process")
    with held:
        for leftover in source.glob(f".{target.name}.*-*"):  # of a run that was killed
            shutil.rmtree(leftover)
        new = temporary_name(target, "new")
        try:
            new.mkdir()
            list_files(source).tofile(new / LISTED)
            num_bad = write_cache(new, images, source, spec, num_workers, skip_bad)
            replace_folder(new, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    if num_bad:
        print(f"{counted(num_bad, 'bad image')} left out, listed in {target / SKIPPED}", file=sys.stderr)
    return read_cache(data_path, name, spec)


def write_cache(
    folder: Path, images: pd.DataFrame, source: Path, spec: ImageSpec, num_workers: int, skip_bad: bool
) -> int:
    """Fill `folder` with a whole cache of the images in `source`. Returns how many bad ones are left out."""
    name = source.name
    listed = count_images(images)
    for part, (num_classes, num_images) in listed.items():
        print(f"{name}: {part} lists {counted(num_classes, 'class')}, {counted(num_images, 'image')}", flush=True)
    needed = 3 * (listed["train"][1] * spec.train_size**2 + listed["test"][1] * spec.size**2)  # if all were square
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{source}: the cache needs at least {needed / 1e9:.1f} GB, only {free / 1e9:.1f} GB are free")
    try:
        images, bad, histogram = store_pixels(folder, images, source, spec, num_workers)
    except BrokenProcessPool:
        time.sleep(0.1)  # a SIGTERM to the whole group reaches this process at about the same time
        raise RunError("a worker process was killed, for lack of memory perhaps; try fewer --num_workers") from None
    images = images[images["height"] > 0]
    warn_of_leaks(name, images)
    if bad and not skip_bad:
        refuse(name, bad, "; --skip_bad goes on without bad images")
    found = count_images(images)
    refuse(name, [f"no image is left in {part}" for part in listed if listed[part][1] > 0 and found[part][1] == 0])
    if bad:
        (folder / SKIPPED).write_text("\n".join(bad) + "\n", encoding="utf-8")

    splits = {split: write_split(folder, split, images[images["split"] == split]) for split in ("train", "test")}
    mean, std = channel_statistics(histogram, name)
    arrays = {}
    for array_name in ARRAYS:
        path = folder / f"{array_name}.npy"
        with open(path, "r+b") as file:
            flush_to_disk(file)
        arrays[array_name] = crc32(path)
    meta = CacheMeta(CACHE_VERSION, spec.size, spec.resize, mean, std, **splits, arrays=arrays)
    write_record(folder / "meta.json", meta)
    return len(bad)


def warn_of_leaks(name: str, images: pd.DataFrame) -> None:
    """Warn of test images that are the same file as a training image, by whatever path or link."""
    is_test = images["split"] == "test"
    leaks = images[is_test & images["file_id"].isin(images["file_id"][~is_test])]
    number = leaks["file_id"].nunique()
    if number:
        text = f"{counted(number, 'image')} {'is' if number == 1 else 'are'} in both train and test"
        print(f"{name}: warning: {text}, such as {leaks['path'].iloc[0]}: scores are too high", file=sys.stderr)


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
) -> tuple[pd.DataFrame, list[str], np.ndarray]:
    """Write the pixels of all images, in their order. Worker processes decode them, this process joins their files.

    Returns the table with the columns FACTS, what is wrong with the bad images, and a histogram `(3, 256) int64`: how
    often a channel of the training images has each value.
    """
    num_workers = min(num_workers, len(images) // CHUNK_IMAGES + 1, 61)  # 61: the most that Windows can wait for
    facts = []
    bad = []
    histogram = np.zeros((3, 256), np.int64)
    with worker_pool(num_workers) as pool:
        # Start it in another thread: in this one, a signal in the middle would leave workers that nobody ends.
        starter = threading.Thread(target=pool.submit, args=(int,))
        starter.start()
        starter.join()
        for split, file_name in (("train", "train_pixels.npy"), ("test", "test_images.npy")):
            paths = images["path"][images["split"] == split].tolist()
            starts = range(0, len(paths), CHUNK_IMAGES)
            chunks = (paths[start : start + CHUNK_IMAGES] for start in starts)
            futures = (pool.submit(decode_chunk, source, chunk, spec, split, folder) for chunk in chunks)
            title = f"{source.name}: {split} pixels"
            decoded = progress_bar(ahead(futures, 2 * num_workers), title, len(starts), f" x {CHUNK_IMAGES} images")
            shape = () if split == "train" else (spec.size, spec.size, 3)
            with open(folder / file_name, "wb") as output:
                write_header(output, (0, *shape))
                header_bytes = output.tell()
                for chunk_file, chunk_facts, chunk_bad, chunk_histogram in decoded:
                    with open(chunk_file, "rb") as pixels:
                        shutil.copyfileobj(pixels, output)
                    chunk_file.unlink()
                    facts.append(chunk_facts)
                    bad += chunk_bad
                    histogram += chunk_histogram
                length = (output.tell() - header_bytes) // math.prod(shape)
                output.seek(0)
                write_header(output, (length, *shape))
    return images.assign(**dict(zip(FACTS, np.concatenate(facts).T, strict=True))), bad, histogram


def decode_chunk(
    source: Path, paths: list[str], spec: ImageSpec, split: str, folder: Path
) -> tuple[Path, np.ndarray, list[str], np.ndarray]:
    """Decode some images, in a worker process, and write their pixels to a new file in `folder`.

    Returns the file, and FACTS, problems and the histogram as `store_pixels` does. Pixels go to a file: a worker that
    is killed while it sends much through a pipe would block its parent.
    """
    facts = np.zeros((len(paths), len(FACTS)), np.int64)
    bad = []
    histogram = np.zeros(3 * 256, np.int64)
    file = temporary_name(folder / "chunk")
    with open(file, "wb") as output:
        for fact, path in zip(facts, paths, strict=True):
            try:
                image = load_rgb(source / path)
                if split == "train":
                    image = resized(image, spec, spec.train_size, source / path)
                    histogram += image.histogram()
                    pixels = np.asarray(image)
                else:
                    pixels = resize_test(image, spec, source / path)
            except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them raise
                bad.append(str(bad_image(source / path, error)))
            else:
                output.write(pixels.tobytes())
                found = (source / path).stat()
                fact[:] = *pixels.shape[:2], hash((found.st_dev, found.st_ino))
    return file, facts, bad, histogram.reshape(3, 256)


def write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Write the header of a .npy file of uint8. It takes as many bytes whatever the first number of the shape is."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def write_split(folder: Path, split: str, images: pd.DataFrame) -> dict[str, list[str] | int]:
    """Write all arrays of a split but its pixels. Returns its classes and the number of images."""
    labels = images["label"].cat.remove_unused_categories()
    np.save(folder / f"{split}_labels.npy", labels.cat.codes.to_numpy(np.int64))
    np.save(folder / f"{split}_paths.npy", np.array([path.encode() for path in images["path"]], "S"))
    if split == "train":
        sizes = np.ascontiguousarray(images[["height", "width"]], np.int32)
        np.save(folder / "train_sizes.npy", sizes)
        np.save(folder / "train_offsets.npy", np.append(0, np.cumsum(3 * sizes.prod(1, dtype=np.int64))))
    else:
        np.save(folder / "test_is_query.npy", images["is_query"].to_numpy())
        np.save(folder / "test_is_gallery.npy", images["is_gallery"].to_numpy())
    return {"classes": labels.cat.categories.tolist(), "images": len(images)}


def channel_statistics(histogram: np.ndarray, data_set: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in 0..1: published, or over the pixels of all training images."""
    if data_set in PUBLISHED:
        return list(PUBLISHED[data_set].mean), list(PUBLISHED[data_set].std)
    values = np.arange(256)
    num_pixels = histogram[0].sum()
    mean = histogram @ values / num_pixels  # of integers: exact, in whatever order they were added
    variance = histogram @ values**2 / num_pixels - mean**2
    std = np.sqrt(np.maximum(variance, 1.0))  # at least one grey level: images of one colour do not divide by zero
    return (mean / 255).round(6).tolist(), (std / 255).round(6).tolist()
