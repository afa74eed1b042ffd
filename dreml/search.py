"""Searching images: what to search for and among, embedding image files, the nearest neighbours."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from dreml.batches import image_batches, spans
from dreml.cli import (
    InputError,
    RunError,
    format_problems,
    is_utf8,
    num_cores,
    progress_bar,
    with_less_memory,
)
from dreml.files import file_id
from dreml.images import BadImage, read_test_image
from dreml.lists import LeftOut, class_folders

BATCH_SIZE = 128  # images embedded at a time

# ------------------------------------------------------------------------------------------------ images


class Item(NamedTuple):
    """An image to search for or among."""

    name: str  # its path, or test:17 for a query
    path: str  # of a test image: relative to the data set's folder
    class_name: str | None  # None: not known
    file: Path
    row: int | None = None  # in test.csv; None: not of the test split

    @property
    def caption(self) -> str:
        """A short name, for the picture."""
        return self.file.name if self.row is None else self.name


def test_item(test: pd.DataFrame, folder: Path, row: int) -> Item:
    """An image of the test split, by its row of test.csv. `folder` is where the raw data set is, or was."""
    path = test.path[row]
    return Item(path, path, test.class_name[row], folder / path, row)


class SplitItems(Sequence[Item]):
    """Images of the test split, made when they are asked for: a search needs a few of a million."""

    def __init__(self, test: pd.DataFrame, folder: Path, rows: np.ndarray):
        self.test, self.folder = test, folder
        self.rows = rows  # (N,) int64, of test.csv, in order

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Item:
        return test_item(self.test, self.folder, int(self.rows[place]))

    def place_of(self, query: Item) -> int:
        """The place of a query, or -1: one that is not of the test split has no row."""
        if query.row is None:
            return -1
        place = int(np.searchsorted(self.rows, query.row))
        return place if place < len(self) and self.rows[place] == query.row else -1


def image_names(option: str, folder: Path, problems: list[str], left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """Yields (subfolder, file name) of all images below a folder; the folder itself is called "".

    Adds what cannot be read to `problems`, and counts files of other types in `left_out`. `option` names the folder.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{option} {folder}: no such folder")
    for name, files in class_folders(folder, problems, left_out):
        for file in files:
            if is_utf8(f"{folder}/{name}/{file}"):
                yield name, file
            else:
                problems.append(f"{str(folder / name / file)!a}: the name is not valid UTF-8")


def folder_items(option: str, folder: Path) -> list[Item]:
    """All images below a folder, at any depth. The class of an image is the first folder below it on the way.

    Says which files are left out, for their types. Raises InputError if there are no images. `option` is the option
    that names the folder.
    """
    problems, items, left_out = [], [], LeftOut()
    for name, file in image_names(option, folder, problems, left_out):
        file = folder / name / file
        items.append(Item(str(file), str(file), name.split("/")[0] or None, file))
    refuse(option, problems)
    if not items:
        raise InputError(f"{option} {folder}: no images below it{f' ({left_out})' if left_out else ''}")
    if left_out:
        print(f"warning: {option} {folder}: {left_out}", file=sys.stderr)
    return items


def refuse(option: str, problems: list[str], shown: int = 20) -> None:
    """Raises InputError with the problems, if there are any; the first `shown` of them are named."""
    if len(problems) == 1:
        raise InputError(f"{option}: {problems[0]}")
    if problems:
        raise InputError(f"{option}: {len(problems):,} problems:{format_problems(problems, shown)}")


def query_items(texts: Sequence[str], test: pd.DataFrame, folder: Path) -> tuple[list[Item], list[str]]:
    """The images that --query asks for, in its order, and what is wrong with others.

    The file of a test image counts as that test image; `folder` is where the raw data set is, or was.
    """
    items, problems = [], []
    for text in texts:
        if not is_utf8(text):
            problems.append(f"{text!a}: the name is not valid UTF-8")
        elif text.startswith("test:"):
            number = text.removeprefix("test:")
            if not number.isascii() or not number.isdigit() or len(number) > 9 or int(number) >= len(test):
                rows = f"INDEX has to be in 0..{len(test) - 1}, a row of test.csv"
                problems.append(f"{text}: {rows if len(test) else 'the data set has no test images'}")
            else:
                items.append(test_item(test, folder, int(number))._replace(name=text))
        elif os.path.isdir(text):  # unlike Path.is_dir, also for a text that is too long for a name
            try:
                items += folder_items("--query", Path(text))
            except InputError as error:
                problems.append(str(error).removeprefix("--query").lstrip(": "))
        elif os.path.isfile(text):
            items.append(Item(text, text, None, Path(text)))
        else:
            problems.append(f"{text}: no such image or folder (test:INDEX for a test image)")
    if os.path.isdir(folder):  # else no file is that of a test image
        places = [place for place, item in enumerate(items) if item.row is None]
        rows = own_rows([items[place].file for place in places], test, folder)
        for place, row in zip(places, rows, strict=True):
            if row is not None:
                items[place] = test_item(test, folder, row)._replace(name=items[place].name)
    return items, problems


