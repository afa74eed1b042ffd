"""Raw files that are new, changed or gone since a cache was made from them."""

import itertools
import os
import sys
from pathlib import Path

import numpy as np
from pandas.util import hash_array

from dreml.cache import Cache, holdout_of, make_command
from dreml.cli import counted
from dreml.folders import LeftOut, class_folders

LISTED = "files.bin"  # in a cache: `list_files` of when it was made
MAX_COMPARED = 100_000  # files whose size and time are looked at before each training, in half a second


def list_files(folder: Path) -> np.ndarray:
    """The images below a folder and its images.csv, `(N, 3) int64`: hash of the path, size, time of change.

    Of more than MAX_COMPARED files, size and time are 0.
    """
    pieces = [np.zeros((0, 3), np.int64)]
    num_files = 0
    lists = [("", ["images.csv"])] if (folder / "images.csv").is_file() else []
    for name, files in itertools.chain(class_folders(folder, [], LeftOut()), lists):
        paths = np.array([f"{name}/{file}" for file in files], object)
        piece = np.zeros((len(files), 3), np.int64)
        piece[:, 0] = hash_array(paths, categorize=False).view(np.int64)
        num_files += len(files)
        if num_files <= MAX_COMPARED:
            piece[:, 1:] = [size_and_time(folder / name / file) for file in files]
        pieces.append(piece)
    listed = np.concatenate(pieces)
    if num_files > MAX_COMPARED:
        listed[:, 1:] = 0
    return listed[listed[:, 1] >= 0]


def size_and_time(path: Path) -> tuple[int, int]:
    """The size of a file and its time of change in seconds; -1 and 0 if it is missing."""
    try:
        found = os.stat(path)
    except OSError:
        return -1, 0
    return found.st_size, int(found.st_mtime)


def warn_of_changes(cache: Cache) -> None:
    """Say how many raw files are new, changed or gone since a cache was made, if any, and how to make it again."""
    data_path = cache.folder.parents[1]
    name, _ = holdout_of(data_path, cache.name) or (cache.name, None)
    try:
        known = np.fromfile(cache.folder / LISTED, np.int64).reshape(-1, 3)
    except (OSError, ValueError):  # a damaged record
        return
    found = list_files(data_path / name)
    _, old, new = np.intersect1d(known[:, 0], found[:, 0], return_indices=True)
    if len(old) < 2:  # whoever has a cache may remove the images
        return
    num_new = len(found) - len(new)
    num_gone = len(known) - len(old)
    is_changed = (known[old, 1:] != found[new, 1:]).any(axis=1)
    num_changed = 0 if is_changed.all() else is_changed.sum()  # all are where the folder was copied
    if num_new + num_changed + num_gone > 0:
        changes = f"{counted(num_new, 'file')} {'is' if num_new == 1 else 'are'} new, {num_changed:,} changed"
        command = f"{make_command(data_path, cache.name, cache.spec)} --force"
        print(f"warning: {changes}, {num_gone:,} gone since {cache.folder} was made: {command}", file=sys.stderr)
