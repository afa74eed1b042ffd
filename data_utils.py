"""Raw image folders -> cached splits, and reading them back.

    python data_utils.py                                      every data set found under data/
    python data_utils.py --data_name cub --image_size 128     one of them, smaller
    python data_utils.py --data_name demo --image_size 32     draws a data set first; needs no download

The cache data/NAME/cache_256/ holds pixels after the last deterministic step of the input pipeline, as uint8: training
images with their shorter side at int(1.1 * 256), test images resized and centre-cropped to 256 x 256. They equal
torchvision's Resize and CenterCrop bit for bit. Random crops, flips and normalisation are left to training.
With --resize squash, cache_256_squash/ has both sides at int(1.1 * 256), or 256: nothing is cut off a wide image.
"""

import argparse
import collections
import contextlib
import csv
import functools
import io
import itertools
import math
import multiprocessing
import os
import posixpath
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from utils import (
    InputError,
    Parser,
    RunError,
    Terminated,
    atomic_open,
    flush_folder,
    flush_to_disk,
    natural_number,
    one_line,
    read_record,
    remove_leftovers,
    run_main,
    sha256,
    size_text,
    stop_here,
    take_lock,
    write_record,
)

CACHE_VERSION = 1
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")  # no other decoder of Pillow sees a downloaded file
SECONDS_FOR_A_LOCK = 10  # the workers of a run that was just killed hold it until they notice
MAX_RESIZED_PIXELS = 16_000_000  # a 1 x 10,000 image would grow to 281 x 2,810,000
RESIZES = ("crop", "squash")


class Published(NamedTuple):
    """What is known of a data set: class ids and split, counts, and the channel statistics of METHOD.md."""

    last_train_class: int | None  # classes 1..this train, the others test; None: the lists say
    num_classes: int | None  # class ids are 1..this; None: they are names
    counts: dict[str, tuple[int, int]]  # split, or part of the test split -> classes, images
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


PUBLISHED = {
    "car": Published(
        last_train_class=98,
        num_classes=196,
        counts={"train": (98, 8054), "test": (98, 8131)},
        mean=(0.4853, 0.4965, 0.4295),
        std=(0.2237, 0.2193, 0.2568),
    ),
    "cub": Published(
        last_train_class=100,
        num_classes=200,
        counts={"train": (100, 5864), "test": (100, 5924)},
        mean=(0.4707, 0.4601, 0.4549),
        std=(0.2767, 0.2760, 0.2850),
    ),
    "sop": Published(
        last_train_class=None,
        num_classes=22634,
        counts={"train": (11318, 59551), "test": (11316, 60502)},
        mean=(0.5807, 0.5396, 0.5044),
        std=(0.2901, 0.2974, 0.3095),
    ),
    "isc": Published(
        last_train_class=None,
        num_classes=None,
        counts={"train": (3997, 25882), "test": (3985, 26830), "query": (3985, 14218), "gallery": (3985, 12612)},
        mean=(0.8324, 0.8109, 0.8041),
        std=(0.2206, 0.2378, 0.2444),
    ),
}

LAYOUTS = """\
  data/car/   cars_annos.mat and car_ims/, or the devkit: cars_train/, cars_test/, devkit/cars_train_annos.mat and
              cars_test_annos_withlabels.mat
  data/cub/   images.txt, image_class_labels.txt and images/   (CUB-200-2011)
  data/sop/   Ebay_train.txt, Ebay_test.txt and *_final/       (Stanford Online Products)
  data/isc/   list_eval_partition.txt and img/                 (In-Shop Clothes Retrieval of DeepFashion)
or, with any other NAME:
  data/NAME/  images.csv with the columns path,label,split     (and is_query,is_gallery)
  data/NAME/  train/ and test/, with a folder of images for each class
The README says where to get them. Without any: python data_utils.py --data_name demo"""

# ------------------------------------------------------------------------------------------------ pixels


def load_rgb(path: str | Path) -> Image.Image:
    """Opens an image as RGB: EXIF orientation applied, 16-bit grey scaled to 8 bits, alpha dropped.

    Raises what Pillow raises for a missing, unreadable or truncated file. An image over Pillow's limit against
    decompression bombs (`Image.MAX_IMAGE_PIXELS`, 89 megapixels) is an error too.
    """
    with _open_image(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
            grey = np.asarray(image).astype(np.int64).clip(0, 65535)
            image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
        return image.convert("RGB")


def _open_image(path: str | Path) -> Image.Image:
    image = Image.open(path, formats=IMAGE_FORMATS)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow only warns of up to twice as many
        image.close()
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are over Pillow's limit")
    return image


def train_size(image_size: int) -> int:
    """The shorter side of a training image before the random crop (METHOD.md: "One member", step 5)."""
    return int(1.1 * image_size)


def resized(width: int, height: int, shorter: int, resize: str = "crop") -> tuple[int, int]:
    """The (width, height) that torchvision's `Resize(shorter)` gives; for squash, `Resize((shorter, shorter))`."""
    if resize not in RESIZES:
        raise ValueError(f"resize has to be one of {', '.join(RESIZES)}, not {resize!r}")
    if resize == "squash":
        return shorter, shorter
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def resize_train(image: Image.Image, image_size: int, resize: str = "crop") -> np.ndarray:
    """`(H, W, 3) uint8`, the shorter side int(1.1 * image_size); for squash, both sides."""
    size = resized(*image.size, train_size(image_size), resize)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def resize_test(image: Image.Image, image_size: int, resize: str = "crop") -> np.ndarray:
    """`(image_size, image_size, 3) uint8`: the shorter side image_size, then the centre crop; squash: no crop."""
    image = image.resize(resized(*image.size, image_size, resize), Image.Resampling.BILINEAR)
    left, top = (round((side - image_size) / 2) for side in image.size)  # torchvision's rounding
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))


# ------------------------------------------------------------------------------------------------ raw layouts


class UnknownLayout(InputError):
    """A folder that holds no data set in a layout that is known for its name."""


class Entry(NamedTuple):
    """One image of a raw data set."""

    split: str  # "train" or "test"
    class_key: int | str  # sorts the classes
    class_name: str
    path: str  # relative to data/NAME, with forward slashes
    is_query: bool = True  # of a test image: whether it is searched for,
    is_gallery: bool = True  # and whether it is searched among


