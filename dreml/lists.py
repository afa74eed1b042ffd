"""Which images a data set holds: its text and CSV lists, and folders of images. No image is opened here."""

import array
import collections
import csv
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dreml.cli import InputError, is_utf8, one_line
from dreml.images import HEIF_REMEDY, HEIF_SUFFIXES, image_suffixes

# ------------------------------------------------------------------------------------------------ what a list gives


class Entry(NamedTuple):
    """One image of a raw data set."""

    split: str  # "train" or "test"
    class_key: int | str  # sorts the classes
    class_name: str
    path: str  # relative to data/NAME, with forward slashes
    is_query: bool = True  # of a test image: whether it is searched for,
    is_gallery: bool = True  # and whether it is searched among


QUERY, GALLERY = 1, 2  # bits of an image's roles


class EntryClass(NamedTuple):
    """A class of one split."""

    split: str
    key: int | str
    name: str  # that of its last image


class Entries(Sequence[Entry]):
    """Many entries in little memory: 17 bytes each and their paths. A list of tuples would take 500.

    Entries are appended; once `sort` was called, no more can be.
    """

    def __init__(self):
        self.classes: list[EntryClass] = []  # by their number
        self._numbers: dict[tuple[str, int | str], int] = {}  # (split, class key) -> the number of the class
        self._text = bytearray()  # all paths in UTF-8, one after the other
        self._starts, self._lengths = array.array("q"), array.array("i")  # of each path, in bytes
        self._class_numbers, self._roles = array.array("i"), array.array("B")

    def append(self, entry: Entry) -> None:
        number = self._numbers.setdefault((entry.split, entry.class_key), len(self.classes))
        self.classes[number : number + 1] = [EntryClass(entry.split, entry.class_key, entry.class_name)]
        path = entry.path.encode()
        self._starts.append(len(self._text))
        self._lengths.append(len(path))
        self._text += path
        self._class_numbers.append(number)
        self._roles.append(QUERY * entry.is_query + GALLERY * entry.is_gallery)

    def sort(self) -> None:
        """Puts training images first, and orders each split by class. Within a class, images stay as they came."""
        places = [(each.split != "train", each.key) for each in self.classes]
        numbers = sorted(range(len(places)), key=places.__getitem__)
        self.classes = [self.classes[number] for number in numbers]
        new_numbers = np.empty(len(numbers), np.int32)
        new_numbers[numbers] = np.arange(len(numbers))
        class_numbers = new_numbers[self.class_numbers]
        order = np.argsort(class_numbers, kind="stable")
        self._class_numbers, self._roles = class_numbers[order], self.roles[order]
        self._starts, self._lengths = np.asarray(self._starts)[order], np.asarray(self._lengths)[order]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> Entry:
        roles, (split, key, name) = self._roles[row], self.classes[self._class_numbers[row]]
        return Entry(split, key, name, self.path(row), bool(roles & QUERY), bool(roles & GALLERY))

    def path(self, row: int) -> str:
        """The path of one image."""
        start = self._starts[row]
        return self._text[start : start + self._lengths[row]].decode()

    @property
    def class_numbers(self) -> np.ndarray:
        """The class of every image, as a place in `classes`: `(N,) int32`."""
        return np.asarray(self._class_numbers)

    @property
    def roles(self) -> np.ndarray:
        """`(N,) uint8`: QUERY, GALLERY or both."""
        return np.asarray(self._roles)

    @property
    def path_lengths(self) -> np.ndarray:
        """The length of every path in UTF-8: `(N,) int32`."""
        return np.asarray(self._lengths)

    def rows_of(self, split: str) -> range:
        """The rows of a split. Only once sorted."""
        num_train = np.searchsorted(self.class_numbers, sum(each.split == "train" for each in self.classes))
        return range(num_train) if split == "train" else range(num_train, len(self))


@dataclass
class Listing:
    """The images of a raw data set, and what is wrong with its lists."""

    entries: Entries = field(default_factory=Entries)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, where: str, entry: Entry, path: str) -> None:
        """Adds one image, or a problem if its `path` in the list is unusable.

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
            self.entries.append(entry)


# ------------------------------------------------------------------------------------------------ text and CSV files


def text_rows(path: Path, columns: int, listing: Listing, skip: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Yields ("file, line n", fields) of a text list. Blank lines and the first `skip` lines are left out.

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


def csv_rows(
    path: Path, needed: tuple[str, ...], optional: tuple[str, ...], listing: Listing
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields ("file, line n", column -> field) of a CSV file with a header. Blank lines are left out.

    Fields are separated by commas, semicolons or tabs, by whichever the header has most of.
    """
    lines = lines_without_nul(path, listing)
    start = []  # up to the header
    for line in lines:
        start.append(line)
        if line.strip(" ,;\t\r\n"):
            break
    separator = max(",;\t", key=start[-1].count) if start else ","
    rows = csv.reader(itertools.chain(start, lines), strict=True, delimiter=separator)
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