def names_of(file: Path) -> set[str]:
    """The name of a file, and of the file that it is a link to."""
    return {os.path.basename(file), os.path.basename(os.path.realpath(file))}


def own_rows(files: list[Path], test: pd.DataFrame, folder: Path) -> list[int | None]:
    """The row of test.csv whose image is each of some files, by whatever path; None for other photos.

    The disk is asked only for test images that have the name of one of the files, or of the file that it is a link to:
    asking for a million takes long.
    """
    names = set().union(*map(names_of, files))
    rows: dict[tuple[int, int] | None, int] = {}
    for row, path in enumerate(test.path.tolist() if names else []):
        if path.rpartition("/")[2] in names:
            rows.setdefault(file_id(os.path.join(folder, path)), row)
    rows.pop(None, None)
    return [rows.get(file_id(file)) for file in files]


# ------------------------------------------------------------------------------------------------ embedding


def unit_rows(member_embeddings: Sequence[torch.Tensor]) -> torch.Tensor:
    """The ensemble's embedding with rows of length 1, from the members' `(N, d)` each: `(N, sum of all d) float32`.

    Each member has the same share, so the dot product of two rows is the mean of the members' cosines.
    """
    widths = [member.shape[1] for member in member_embeddings]
    rows = torch.empty((len(member_embeddings[0]), sum(widths)), device=member_embeddings[0].device)
    for target, member in zip(rows.split(widths, dim=1), member_embeddings, strict=True):
        target.copy_(F.normalize(member, dim=1)).div_(math.sqrt(len(widths)))
    return rows


@torch.inference_mode()
def embed_batch(option: str, images: torch.Tensor, ensemble: nn.Module) -> torch.Tensor:
    """The embedding of images `(N, S, S, 3) uint8`, like that of `unit_rows`. `ensemble` is an `Ensemble` of model.py.

    Raises RunError, which names `option`, if numbers are not finite.
    """
    rows = ensemble(images.to(ensemble.mean.device))
    if not torch.isfinite(rows).all():
        raise RunError(f"{option}: the embedding of some images is not finite")
    return rows


@torch.inference_mode()
def embed_images(
    option: str, items: list[Item], ensemble: nn.Module, batch_size: int, bad: dict[int, str] | None = None
) -> torch.Tensor:
    """The embedding of image files, like that of `unit_rows`. `ensemble` is an `Ensemble` of model.py.

    A bad image is added to `bad`, its place in `items` and what is wrong, and its row says nothing. Without `bad`,
    raises InputError that names every bad image and `option`, which asked for them; after the first bad image, the
    others are only read, not embedded.
    """
    files, problems, rows, spec = [item.file for item in items], {}, [], ensemble.image_spec

    def read(file: Path) -> np.ndarray | BadImage:
        try:
            return read_test_image(file, spec)
        except BadImage as error:
            return error

    def fill(start: int, stop: int, out: np.ndarray) -> None:
        for place, image in enumerate(threads.map(read, files[start:stop])):
            if isinstance(image, BadImage):
                problems[start + place], out[place] = str(image), 0
            else:
                out[place] = image

    with ThreadPoolExecutor(num_cores()) as threads:
        pieces = spans(0, len(files), batch_size)
        batches = image_batches(fill, pieces, spec.size, ensemble.mean.device)
        for batch in progress_bar(batches, option, len(pieces), " batches"):
            if bad is not None or not problems:
                rows.append(embed_batch(option, batch, ensemble))
    if bad is None:
        refuse(option, list(problems.values()))
    else:
        bad.update(problems)
    return torch.cat(rows)


def embeddings_of(
    option: str,
    items: list[Item],
    saved: torch.Tensor | None,
    load: Callable[[], nn.Module],
    bad: dict[int, str] | None = None,
) -> torch.Tensor:
    """The embeddings of images, `(N, d)` in their order: rows of `saved` for test images, computed for image files.

    `saved` may be None where there are no test images; `load` is called where there are files. `option` asked for them.
    Bad files: see `embed_images`.
    """
    of_test = [item.row for item in items if item.row is not None]
    files = [place for place, item in enumerate(items) if item.row is None]
    if not files:
        return saved if of_test == list(range(len(saved))) else saved[of_test]
    of_files, ensemble, problems = [items[place] for place in files], load(), None if bad is None else {}
    computed = with_less_memory(lambda size: embed_images(option, of_files, ensemble, size, problems), BATCH_SIZE)
    if problems:
        bad.update((files[number], problem) for number, problem in problems.items())
    if not of_test:
        return computed
    is_file = torch.tensor([item.row is None for item in items], device=saved.device)
    rows = saved.new_empty(len(items), saved.shape[1])
    rows[is_file], rows[~is_file] = computed.to(saved.device), saved[of_test]
    return rows


