"""Photos without labels that a student learns from besides the training images: finding them, storing their pixels."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dreml.console import InputError, format_problems, num_cores, progress_bar
from dreml.data.cache import Cache
from dreml.data.cache_writer import CacheJob, store_images
from dreml.data.images import BadImage
from dreml.data.lists import Entry
from dreml.files import json_sha256, make_folder, sha256
from dreml.search import folder_items, real_paths

OPTION = "--images"


def find_photos(folders: list[Path], forbidden: Iterable[str]) -> dict[str, Path]:
    """All images below the folders, by the SHA-256 of their files and in its order: each content counts once.

    Raises InputError for a folder without images, and for files that are `forbidden`: the test images.
    """
    files = [item.file for folder in folders for item in folder_items(OPTION, folder)]
    test = set(real_paths(forbidden)) & set(real_paths(map(str, files)))
    if test:
        raise InputError(
            f"{OPTION}: {len(test):,} of the files are test images of this run, such as {sorted(test)[0]}: a student "
            "that has seen them could not be measured by them"
        )
    photos = {sha256(file): file for file in progress_bar(files, f"{OPTION}: checksums", len(files))}
    return dict(sorted(photos.items()))


def photos_checksum(photos: dict[str, Path]) -> str:
    """What tells sets of photos apart, wherever they lie; "" for none."""
    return json_sha256(list(photos)) if photos else ""


def store_photos(photos: dict[str, Path], folder: Path, cache: Cache) -> Cache:
    """Decodes photos into `folder`, as `cache` holds its training images, and returns them as a cache without labels.

    Those that cannot be used are left out and named. Raises InputError if none is left.
    """
    make_folder(folder)
    entries = [Entry("train", "", "", os.path.abspath(file)) for file in photos.values()]
    job = CacheJob(OPTION, Path(), cache.spec, num_cores(), skip_bad=True)
    stored = store_images(folder, entries, job)
    bad = [str(image) for image in stored if isinstance(image, BadImage)]
    sizes = [(image.height, image.width) for image in stored if not isinstance(image, BadImage)]
    if bad:
        text = f"warning: {OPTION}: {len(bad):,} images cannot be used:{format_problems(bad)}"
        print(text.encode(errors="backslashreplace").decode(), file=sys.stderr)
    if not sizes:
        raise InputError(f"{OPTION}: no image is left")
    np.save(folder / "train_sizes.npy", np.array(sizes, np.int32))
    np.save(folder / "train_offsets.npy", np.cumsum([0] + [height * width * 3 for height, width in sizes]))
    return Cache(folder, cache.meta, fingerprint="")


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
        for cache, start, stop in self.parts:
            mine = np.flatnonzero((start <= indices) & (indices < stop))
            cache.train_crops(indices[mine] - start, corners[mine], sides[mine], [out[place] for place in mine])
