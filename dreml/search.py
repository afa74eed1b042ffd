"""Searching images: what to search for and among, embedding image files, the nearest neighbours."""

import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from dreml.console import InputError, RunError, format_problems, is_utf8, num_cores, progress_bar, raise_if_interrupted
from dreml.data.batches import image_batches, spans
from dreml.data.images import BadImage, read_test_image
from dreml.data.lists import LeftOut, class_folders

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


def test_items(test: pd.DataFrame, folder: Path) -> list[Item]:
    """All images of the test split, row by row of test.csv. `folder` is where the raw data set is, or was."""
    pairs = zip(test.path, test.class_name, strict=True)
    return [Item(path, path, name, folder / path, row) for row, (path, name) in enumerate(pairs)]


def folder_items(option: str, folder: Path) -> list[Item]:
    """All images below a folder, at any depth. The class of an image is the first folder below it on the way.

    Says which files are left out, for their types. Raises InputError if there are no images. `option` is the option
    that names the folder.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{option} {folder}: no such folder")
    problems, items, left_out = [], [], LeftOut()
    for name, files in class_folders(folder, problems, left_out):
        class_name = name.split("/")[0] or None
        for file in (folder / name / file for file in files):
            if is_utf8(str(file)):
                items.append(Item(str(file), str(file), class_name, file))
            else:
                problems.append(f"{str(file)!a}: the name is not valid UTF-8")
    refuse(option, problems)
    if not items:
        raise InputError(f"{option} {folder}: no images below it{f' ({left_out})' if left_out else ''}")
    if left_out:
        print(f"warning: {option} {folder}: {left_out}", file=sys.stderr)
    return items


def refuse(option: str, problems: list[str]) -> None:
    """Raises InputError with all the problems, if there are any."""
    if len(problems) == 1:
        raise InputError(f"{option}: {problems[0]}")
    if problems:
        raise InputError(f"{option}: {len(problems):,} problems:{format_problems(problems)}")


def query_items(texts: Sequence[str], test: list[Item]) -> list[Item]:
    """The images that --query asks for, in its order. The file of a test image counts as that test image."""
    items = []
    for text in texts:
        if not is_utf8(text):
            raise InputError(f"--query {text!a}: the name is not valid UTF-8")
        if text.startswith("test:"):
            number = text.removeprefix("test:")
            if not number.isascii() or not number.isdigit() or len(number) > 9 or int(number) >= len(test):
                raise InputError(f"--query {text}: INDEX has to be in 0..{len(test) - 1}, a row of test.csv")
            items.append(test[int(number)]._replace(name=text))
        elif os.path.isdir(text):  # unlike Path.is_dir, also for a text that is too long for a name
            items += folder_items("--query", Path(text))
        elif os.path.isfile(text):
            items.append(Item(text, text, None, Path(text)))
        else:
            raise InputError(f"--query {text}: no such image or folder (test:INDEX for a test image)")
    if all(item.row is not None for item in items):
        return items
    test_of_file = {os.path.realpath(item.file): item for item in test}
    for place, item in enumerate(items):
        known = test_of_file.get(os.path.realpath(item.file))
        if item.row is None and known:
            items[place] = known._replace(name=item.name)
    return items


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
def embed_images(option: str, items: list[Item], ensemble: nn.Module, batch_size: int) -> torch.Tensor:
    """The embedding of image files, like that of `unit_rows`. `ensemble` is an `Ensemble` of model.py.

    Raises InputError that names every bad image and `option`, which asked for them. After the first bad image, the
    others are only read, not embedded.
    """
    files, problems, rows, spec = [item.file for item in items], [], [], ensemble.image_spec

    def read(file: Path) -> np.ndarray | BadImage:
        try:
            return read_test_image(file, spec)
        except BadImage as error:
            return error

    def fill(start: int, stop: int, out: np.ndarray) -> None:
        for place, image in zip(out, threads.map(read, files[start:stop]), strict=True):
            if isinstance(image, BadImage):
                problems.append(str(image))
            else:
                place[:] = image

    with ThreadPoolExecutor(num_cores()) as threads:
        pieces = spans(0, len(files), batch_size)
        batches = image_batches(fill, pieces, spec.size, ensemble.mean.device)
        for batch in progress_bar(batches, option, len(pieces), " batches"):
            if not problems:
                rows.append(ensemble(batch))
    refuse(option, problems)
    rows = torch.cat(rows)
    if not torch.isfinite(rows).all():
        raise RunError(f"{option}: the embedding of some images is not finite")
    return rows


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
        raise_if_interrupted()
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
    queries: list[Item], query_rows: torch.Tensor, gallery: list[Item], gallery_rows: torch.Tensor, top: int
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


def places_of(queries: list[Item], gallery: list[Item], top: int) -> list[int]:
    """The place of each query itself in the gallery, or -1: the same row of test.csv or, in a folder, the same file.

    Raises InputError if too few others are left for `top` neighbours.
    """

    def key(item: Item) -> int | str:
        return os.path.realpath(item.file) if item.row is None or gallery[0].row is None else item.row

    place_of_key = {key(item): place for place, item in enumerate(gallery)}
    places = [place_of_key.get(key(query), -1) for query in queries]
    available = len(gallery)
    if max(places) >= 0:
        available -= 1
    if top > available:
        raise InputError(f"--top {top} is over the number of images that can be found, {available}")
    return places
