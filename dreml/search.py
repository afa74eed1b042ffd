"""Search with a trained run: a gallery, the images nearest to a query, and whether they are near enough."""

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

from dreml.cli import InputError, RunError, format_problems, is_utf8, pick_device, with_less_memory
from dreml.confusions import confident_errors, first_neighbour_table
from dreml.files import file_id
from dreml.images import read_pixels, resize_test, to_rgb
from dreml.index import PhotoIndex, class_of, default_place, embed_images, list_photos, model_checksum
from dreml.runs import read_run
from dreml.settings import EMBEDDINGS
from dreml.thresholds import read_threshold
from model import Ensemble, load_ensemble, unit_rows
from utils import full_float32

Query = str | Path | int | Image.Image | np.ndarray  # a file, a row of test.csv (or "test:17"), (H, W, 3) uint8

# ------------------------------------------------------------------------------------------------ images


class Item(NamedTuple):
    """An image to search for or among."""

    name: str  # its path, or test:17
    path: str  # of a test image: relative to the data set's folder
    class_name: str | None  # None: not known
    file: Path | None  # None: it is only in memory
    row: int | None = None  # in test.csv; None: not of the test split
    image: Image.Image | None = None  # of a query in memory

    @property
    def caption(self) -> str:
        """A short name, for the picture."""
        return self.name if self.row is not None or self.file is None else self.file.name


class Neighbour(NamedTuple):
    """An image that was found."""

    path: str  # as for Item
    class_name: str | None
    file: Path
    row: int | None
    similarity: float  # the mean of the members' cosines, rounded to 1e-6
    right: bool | None  # whether it is of the query's class; None where that is not known
    found: bool  # whether it reaches the threshold


@dataclass
class Answer:
    """A query and its neighbours, the most similar first."""

    query: Item
    neighbours: list[Neighbour]
    threshold: float | None = None  # None: every neighbour counts as found

    def __iter__(self) -> Iterator[Neighbour]:
        return iter(self.neighbours)

    @property
    def found(self) -> bool:
        """Whether any neighbour reaches the threshold."""
        return any(neighbour.found for neighbour in self.neighbours)


class Gallery:
    """What is searched."""

    def __init__(self, table: pd.DataFrame, vectors: torch.Tensor):
        self.table = table  # path (relative to the folder), class_name, row (of test.csv; -1 for a photo)
        self.vectors = vectors  # (N, d) float32, rows of length 1
        self.places = {path: place for place, path in enumerate(table.path)}
        self.classes = set(table.class_name) - {None}


def find_path(file: str | Path | None, folder: Path, paths: dict[str, int]) -> int | None:
    """The number of a file among paths relative to a folder. It may be written in another way, or be a link to it."""
    for resolve in (os.path.abspath, os.path.realpath) if file else ():
        path = resolve(file).removeprefix(resolve(folder) + os.sep).replace(os.sep, "/")  # outside: an absolute path
        if path in paths:
            return paths[path]
    found = file_id(file) if file else None
    if found is None:
        return None
    names = {os.path.basename(file), os.path.basename(os.path.realpath(file))}  # asking for all files takes long
    same = (path for path in paths if path.rpartition("/")[2] in names and file_id(folder / path) == found)
    return paths.get(next(same, ""))


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


