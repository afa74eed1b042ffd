"""Which images there are, in folders and lists, and which changed since a cache was made. None is opened here."""

import collections
import contextlib
import csv
import itertools
import os
import posixpath
import re
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.util import hash_array

from dreml.cache import Cache, make_command
from dreml.cli import InputError, counted, format_problems, is_utf8, one_line
from dreml.images import HEIF_REMEDY, HEIF_SUFFIXES, image_suffixes

Photos = dict[str, tuple[int, int]]  # path relative to their folder, with "/" -> bytes, time of change in nanoseconds
COLUMNS = ("path", "label", "split", "is_query", "is_gallery")
SPLITS = {"train": "train", "test": "test", "validation": "test", "val": "test"}
TRUTH_VALUES = {"0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True}  # the last: pandas

NEVER_IMAGES = {"images.csv", "Thumbs.db", "desktop.ini"}  # the last two are what Windows leaves in folders
# Thumbnails, deleted files and earlier versions, which a NAS, Samba, Windows and macOS keep among photos. In lower case
PROGRAM_FOLDERS = {"@eadir", "#recycle", "@recycle", "$recycle.bin", "#snapshot", "@recently-snapshot"}
PROGRAM_FOLDERS |= {"system volume information", "lost+found", "__macosx"}
OF_PROGRAMS = "of programs (folders such as @eaDir, results of this one)"
OWN_RECORDS = {"args.json", "index.json", "train_pixels.npy"}  # of a run, an index, a cache
OWN_PICTURE = re.compile(r"(neighbours|worst|evaluation)(_pooled)?\.png")  # beside a CSV of the same name

LISTED = "files.bin"  # in a cache: `list_files` of when it was made
MAX_COMPARED = 100_000  # files whose size and time are looked at before each training, in half a second

# ------------------------------------------------------------------------------------------------ folders


class LeftOut(collections.Counter):
    """What lies where images are looked for and is none: the suffix of files, or in words -> number."""

    def __str__(self) -> str:
        """Say all of it on one line, the most frequent first."""
        return "left out: " + ", ".join(f"{number:,} {kind}" for kind, number in self.most_common(10))


def class_folders(root: Path, problems: list[str], left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    """Yield (name, image files) of every folder that holds images, sorted, at any depth. `root` itself is called "".

    What cannot be read is added to `problems`. Passed over: hidden files, folders of other programs, pictures, runs,
    indexes and caches of this one, links back to a folder above.
    """
    suffixes = image_suffixes()
    above: dict[str, list[str]] = {}  # folder -> the real paths of itself and of those above

    def report(error: OSError) -> None:
        problems.append(f"{error.filename}: unreadable folder ({one_line(error)})")

    def is_shown(folder: str, item: str) -> bool:
        if not is_utf8(item):
            problems.append(f"{os.path.join(folder, item)!a}: the name is not valid UTF-8: rename it")
            return False
        return not item.startswith(".") and item not in NEVER_IMAGES

    for folder, folders, files in os.walk(root, onerror=report, followlinks=True):
        if folder != str(root) and not OWN_RECORDS.isdisjoint(files):
            left_out[OF_PROGRAMS] += 1
            folders.clear()
            continue
        images = []
        for file in sorted(files):
            suffix = os.path.splitext(file)[1].lower()
            if not is_shown(folder, file):
                continue
            if OWN_PICTURE.fullmatch(file) and f"{file[:-4]}.csv" in files:
                left_out[OF_PROGRAMS] += 1
            elif suffix in suffixes:
                images.append(file)
            elif suffix in HEIF_SUFFIXES:
                left_out[f"{suffix} ({HEIF_REMEDY})"] += 1
            else:
                left_out[suffix or "without a suffix"] += 1
        above[folder] = [*above.get(os.path.dirname(folder), []), os.path.realpath(folder)]
        visited = []
        for child in sorted(folders):
            if child.lower() in PROGRAM_FOLDERS:
                left_out[OF_PROGRAMS] += 1
            elif is_shown(folder, child) and os.path.realpath(os.path.join(folder, child)) not in above[folder]:
                visited.append(child)
        folders[:] = visited
        if images:
            yield os.path.relpath(folder, root).replace(os.sep, "/").removeprefix("."), images


def class_of(path: str) -> str | None:
    """The class of a photo, as in data sets: the path of its folder; None for a photo outside any."""
    return path.rpartition("/")[0] or None


def list_photos(folder: Path, problems: list[str]) -> Photos:
    """All photos below a folder, at any depth. What cannot be read is added to `problems`.

    Prints which files are left out for their types. Raises InputError if there are no photos.
    """
    photos = {}
    left_out = LeftOut()
    for class_name, files in class_folders(folder, problems, left_out):
        for name in files:
            path = f"{class_name}/{name}".removeprefix("/")
            if not os.path.isfile(folder / path):  # a link to nowhere, or a pipe: opening that would wait without end
                problems.append(f"{folder / path}: not a regular file")
                continue
            found = os.stat(folder / path)
            mtime = max(-(2**63), min(found.st_mtime_ns, 2**63 - 1))  # int64 ends in 2262
            photos[path] = (found.st_size, mtime)
    if not photos:
        raise InputError(f"{folder}: no images below it{f' ({left_out})' if left_out else format_problems(problems)}")
    if left_out:
        print(f"warning: {folder}: {left_out}", file=sys.stderr)
    return photos


def list_files(folder: Path, with_times: bool = True) -> np.ndarray:
    """The images below a folder and its images.csv, `(N, 3) int64`: hash of the path, size, time of change in seconds.

    Size and time are 0 of a file that is missing, and of all files without `with_times`.
    """
    pieces = [np.zeros((0, 3), np.int64)]
    lists = [("", ["images.csv"])] if (folder / "images.csv").is_file() else []
    for name, files in itertools.chain(class_folders(folder, [], LeftOut()), lists):
        paths = [f"{name}/{file}" for file in files]
        piece = np.zeros((len(paths), 3), np.int64)
        piece[:, 0] = hash_array(np.array(paths, object), categorize=False).view(np.int64)
        if with_times:
            for row, path in zip(piece, paths, strict=True):
                with contextlib.suppress(OSError):
                    found = os.stat(f"{folder}/{path}")
                    row[1:] = found.st_size, found.st_mtime
        pieces.append(piece)
    return np.concatenate(pieces)


def warn_of_changes(cache: Cache) -> None:
    """Say how many raw files are new, changed or gone since a cache was made, if any, and how to make it again."""
    try:
        known = np.fromfile(cache.folder / LISTED, np.int64).reshape(-1, 3)
    except (OSError, ValueError):  # a damaged record
        return
    found = list_files(cache.folder.parent, with_times=len(known) <= MAX_COMPARED)
    _, old, new = np.intersect1d(known[:, 0], found[:, 0], return_indices=True)
    if len(old) < 2:  # whoever has a cache may remove the images
        return
    num_new = len(found) - len(new)
    num_gone = len(known) - len(old)
    is_changed = (known[old, 1:] != found[new, 1:]).any(axis=1)
    are_all_changed = is_changed[known[old, 1] > 0].all()  # as where the folder was copied, or the times are left out
    num_changed = 0 if are_all_changed else is_changed.sum()
    if num_new + num_changed + num_gone > 0:
        changes = f"{counted(num_new, 'file')} {'is' if num_new == 1 else 'are'} new, {num_changed:,} changed"
        command = make_command(cache.folder.parents[1], cache.name, cache.spec)
        origin = cache.name.rpartition("_holdout")[0]
        if origin and (cache.folder.parent / origin).is_symlink():
            command = "its --holdout command with"  # which makes its list again, too
        changes += f", {num_gone:,} gone since {cache.folder} was made: {command} --force"
        print(f"warning: {changes}", file=sys.stderr)


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and PROGRAM_FOLDERS."""
    folders = [path for path in folder.iterdir() if path.is_dir() and path.name.lower() not in PROGRAM_FOLDERS]
    return sorted(path for path in folders if not path.name.startswith("."))


# ------------------------------------------------------------------------------------------------ lists


class UnknownLayout(InputError):
    """A folder that holds no data set in a layout that is known for its name."""


@dataclass
class Listing:
    """The images that the lists of a raw data set name, and what is wrong with the lists."""

    root: Path  # the folder of the lists
    columns: dict[str, list] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, paths: list[str], label: str, split: str, is_query: bool = True, is_gallery: bool = True) -> None:
        """Add images of one class. Paths are relative to `root`, with forward slashes; `split` is "train" or "test"."""
        self.columns["path"] += paths
        label = sys.intern(label)  # one text a class, not one an image
        for name, value in zip(COLUMNS[1:], (label, split, is_query, is_gallery), strict=True):
            self.columns[name] += [value] * len(paths)

    def add_line(self, where: str, path: str, *image: str | bool) -> None:
        """Add one image of a list, see `add`, or a problem if its path leads out of the data set's folder."""
        if not path or re.match(r"[/\\]|[A-Za-z]:", path) or ".." in re.split(r"[/\\]", path):
            remedy = "name an image by its path in the data set's folder (a link to it is fine)"
            self.problems.append(f"{where}: unusable path {path!r}: {remedy}")
            return
        path = posixpath.normpath(path)
        self.add([path if path.isascii() else as_on_disk(self.root, path)], *image)

    def table(self) -> pd.DataFrame:
        """One image a row, with COLUMNS: training images first, then by class, then as they came.

        label and split are categories.
        """
        columns = self.columns
        table = pd.DataFrame({"path": pd.Series(columns["path"], dtype=object)})  # pandas' own text copies a million
        for name, categories in (("label", sorted(set(columns["label"]))), ("split", ["train", "test"])):
            codes = {category: code for code, category in enumerate(categories)}
            table[name] = pd.Categorical.from_codes([codes[value] for value in columns[name]], categories)
        for name in ("is_query", "is_gallery"):
            table[name] = np.array(columns[name], bool)
        return table.sort_values(["split", "label"], kind="stable", ignore_index=True)


def as_on_disk(root: Path, path: str) -> str:
    """A path whose parts have the Unicode form (NFC or NFD) of the files; as it is where there is no such file."""
    found = ""
    for part in path.split("/"):
        forms = [found + part] + [found + unicodedata.normalize(form, part) for form in ("NFC", "NFD")]
        found = next((form for form in forms if os.path.exists(root / form)), forms[0]) + "/"
    return found[:-1]


def text_rows(path: Path, columns: int, listing: Listing, skip: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Yield ("file, line n", fields) of a text list. Blank lines and the first `skip` lines are left out.

    The last field may contain spaces. What is wrong with the list is added to its problems.
    """
    if not path.is_file():
        listing.problems.append(f"{path}: missing file")
        return
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                fields = line.strip().split(maxsplit=columns - 1)
                if number <= skip or not fields:
                    continue
                if len(fields) == columns:
                    yield f"{path}, line {number}", fields
                else:
                    shown = line.strip()[:80]
                    listing.problems.append(f"{path}, line {number}: {columns} fields expected: {shown!r}")
    except UnicodeDecodeError:
        listing.problems.append(f"{path}: not valid UTF-8: save the list in that encoding")


def csv_rows(path: Path, listing: Listing) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("file, line n", column -> field) of an `images.csv`. Blank lines are left out.

    Fields are separated by commas, semicolons or tabs, by whichever the header has most of. What is wrong with the list
    is added to its problems.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            separator = max(",;\t", key=file.readline().count)
            file.seek(0)
            rows = csv.DictReader(file, restval="", delimiter=separator, strict=True)
            header = [name.strip().lower() for name in rows.fieldnames or []]
            if not {"path", "label", "split"} <= set(header) or len(set(header)) < len(header):
                what = f"the first line has to name path, label and split, once: {header}"
                listing.problems.append(f"{path}: {what}"[:300])
                return
            rows.fieldnames = header
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if None in row:
                    listing.problems.append(f"{where}: more fields than the header has")
                elif any(row.values()):
                    yield where, {name: value.strip() for name, value in row.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        listing.problems.append(f"{path}: not valid CSV in UTF-8 ({one_line(error)})")


def list_csv(root: Path) -> Listing | None:
    """List a data set by its `images.csv`: path, label, split, and is_query, is_gallery for test images.

    The last two columns may be missing: both true. Other columns are left alone. The test split may be called
    "validation" or "val", as in other libraries' lists, but a list that has it and "test" is refused. Paths may be
    written as on Windows, with backslashes. Returns None if there is no `images.csv`.
    """
    path = root / "images.csv"
    if not path.is_file():
        return None
    listing = Listing(root)
    names = set()
    for where, row in csv_rows(path, listing):
        name = row["split"].lower()
        names.add(name)
        roles = [TRUTH_VALUES.get(row.get(role, "true").lower()) for role in ("is_query", "is_gallery")]
        if name not in SPLITS:
            listing.problems.append(f"{where}: the split {row['split']!r} is neither train nor test")
        elif not row["label"]:
            listing.problems.append(f"{where}: the label is empty")
        elif SPLITS[name] == "train":
            listing.add_line(where, row["path"].replace("\\", "/"), row["label"], "train")
        elif None in roles or not any(roles):
            listing.problems.append(f"{where}: is_query and is_gallery have to be 0 or 1, and one of them 1")
        else:
            listing.add_line(where, row["path"].replace("\\", "/"), row["label"], "test", *roles)
    if "test" in names and names & {"val", "validation"}:
        listing.problems.append(f"{path}: both test and validation images: take the lines of one of them out")
    return listing


def list_image_folder(root: Path) -> Listing | None:
    """List a data set in `train/` and `test/`: every folder that holds images is a class, named by its path.

    Returns None if there is no `train/`. Without `test/`, there are no test images.
    """
    folders = [folder.name for folder in subfolders(root) if not folder.name.startswith("cache_")]
    if "train" not in folders:
        return None
    listing = Listing(root)
    other = [name for name in folders if name.lower() in ("test", "testing", "val", "valid", "validation")]
    if other and "test" not in folders:
        raise InputError(f"{root}: found {other[0]}/: rename it to test/")
    unused = [repr(name) for name in folders if name not in ("train", "test")]
    if unused:
        listing.warnings.append(f"{root}: left alone: {', '.join(unused[:10])}; only train/ and test/ are read")
    for split in [name for name in ("train", "test") if name in folders]:
        left_out = LeftOut()
        for class_name, files in class_folders(root / split, listing.problems, left_out):
            if class_name:
                listing.add([f"{split}/{class_name}/{file}" for file in files], class_name, split)
            else:
                left_out["outside any class folder"] = len(files)
        if left_out:
            listing.warnings.append(f"{root / split}: {left_out}")
    if "test" in folders and "test" not in listing.columns["split"]:
        listing.problems.append(f"the test split has no images: {root / 'test'}")
    return listing
