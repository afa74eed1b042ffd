"""The cached pixels of a data set: opening them, and whether they are sound. `cache_writer` makes them."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dreml.cli import InputError, one_line
from dreml.files import crc32, read_record, sha256
from dreml.images import ImageSpec

CACHE_VERSION = 4
ARRAYS = ["train_pixels", "train_offsets", "train_sizes", "train_labels", "train_paths"]
ARRAYS += ["test_images", "test_labels", "test_is_query", "test_is_gallery", "test_paths"]


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
    arrays: dict[str, int]  # name -> CRC-32 of its file
    holdout: None = None  # not used: caches that exist have it


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
        `train_labels (N,) int64`, `train_paths (N,)` bytes; `test_images (M, S, S, 3) uint8`, `test_labels (M,) int64`,
        `test_is_query (M,) bool`, `test_is_gallery (M,) bool`, `test_paths (M,)`. Labels count the split's classes from
        0. Paths are UTF-8, filled up with zeros.
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

    def test_table(self) -> pd.DataFrame:
        """The test images, `runs.TEST_COLUMNS`."""
        labels = np.array(self.array("test_labels"))
        class_names = np.array(self.meta.test["classes"], dtype=object)[labels]
        columns = {"path": [path.decode() for path in self.array("test_paths").tolist()], "label": labels}
        columns |= {name: np.array(self.array(f"test_{name}")) for name in ("is_query", "is_gallery")}
        return pd.DataFrame(columns | {"class_name": class_names})

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


def cache_folder(data_path: Path, name: str, spec: ImageSpec) -> Path:
    """The folder of a cache: data/NAME/cache_256, or cache_256_squash."""
    suffix = "" if spec.resize == "crop" else f"_{spec.resize}"
    return data_path / name / f"cache_{spec.size}{suffix}"


def cache_options(data_path: Path, name: str, spec: ImageSpec) -> str:
    """The options of data_utils.py and train.py that name a cache."""
    options = f"--data_name {shlex.quote(name)}"
    if data_path != Path("data"):
        options += f" --data_path {shlex.quote(str(data_path))}"
    if spec.size != 256:
        options += f" --image_size {spec.size}"
    return options if spec.resize == "crop" else f"{options} --resize {spec.resize}"


def default_recalls(data_name: str) -> list[int]:
    """The K of Recall@K that the papers on a data set report."""
    return [1, 10, 20, 30] if data_name == "isc" else [1, 2, 4, 8]


def make_command(data_path: Path, name: str, spec: ImageSpec) -> str:
    """The command that makes a cache."""
    return f"python data_utils.py {cache_options(data_path, name, spec)}"


def read_cache(data_path: Path, name: str, spec: ImageSpec) -> Cache:
    """Open the cache of a data set.

    Raises InputError, which names the command that makes it, for one that is missing, damaged or of an older version.
    Contents are checked by `verify_cache`.
    """
    folder = cache_folder(data_path, name, spec)
    command = make_command(data_path, name, spec)
    if not folder.parent.is_dir() and name != "demo":
        raise InputError(
            f"{folder.parent}: no such folder; put the data set there (README, Data), then: {command} (or, for "
            f"NAME_holdout, --holdout); to try it without one: {make_command(data_path, 'demo', ImageSpec(32))}"
        )
    remedy = f"make it with: {command}"
    try:
        meta = read_record(folder / "meta.json", CacheMeta)
        arrays = {array_name: np.load(folder / f"{array_name}.npy", mmap_mode="r") for array_name in ARRAYS}
        cache = Cache(folder, meta, sha256(folder / "meta.json"), arrays)
    except FileNotFoundError as error:
        raise InputError(f"no cache: {error.filename} is missing; {remedy}") from None
    except Exception as error:  # for the damaged header of an array, numpy raises whatever Python's parser does
        raise InputError(f"{folder} is damaged ({one_line(error)}); {remedy}") from None
    if meta.version != CACHE_VERSION or cache.spec != spec:
        raise InputError(f"{folder} is of another version or has other settings; {remedy}")
    return cache


def verify_cache(cache: Cache) -> None:
    """Read every array and compare its checksum. Raises InputError, which names those that changed."""
    arrays = cache.meta.arrays.items()
    changed = [name for name, checksum in arrays if crc32(cache.folder / f"{name}.npy") != checksum]
    if changed:
        remedy = make_command(cache.folder.parents[1], cache.name, cache.spec)
        raise InputError(f"{cache.folder}: damaged: {', '.join(changed)}; make it again with: {remedy} --force")