@dataclass
class Listing:
    """What a raw data set holds, before any image is opened."""

    entries: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def list_data_set(name: str, folder: Path) -> Listing:
    """Lists the images of the raw data set `folder` (data/NAME) by the layout that its name asks for.

    Raises InputError if the layout is not there. Problems with single lines and paths are collected in the listing;
    that the images exist is checked when they are opened.
    """
    if name in RAW_LAYOUTS:
        parsers, roots = [RAW_LAYOUTS[name]], [folder, *_subfolders(folder)]  # archives unpack one deeper
    else:  # images.csv comes first: somebody wrote it for this, while train/ and test/ may just be where images lie
        parsers, roots = [list_csv, list_image_folder], [folder]
    for root, parser in itertools.product(roots, parsers):
        listing = parser(root, f"{root.relative_to(folder).as_posix()}/" if root != folder else "")
        if listing is not None:
            return _checked(listing, name)
    raise UnknownLayout(f"{folder} holds no data set; expected is one of\n{LAYOUTS}")


def list_car(root: Path, prefix: str) -> Listing | None:
    """Cars196: `cars_annos.mat` with `car_ims/`, or the devkit with `cars_train/` and `cars_test/`."""
    listing = Listing()
    if (root / "cars_annos.mat").is_file() and (root / "car_ims").is_dir():
        tables = [(root / "cars_annos.mat", "relative_im_path", prefix)]
        names_file = root / "cars_annos.mat"
    else:
        devkit = _first_existing(root / "devkit" / "cars_train_annos.mat", root / "cars_train_annos.mat")
        if devkit is None and (root / "cars_train").is_dir():  # the devkit's archive may be unpacked one deeper too
            devkit = _first_existing(
                *sorted(root.glob("*/devkit/*_train_annos.mat")), *root.glob("*/*_train_annos.mat")
            )
        if devkit is None:
            if not (root / "cars_annos.mat").is_file():
                return None
            listing.problems.append(f"{root / 'car_ims'}: missing folder")
            return listing
        labelled = _first_existing(
            *(folder / "cars_test_annos_withlabels.mat" for folder in (devkit.parent, devkit.parent.parent, root))
        )
        if labelled is None:
            listing.problems.append(
                f"{devkit.with_name('cars_test_annos_withlabels.mat')}: missing (cars_test_annos.mat has no labels: "
                "the file needed is cars_test_annos_withlabels.mat)"
            )
        tables = []
        for table, part in ((devkit, "cars_train"), (labelled, "cars_test")):
            nested = f"{part}/{part}" if (root / part / part).is_dir() else part
            if table is not None:
                tables.append((table, "fname", f"{prefix}{nested}/"))
        names_file = devkit.with_name("cars_meta.mat")
    names = {}
    try:
        names = _apart(_car_names, names_file)
    except InputError as error:
        listing.problems.append(str(error))
    for table, path_field, folder in tables:
        try:
            rows = _apart(read_car_annotations, table, path_field)
        except InputError as error:
            listing.problems.append(str(error))
            continue
        for number, (path, class_id) in enumerate(rows, 1):
            _add_numbered(listing, "car", f"{table}, entry {number}", class_id, folder, path, names.get(class_id))
    return listing


def _apart(read: Callable, path: Path, *args: object) -> object:
    """read(path, *args) in a process of its own: a damaged .mat file can crash scipy 1.17's reader."""
    try:
        with ProcessPoolExecutor(1, initializer=_end_with_parent) as pool:
            return pool.submit(read, path, *args).result()
    except BrokenProcessPool:
        _stop_if_told()
        raise InputError(f"{path}: not a readable Cars196 annotation file (it crashes scipy's reader)") from None


def _stop_if_told() -> None:
    """For a worker that died: a SIGTERM to the whole group reaches this process at about the same time."""
    time.sleep(0.1)
    stop_here()


def read_car_annotations(path: Path, path_field: str = "fname") -> list[tuple[str, int]]:
    """The (image path, class id) pairs of one of Cars196's annotation files.

    Raises InputError if it cannot be read or has no labels.
    """
    try:
        annotations = np.ravel(scipy.io.loadmat(path)["annotations"])
        fields = annotations.dtype.names
    except Exception as error:  # scipy raises a dozen kinds for a damaged, empty, HTML or version 7.3 file
        raise InputError(f"{path}: not a readable Cars196 annotation file ({one_line(error)})") from None
    if fields and "class" not in fields:
        raise InputError(f"{path}: has no labels; the file needed is cars_test_annos_withlabels.mat")
    try:
        return [(str(row[path_field].item()), int(row["class"].item())) for row in annotations]
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{path}: not a readable Cars196 annotation file ({one_line(error)})") from None


def _car_names(path: Path) -> dict[int, str]:
    """Class id -> name, from the `class_names` of a .mat file; empty where that is not to be had."""
    try:
        names = np.ravel(scipy.io.loadmat(path, variable_names=["class_names"])["class_names"])
        return {class_id: str(name.item()) for class_id, name in enumerate(names, 1)}
    except Exception:  # names are for people only: the ids will do, and a bad annotation file is reported elsewhere
        return {}


def list_cub(root: Path, prefix: str) -> Listing | None:
    """CUB-200-2011: `images.txt` ("id path") and `image_class_labels.txt` ("id class")."""
    if not (root / "images.txt").is_file():
        return None
    listing = Listing()
    classes: dict[str, int] = {}
    for where, (image_id, class_id) in _rows(root / "image_class_labels.txt", 2, listing):
        if not _is_number(class_id):
            listing.problems.append(f"{where}: malformed line: {class_id!r} is no class id")
        elif image_id in classes:
            listing.problems.append(f"{where}: image id {image_id} stands in the list twice")
        else:
            classes[image_id] = int(class_id)
    seen = set()
    for where, (image_id, path) in _rows(root / "images.txt", 2, listing):
        if image_id in seen:
            listing.problems.append(f"{where}: image id {image_id} stands in the list twice")
        elif image_id not in classes:
            listing.problems.append(f"{where}: image {image_id} has no class in image_class_labels.txt")
        else:
            _add_numbered(listing, "cub", where, classes[image_id], f"{prefix}images/", path, path.split("/")[0])
        seen.add(image_id)
    return listing


