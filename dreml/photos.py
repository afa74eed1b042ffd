"""The photos below a folder: which there are, what tells that one has changed, and reading many of them ahead."""

import collections
import itertools
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dreml.cli import InputError, num_cores, progress_bar
from dreml.files import file_id, sha256
from dreml.images import BadImage, ImageSpec, bad_image, read_test_image
from dreml.lists import LeftOut
from dreml.search import Item, image_names, names_of, refuse


class Photo(NamedTuple):
    """A photo as its folder shows it. Its class is the first folder of its path."""

    path: str  # relative to the photo folder, with forward slashes
    size: int  # bytes
    mtime: int  # time of change, in nanoseconds


def class_of(path: str) -> str | None:
    """The class of a photo: the first folder of its path; None for a photo outside any."""
    first, slash, _ = path.partition("/")
    return first if slash else None


def walk_order(path: str) -> str:
    """Sorts paths as the folder is walked: the photos of a folder first, then its subfolders."""
    head, slash, tail = path.rpartition("/")
    return "\x01" + head.replace("/", "\x01") + "\x01\0" + tail if slash else "\0" + tail


def list_photos(folder: Path, problems: list[str]) -> list[Photo]:
    """All photos below a folder, in the order of the walk. What cannot be read is added to `problems`.

    Says which files are left out, for their types. Raises InputError if there are no photos.
    """
    photos, left_out = [], LeftOut()
    for name, file in image_names("--gallery", folder, problems, left_out):
        path = f"{name}/{file}" if name else file
        try:
            found = os.stat(folder / path)
            if not stat.S_ISREG(found.st_mode):
                raise OSError("not a regular file")
            photos.append(Photo(path, found.st_size, found.st_mtime_ns))
        except OSError as error:
            problems.append(str(bad_image(folder / path, error)))
    if not photos:
        refuse("--gallery", problems)
        raise InputError(f"--gallery {folder}: no images below it{f' ({left_out})' if left_out else ''}")
    if left_out:
        print(f"warning: --gallery {folder}: {left_out}", file=sys.stderr)
    return photos


class Reading(NamedTuple):
    """What became of reading a photo."""

    photo: Photo
    hash: str = ""  # SHA-256 of the file
    pixels: np.ndarray | None = None  # (S, S, 3) uint8; None where its embedding is known already
    problem: str = ""


def read_photos(folder: Path, photos: list[Photo], spec: ImageSpec, known: set[str], ahead: int) -> Iterator[Reading]:
    """Reads photos by several threads, `ahead` of them in advance. Those with a known hash are not decoded."""

    def read(photo: Photo) -> Reading:
        file = folder / photo.path
        try:
            digest = sha256(file)
            pixels = None if digest in known else read_test_image(file, spec)
            found = os.stat(file)
            if (found.st_size, found.st_mtime_ns) != photo[1:]:
                return Reading(photo, problem=f"{file}: it changed while it was read")
            return Reading(photo, digest, pixels)
        except OSError as error:
            return Reading(photo, problem=str(bad_image(file, error)))
        except BadImage as error:
            return Reading(photo, problem=str(error))

    threads, waiting = ThreadPoolExecutor(num_cores()), iter(photos)
    try:
        reading = collections.deque(threads.submit(read, photo) for photo in itertools.islice(waiting, ahead))
        for _ in progress_bar(photos, "--gallery", len(photos)):
            yield reading.popleft().result()
            reading.extend(threads.submit(read, photo) for photo in itertools.islice(waiting, 1))
    finally:
        threads.shutdown(cancel_futures=True)


class Row(NamedTuple):
    """A row of the index, but for its vector."""

    photo: Photo
    hash: str  # SHA-256 of the file
    id: int  # Lance's own; larger in later rows


@dataclass
class IndexedPhotos(Sequence[Item]):
    """The photos of an index, in the order of a walk through their folder."""

    folder: Path
    paths: list[str]
    sizes: np.ndarray  # (N,) int64
    mtimes: np.ndarray  # (N,) int64
    vectors: torch.Tensor  # (N, d) float32, rows of length 1

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> Item:
        file = os.path.join(self.folder, self.paths[place])
        return Item(file, file, class_of(self.paths[place]), Path(file))

    def place_of(self, query: Item) -> int:
        """The place of the photo that is the query's own file, by whatever path, or -1."""
        try:
            found = os.stat(query.file)
        except OSError:  # a test image whose file is gone
            return -1
        same = np.flatnonzero((self.sizes == found.st_size) & (self.mtimes == found.st_mtime_ns)).tolist()
        names, own = names_of(query.file), (found.st_dev, found.st_ino)
        same.sort(key=lambda place: os.path.basename(self.paths[place]) not in names)  # one of its name first
        return next((place for place in same if file_id(self.folder / self.paths[place]) == own), -1)