def lines_without_nul(path: Path, listing: Listing) -> Iterator[str]:
    """Yields the lines of a list with the ends that they have. At a NUL byte, adds a problem and stops."""
    for number, line in enumerate(text_lines(path, listing, newline=""), 1):
        if "\0" in line:
            listing.problems.append(f"{path}, line {number}: a NUL byte")
            return
        yield line


def text_lines(path: Path, listing: Listing, newline: str | None = None) -> Iterator[str]:
    """Yields the lines of a list in UTF-8, without its byte order mark. If that fails, adds a problem and stops.

    `newline` as for `open`. The list is never in memory as a whole.
    """
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            yield from file
    except FileNotFoundError:
        listing.problems.append(f"{path}: missing file")
    except UnicodeDecodeError as error:
        line = first_line_not_utf8(path)
        listing.problems.append(f"{path}: not a readable text file in UTF-8 (line {line}: {one_line(error)})")
    except OSError as error:
        listing.problems.append(f"{path}: not a readable text file in UTF-8 ({one_line(error)})")


def first_line_not_utf8(path: Path) -> int:
    """The number of the first line that is not valid UTF-8."""
    number = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return number + len(line[: error.start + 1].splitlines())
            number += len(line.splitlines())
    return number


# ------------------------------------------------------------------------------------------------ data sets of any name

