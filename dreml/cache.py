"""The cached pixels of a data set: opening them, and whether they are sound. `cache_writer` makes them."""

import contextlib
import itertools
import os
import re
import shlex
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dreml.cli import InputError, RunError, one_line
from dreml.files import crc32, read_record, sha256
from dreml.images import ImageSpec

CACHE_VERSION = 3  # 1: the hidden colours of transparent images; 2: the paths in meta.json
ARRAYS = ["train_pixels", "train_offsets", "train_sizes", "train_labels", "train_paths", "train_path_offsets"]
ARRAYS += ["test_images", "test_labels", "test_is_query", "test_is_gallery", "test_paths", "test_path_offsets"]


@dataclass(frozen=True)
class CacheMeta:
    """What meta.json says of a cache."""

    version: int
    image_size: int
    resize: str
    mean: list[float]  # of each channel, in 0..1
    std: list[float]
    train: dict[str, list[str] | int]  # "classes": the names of labels 0, 1, ...; "images": their number
    test: dict[str, list[str] | int]
    arrays: dict[str, dict[str, int]]  # name -> "bytes" and "crc32" of its file


@dataclass(frozen=True)
class Cache:
    """A cached data set."""

    folder: Path
    meta: CacheMeta
    fingerprint: str  # sha256 of meta.json, which holds the checksums of all arrays
    arrays: dict[str, np.ndarray]  # memory maps. All stay those of one cache when another one takes its place

    def array(self, name: str) -> np.ndarray:
        """One array of the cache, read-only.

        `train_pixels (bytes,) uint8`, `train_offsets (N + 1,) int64`, `train_sizes (N, 2) int32` (height, width),
        `train_labels (N,) int64`; `test_images (M, S, S, 3) uint8`, `test_labels (M,) int64`,
        `test_is_query (M,) bool`, `test_is_gallery (M,) bool`. Labels count the split's classes from 0. Of each split,
        `paths (bytes,) uint8`, UTF-8 with a line end after each, and `path_offsets (N + 1,) int64`: see `paths`.
        """
        return self.arrays[name]

    @property
    def name(self) -> str:
        """The name of the data set."""
        return self.folder.parent.name

    @property
    def spec(self) -> ImageSpec:
        """The size and the resize of its images."""
        return ImageSpec(self.meta.image_size, self.meta.resize)

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Split -> (number of classes, number of images)."""
        splits = {"train": self.meta.train, "test": self.meta.test}
        return {name: (len(split["classes"]), split["images"]) for name, split in splits.items()}

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def paths(self, split: str, start: int = 0, stop: int | None = None) -> list[str]:
        """The paths of the images `start` to `stop` of a split, relative to data/NAME. Reads no others."""
        offsets = self.array(f"{split}_path_offsets")[start : None if stop is None else stop + 1]
        text = self.array(f"{split}_paths")[offsets[0] : offsets[-1]].tobytes()
        ends = (offsets - offsets[0]).tolist()
        return [text[left : right - 1].decode() for left, right in itertools.pairwise(ends)]

    def raw_files(self) -> tuple[list[str], np.ndarray]:
        """The paths of all files that were listed when it was made, and their sizes and times, `(N, 2) float64`."""
        with np.load(self.folder / "raw_files.npz") as found:
            return self.paths("train") + self.paths("test") + found["left_out"].tolist(), found["stats"]

    def places(self) -> set[tuple[str, str, str]]:
        """The path, split and class name of every image."""
        found = set()
        for split, meta in (("train", self.meta.train), ("test", self.meta.test)):
            classes = np.array(meta["classes"], dtype=object)[self.array(f"{split}_labels")]
            found.update((path, split, name) for path, name in zip(self.paths(split), classes, strict=True))
        return found

    def train_crops(self, indices: np.ndarray, corners: np.ndarray, sides: np.ndarray, out: np.ndarray) -> None:
        """Cut one square window out of each of B training images.

        `indices` `(B,)` says which, `corners` `(B, 2)` the (top, left) of each window, `sides` `(B,)` its side. Writes
        the windows to the top left corners of `out`, `(B, S, S, 3) uint8`, and 0 elsewhere.
        """
        pixels = np.asarray(self.arrays["train_pixels"])  # slices of a memmap are slow to make
        offsets = np.asarray(self.arrays["train_offsets"])
        sizes = np.asarray(self.arrays["train_sizes"])
        for crop, index, (top, left), side in zip(out, indices, corners, sides, strict=True):
            image = pixels[offsets[index] : offsets[index + 1]].reshape(*sizes[index], 3)
            crop[:side, :side] = image[top : top + side, left : left + side]
            crop[side:] = 0
            crop[:side, side:] = 0

    def read_ahead(self, indices: np.ndarray, corners: np.ndarray, sides: np.ndarray) -> None:
        """Ask the system for the rows of windows that `train_crops` will cut soon, without waiting for them."""
        row_bytes = 3 * self.arrays["train_sizes"][indices, 1]
        starts = self.arrays["train_pixels"].offset + self.arrays["train_offsets"][indices] + corners[:, 0] * row_bytes
        stops = starts + sides * row_bytes
        read_ahead(self.folder / "train_pixels.npy", zip(starts.tolist(), stops.tolist(), strict=True))


def cache_folder(data_path: Path, name: str, spec: ImageSpec) -> Path:
    """The folder of a cache: data/NAME/cache_256, or cache_256_squash."""
    suffix = "" if spec.resize == "crop" else f"_{spec.resize}"
    return data_path / name / f"cache_{spec.size}{suffix}"


def read_ahead(path: Path, ranges: Iterable[tuple[int, int]]) -> None:
    """Ask the system to read ranges of bytes of a file, `(start, stop)` each, into its page cache, and do not wait.

    So a slow disk gets many requests at once. A file that fits into half the memory stays there once it was read, and
    needs no requests. Systems without `posix_fadvise` get none.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:  # what is wrong, reading itself will tell
        if os.fstat(file.fileno()).st_size <= memory / 2:
            return
        for start, stop in ranges:
            os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)


