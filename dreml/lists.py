"""Which images a data set holds: its text and CSV lists, and folders of images. No image is opened here."""

import collections
import csv
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from dreml.cli import InputError, is_utf8, one_line
from dreml.images import HEIF_REMEDY, HEIF_SUFFIXES, image_suffixes

PATHS_AT_ONCE = 100_000  # made a column of a table: pandas takes three times their memory on the way

# ------------------------------------------------------------------------------------------------ what a list gives


class Entry(NamedTuple):
    """One image of a raw data set."""

    path: str  # relative to data/NAME, with forward slashes
    label: int | str  # its class: classes are sorted by it
    class_name: str
    split: str  # "train" or "test"
    is_query: bool = True  # of a test image: whether it is searched for,
    is_gallery: bool = True  # and whether it is searched among


@dataclass
class Listing:
    """The images that the lists of a raw data set name, and what is wrong with the lists."""

    columns: dict[str, list] = field(default_factory=lambda: {name: [] for name in Entry._fields})
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def append(self, entry: Entry) -> None:
        """Add one image whose path is known to be usable."""
        for column, value in zip(self.columns.values(), entry, strict=True):  # a list of tuples would take more memory
            column.append(value)

    def add(self, where: str, entry: Entry, path: str) -> None:
        """Add one image, or a problem if its `path` in the list is unusable.

        The path is judged by its text: links on the disk are fine.
        """
        if not path:
            self.problems.append(f"{where}: the path is empty: name an image, or take the line out")
        elif re.match(r"[/\\]|[A-Za-z]:", path):
            self.problems.append(f"{where}: absolute path {path!r}: write it relative to the data set's folder")
        elif ".." in re.split(r"[/\\]", path):
            self.problems.append(f"{where}: '..' in {path!r}: move or link the image into the data set's folder")
        elif "\0" in path or not is_utf8(path):
            self.problems.append(f"{where}: unusable characters in {path!r}: rename the image")
        else:
            self.append(entry)

    def table(self) -> pd.DataFrame:
        """The images, one a row, sorted (`sort_images`). Empties `columns`, so that they are not in memory twice.

        The columns are those of Entry. label, class_name and split are categories, those of label in order.
        """
        paths = self.columns.pop("path")
        starts = range(0, max(1, len(paths)), PATHS_AT_ONCE)
        pieces = [pd.Series(paths[start : start + PATHS_AT_ONCE], dtype="str") for start in starts]
        del paths
        table = pd.DataFrame({"path": pd.concat(pieces, ignore_index=True)})
        table["label"] = pd.Categorical(self.columns.pop("label"))
        table["class_name"] = pd.Categorical(self.columns.pop("class_name"))
        table["split"] = pd.Categorical(self.columns.pop("split"), ["train", "test"])
        table["is_query"] = np.array(self.columns.pop("is_query"), bool)
        table["is_gallery"] = np.array(self.columns.pop("is_gallery"), bool)
        return sort_images(table)


def sort_images(table: pd.DataFrame) -> pd.DataFrame:
    """Put training images first, and order each split by class. Within a class, images stay as they came."""
    return table.sort_values(["split", "label"], kind="stable", ignore_index=True)


# ------------------------------------------------------------------------------------------------ text and CSV files


def text_lines(path: Path, listing: Listing, newline: str | None = None) -> Iterator[str]:
    """Yield the lines of a list in UTF-8, without its byte order mark. If that fails, add a problem and stop.

    `newline` as for `open`. The list is never in memory as a whole.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
            for number, line in enumerate(file, 1):
                if not is_utf8(line):
                    listing.problems.append(f"{path}, line {number}: not valid UTF-8: save the list in that encoding")
                    return
                yield line
    except FileNotFoundError:
        listing.problems.append(f"{path}: missing file")
    except OSError as error:
        listing.problems.append(f"{path}: not a readable text file ({one_line(error)})")


def text_rows(path: Path, columns: int, listing: Listing, skip: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Yield ("file, line n", fields) of a text list. Blank lines and the first `skip` lines are left out.

    The last field may contain spaces.
    """
    for number, line in enumerate(text_lines(path, listing), 1):
        fields = line.split(maxsplit=columns - 1)
        if number <= skip:
            continue
        if len(fields) == columns:
            yield f"{path}, line {number}", [field.strip() for field in fields]
        elif fields:
            shown = line.rstrip("\n")[:80]
            listing.problems.append(f"{path}, line {number}: malformed line: {columns} fields expected: {shown!r}")


