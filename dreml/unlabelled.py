"""Photos without labels that a student learns from besides the training images: finding them, storing their pixels."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from dreml.console import InputError, format_problems, num_cores, progress_bar
from dreml.data.cache import Cache
from dreml.data.cache_writer import CacheJob, offsets_of, store_images
from dreml.data.images import bad_image
from dreml.data.lists import Entries, Entry
from dreml.files import json_sha256, make_folder, sha256
from dreml.search import folder_items

OPTION = "--images"


def find_photos(folders: list[Path], test: pd.DataFrame, data_folder: Path) -> dict[str, Path]:
    """All images below the folders, by the SHA-256 of their files and in its order: each content counts once.

    Files that cannot be read are left out and named. Raises InputError for a folder without images, and for images of
    the test split and copies of them: those of test.csv, `test`, whose paths are relative to `data_folder`.
    """
    files = [item.file for folder in folders for item in folder_items(OPTION, folder)]
    photos, sizes, problems = {}, set(), []
    for file in progress_bar(files, f"{OPTION}: checksums", len(files)):
        try:
            photos[sha256(file)] = file
            sizes.add(os.stat(file).st_size)
        except OSError as error:
            problems.append(str(bad_image(file, error)))
    warn_of(problems)
    if not photos:
        raise InputError(f"{OPTION}: no image is left")
    of_test = sorted(photos.keys() & test_contents(sizes, test, data_folder))
    if of_test:
        raise InputError(
            f"{OPTION}: {len(of_test):,} of the images are test images of this run, such as {photos[of_test[0]]}: "
            "a student that has seen them could not be measured by them"
        )
    return dict(sorted(photos.items()))


def test_contents(sizes: set[int], test: pd.DataFrame, data_folder: Path) -> set[str]:
    """The SHA-256 of the test images whose files have one of the sizes: others cannot equal a photo.

    Says how many cannot be read.
    """
    contents, num_unread = set(), 0
    for path in progress_bar(test.path, "test images: checksums", len(test)):
        file = data_folder / path
        try:
            if os.stat(file).st_size in sizes:
                contents.add(sha256(file))
        except OSError:
            num_unread += 1
    if num_unread:
        where = f"{num_unread:,} of {len(test):,} test images cannot be read in {data_folder}"
        print_warning(f"{OPTION}: {where}: copies of them are not noticed")
    return contents


def warn_of(problems: list[str]) -> None:
    """Names photos that are left out, if there are any."""
    if problems:
        print_warning(f"{OPTION}: {len(problems):,} images cannot be used:{format_problems(problems)}")


def print_warning(text: str) -> None:
    """Prints it. File names that the terminal cannot show are printed as escapes."""
    print(f"warning: {text}".encode(errors="backslashreplace").decode(), file=sys.stderr)


def photos_checksum(photos: dict[str, Path]) -> str:
    """What tells sets of photos apart, wherever they lie; "" for none."""
    return json_sha256(list(photos)) if photos else ""


def store_photos(photos: dict[str, Path], folder: Path, cache: Cache) -> Cache:
    """Decodes photos into `folder`, as `cache` holds its training images, and returns them as a cache without labels.

    Those that cannot be used are left out and named. Raises InputError if none is left.
    """
    make_folder(folder)
    entries = Entries()
    for file in photos.values():
        entries.append(Entry("train", "", "", os.path.abspath(file)))
    images = store_images(folder, entries, CacheJob(OPTION, Path(), cache.spec, num_cores(), skip_bad=True))
    warn_of([images.bad[row] for row in sorted(images.bad)])
    good = np.flatnonzero(images.good)
    if not len(good):
        raise InputError(f"{OPTION}: no image is left")
    np.save(folder / "train_sizes.npy", images.sizes[good])
    np.save(folder / "train_offsets.npy", offsets_of(images.num_bytes(good)))
    return Cache(folder, cache.meta, fingerprint="")


@contextlib.contextmanager
def removed_at_the_end(folder: Path) -> Iterator[None]:
    """Removes a folder that the block makes, however the block ends, and the one around it if it is empty then."""
    try:
        yield
    finally:
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty
                folder.parent.rmdir()


class JoinedImages:
    """The training images of several caches, one after the other, as `epoch_batches` takes those of one."""

    def __init__(self, caches: list[Cache]):
        sizes = [cache.array("train_sizes") for cache in caches]
        starts = np.cumsum([0, *(len(each) for each in sizes)])
        self.sizes, self.parts = np.concatenate(sizes), list(zip(caches, starts[:-1], starts[1:], strict=True))

    def __len__(self) -> int:
        return len(self.sizes)

    def array(self, name: str) -> np.ndarray:
        """`train_sizes (N, 2) int32`, see `Cache.array`; there is no other."""
        if name != "train_sizes":
            raise ValueError(f"images without labels have no {name}")
        return self.sizes

    def train_crops(self, indices: np.ndarray, corners: np.ndarray, sides: np.ndarray, out: np.ndarray) -> None:
        """As `Cache.train_crops`."""
        for cache, start, mine in self._parts_of(indices):
            cache.train_crops(indices[mine] - start, corners[mine], sides[mine], [out[place] for place in mine])

    def read_ahead(self, indices: np.ndarray, corners: np.ndarray, sides: np.ndarray) -> None:
        """As `Cache.read_ahead`."""
        for cache, start, mine in self._parts_of(indices):
            cache.read_ahead(indices[mine] - start, corners[mine], sides[mine])

    def _parts_of(self, indices: np.ndarray) -> Iterator[tuple[Cache, int, np.ndarray]]:
        """For each cache, the number of its first image and which of the indices are of its images."""
        for cache, start, stop in self.parts:
            yield cache, start, np.flatnonzero((start <= indices) & (indices < stop))
