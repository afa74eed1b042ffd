"""Search with a trained run: a gallery, the images nearest to a query, and whether they are near enough."""

import argparse
import functools
import math
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image

from dreml import cli
from dreml.cli import InputError
from dreml.confusions import first_neighbour_table
from dreml.images import read_pixels, resize_test, to_rgb
from dreml.index import PhotoIndex, default_place, embed_images, model_checksum
from dreml.lists import class_of, list_photos
from dreml.runs import add_run_options, read_run
from dreml.settings import EMBEDDINGS
from model import Ensemble, load_ensemble, unit_rows
from utils import full_float32

FARS = (0.1, 0.01, 0.001)  # false-accept rates: the share of searches for something that is not there that find it
FEWEST_ABOVE = 10  # of fewer wrong neighbours above a threshold, their number says little
Query = str | Path | int | Image.Image | np.ndarray  # a file, a row of test.csv (or "test:17"), (H, W, 3) uint8


class Item(NamedTuple):
    """An image: a query, or one that was found."""

    path: str  # of a test image: relative to the data set's folder
    class_name: str | None  # None: not known
    file: Path | None  # None: it is only in memory
    row: int | None = None  # in test.csv; None: not of the test split
    # Of a query:
    name: str = ""  # its path as it was given, or test:17
    image: Image.Image | None = None  # what is in memory
    # Of a neighbour:
    similarity: float = 0.0  # the mean of the members' cosines, rounded to 1e-6
    right: bool | None = None  # whether it is of the query's class; None where that is not known
    found: bool = True  # whether it reaches the threshold


@dataclass
class Answer:
    """A query and its neighbours, the most similar first."""

    query: Item
    neighbours: list[Item]
    threshold: float | None = None  # None: every neighbour counts as found

    def __iter__(self) -> Iterator[Item]:
        return iter(self.neighbours)

    @property
    def found(self) -> bool:
        """Whether any neighbour reaches the threshold."""
        return any(neighbour.found for neighbour in self.neighbours)


class Gallery(NamedTuple):
    """What is searched."""

    images: list[int] | list[str]  # rows of test.csv, or paths of photos relative to their folder
    vectors: torch.Tensor  # (N, d) float32, rows of length 1
    classes: set[str]  # folders with other names are not known as classes


def path_below(file: str, folder: str) -> str | None:
    """The path of a file relative to a folder, with forward slashes; None for a file elsewhere."""
    path = Path(file)
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else None


def is_same(query: Item, item: Item) -> bool:
    """Whether both are one test image, or one file, to which links may lead."""
    if query.row is not None and item.row is not None:
        return query.row == item.row
    return query.file is not None and os.path.realpath(query.file) == os.path.realpath(item.file)