def list_sop(root: Path, prefix: str) -> Listing | None:
    """Stanford Online Products: `Ebay_train.txt` and `Ebay_test.txt`, a header, then "image class super_class path"."""
    if not (root / "Ebay_train.txt").is_file() and not (root / "Ebay_test.txt").is_file():
        return None
    listing = Listing()
    for split in ("train", "test"):
        rows = _rows(root / f"Ebay_{split}.txt", 4, listing)
        header = next(rows, None)
        if header is not None and header[1][0] != "image_id":
            listing.problems.append(f"{header[0]}: the header 'image_id class_id super_class_id path' is missing")
        for where, (_, class_id, _, path) in rows:
            if _is_number(class_id):
                _add_numbered(listing, "sop", where, int(class_id), prefix, path, class_id, split)
            else:
                listing.problems.append(f"{where}: malformed line: {class_id!r} is no class id")
    return listing


def list_isc(root: Path, prefix: str) -> Listing | None:
    """In-Shop Clothes: `list_eval_partition.txt`, a count, a header, then "image item status", and `img/`."""
    name = "list_eval_partition.txt"
    path = _first_existing(root / name, root / "Eval" / name, root / "Anno" / name)
    if path is None:
        return None
    listing = Listing()
    prefix += "Img/" if (root / "Img" / "img").is_dir() else ""  # where the original archives put them
    rows = _rows(path, 3, listing, skip=1)
    header = next(rows, None)
    first_line = _text(path, Listing()).partition("\n")[0].strip()
    if header is not None and header[1][0] != "image_name":
        listing.problems.append(f"{header[0]}: the header 'image_name item_id evaluation_status' is missing")
    for where, (image, item, status) in rows:
        if status in ("train", "query", "gallery"):
            split = "train" if status == "train" else "test"
            entry = Entry(split, item, item, prefix + image, status != "gallery", status != "query")
            _add(listing, where, entry, image)
        else:
            listing.problems.append(f"{where}: {status!r} is not one of train, query, gallery")
    if _is_number(first_line) and int(first_line) != len(listing.entries) and not listing.problems:
        listing.warnings.append(f"{path}: {first_line} images by its first line, {len(listing.entries)} by its rows")
    return listing


def list_csv(root: Path, prefix: str) -> Listing | None:
    """`images.csv`: path, label and split, for test images also is_query and is_gallery (default: both true).

    Spaces around a field do not count; other columns are left alone. The test split may be called "validation", as in
    other libraries' lists, but a list that has both is refused.
    """
    if not (root / "images.csv").is_file():
        return None
    listing, test_names = Listing(), set()
    for where, row in _csv_rows(root / "images.csv", ("path", "label", "split"), ("is_query", "is_gallery"), listing):
        split, label, path = row["split"].lower(), row["label"], row["path"]
        roles = [TRUTH_VALUES.get(row.get(column, "true").lower()) for column in ("is_query", "is_gallery")]
        if split == "train":
            roles = [True, True]  # whatever stands there
        elif split in ("test", "validation"):
            test_names.add(split)
            split = "test"
        if split not in ("train", "test"):
            listing.problems.append(f"{where}: the split {split!r} is neither train nor test")
        elif len(test_names) > 1:
            listing.problems.append(f"{where}: the list has both test and validation images; only one can be the test")
            break
        elif not label:
            listing.problems.append(f"{where}: the label is empty")
        elif None in roles:
            listing.problems.append(f"{where}: is_query and is_gallery have to be 0, 1, true or false")
        elif not any(roles):
            listing.problems.append(f"{where}: a test image has to be a query, in the gallery, or both")
        else:
            _add(listing, where, Entry(split, label, label, prefix + path, *roles), path)
    return listing


def list_image_folder(root: Path, prefix: str) -> Listing | None:
    """`train/` and `test/`: every folder at any depth that holds images is a class, named by its path."""
    if not (root / "train").is_dir() and not (root / "test").is_dir():
        return None
    listing = Listing()
    for split in ("train", "test"):
        if not (root / split).is_dir():
            listing.problems.append(f"{root / split}: missing folder")
            continue
        for class_name, files in class_folders(root / split, listing.problems):
            if class_name == "":
                listing.warnings.append(f"{root / split}: {len(files)} images outside any class folder are left out")
                continue
            folder = f"{prefix}{split}/{class_name}/"
            for file in files:
                if is_utf8(folder + file):
                    listing.entries.append(Entry(split, class_name, class_name, folder + file))
                else:
                    listing.problems.append(f"{folder + file!a}: the name is not valid UTF-8")
    return listing