def embed_queries(
    queries: list[Item], saved: torch.Tensor | None, load: Callable[[], nn.Module], problems: list[str]
) -> tuple[list[Item], torch.Tensor]:
    """The queries whose image can be used, and their embeddings. What is wrong with the others goes to `problems`.

    Raises InputError if none can be used.
    """
    bad: dict[int, str] = {}
    rows = embeddings_of("--query", queries, saved, load, bad)
    problems += [bad[place] for place in sorted(bad)]
    good = [place for place in range(len(queries)) if place not in bad]
    if not good:
        refuse("--query", problems, shown=len(problems))
    return [queries[place] for place in good], rows[good]


# ------------------------------------------------------------------------------------------------ search


@torch.inference_mode()
def nearest(
    queries: torch.Tensor, gallery: torch.Tensor, top: int, left_out: Sequence[int], max_block: int = 2**22
) -> tuple[np.ndarray, np.ndarray]:
    """The `top` rows of the gallery `(N, d)` that are most similar to each of the queries `(Q, d)`.

    Returns their similarities `(Q, top) float32` and their numbers `(Q, top) int64`; among equally similar ones, the
    first in the gallery comes first. Similarities are rounded to 1e-6: the order in which products were summed up
    should break no tie. `left_out` `(Q,)` is the place of each query itself in the gallery, or -1. At most `max_block`
    similarities are held at a time, 4 bytes each, but at least one query's.
    """
    similarities, numbers = np.empty((len(queries), top), np.float32), np.empty((len(queries), top), np.int64)
    left_out = torch.as_tensor(left_out, device=gallery.device)
    for start, stop in spans(0, len(queries), max(1, max_block // len(gallery))):
        block = (queries[start:stop].to(gallery.device) @ gallery.T).mul_(1e6).round_().div_(1e6)
        itself = left_out[start:stop]
        inside = torch.nonzero(itself >= 0)[:, 0]
        block[inside, itself[inside]] = -torch.inf
        # All that reach the last place, sorted by row, similarity and number. The first `top` of each row remain.
        reaching = block >= block.topk(top).values[:, -1:]
        rows, columns = (indices.cpu().numpy() for indices in torch.nonzero(reaching, as_tuple=True))
        values = block[reaching].cpu().numpy()
        order = np.lexsort((columns, -values, rows))
        places = np.searchsorted(rows[order], np.arange(stop - start))[:, None] + np.arange(top)
        similarities[start:stop], numbers[start:stop] = values[order[places]], columns[order[places]]
    return similarities, numbers


@dataclass
class Found:
    """A query and its neighbours, the most similar first."""

    query: Item
    neighbours: list[Item]
    similarities: list[float]
    threshold: float | None = None  # neighbours below it count as not found

    @property
    def right(self) -> list[bool | None]:
        """Whether each neighbour is of the query's class, by its name; None where one of the classes is not known."""
        mine, theirs = self.query.class_name, [item.class_name for item in self.neighbours]
        return [None if None in (mine, other) else mine == other for other in theirs]

    @property
    def passes(self) -> list[bool]:
        """Whether each neighbour reaches the threshold, both rounded to 1e-6."""
        least = -math.inf if self.threshold is None else round(1e6 * self.threshold)
        return [round(1e6 * similarity) >= least for similarity in self.similarities]


def find_neighbours(
    queries: list[Item], query_rows: torch.Tensor, gallery: Sequence[Item], gallery_rows: torch.Tensor, top: int
) -> list[Found]:
    """The `top` gallery images nearest to each query, but for the query itself. Row i of a matrix embeds image i."""
    places = places_of(queries, gallery, top)
    similarities, numbers = nearest(query_rows, gallery_rows, top, places)
    found = []
    for query, place, row, values in zip(queries, places, numbers.tolist(), similarities.tolist(), strict=True):
        if query.class_name is None and place >= 0:  # a photo that lies in the gallery has its class
            query = query._replace(class_name=gallery[place].class_name)
        found.append(Found(query, [gallery[number] for number in row], values))
    return found


def places_of(queries: list[Item], gallery: Sequence[Item], top: int) -> list[int]:
    """The place of each query itself in the gallery, or -1: the same row of test.csv or, in a folder, the same file.

    A gallery that is no list finds a query by its own method `place_of`. Raises InputError if too few others are left
    for `top` neighbours.
    """
    if not isinstance(gallery, list):
        places = [gallery.place_of(query) for query in queries]
    else:
        place_of_name = {item.file: place for place, item in enumerate(gallery)}
        places = [place_of_name.get(query.file, -1) for query in queries]
        if min(places) < 0:
            place_of_file = {file_id(item.file): place for place, item in enumerate(gallery)}
            place_of_file[None] = -1
            for number, query in enumerate(queries):
                if places[number] < 0:
                    places[number] = place_of_file.get(file_id(query.file), -1)
    available = len(gallery)
    if max(places) >= 0:
        available -= 1
    if top > available:
        raise InputError(f"--top {top} is over the number of images that can be found, {available}")
    return places
