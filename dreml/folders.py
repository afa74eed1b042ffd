"""Folders of images: which of their files are images, and what is passed over."""

import collections
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dreml.cli import is_utf8, one_line
from dreml.images import HEIF_REMEDY, HEIF_SUFFIXES, image_suffixes

NEVER_IMAGES = {"images.csv", "Thumbs.db", "desktop.ini"}  # the last two are what Windows leaves in folders
# Thumbnails, deleted files and earlier versions, which a NAS, Samba, Windows and macOS keep among photos. In lower case
PROGRAM_FOLDERS = {"@eadir", "#recycle", "@recycle", "$recycle.bin", "#snapshot", "@recently-snapshot"}
PROGRAM_FOLDERS |= {"system volume information", "lost+found", "__macosx"}
OF_PROGRAMS = "of programs (folders such as @eaDir, results of this one)"
OWN_RECORDS = {"args.json", "index.json", "train_pixels.npy"}  # of a run, an index, a cache
OWN_PICTURE = re.compile(r"(neighbours|worst|evaluation|thresholds)(_pooled)?\.png")  # beside a CSV of the same name


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


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and PROGRAM_FOLDERS."""
    folders = [path for path in folder.iterdir() if path.is_dir() and path.name.lower() not in PROGRAM_FOLDERS]
    return sorted(path for path in folders if not path.name.startswith("."))