TRUTH_VALUES = {"0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True}  # the last: pandas


def list_csv(root: Path, prefix: str) -> Listing | None:
    """Lists a data set by its `images.csv`: path, label, split, and is_query, is_gallery for test images.

    The last two columns may be missing: both true. Spaces around a field do not count; other columns are left alone.
    The test split may be called "validation" or "val", as in other libraries' lists, but a list that has it and "test"
    is refused. Paths may be written as on Windows, with backslashes. Returns None if there is no `images.csv`.
    """
    if not (root / "images.csv").is_file():
        return None
    listing, test_names = Listing(), set()
    for where, row in csv_rows(root / "images.csv", ("path", "label", "split"), ("is_query", "is_gallery"), listing):
        split, label, path = row["split"].lower(), row["label"], row["path"]
        roles = [TRUTH_VALUES.get(row.get(column, "true").lower()) for column in ("is_query", "is_gallery")]
        if split == "train":
            roles = [True, True]  # whatever stands there
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
        elif None in roles:
            listing.problems.append(f"{where}: is_query and is_gallery have to be 0, 1, true or false")
        elif not any(roles):
            listing.problems.append(f"{where}: a test image has to be a query, in the gallery, or both")
        else:
            listing.add(where, Entry(split, label, label, prefix + path.replace("\\", "/"), *roles), path)
    return listing


def list_image_folder(root: Path, prefix: str) -> Listing | None:
    """Lists a data set in `train/` and `test/`: every folder that holds images is a class, named by its path.

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
                    listing.entries.append(Entry(split, class_name, class_name, folder + file))
                else:
                    listing.problems.append(f"{folder + file!a}: the name is not valid UTF-8")
        if left_out:
            listing.warnings.append(f"{root / split}: {left_out}")
        if left_out.empty_folders:
            listing.warnings.append(f"{root / split}: empty folders are no classes: {some(left_out.empty_folders)}")
        is_empty = split not in {each.split for each in listing.entries.classes}
        if split == "test" and is_empty and not listing.problems:
            listing.problems.append("the test split has no images")  # a folder test/ that is empty was not meant so
    return listing


# ------------------------------------------------------------------------------------------------ what was meant

OTHER_NAMES = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}


def misnamed_splits(root: Path) -> str:
    """Says which folders are `train/` or `test/` under another name, such as `Train/` or `val/`; "": none."""
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
    """Says what a folder holds that is no data set, and what to do so that it is one."""
    folders = subfolders(root)
    for folder in folders:
        split = next((f"{inner.name}/" for inner in subfolders(folder) if inner.name.lower() in ("train", "test")), "")
        inside = "images.csv" if (folder / "images.csv").is_file() else split
        if inside:
            return f"found {folder.name}/{inside}: move what is in {folder.name}/ one folder up"
    lists = sorted(path.name for path in root.iterdir() if path.suffix.lower() == ".csv")
    if lists:
        return f"found {lists[0]}: a list has to be called images.csv"
    classes = [each.name for each in folders if next(class_folders(each, []), None)]
    if classes:
        where = "those to train on into train/, those to measure with into test/"
        return f"found images in {some(classes, 3)}, without train/ and test/: move {where}"
    left_out = LeftOut()
    loose = next((files for name, files in class_folders(root, [], left_out) if not name), [])
    where = "put them into train/CLASS/ and test/CLASS/, or list them in images.csv"
    if loose:
        return f"found {len(loose):,} images outside any folder: {where}"
    return f"no images{f' ({left_out})' if left_out else ''}: {where}"


# ------------------------------------------------------------------------------------------------ folders


NEVER_IMAGES = {  # lists of the known sets and of this program, and what Windows leaves in folders
    *("images.csv", "images.txt", "image_class_labels.txt", "classes.txt", "bounding_boxes.txt"),
    *("train_test_split.txt", "README", "attributes.txt", "Ebay_train.txt", "Ebay_test.txt", "Ebay_info.txt"),
    *("list_eval_partition.txt", "cars_annos.mat", "cars_train_annos.mat", "cars_test_annos.mat"),
    *("cars_test_annos_withlabels.mat", "cars_meta.mat", "Thumbs.db", "desktop.ini"),
}


@dataclass
class LeftOut:
    """The files of other types that lie where images are looked for, and the classes that have nothing else."""

    types: collections.Counter = field(default_factory=collections.Counter)  # suffix in lower case -> number
    empty_classes: list[str] = field(default_factory=list)
    empty_folders: list[str] = field(default_factory=list)  # those that have not even such files
    suffixes: set[str] = field(default_factory=image_suffixes)  # of what is not left out

    def __bool__(self) -> bool:
        return bool(self.types)

    def __str__(self) -> str:
        """Says all of it on one line, the most frequent types first."""
        parts = []
        for suffix, number in self.types.most_common(8):
            parts.append(f"{number:,} {suffix}" + (f" ({HEIF_REMEDY})" if suffix in HEIF_SUFFIXES else ""))
        rest = self.types.total() - sum(number for _, number in self.types.most_common(8))
        text = f"left out: {', '.join(parts)}" + (f" and {rest:,} of other types" if rest else "")
        if self.empty_classes:
            text += f"; classes without an image for that reason: {some(self.empty_classes)}"
        return text

    def add(self, file: str) -> None:
        """Counts one file by its suffix, but for NEVER_IMAGES."""
        if file not in NEVER_IMAGES:
            suffix = os.path.splitext(file)[1].lower()
            self.types[suffix if re.fullmatch(r"\.[\w-]{1,12}", suffix) else "without a suffix"] += 1


def class_folders(
    folder: Path, problems: list[str], left_out: LeftOut | None = None, name: str = "", above: tuple[str, ...] = ()
) -> Iterator[tuple[str, list[str]]]:
    """Yields (name, image files) of every folder that holds images, sorted, at any depth. The outermost is called "".

    Adds a folder that cannot be read to `problems`, and files of other types and empty folders to `left_out`, but for
    hidden ones. Does not follow links back to a folder above.
    """
    left_out = LeftOut() if left_out is None else left_out
    above = (*above, os.path.realpath(folder))
    files, folders, others_before = [], [], left_out.types.total()
    try:
        for item in os.scandir(folder):
            if item.name.startswith("."):
                continue
            if item.is_dir():
                folders.append(item.name)
            elif os.path.splitext(item.name)[1].lower() in left_out.suffixes:
                files.append(item.name)
            else:
                left_out.add(item.name)
        if name and not files and not folders and left_out.types.total() == others_before:
            left_out.empty_folders.append(name)
    except OSError as error:
        problems.append(f"{folder}: unreadable folder ({one_line(error)})")
    is_empty = name and not files and left_out.types.total() > others_before
    if files:
        yield name, sorted(files)
    for child in sorted(folders):
        if os.path.realpath(folder / child) not in above:
            child_name = f"{name}/{child}" if name else child
            for found in class_folders(folder / child, problems, left_out, child_name, above):
                is_empty = False
                yield found
    if is_empty:
        left_out.empty_classes.append(name)


def some(names: list[str], shown: int = 10) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + more


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