# ------------------------------------------------------------------------------------------------ the searcher


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
        if num_members is not None and num_members < 1:
            raise InputError(f"num_members has to be at least 1, not {num_members}")
        self.run = read_run(Path(run), num_members)
        self.device = pick_device(str(self.device))
        self.data_path = self.run.data_path(self.data_path)
        self.test = self.run.test.assign(row=range(len(self.run.test)))
        self.test_rows = dict(zip(self.test.path, self.test.row, strict=True))
        self.test_classes = set(self.test.class_name)
        self.lock = threading.Lock()
        if self.gallery is None:
            if not len(self.test):
                raise InputError(f"{run}: its data set has no test images to search: name a gallery")
            self.run.require(self.embedding)
            return
        self.gallery = Path(self.gallery)
        if self.refresh and not self.gallery.is_dir():
            raise InputError(f"gallery {self.gallery}: no such folder")
        model = model_checksum(self.run, self.embedding)
        place = Path(index) if index else default_place(self.run.folder, self.gallery, model)
        self.index = PhotoIndex(self.gallery, place, model)

    @property
    def data_folder(self) -> Path:
        """Where the raw data set is, or was."""
        return self.data_path / self.run.settings.data_name

    @functools.cached_property
    def ensemble(self) -> Ensemble:
        """The network."""
        return load_ensemble(self.run.folder, self.device, self.embedding, self.run.num_members)

    @functools.cached_property
    def saved(self) -> torch.Tensor:
        """The embeddings of all test images, `(M, d) float32`, rows of length 1."""
        self.run.require(self.embedding)
        return unit_rows(self.run.embeddings(self.embedding, self.device))

    @functools.cached_property
    def fresh_index(self) -> PhotoIndex:
        """The index of the gallery, refreshed."""
        if self.refresh:
            self.index.refresh(self.embed, self.run.settings.image_spec, self.ann)
        return self.index

    @functools.cached_property
    def searched(self) -> Gallery:
        """All that is searched."""
        if self.gallery is not None:
            return self.photos(*self.fresh_index.read())
        table = self.test[self.test.is_gallery]
        return Gallery(table, self.saved[torch.tensor(table.row.to_numpy())])

    def photos(self, paths: list[str], vectors: torch.Tensor) -> Gallery:
        """A gallery of photos, by their paths relative to the folder."""
        table = pd.DataFrame({"path": paths, "class_name": [class_of(path) for path in paths]}, dtype=object)
        return Gallery(table.assign(row=-1), vectors.to(self.device))

    def item(self, table: pd.DataFrame, place: int, name: str | None = None) -> Item:
        """An image of a gallery's table, or of `test`. It is made when it is asked for: a search needs a few."""
        path, class_name, row = (table[column].iloc[place] for column in ("path", "class_name", "row"))
        if row >= 0:
            return Item(name or path, path, class_name, self.data_folder / path, int(row))
        file = self.gallery / path
        return Item(str(file), str(file), class_name, file)

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(N, S, S, 3) uint8` -> rows `(N, d) float32` on the CPU. Raises RunError if they are not finite."""
        network = self.ensemble
        rows = with_less_memory(lambda size: torch.cat([network(x).cpu() for x in images.split(size)]), len(images))
        if not torch.isfinite(rows).all():
            raise RunError("the embedding of some images is not finite")
        return rows

    # -------------------------------------------------------------------------------------------- queries

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

        Neighbours less similar than `threshold`, or than what evaluate.py has measured for the false-accept rate `far`,
        have `found` False. A folder stands for the photos below it. What is wrong with queries is added to `problems`,
        and the others are answered; without `problems`, that is an InputError.
        """
        if isinstance(queries, str | Path):  # "/a.jpg" would be a list of letters, and "/" the whole disk
            raise InputError(f"find_many takes a list of queries, not {str(queries)!r}: use find")
        if not isinstance(top, int | np.integer) or top < 1:
            raise InputError(f"top has to be a whole number, at least 1, not {top!r}")
        if threshold is not None and not math.isfinite(threshold):
            raise InputError(f"threshold has to be a number, not {threshold}")
        if far is not None:
            threshold = read_threshold(self.run, self.embedding, far)
        bad: list[str] = []
        items: list[Item] = []
        for query in queries:
            try:
                items += self.items(query, bad)
            except InputError as error:
                bad.append(str(error))
        with self.lock:
            found = self.embed_queries(items, bad)
            if problems is None:
                refuse("query", bad)
            else:
                problems += bad
            return [self.answer(item, row, top, threshold) for item, row in found]

    def items(self, query: Query, problems: list[str]) -> list[Item]:
        """The image of one query, or the photos of a folder. Raises InputError if there is none."""
        if isinstance(query, np.ndarray):
            if query.dtype != np.uint8 or query.ndim != 3 or query.shape[2] not in (3, 4) or not query.size:
                raise InputError(f"image: an array has to be (H, W, 3) uint8, not {query.shape} {query.dtype}")
            query = Image.fromarray(query)
        if isinstance(query, Image.Image):
            return [Item("image", "image", None, None, image=query)]
        name = f"test:{query}" if isinstance(query, int | np.integer) else str(query)
        if name.startswith("test:"):
            number = name.removeprefix("test:")
            if not re.fullmatch("[0-9]{1,9}", number) or int(number) >= len(self.test):
                raise InputError(f"{name}: the test split has {len(self.test):,} images, the first is test:0")
            return [self.item(self.test, int(number), name)]
        if not is_utf8(name) or "\0" in name:
            raise InputError(f"{name!a}: the name is not valid UTF-8")
        if not os.path.isdir(name):  # unlike Path.is_dir, also for a text that is too long for a name
            return [self.file_item(name)]
        photos = list_photos(Path(name), problems)
        return [self.file_item(str(Path(name, photo.path)), class_of(photo.path)) for photo in photos]

    def file_item(self, name: str, class_name: str | None = None) -> Item:
        """An image file. That of a test image counts as the test image."""
        row = find_path(name, self.data_folder, self.test_rows)
        return Item(name, name, class_name, Path(name)) if row is None else self.item(self.test, row, name)

    def embed_queries(self, items: list[Item], problems: list[str]) -> list[tuple[Item, torch.Tensor]]:
        """The images that can be used, and their embeddings `(d,)`. What is wrong with others goes to `problems`."""
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
        return [(items[place], rows[place]) for place in sorted(rows)]

    def answer(self, query: Item, row: torch.Tensor, top: int, threshold: float | None) -> Answer:
        """The neighbours of a query with this embedding, `(d,) float32`."""
        is_nearby = self.gallery and self.ann
        searched = self.photos(*self.fresh_index.read(row, top + 8)) if is_nearby else self.searched
        place = find_path(query.file, self.gallery, searched.places) if self.gallery else None
        if query.row is None and place is not None:  # a photo that lies in the gallery has the class that it has there
            query = query._replace(class_name=searched.table.class_name.iloc[place])
        # Folders that are no classes of the run or, for two photos, of the gallery are not known as classes.
        known = searched.classes if self.gallery and query.row is None else self.test_classes
        neighbours = []
        similarities, numbers = nearest(row, searched.vectors, top + 1)  # one may be the query itself
        for similarity, number in zip(similarities, numbers, strict=True):
            item = self.item(searched.table, number)
            is_itself = number == place if item.row is None else item.row == query.row
            if not is_itself and len(neighbours) < top:
                both_known = {query.class_name, item.class_name} <= known
                right = query.class_name == item.class_name if both_known else None
                is_found = threshold is None or similarity >= threshold - 5e-7  # as rounded as the similarity
                neighbours.append(Neighbour(*item[1:5], similarity, right, is_found))
        return Answer(query, neighbours, threshold)

    @functools.cached_property
    def test_queries(self) -> pd.DataFrame:
        """The queries of the test split and their first neighbours, see `first_neighbour_table`."""
        return first_neighbour_table([self.saved], self.test)

    @functools.cached_property
    def confident_errors(self) -> pd.DataFrame:
        """The rows of `test_queries` with a wrong neighbour, the most similar first."""
        return confident_errors(self.test_queries)


def refuse(name: str, problems: list[str], num_answered: int = 0) -> None:
    """Raise InputError that says all that is wrong with some images, if anything is."""
    rest = f" (answered: {num_answered:,})" if num_answered else ""
    if len(problems) == 1:
        raise InputError(f"{name}: {problems[0]}{rest}")
    if problems:
        raise InputError(f"{name}: {len(problems):,} problems{rest}:{format_problems(problems, len(problems))}")