RAW_LAYOUTS: dict[str, Callable[[Path, str], Listing | None]] = {
    "car": list_car,
    "cub": list_cub,
    "sop": list_sop,
    "isc": list_isc,
}
TRUTH_VALUES = {"0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True}  # the last: pandas


def class_folders(
    folder: Path, problems: list[str], name: str = "", above: tuple[str, ...] = ()
) -> Iterator[tuple[str, list[str]]]:
    """Yields (name, image files) of every folder that holds images, sorted. Links back to a folder above end there.

    A folder that cannot be read is added to `problems`.
    """
    above = (*above, os.path.realpath(folder))
    files, folders = [], []
    try:
        items = sorted(os.scandir(folder), key=lambda item: item.name)
    except OSError as error:
        problems.append(f"{folder}: unreadable folder ({one_line(error)})")
    else:
        for item in items:
            if item.name.startswith("."):
                continue
            if item.is_dir():
                folders.append(item.name)
            elif os.path.splitext(item.name)[1].lower() in IMAGE_SUFFIXES:
                files.append(item.name)
    if files:
        yield name, files
    for child in folders:
        if os.path.realpath(folder / child) not in above:
            yield from class_folders(folder / child, problems, f"{name}/{child}" if name else child, above)


def _rows(path: Path, columns: int, listing: Listing, skip: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Yields ("file, line n", fields) of a text list after the first `skip` lines, blank lines left out.

    The last field may contain spaces.
    """
    for number, line in enumerate(_text(path, listing).splitlines(), 1):
        fields = line.split(maxsplit=columns - 1)
        if number <= skip:
            continue
        if len(fields) == columns:
            yield f"{path}, line {number}", [field.strip() for field in fields]
        elif fields:
            listing.problems.append(f"{path}, line {number}: malformed line: {columns} fields expected: {line[:80]!r}")


def _csv_rows(
    path: Path, needed: tuple[str, ...], optional: tuple[str, ...], listing: Listing
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields ("file, line n", column -> field) of a CSV file with a header, blank lines left out."""
    text = _text(path, listing)
    if "\0" in text:
        line = len(text[: text.index("\0") + 1].encode().splitlines())
        listing.problems.append(f"{path}, line {line}: a NUL byte")
        return
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header, line = None, 1
    try:
        for row in rows:
            where, line = f"{path}, line {line}", rows.line_num + 1  # a quoted field may go over several lines
            fields = [field.strip() for field in row]
            if not any(fields):
                continue
            if header is None:
                header = [name.lower() for name in fields]
                faults = [f"no column {name!r}" for name in needed if name not in header]
                faults += [f"two columns {name!r}" for name in (*needed, *optional) if header.count(name) > 1]
                if faults:
                    listing.problems.append(f"{where}: {', '.join(faults)} in the header {','.join(header)[:80]!r}")
                    return
            elif len(fields) == len(header):
                yield where, dict(zip(header, fields, strict=True))
            else:
                listing.problems.append(f"{where}: malformed line: {len(fields)} fields, the header has {len(header)}")
    except csv.Error as error:
        listing.problems.append(f"{path}, line {line}: not valid CSV, read no further ({error})")
    if header is None and not listing.problems:
        listing.problems.append(f"{path}: empty; its first line has to be {','.join(needed)}")


def _text(path: Path, listing: Listing) -> str:
    """The text of a list in UTF-8, without its byte order mark; what is wrong with it is a problem of the listing."""
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        listing.problems.append(f"{path}: missing file")
    except UnicodeDecodeError as error:
        line = len(content[: error.start + 1].splitlines())
        listing.problems.append(f"{path}: not a readable text file in UTF-8 (line {line}: {one_line(error)})")
    except OSError as error:
        listing.problems.append(f"{path}: not a readable text file in UTF-8 ({one_line(error)})")
    return ""


def _add_numbered(
    listing: Listing,
    data_set: str,
    where: str,
    class_id: int,
    folder: str,
    path: str,
    class_name: str | None,
    split: str | None = None,
) -> None:
    """Adds one listed image of a data set whose classes are numbers, or the problem with it."""
    known = PUBLISHED[data_set]
    if 1 <= class_id <= known.num_classes:
        split = split or ("train" if class_id <= known.last_train_class else "test")
        _add(listing, where, Entry(split, class_id, class_name or str(class_id), folder + path), path)
    else:
        listing.problems.append(f"{where}: class id {class_id} is out of range 1..{known.num_classes}")


def _add(listing: Listing, where: str, entry: Entry, path: str) -> None:
    """Adds one listed image, or the problem with the path in the list, judged on its text: links on disk are fine."""
    if re.match(r"[/\\]|[A-Za-z]:", path) or ".." in re.split(r"[/\\]", path) or "\0" in path or not is_utf8(path):
        listing.problems.append(f"{where}: absolute path, '..' or unusable characters in {path!r}")
    else:
        listing.entries.append(entry)


def _checked(listing: Listing, name: str) -> Listing:
    """Sorts the entries by split and class and adds the problems and warnings that only the whole list shows."""
    # Training images first, then by class; the sort is stable and keeps the list's order within a class.
    listing.entries.sort(key=lambda entry: (entry.split != "train", entry.class_key))
    classes = {split: {e.class_key for e in listing.entries if e.split == split} for split in ("train", "test")}
    both = sorted(classes["train"] & classes["test"])
    if both:
        listing.warnings.append(
            f"classes in both train and test: {len(both)} ({', '.join(map(str, both[:3]))}{', …' * (len(both) > 3)}); "
            "Recall@K is meant for classes that were not trained on"
        )
    for split, reports in (("train", listing.warnings), ("test", listing.problems)):  # a test image would find itself
        times = collections.Counter(posixpath.normpath(entry.path) for entry in listing.entries if entry.split == split)
        repeated = [path for path, number in times.items() if number > 1]
        if repeated:
            reports.append(f"{len(repeated)} {split} images are listed more than once, such as {repeated[0]}")
    for part, found in count(listing.entries).items():
        if found[1] == 0 and not listing.problems:
            listing.problems.append(f"the {part} split has no images")
        if name in PUBLISHED and found != PUBLISHED[name].counts[part]:
            published = "{:,} and {:,}".format(*PUBLISHED[name].counts[part])
            listing.warnings.append(f"{part}: {found[0]:,} classes and {found[1]:,} images, published are {published}")
    return listing


def _first_existing(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def is_utf8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


# ------------------------------------------------------------------------------------------------ writing the cache


def build_cache(
    data_path: Path,
    name: str,
    image_size: int,
    num_workers: int,
    force: bool = False,
    skip_bad: bool = False,
    resize: str = "crop",
) -> "Cache":
    """Turns the raw data set data_path/name into its cache, unless a good one is there and `force` is not set.

    The new cache is made under a temporary name and renamed when whole; until then an earlier one stays as it was.
    Raises UnknownLayout if there is no data set, InputError with all problems found in it.
    """
    target = cache_folder(data_path, name, image_size, resize)
    lock = target.with_name(f".{target.name}.lock")
    _bring_back(target, lock)
    if not force and (target / "meta.json").exists():
        try:
            cache = read_cache(data_path, name, image_size, resize)
            print(f"{name}: {target} is there already (--force makes it again)")
            return cache
        except InputError as error:
            print(f"{name}: making the cache again: {error}", file=sys.stderr)
    listing = list_data_set(name, data_path / name)
    old, new = (target.with_name(f".{target.name}.{word}-{os.getpid()}") for word in ("old", "new"))
    skipped_list = target.with_name(f"{target.name}_skipped.txt")
    held = take_lock(lock, SECONDS_FOR_A_LOCK)
    if held is None:
        raise InputError(f"{target} is being made by another process")
    with held:
        for leftover in target.parent.glob(f".{target.name}.*-*"):  # of a run that was killed
            shutil.rmtree(leftover)
        remove_leftovers(target.parent, skipped_list.name)
        try:
            new.mkdir()
            skipped = _write_cache(new, listing, name, data_path / name, image_size, resize, num_workers, skip_bad)
            _write_skipped(skipped_list, skipped)
            if target.exists():
                os.rename(target, old)
            os.rename(new, target)
            flush_folder(target.parent)
        finally:
            if old.exists() and not target.exists():
                os.rename(old, target)
            for folder in (new, old):
                shutil.rmtree(folder, ignore_errors=True)
    return read_cache(data_path, name, image_size, resize)


def _bring_back(target: Path, lock: Path) -> None:
    """Renames an earlier cache back that a run was killed in replacing, between its two renames."""
    if target.exists() or not any(target.parent.glob(f".{target.name}.old-*/meta.json")):
        return
    held = take_lock(lock, SECONDS_FOR_A_LOCK)
    with held or contextlib.nullcontext():
        for earlier in target.parent.glob(f".{target.name}.old-*/meta.json"):
            if held and not target.exists():
                os.rename(earlier.parent, target)


def _write_cache(
    folder: Path,
    listing: Listing,
    name: str,
    source: Path,
    image_size: int,
    resize: str,
    num_workers: int,
    skip_bad: bool,
) -> list[str]:
    """Fills `folder` and returns the problems of the images that `skip_bad` left out. Memory: a few images a worker."""
    entries = listing.entries
    for split, (num_classes, num_images) in count(entries).items():
        print(f"{name}: {split} lists {num_classes:,} classes, {num_images:,} images", flush=True)
    for warning in listing.warnings:
        print(f"{name}: warning: {warning}", file=sys.stderr)

    num_bytes: dict[int, int] = {}  # number of the entry -> bytes of its pixels
    bad: dict[int, str] = {}  # number of the entry -> what is wrong with its image
    stored: dict[int, tuple] = {}  # number of the entry -> what _store_image returned
    num_workers = max(1, min(num_workers, len(entries), 61))  # 61: the most that Windows can wait for
    pool = ProcessPoolExecutor(num_workers, initializer=_end_with_parent)
    try:
        # The headers give every image its place before any is decoded, so that workers write in parallel. (A rotation
        # by EXIF, applied later, swaps the sides and keeps the number of pixels.)
        probe = functools.partial(_probe_image, source, image_size, resize)
        results = pool.map(probe, entries, chunksize=64)
        for number, result in enumerate(_bar(results, f"{name}: headers", len(entries))):
            (bad if isinstance(result, str) else num_bytes)[number] = result
        store = functools.partial(_store_image, source, image_size, resize)
        while True:
            good = [number for number in range(len(entries)) if number not in bad]
            images, sizes = [entries[number] for number in good], [num_bytes[number] for number in good]
            files, offsets = _allocate(folder, [entry.split for entry in images], sizes, image_size)
            results = pool.map(store, images, sizes, files, offsets, chunksize=32)
            for number, result in zip(good, _bar(results, f"{name}: pixels", len(good)), strict=True):
                (bad if isinstance(result, str) else stored)[number] = result
            if not skip_bad or not any(number in bad for number in good):
                break  # else once more, without those that turned out to be damaged
    except BrokenProcessPool:
        _stop_if_told()
        raise RunError("a worker process was killed, for lack of memory perhaps; try fewer --num_workers") from None
    finally:
        pool.shutdown(cancel_futures=True)

    skipped = [bad[number] for number in sorted(bad)]
    problems = listing.problems if skip_bad else listing.problems + skipped
    if not problems:
        counts = count(entries[number] for number in good)
        problems = [f"no image is left in {split}" for split in counts if counts[split][1] == 0]
    if problems:
        remedy = "; --skip_bad goes on without bad images" if skipped and not skip_bad and not listing.problems else ""
        raise InputError(f"{name}: {len(problems):,} problems, nothing written{remedy}:{listed(problems)}")

    train, test = ([number for number in good if entries[number].split == split] for split in ("train", "test"))
    meta = {"version": CACHE_VERSION, "image_size": image_size, "resize": resize}
    meta |= _channel_statistics(name, [stored[number] for number in train])
    arrays = {
        "train_sizes": np.array([stored[number][0] for number in train], np.int32),
        "train_offsets": np.cumsum([0] + [num_bytes[number] for number in train], dtype=np.int64),
        "test_is_query": np.array([entries[number].is_query for number in test], bool),
        "test_is_gallery": np.array([entries[number].is_gallery for number in test], bool),
    }
    for split, numbers in (("train", train), ("test", test)):
        # In the order of the entries, which are sorted by class.
        classes = {entries[number].class_key: entries[number].class_name for number in numbers}
        label_of = {key: label for label, key in enumerate(classes)}
        meta[split] = {"classes": list(classes.values()), "paths": [entries[number].path for number in numbers]}
        arrays[f"{split}_labels"] = np.array([label_of[entries[number].class_key] for number in numbers], np.int64)
    for array_name, array in arrays.items():
        np.save(folder / f"{array_name}.npy", array, allow_pickle=False)
    with ThreadPoolExecutor(2) as threads:  # the two large files at once
        sealed = threads.map(_seal, [folder / f"{array_name}.npy" for array_name in sorted(ARRAYS)])
        meta["arrays"] = dict(zip(sorted(ARRAYS), sealed, strict=True))
    write_record(folder / "meta.json", meta)
    return skipped


def _allocate(folder: Path, splits: list[str], sizes: list[int], image_size: int) -> tuple[list[Path], list[int]]:
    """Makes the two pixel files in their full size, for images of these splits and bytes, training images first.

    Returns each image's file and byte offset.
    """
    pixel_files = {"train": folder / "train_pixels.npy", "test": folder / "test_images.npy"}
    for path in pixel_files.values():
        path.unlink(missing_ok=True)  # of the first try, when --skip_bad found damaged images
    needed, free = sum(sizes), shutil.disk_usage(folder).free
    if needed + 2**24 > free:  # 16 MiB for all that is not pixels
        raise InputError(f"{folder.parent}: the cache needs {size_text(needed)}, only {size_text(free)} are free")
    files, offsets = [], []
    for split, path in pixel_files.items():
        of_split = [size for size, its_split in zip(sizes, splits, strict=True) if its_split == split]
        shape = (sum(of_split),) if split == "train" else (len(of_split), image_size, image_size, 3)
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            *starts, end = itertools.accumulate(of_split, initial=file.tell())
            file.truncate(end)
        files += [path] * len(of_split)
        offsets += starts
    return files, offsets


def _probe_image(source: Path, image_size: int, resize: str, entry: Entry) -> int | str:
    """Reads one image's header: the bytes that its pixels will take, or what is wrong with it."""
    try:
        with _open_image(source / entry.path) as image:
            shorter = train_size(image_size) if entry.split == "train" else image_size
            width, height = resized(*image.size, shorter, resize)
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them raise
        return _bad_image(source / entry.path, error)
    if width * height > MAX_RESIZED_PIXELS:
        return _too_large(source / entry.path, width, height)
    return (width * height if entry.split == "train" else image_size**2) * 3


def _store_image(
    source: Path, image_size: int, resize: str, entry: Entry, num_bytes: int, file: Path, offset: int
) -> tuple | str:
    """Decodes one image and writes its pixels, which have to be `num_bytes`, to their place.

    Returns ((height, width), sums, sums of squares of the channels), the sums for training images only, or what is
    wrong with the image.
    """
    try:
        to_size = resize_train if entry.split == "train" else resize_test
        pixels = to_size(load_rgb(source / entry.path), image_size, resize)
    except Exception as error:
        return _bad_image(source / entry.path, error)
    if pixels.nbytes != num_bytes:  # would overwrite the next image
        return f"{source / entry.path}: unreadable (its header gives another size than its pixels)"
    with open(file, "r+b") as target:  # not a memory map, whose writer dies of SIGBUS when the disk is full
        target.seek(offset)
        target.write(np.ascontiguousarray(pixels))
    if entry.split == "test":
        return pixels.shape[:2], 0, 0
    rows = pixels.reshape(len(pixels), -1)  # sums along three channels at a time would be slow
    sums, squares = rows.sum(0, dtype=np.int64), np.einsum("ij,ij->j", rows, rows, dtype=np.int64)
    return pixels.shape[:2], sums.reshape(-1, 3).sum(0), squares.reshape(-1, 3).sum(0)  # whole numbers: exact


def listed(problems: list[str]) -> str:
    """The first 20 of them, a line each, and how many more there are."""
    shown = "".join(f"\n  {problem}" for problem in problems[:20])
    return shown + (f"\n  … and {len(problems) - 20:,} more" if len(problems) > 20 else "")


def read_test_image(path: Path, image_size: int, resize: str = "crop") -> np.ndarray | str:
    """An image file as the network sees it (`resize_test`), or what is wrong with it."""
    try:
        image = load_rgb(path)
        width, height = resized(*image.size, image_size, resize)
        if width * height > MAX_RESIZED_PIXELS:
            return _too_large(path, width, height)
        return resize_test(image, image_size, resize)
    except Exception as error:  # as in _probe_image
        return _bad_image(path, error)


def _too_large(path: Path, width: int, height: int) -> str:
    """What is wrong with an image that would be so large after the resize."""
    return f"{path}: {width} x {height} after the resize is over {MAX_RESIZED_PIXELS:,} pixels"


def _bad_image(path: Path, error: Exception) -> str:
    """What is wrong with an image that raised `error` when it was opened or decoded."""
    if isinstance(error, FileNotFoundError):
        return f"{path}: missing image"
    if isinstance(error, UnidentifiedImageError):
        return f"{path}: unreadable (not an image of a known format)"
    return f"{path}: unreadable ({one_line(error)})"


def _end_with_parent() -> None:
    """Starts a worker: Ctrl-C is the parent's affair, and a worker whose parent was killed ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by it, a pool of which one worker died ends the others

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _bar(items: Iterable, title: str, total: int, unit: str = " images") -> Iterator:
    """The items, with a progress bar if they take more than a second; none without a terminal. Stops at signals."""
    for item in tqdm(items, title, total, unit=unit, delay=1, disable=None):
        stop_here()
        yield item


def _channel_statistics(name: str, stored: list[tuple]) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel, in 0..1: published, or over the pixels of all training images."""
    if name in PUBLISHED:
        return {"mean": list(PUBLISHED[name].mean), "std": list(PUBLISHED[name].std)}
    num_pixels = sum(height * width for (height, width), _, _ in stored)
    mean = sum(sums for _, sums, _ in stored) / num_pixels
    variance = sum(squares for _, _, squares in stored) / num_pixels - mean**2
    std = np.sqrt(np.maximum(variance, 1.0))  # at least one grey level: images of one colour do not divide by zero
    return {"mean": (mean / 255).round(6).tolist(), "std": (std / 255).round(6).tolist()}


def _write_skipped(path: Path, skipped: list[str]) -> None:
    """Lists the images that --skip_bad left out of the cache beside it; no list where none was."""
    path.unlink(missing_ok=True)
    if skipped:
        with atomic_open(path) as file:
            file.write("\n".join(skipped) + "\n")
        print(f"{len(skipped):,} bad images were left out; they are listed in {path}", file=sys.stderr)


def _seal(path: Path) -> dict[str, int]:
    """Flushes a finished array to disk and returns its size and checksum."""
    with open(path, "r+b") as file:
        flush_to_disk(file)
    return {"bytes": path.stat().st_size, "crc32": _crc32(path)}


def _crc32(path: Path) -> int:
    """The CRC-32 of a file."""
    crc, num_bytes = 0, path.stat().st_size
    with open(path, "rb") as file:
        for _ in _bar(range(0, num_bytes, 2**22), f"checksum of {path.name}", -(-num_bytes // 2**22), " x 4 MiB"):
            crc = zlib.crc32(file.read(2**22), crc)
    return crc


def count(entries: Iterable[Entry]) -> dict[str, tuple[int, int]]:
    """Split -> (number of classes, number of images); "query" and "gallery" too, unless all test images are both."""
    keys = {"train": [], "test": [], "query": [], "gallery": []}
    for entry in entries:
        keys[entry.split].append(entry.class_key)
        if entry.split == "test" and entry.is_query:
            keys["query"].append(entry.class_key)
        if entry.split == "test" and entry.is_gallery:
            keys["gallery"].append(entry.class_key)
    if keys["test"] == keys["query"] == keys["gallery"]:
        del keys["query"], keys["gallery"]
    return {part: (len(set(of_part)), len(of_part)) for part, of_part in keys.items()}


# ------------------------------------------------------------------------------------------------ reading the cache


ARRAYS = ["train_pixels", "train_offsets", "train_sizes", "train_labels"]
ARRAYS += ["test_images", "test_labels", "test_is_query", "test_is_gallery"]
META = {  # meta.json
    "version": int,
    "image_size": int,
    "resize": str,
    "mean": [float],
    "std": [float],
    "train": {"classes": [str], "paths": [str]},
    "test": {"classes": [str], "paths": [str]},
    "arrays": {name: {"bytes": int, "crc32": int} for name in ARRAYS},
}


@dataclass(frozen=True)
class Cache:
    """A cached data set. The arrays are memory maps, opened where they are first used."""

    folder: Path
    meta: dict
    fingerprint: str  # sha256 of meta.json, which holds the checksums of all arrays

    def array(self, name: str) -> np.ndarray:
        """One array of the cache, read-only.

        `train_pixels (bytes,) uint8`, `train_offsets (N + 1,) int64`, `train_sizes (N, 2) int32` (height, width),
        `train_labels (N,) int64`; `test_images (M, S, S, 3) uint8`, `test_labels (M,) int64`,
        `test_is_query (M,) bool`, `test_is_gallery (M,) bool`. Labels count the split's classes from 0.
        """
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    @functools.cached_property
    def _train(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.array("train_pixels"), self.array("train_offsets"), self.array("train_sizes").astype(np.int64)

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Split -> (number of classes, number of images)."""
        return {
            split: (len(self.meta[split]["classes"]), len(self.meta[split]["paths"])) for split in ("train", "test")
        }

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def train_crops(self, indices: np.ndarray, corners: np.ndarray, sides: np.ndarray, out: np.ndarray) -> None:
        """Cuts one square window out of each of B training images.

        `indices` `(B,)` says which, `corners` `(B, 2)` the (top, left) of each window, `sides` `(B,)` its side. Writes
        the windows to the top left corners of `out`, `(B, S, S, 3) uint8`, and 0 elsewhere.
        """
        pixels, offsets, sizes = self._train
        for crop, index, (top, left), side in zip(out, indices, corners, sides, strict=True):
            image = pixels[offsets[index] : offsets[index + 1]].reshape(*sizes[index], 3)
            crop[:side, :side] = image[top : top + side, left : left + side]
            crop[side:], crop[:side, side:] = 0, 0


def cache_folder(data_path: Path, name: str, image_size: int, resize: str = "crop") -> Path:
    """data/NAME/cache_256, or cache_256_squash"""
    return data_path / name / (f"cache_{image_size}" if resize == "crop" else f"cache_{image_size}_{resize}")


def read_cache(data_path: Path, name: str, image_size: int, resize: str = "crop") -> Cache:
    """Opens the cache of a data set.

    One that is missing, partial, damaged or of an older version is an InputError that names the command that makes it.
    Sizes are checked here, contents by `verify_cache`.
    """
    folder, command = cache_folder(data_path, name, image_size, resize), _command(data_path, name, image_size, resize)
    if not folder.parent.is_dir() and name != "demo":
        raise InputError(
            f"{folder.parent}: no such folder; put the data set there (README, Data), then: {command}; to try it "
            f"without one: {_command(data_path, 'demo', 32, 'crop')}"
        )
    remedy = f"make it with: {command}"
    try:
        meta = read_record(folder / "meta.json", META)
        if (meta["version"], meta["image_size"], meta["resize"]) != (CACHE_VERSION, image_size, resize):
            raise InputError(f"{folder} is of another version or has other settings; {remedy}")
        for array_name, expected in meta["arrays"].items():
            if (folder / f"{array_name}.npy").stat().st_size != expected["bytes"]:
                raise InputError(f"{folder / array_name}.npy has the wrong size; {remedy}")
        cache = Cache(folder, meta, sha256(folder / "meta.json"))
        if not len(meta["mean"]) == len(meta["std"]) == 3:
            raise ValueError("mean and std have to be of three channels")
        for array_name in ("train_labels", "test_labels", "test_is_query", "test_is_gallery"):
            if len(cache.array(array_name)) != cache.counts[array_name.split("_")[0]][1]:
                raise ValueError(f"it does not fit {array_name}.npy")
        return cache
    except FileNotFoundError as error:
        raise InputError(f"no cache: {error.filename} is missing; {remedy}") from None
    except InputError:
        raise
    except Exception as error:  # for the damaged header of an array, numpy raises whatever Python's parser does
        raise InputError(f"{folder} is damaged ({one_line(error)}); {remedy}") from None


def _command(data_path: Path, name: str, image_size: int, resize: str) -> str:
    """The command that makes a cache."""
    command = f"python data_utils.py --data_name {shlex.quote(name)}"
    if data_path != Path("data"):
        command += f" --data_path {shlex.quote(str(data_path))}"
    if image_size != 256:
        command += f" --image_size {image_size}"
    return command if resize == "crop" else f"{command} --resize {resize}"


def check_unchanged(cache: Cache) -> None:
    """Raises RunError if the cache has been made anew, from other data, since it was opened."""
    try:
        changed = sha256(cache.folder / "meta.json") != cache.fingerprint
    except OSError:
        changed = True
    if changed:
        raise RunError(f"{cache.folder} has been changed during the run; what was finished before is kept")


def verify_cache(cache: Cache) -> None:
    """Reads every array and compares its checksum. Raises InputError naming those that changed."""
    arrays = cache.meta["arrays"]
    with ThreadPoolExecutor(2) as threads:
        sums = list(threads.map(_crc32, [cache.folder / f"{name}.npy" for name in arrays]))
    changed = [name for name, crc32 in zip(arrays, sums, strict=True) if crc32 != arrays[name]["crc32"]]
    if changed:
        meta = cache.meta
        remedy = _command(cache.folder.parents[1], cache.folder.parent.name, meta["image_size"], meta["resize"])
        raise InputError(f"{cache.folder}: damaged: {', '.join(changed)}; make it again with: {remedy} --force")


# ------------------------------------------------------------------------------------------------ the demo data set


def draw_demo(
    folder: Path, num_classes: int = 100, images_per_class: int = 20, image_side: int = 64, seed: int = 0
) -> None:
    """Draws an image-folder data set of handwriting-like characters: `num_classes` to train on and as many unseen ones.

    A character is a few random strokes. Each image is that character written anew: the strokes jitter, the whole is
    turned, sheared, scaled and shifted a little, with another pen, ink and paper. The same arguments give the same
    images. The folder appears when it is whole; one that is there is left as it is.
    """
    with take_lock(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            _draw_demo(folder, num_classes, images_per_class, image_side, seed)


def _draw_demo(folder: Path, num_classes: int, images_per_class: int, image_side: int, seed: int) -> None:
    for leftover in folder.parent.glob(f".{folder.name}.new-*"):  # of a run that was killed
        shutil.rmtree(leftover)
    temporary = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    try:
        for number in _bar(range(2 * num_classes), f"drawing {folder.name}", 2 * num_classes, " classes"):
            generator = np.random.default_rng((seed, number))
            strokes = _new_character(generator)
            class_folder = temporary / ("train" if number < num_classes else "test") / f"character_{number:03d}"
            class_folder.mkdir(parents=True)
            for image_number in range(images_per_class):
                _write_character(strokes, image_side, generator).save(class_folder / f"{image_number:02d}.png")
        if hasattr(os, "sync"):
            os.sync()  # a flush of each of thousands of files would take longer
        os.rename(temporary, folder)
        flush_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _new_character(generator: np.random.Generator) -> list[np.ndarray]:
    """2 to 4 strokes, each `(4, 2) float`: the control points of a Bezier curve in [-1, 1] x [-1, 1]."""
    return [generator.uniform(-0.9, 0.9, (4, 2)) for _ in range(generator.integers(2, 5))]


def _write_character(strokes: list[np.ndarray], side: int, generator: np.random.Generator) -> Image.Image:
    """One handwritten RGB image of a character, `side` x `side` pixels."""
    angle, shear = generator.normal(0, 0.15, 2)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    affine = turn @ np.array([[1, shear], [0, 1]]) * generator.uniform(0.75, 1.05, 2)
    shift = generator.normal(0, 0.08, 2)
    along = np.linspace(0, 1, 24)[:, None]
    bezier = np.hstack([math.comb(3, k) * along**k * (1 - along) ** (3 - k) for k in range(4)])

    large = 4 * side  # drawn large and reduced: Pillow's lines are not smooth
    canvas = Image.new("L", (large, large))
    draw = ImageDraw.Draw(canvas)
    pen = generator.uniform(0.03, 0.07) * large
    for stroke in strokes:
        points = bezier @ (stroke + generator.normal(0, 0.1, stroke.shape)) @ affine.T + shift
        points = (points * 0.45 + 0.5) * large
        draw.line([tuple(point) for point in points], fill=255, width=round(pen), joint="curve")
        for x, y in (points[0], points[-1]):
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)
    ink_share = np.asarray(canvas.resize((side, side), Image.Resampling.BOX))[..., None] / 255
    paper, ink = generator.uniform(170, 255, 3), generator.uniform(0, 110, 3)
    return Image.fromarray((paper + (ink - paper) * ink_share).round().astype(np.uint8))


# ------------------------------------------------------------------------------------------------ command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="data_utils.py", description=__doc__)
    add = parser.add_argument
    add("--data_name", nargs="+", metavar="NAME", help="data sets to cache (default: all that are found)")
    add("--data_path", type=Path, default=Path("data"), metavar="DIR", help="folder of the data sets (default: data)")
    add("--image_size", type=natural_number, default=256, metavar="S", help="side of the crops, pixels (default: 256)")
    resize_help = "crop (default): the shorter side to S, then a crop; squash: all of the image to S x S"
    add("--resize", choices=RESIZES, default="crop", metavar="R", help=resize_help)
    add("--num_workers", type=natural_number, default=num_cores(), metavar="N", help="processes (default: all cores)")
    add("--force", action="store_true", help="make a cache again that is there already")
    add("--skip_bad", action="store_true", help="go on without bad images; their list is written beside the cache")
    add("--verify", action="store_true", help="only compare the caches with their checksums")
    args = parser.parse_args(argv)
    for name in args.data_name or []:
        check_data_name(name)
    if args.image_size > 2048:
        raise InputError(f"--image_size {args.image_size} is over 2048 pixels")
    if args.verify and (args.force or args.skip_bad):
        raise InputError("--verify only reads: it does not go with --force or --skip_bad")
    return args


def check_data_name(name: str) -> None:
    """Raises InputError unless `name` is the plain name of a folder."""
    if not name or name.startswith(".") or re.search(r'[/\\:*?"<>|\0\n\r]', name) or not is_utf8(name):
        raise InputError(f"--data_name {name!a} is not the name of a folder under --data_path")


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(args: argparse.Namespace) -> None:
    names = list(dict.fromkeys(args.data_name)) if args.data_name else _found_names(args)
    rows, refused, failed = [], [], False
    for name in names:
        start = time.perf_counter()
        try:
            if args.verify:
                cache = read_cache(args.data_path, name, args.image_size, args.resize)
                verify_cache(cache)
            else:
                if name == "demo" and not (args.data_path / name).exists():
                    args.data_path.mkdir(parents=True, exist_ok=True)
                    draw_demo(args.data_path / name)
                if not (args.data_path / name).is_dir():
                    raise UnknownLayout(f"{args.data_path / name}: no such folder; expected is one of\n{LAYOUTS}")
                cache = build_cache(
                    args.data_path, name, args.image_size, args.num_workers, args.force, args.skip_bad, args.resize
                )
            rows.append((name, cache, time.perf_counter() - start))
        except UnknownLayout as error:
            if args.data_name:
                refused.append(str(error))
            else:
                print(f"{args.data_path / name}: no data set, passed over")
        except InputError as error:
            refused.append(str(error))
        except (RunError, OSError) as error:  # the other sets may still go well
            refused.append(f"{name}: {error}")
            failed = True
        except (KeyboardInterrupt, Terminated) as stop:
            stop.add_note(name)
            raise
    if rows:
        print(f"\n{'data set':<12}{'train':>26}{'test':>26}{'on disk':>10}{'seconds':>9}")
    for name, cache, seconds in rows:
        train, test = (f"{c:,} classes {n:,} images" for c, n in (cache.counts["train"], cache.counts["test"]))
        print(f"{name:<12}{train:>26}{test:>26}{size_text(cache.num_bytes):>10}{seconds:>9.1f}")
    if rows and not args.verify:
        print(f"\ntrain on it with: {_training_command(args, rows[0][0])}")
    if refused:
        raise (RunError if failed else InputError)("\n".join(refused))
    if not rows and args.verify:
        wanted = cache_folder(args.data_path, "", args.image_size, args.resize).name
        raise InputError(f"no {wanted} found in {args.data_path}/; --image_size and --resize name another one")
    if not rows:
        raise InputError(f"no data set found in {args.data_path}/; expected is one of\n{LAYOUTS}")


def _training_command(args: argparse.Namespace, name: str) -> str:
    """What to run next; for the demo, with options for a CPU."""
    options = _command(args.data_path, name, args.image_size, args.resize).partition(".py")[2]
    return f"python train.py{options}" + " --weights none --no_flip --lr 1e-3" * (name == "demo")


def _found_names(args: argparse.Namespace) -> list[str]:
    """The folders that may be data sets; for --verify, those that have a cache."""
    names = []
    for folder in _subfolders(args.data_path) if args.data_path.is_dir() else []:
        if not is_utf8(folder.name):
            print(f"{str(folder)!a}: the name is not valid UTF-8, passed over")
        elif not args.verify or os.path.exists(cache_folder(args.data_path, folder.name, args.image_size, args.resize)):
            names.append(folder.name)
    return names


def main(argv: list[str] | None = None) -> int:
    return run_main("data_utils.py", lambda: run(parse_args(argv)), "fewer --num_workers or a smaller --image_size")


if __name__ == "__main__":
    sys.exit(main())