class Holdout(NamedTuple):
    """A random share of the training classes, which data/NAME_holdout tests on in place of the true test classes."""

    share: float = 0.2  # between 0 and 1
    seed: int = 0

    def name_of(self, name: str) -> str:
        """The name of the data set: NAME_holdout, or NAME_holdout1 for seed 1."""
        return f"{name}_holdout{self.seed or ''}"


def holdout_of(data_path: Path, name: str) -> tuple[str, Holdout] | None:
    """The data set that NAME_holdout was divided from, and how; None if this is another kind of data set.

    The share is that of a cache that is there, 0.2 without any.
    """
    match = re.fullmatch(r"(.+)_holdout(|[1-9][0-9]*)", name)
    if match is None or not (data_path / match[1]).is_dir():
        return None
    if any((data_path / name / raw).exists() for raw in ("images.csv", "train")):  # a data set of its own
        return None
    share = Holdout().share
    for path in (data_path / name).glob("cache_*/meta.json"):
        with contextlib.suppress(ValueError, KeyError):  # a damaged or older one
            meta = read_record(path)
            num_train, num_test = (len(meta[split]["classes"]) for split in ("train", "test"))
            share = num_test / (num_train + num_test)
    return match[1], Holdout(share, int(match[2] or 0))


def cache_options(data_path: Path, name: str, spec: ImageSpec) -> str:
    """The options of data_utils.py and train.py that name a cache."""
    options = f"--data_name {shlex.quote(name)}"
    if data_path != Path("data"):
        options += f" --data_path {shlex.quote(str(data_path))}"
    if spec.size != 256:
        options += f" --image_size {spec.size}"
    return options if spec.resize == "crop" else f"{options} --resize {spec.resize}"


def make_command(data_path: Path, name: str, spec: ImageSpec) -> str:
    """The command that makes a cache."""
    origin, holdout = holdout_of(data_path, name) or (name, None)
    command = f"python data_utils.py {cache_options(data_path, origin, spec)}"
    if holdout is None:
        return command
    return f"{command} --holdout {holdout.share:.6g}" + (f" --holdout_seed {holdout.seed}" if holdout.seed else "")


def read_cache(data_path: Path, name: str, spec: ImageSpec) -> Cache:
    """Open the cache of a data set.

    Raises InputError, which names the command that makes it, for one that is missing, damaged or of an older version.
    Sizes are checked here, contents by `verify_cache`.
    """
    folder = cache_folder(data_path, name, spec)
    command = make_command(data_path, name, spec)
    if not folder.parent.is_dir() and name != "demo":
        raise InputError(
            f"{folder.parent}: no such folder; put the data set there (README, Data), then: {command}; to try it "
            f"without one: {make_command(data_path, 'demo', ImageSpec(32))}"
        )
    remedy = f"make it with: {command}"
    try:
        found = read_record(folder / "meta.json")
        if [found.get(key) for key in ("version", "image_size", "resize")] != [CACHE_VERSION, spec.size, spec.resize]:
            raise InputError(f"{folder} is of another version or has other settings; {remedy}")
        meta = CacheMeta(**found)
        arrays = {}
        for array_name in ARRAYS:
            path = folder / f"{array_name}.npy"
            if path.stat().st_size != meta.arrays[array_name]["bytes"]:
                raise InputError(f"{path} has the wrong size; {remedy}")
            arrays[array_name] = np.load(path, mmap_mode="r", allow_pickle=False)
        return Cache(folder, meta, sha256(folder / "meta.json"), arrays)
    except FileNotFoundError as error:
        raise InputError(f"no cache: {error.filename} is missing; {remedy}") from None
    except InputError:
        raise
    except Exception as error:  # for the damaged header of an array, numpy raises whatever Python's parser does
        raise InputError(f"{folder} is damaged ({one_line(error)}); {remedy}") from None


def check_unchanged(cache: Cache) -> None:
    """Raise RunError if the cache has been made anew, from other data, since it was opened."""
    try:
        changed = sha256(cache.folder / "meta.json") != cache.fingerprint
    except OSError:
        changed = True
    if changed:
        raise RunError(f"{cache.folder} has been changed during the run; what was finished before is kept")


def verify_cache(cache: Cache) -> None:
    """Read every array and compare its checksum. Raises InputError, which names those that changed."""
    arrays = cache.meta.arrays
    with ThreadPoolExecutor(2) as threads:
        sums = list(threads.map(crc32, [cache.folder / f"{name}.npy" for name in arrays]))
    changed = [name for name, found in zip(arrays, sums, strict=True) if found != arrays[name]["crc32"]]
    if changed:
        remedy = make_command(cache.folder.parents[1], cache.name, cache.spec)
        raise InputError(f"{cache.folder}: damaged: {', '.join(changed)}; make it again with: {remedy} --force")