@torch.inference_mode()
def nearest(query: torch.Tensor, gallery: torch.Tensor, top: int) -> tuple[list[float], list[int]]:
    """The `top` rows of the gallery `(N, d)`, or all, that are most similar to a query `(d,)`: similarities, numbers.

    Similarities are rounded to 1e-6: the order in which products were summed up should break no tie. Among equally
    similar rows, the first in the gallery comes first.
    """
    size = len(gallery)
    with full_float32(gallery.device.type):
        products = (gallery @ query.to(gallery.device)).cpu()
    # One integer holds a similarity and, for ties, how far in front the row is.
    keys = (products * 1e6).round().long() * size - torch.arange(size)
    keys = keys.topk(min(top, size)).values
    numbers = -keys % size
    similarities = ((keys + numbers) // size).double() / 1e6
    return similarities.tolist(), numbers.tolist()


def threshold_at(queries: pd.DataFrame, far: float) -> float | None:
    """The similarity from which on a share `far` of wrong neighbours would count as found.

    `queries` is a `first_neighbour_table`; those without an image of another class do not count. Similarities are
    rounded to 1e-6, as in a search, and equal ones reach the threshold all or none, so that the share is at most `far`.
    None where fewer than FEWEST_ABOVE queries are expected above it.
    """
    others = queries.other[np.isfinite(queries.other)].to_numpy(np.float64)
    others = np.sort(np.round(others * 1e6))[::-1]
    allowed = math.floor(far * len(others) + 1e-9)
    if allowed < FEWEST_ABOVE:
        return None
    return float(others[allowed] + 1) / 1e6 if allowed < len(others) else -1.0


@dataclass(eq=False)
class Searcher:
    """Finds the images that are most similar to a query, with the ensemble of a run.

        searcher = Searcher("results/RUN", gallery="photos/")
        for neighbour in searcher.find("photo.jpg", top=8):
            print(neighbour.similarity, neighbour.class_name, neighbour.path)

    Raises InputError, one sentence, for what cannot be used. Several threads may search at once.
    """

    run: InitVar[str | Path]  # a run folder of train.py; the attribute is its Run
    gallery: str | Path | None = None  # a folder of photos, a class for each folder; None: the run's test images
    _: KW_ONLY
    embedding: str = "logits"  # or "pooled"
    num_members: InitVar[int | None] = None  # members 1 to `num_members`; None: all that are finished
    device: str | torch.device = "auto"
    index: InitVar[str | Path | None] = None  # where the index of the gallery is kept; None: in the run folder
    refresh: bool = True  # embed new and changed photos first; False: search the index as it is
    ann: bool = False  # search by LanceDB's approximate index
    data_path: Path | None = None  # the folder of data sets; None: as in training

    def __post_init__(self, run: str | Path, num_members: int | None, index: str | Path | None):
        if self.embedding not in EMBEDDINGS:
            raise InputError(f"embedding has to be one of {', '.join(EMBEDDINGS)}, not {self.embedding!r}")
        self.run = read_run(Path(run), num_members, self.embedding)
        self.device = cli.pick_device(str(self.device))
        self.data_path = self.run.data_path(self.data_path)
        self.data_folder = self.data_path / self.run.settings.data_name  # where the raw data set is, or was
        self.test_rows = {path: row for row, path in enumerate(self.run.test.path)}
        self.test_classes = set(self.run.test.class_name)
        self.lock = threading.Lock()
        if self.gallery is None:
            if not self.test_rows:
                raise InputError(f"{run}: its data set has no test images to search: name a gallery")
            return
        self.gallery = Path(self.gallery)
        if not cli.is_utf8(str(self.gallery)):
            raise InputError(f"gallery {str(self.gallery)!a}: the name is not valid UTF-8")
        if self.refresh and not self.gallery.is_dir():
            raise InputError(f"gallery {self.gallery}: no such folder")
        model = model_checksum(self.run, self.embedding)
        place = Path(index) if index else default_place(self.run.folder, self.gallery, model)
        self.index = PhotoIndex(self.gallery, place, model)

    @functools.cached_property
    def ensemble(self) -> Ensemble:
        """The network."""
        return load_ensemble(self.run.folder, self.device, self.embedding, self.run.num_members)

    @functools.cached_property
    def saved(self) -> torch.Tensor:
        """The embeddings of all test images, `(M, d) float32`, rows of length 1."""
        return unit_rows(self.run.embeddings(self.embedding, self.device))

    @functools.cached_property
    def test_queries(self) -> pd.DataFrame:
        """The `first_neighbour_table` of the test split. 60,000 images of 144 numbers take 15 seconds on two cores."""
        return first_neighbour_table([self.saved], self.run.test)

    def threshold_of(self, far: float) -> float:
        """The threshold of a false-accept rate. Raises InputError if there are too few test queries for it."""
        if not 1e-9 <= far <= 1:
            raise InputError(f"far has to be above 0 and at most 1, not {far}")
        test = self.run.test
        class_sizes = test.label[test.is_gallery].value_counts()
        num_others = class_sizes.sum() - test.label.map(class_sizes).fillna(0)  # images of other classes
        number = int((test.is_query & (num_others > 0)).sum())
        if far * number + 1e-9 >= FEWEST_ABOVE:
            return threshold_at(self.test_queries, far)
        needed = f"{math.ceil(FEWEST_ABOVE / far):,} test queries (with other classes in the gallery)"
        least = math.ceil(1e6 * FEWEST_ABOVE / max(1, number)) / 1e6
        remedy = f"far {least:g} or more, or " if least <= 1 else ""
        raise InputError(f"far {far:g} takes {needed}, and there are {number:,}: give {remedy}your own threshold")

    @functools.cached_property
    def searched(self) -> Gallery:
        """All that is searched."""
        if self.gallery:
            return self.photos()
        rows = np.flatnonzero(self.run.test.is_gallery)
        return Gallery(rows.tolist(), self.saved[torch.from_numpy(rows)], self.test_classes)

    def photos(self, near: torch.Tensor | None = None, number: int = 0) -> Gallery:
        """The photos of the gallery, or `number` that are near a vector. The first call refreshes the index."""
        if self.refresh:
            self.index.refresh(self.embed, self.run.settings.image_spec, self.ann)
            self.refresh = False
        paths, vectors = self.index.read(near, number)
        return Gallery(paths, vectors.to(self.device), {class_of(path) for path in paths} - {None})

    def item(self, image: int | str) -> Item:
        """A test image by its row, or a photo of the gallery by its path relative to the folder."""
        if isinstance(image, str):
            file = self.gallery / image
            return Item(str(file), class_of(image), file)
        path = self.run.test.path[image]
        return Item(path, self.run.test.class_name[image], self.data_folder / path, image)

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(N, S, S, 3) uint8` -> rows `(N, d) float32` on the CPU. Raises RunError if they are not finite."""
        network = self.ensemble
        rows = cli.with_less_memory(lambda size: torch.cat([network(x).cpu() for x in images.split(size)]), len(images))
        if not torch.isfinite(rows).all():
            raise cli.RunError("the embedding of some images is not finite")
        return rows

    def find(self, query: Query, top: int = 8, far: float | None = None, threshold: float | None = None) -> Answer:
        """The answer to one query, see `find_many`."""
        return self.find_many([query], top, far, threshold)[0]

    def find_many(
        self,
        queries: Sequence[Query],
        top: int = 8,
        far: float | None = None,
        threshold: float | None = None,
        problems: list[str] | None = None,
    ) -> list[Answer]:
        """The `top` images that are most similar to each query, but not the query itself; fewer if there are fewer.

        Neighbours less similar than `threshold`, or than the threshold of the false-accept rate `far`, have `found`
        False. A folder stands for the photos below it. What is wrong with queries is added to `problems`,
        and the others are answered; without `problems`, that is an InputError.
        """
        if isinstance(queries, str | Path):  # "/a.jpg" would be a list of letters, and "/" the whole disk
            raise InputError(f"find_many takes a list of queries, not {str(queries)!r}: use find")
        if top < 1:
            raise InputError(f"top has to be at least 1, not {top}")
        bad = [] if problems is None else problems
        items: list[Item] = []
        for query in queries:
            try:
                items += self.items(query, bad)
            except InputError as error:
                bad.append(str(error))
        with self.lock:
            if far is not None:
                threshold = self.threshold_of(far)
            rows = self.embed_queries(items, bad)
            if problems is None:
                refuse("query", bad)
            return [self.answer(items[place], rows[place], top, threshold) for place in sorted(rows)]

    def items(self, query: Query, problems: list[str]) -> list[Item]:
        """The image of one query, or the photos of a folder. Raises InputError if there is none."""
        if isinstance(query, np.ndarray):
            if query.dtype != np.uint8 or query.ndim != 3 or query.shape[2] not in (3, 4) or not query.size:
                raise InputError(f"image: an array has to be (H, W, 3) uint8, not {query.shape} {query.dtype}")
            query = Image.fromarray(query)
        if isinstance(query, Image.Image):
            return [Item("image", None, None, name="image", image=query)]
        name = f"test:{query}" if isinstance(query, int | np.integer) else str(query)
        if name.startswith("test:"):
            number = name.removeprefix("test:")
            if not re.fullmatch("[0-9]{1,9}", number) or int(number) >= len(self.test_rows):
                raise InputError(f"{name}: the test split has {len(self.test_rows):,} images, the first is test:0")
            return [self.item(int(number))._replace(name=name)]
        if not cli.is_utf8(name) or "\0" in name:
            raise InputError(f"{name!a}: the name is not valid UTF-8")
        if not os.path.isdir(name):  # unlike Path.is_dir, also for a text that is too long for a name
            return [self.file_item(name)]
        return [self.file_item(str(Path(name, path)), class_of(path)) for path in list_photos(Path(name), problems)]

    def file_item(self, name: str, class_name: str | None = None) -> Item:
        """An image file. That of a test image counts as the test image; a photo of the gallery has its class there."""
        for resolve in (os.path.abspath, os.path.realpath):
            row = self.test_rows.get(path_below(resolve(name), resolve(self.data_folder)))
            if row is not None:
                return self.item(row)._replace(name=name)
        for resolve in (os.path.realpath, os.path.abspath) if self.gallery else ():
            path = path_below(resolve(name), resolve(self.gallery))
            class_name = class_of(path) if path else class_name
        return Item(name, class_name, Path(name), name=name)

    def embed_queries(self, items: list[Item], problems: list[str]) -> dict[int, torch.Tensor]:
        """The embeddings `(d,)` of the items that can be used, by their places. What is wrong: `problems`."""
        spec = self.run.settings.image_spec

        def read(place: int) -> np.ndarray:
            item = items[place]
            if item.image is None:
                return read_pixels(item.file, spec)
            return resize_test(to_rgb(item.image.copy()), spec)  # a copy: `to_rgb` may turn the image

        rows = {place: self.saved[item.row].cpu() for place, item in enumerate(items) if item.row is not None}
        files = [place for place in range(len(items)) if place not in rows]
        for batch in embed_images(files, read, self.embed, "query", problems):
            rows |= batch
        return rows

    def answer(self, query: Item, row: torch.Tensor, top: int, threshold: float | None) -> Answer:
        """The neighbours of a query with this embedding, `(d,) float32`."""
        searched = self.photos(row, 4 * (top + 1)) if self.gallery and self.ann else self.searched
        known = searched.classes if query.row is None else self.test_classes
        for number in (top + 1, len(searched.vectors)):  # all of them where several links lead to the query
            neighbours = []
            for similarity, place in zip(*nearest(row, searched.vectors, number), strict=True):
                item = self.item(searched.images[place])._replace(similarity=similarity)
                if len(neighbours) < top and not is_same(query, item):
                    neighbours.append(item)
            if len(neighbours) == top:
                break
        for place, item in enumerate(neighbours):
            both_known = {query.class_name, item.class_name} <= known
            right = query.class_name == item.class_name if both_known else None
            is_found = threshold is None or item.similarity >= threshold - 5e-7  # as rounded as the similarity
            neighbours[place] = item._replace(right=right, found=is_found)
        return Answer(query, neighbours, threshold)


def refuse(name: str, problems: list[str], num_answered: int = 0) -> None:
    """Raise InputError that says all that is wrong with some images, if anything is."""
    rest = f" (answered: {num_answered:,})" if num_answered else ""
    if len(problems) == 1:
        raise InputError(f"{name}: {problems[0]}{rest}")
    if problems:
        raise InputError(f"{name}: {len(problems):,} problems{rest}:{cli.format_problems(problems, len(problems))}")


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a run and what is searched with it, which `searcher_of` takes."""
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="a run folder of train.py")
    group = parser.add_argument_group("what is searched")
    gallery_help = "the images below DIR, a class for each folder (default: the gallery of the test split)"
    group.add_argument("--gallery", type=Path, metavar="DIR", help=gallery_help)
    index_help = "index of --gallery (default: in RUN_FOLDER/index); needs LanceDB: pip install lancedb"
    group.add_argument("--index", type=Path, metavar="DIR", help=index_help)
    add_run_options(group)
    group.add_argument("--data_path", type=Path, metavar="DIR", help="data sets (default: as in training)")
    group.add_argument("--device", default="auto", help=cli.DEVICE_HELP)


def searcher_of(args: argparse.Namespace, **options: bool) -> Searcher:
    """The searcher for parsed options."""
    names = ("embedding", "num_members", "device", "index", "data_path")
    return Searcher(args.folder, args.gallery, **{name: getattr(args, name) for name in names}, **options)