def csv_rows(path: Path, listing: Listing) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("file, line n", column -> field) of an `images.csv`. Blank lines are left out.

    Fields are separated by commas, semicolons or tabs, by whichever the header has most of. The line is the one where
    a row begins: a quoted field may go over several.
    """
    header_line = next((line for line in text_lines(path, Listing()) if line.strip(" ,;\t\n")), "")
    separator = max(",;\t", key=header_line.count)
    rows = csv.reader(text_lines(path, listing, newline=""), strict=True, delimiter=separator)
    header = None
    line = 1
    try:
        for row in rows:
            where = f"{path}, line {line}"
            line = rows.line_num + 1
            fields = [field.strip() for field in row]
            if not any(fields):
                continue
            if header is None:
                header = [name.lower() for name in fields]
                faults = [f"no column {name!r}" for name in NEEDED_COLUMNS if name not in header]
                faults += [f"two columns {name!r}" for name in CSV_COLUMNS if header.count(name) > 1]
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
        listing.problems.append(f"{path}: empty; its first line has to be {','.join(NEEDED_COLUMNS)}")


# ------------------------------------------------------------------------------------------------ data sets of any name

NEEDED_COLUMNS = ("path", "label", "split")
CSV_COLUMNS = (*NEEDED_COLUMNS, "is_query", "is_gallery")
TRUTH_VALUES = {"0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True}  # the last: pandas


def list_csv(root: Path, prefix: str) -> Listing | None:
    """List a data set by its `images.csv`: path, label, split, and is_query, is_gallery for test images.

    The last two columns may be missing: both true. Other columns are left alone. The test split may be called
    "validation" or "val", as in other libraries' lists, but a list that has it and "test" is refused. Paths may be
    written as on Windows, with backslashes. Returns None if there is no `images.csv`.
    """
    if not (root / "images.csv").is_file():
        return None
    listing = Listing()
    test_names = set()
    for where, row in csv_rows(root / "images.csv", listing):
        path = row["path"]
        label = sys.intern(row["label"])  # one text a class, not one an image
        split = row["split"].lower()
        is_query = TRUTH_VALUES.get(row.get("is_query", "true").lower())
        is_gallery = TRUTH_VALUES.get(row.get("is_gallery", "true").lower())
        if split == "train":  # whatever stands there
            is_query = True
            is_gallery = True
        elif split in ("test", "validation", "val"):
            test_names.add("test" if split == "test" else "validation")
            split = "test"
        if split not in ("train", "test"):
            listing.problems.append(f"{where}: the split {split!r} is neither train nor test (or validation)")
        elif len(test_names) > 1:
            listing.problems.append(f"{where}: both test and validation images: take the lines of one of them out")
            break
        elif not label:
            listing.problems.append(f"{where}: the label is empty")
        elif is_query is None or is_gallery is None:
            listing.problems.append(f"{where}: is_query and is_gallery have to be 0, 1, true or false")
        elif not is_query and not is_gallery:
            listing.problems.append(f"{where}: a test image has to be a query, in the gallery, or both")
        else:
            entry = Entry(prefix + path.replace("\\", "/"), label, label, sys.intern(split), is_query, is_gallery)
            listing.add(where, entry, path)
    return listing


def list_image_folder(root: Path, prefix: str) -> Listing | None:
    """List a data set in `train/` and `test/`: every folder that holds images is a class, named by its path.

    Returns None if neither is there. Raises InputError where one of them seems to be there under another name.
    """
    misnamed = misnamed_splits(root)
    if misnamed:
        raise InputError(f"{root}: {misnamed}")
    if not (root / "train").is_dir() and not (root / "test").is_dir():
        return None
    listing = Listing()
    unused = [each.name for each in subfolders(root) if each.name.lower() in OTHER_NAMES["test"][1:]]
    if unused:
        listing.warnings.append(f"{root}: left alone: {some(unused)}; only train/ and test/ are read")
    for split in ("train", "test"):
        if not (root / split).is_dir():
            if split == "train":  # test/ may be missing: nothing is measured then
                listing.problems.append(f"{root / split}: missing folder")
            continue
        left_out = LeftOut()
        for class_name, files in class_folders(root / split, listing.problems, left_out):
            if class_name == "":
                listing.warnings.append(f"{root / split}: {len(files)} images outside any class folder are left out")
                continue
            folder = f"{prefix}{split}/{class_name}/"
            for file in files:
                if is_utf8(folder + file):
                    listing.append(Entry(folder + file, class_name, class_name, split))
                else:
                    listing.problems.append(f"{folder + file!a}: the name is not valid UTF-8")
        if left_out:
            listing.warnings.append(f"{root / split}: {left_out}")
        elif left_out.empty_folders:
            listing.warnings.append(f"{root / split}: empty folders are no classes: {some(left_out.empty_folders)}")
        if split == "test" and "test" not in listing.columns["split"] and not listing.problems:
            listing.problems.append("the test split has no images")  # a folder test/ that is empty was not meant so
    return listing


# ------------------------------------------------------------------------------------------------ what was meant

OTHER_NAMES = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}


def misnamed_splits(root: Path) -> str:
    """Say which folders are `train/` or `test/` under another name, such as `Train/` or `val/`; "": none."""
    found = {}  # name -> what it should be
    for split, names in OTHER_NAMES.items():
        if not (root / split).is_dir():
            folders = [folder.name for folder in subfolders(root) if folder.name.lower() in names]
            found |= {name: split for name in sorted(folders, key=lambda name: names.index(name.lower()))[:1]}
    if not found:
        return ""
    before, after = (" and ".join(f"{name}/" for name in names) for names in (found, found.values()))
    return f"found {before}: rename {'them' if len(found) > 1 else 'it'} to {after}"


def what_was_meant(root: Path) -> str:
    """Say what a folder without a data set holds, and what to do so that it becomes one."""
    for folder in subfolders(root):
        inside = [f"{inner.name}/" for inner in subfolders(folder) if inner.name.lower() in ("train", "test")]
        if (folder / "images.csv").is_file():
            inside.insert(0, "images.csv")
        if inside:
            return f"found {folder.name}/{inside[0]}: move what is in {folder.name}/ one folder up"
    lists = sorted(path.name for path in root.iterdir() if path.suffix.lower() == ".csv")
    if lists:
        return f"found {lists[0]}: a list has to be called images.csv"
    where = "put them into train/CLASS/ and test/CLASS/, or list them in images.csv"
    left_out = LeftOut()
    folders = [name for name, _ in class_folders(root, [], left_out)]
    if folders == [""]:
        return f"found images outside any folder: {where}"
    if folders:
        return f"found images in {some([name for name in folders if name], 3)}, without train/ and test/: {where}"
    return f"no images{f' ({left_out})' if left_out else ''}: {where}"


# ------------------------------------------------------------------------------------------------ folders

NEVER_IMAGES = {"images.csv", "Thumbs.db", "desktop.ini"}  # the last two are what Windows leaves in folders
# Thumbnails, deleted files and the like, which a NAS, Samba, Windows and macOS keep among photos.
PROGRAM_FOLDERS = {"@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX"}


@dataclass
class LeftOut:
    """What lies where images are looked for and is none: files of other types, and folders without any image."""

    types: collections.Counter = field(default_factory=collections.Counter)  # suffix in lower case -> number
    empty_folders: list[str] = field(default_factory=list)  # without an image, also below them
    num_program_folders: int = 0  # PROGRAM_FOLDERS
    suffixes: set[str] = field(default_factory=image_suffixes)  # of images

    def __bool__(self) -> bool:
        return bool(self.types) or self.num_program_folders > 0

    def __str__(self) -> str:
        """Say all of it on one line, the most frequent types first."""
        most = self.types.most_common(8)
        remedies = {suffix: f" ({HEIF_REMEDY})" for suffix in HEIF_SUFFIXES}
        parts = [f"{number:,} {suffix}{remedies.get(suffix, '')}" for suffix, number in most]
        if self.num_program_folders:
            parts.insert(0, f"{self.num_program_folders:,} folders of other programs, such as @eaDir")
        text = f"left out: {', '.join(parts)}"
        rest = self.types.total() - sum(number for _, number in most)
        if rest:
            text += f" and {rest:,} of other types"
        if self.empty_folders:
            text += f"; folders without an image: {some(self.empty_folders)}"
        return text

    def add(self, file: str) -> None:
        """Count one file by its suffix, but for NEVER_IMAGES."""
        if file not in NEVER_IMAGES:
            suffix = os.path.splitext(file)[1].lower()
            self.types[suffix if re.fullmatch(r"\.[\w-]{1,12}", suffix) else "without a suffix"] += 1


def class_folders(
    folder: Path, problems: list[str], left_out: LeftOut | None = None, name: str = "", above: tuple[str, ...] = ()
) -> Iterator[tuple[str, list[str]]]:
    """Yield (name, image files) of every folder that holds images, sorted, at any depth. The outermost is called "".

    A folder that cannot be read is added to `problems`; files of other types, empty folders and PROGRAM_FOLDERS to
    `left_out`. Hidden files and links back to a folder above are passed over.
    """
    left_out = LeftOut() if left_out is None else left_out
    above = (*above, os.path.realpath(folder))
    files = []
    folders = []
    try:
        for item in os.scandir(folder):
            if item.name.startswith("."):
                continue
            if item.is_dir() and item.name in PROGRAM_FOLDERS:
                left_out.num_program_folders += 1
            elif item.is_dir():
                folders.append(item.name)
            elif os.path.splitext(item.name)[1].lower() in left_out.suffixes:
                files.append(item.name)
            else:
                left_out.add(item.name)
    except OSError as error:
        problems.append(f"{folder}: unreadable folder ({one_line(error)})")
    is_empty = not files
    if files:
        yield name, sorted(files)
    for child in sorted(folders):
        if os.path.realpath(folder / child) not in above:
            child_name = f"{name}/{child}" if name else child
            for found in class_folders(folder / child, problems, left_out, child_name, above):
                is_empty = False
                yield found
    if name and is_empty:
        left_out.empty_folders.append(name)


def some(names: list[str], shown: int = 10) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + more


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and PROGRAM_FOLDERS."""
    folders = [path for path in folder.iterdir() if path.is_dir() and path.name not in PROGRAM_FOLDERS]
    return sorted(path for path in folders if not path.name.startswith("."))
