"""Raw files that are new, changed or gone since a cache was made from them."""

import contextlib
import itertools
import os
import sys
from pathlib import Path

import numpy as np
from pandas.util import hash_array

from dreml.cache import Cache, make_command
from dreml.cli import counted
from dreml.lists import LeftOut, class_folders

LISTED = "files.bin"  # in a cache: `list_files` of when it was made
MAX_COMPARED = 100_000  # files whose size and time are looked at before each training, in half a second


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
