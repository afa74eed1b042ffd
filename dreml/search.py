"""Search with a trained run: a gallery, the images nearest to a query, and whether they are near enough."""

import functools
import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image

from dreml.batches import spans
from dreml.cli import InputError, format_problems, is_utf8, pick_device
from dreml.files import file_id
from dreml.images import BadImage, ImageSpec, bad_image, read_pixels, resize_test, to_rgb
from dreml.index import (
    PhotoIndex,
    class_of,
    embed_folder,
    embed_images,
    index_name,
    is_installed,
    list_photos,
    model_checksum,
)
from dreml.runs import read_run
from dreml.settings import EMBEDDINGS
from dreml.thresholds import Threshold, read_threshold
from model import Ensemble, load_ensemble, unit_rows
from utils import first_neighbours, full_float32, unmatched_queries

REFRESHES = ("always", "never", "moved")
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

    path: str  # of a test image: relative to the data set's folder
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

    @property
    def class_name(self) -> str | None:
        """The class of the query, where it is known."""
        return self.query.class_name

    def __iter__(self) -> Iterator[Neighbour]:
        return iter(self.neighbours)


@dataclass
class Gallery:
    """What is searched: images of the test split, or photos below a folder. Row i of `vectors` embeds image i."""

    folder: Path
    paths: Sequence[str]  # relative to the folder
    vectors: torch.Tensor  # (N, d) float32, rows of length 1
    test: pd.DataFrame | None = None  # test.csv; None: photos
    rows: np.ndarray | None = None  # (N,) int64, of test.csv

    def item(self, place: int) -> Item:
        """One image. It is made when it is asked for: a search needs a few of a million."""
        if self.rows is not None:
            return test_item(self.test, self.folder, int(self.rows[place]))
        return photo_item(self.folder, self.paths[place])

    def places_of(self, queries: list[Item]) -> list[int]:
        """The place of each query itself, by its row of test.csv or its file, or -1."""
        if self.rows is None:
            return same_files([query.file for query in queries], self.paths, self.folder)
        places = np.full(len(self.test) + 1, -1)
        places[self.rows] = np.arange(len(self.rows))
        return [int(places[-1 if query.row is None else query.row]) for query in queries]


def test_item(test: pd.DataFrame, folder: Path, row: int, name: str | None = None) -> Item:
    """An image of the test split, by its row of test.csv. `folder` is where the raw data set is, or was."""
    path = test.path[row]
    return Item(name or path, path, test.class_name[row], folder / path, row)


def photo_item(folder: Path, path: str) -> Item:
    """A photo below a folder."""
    file = os.path.join(folder, path)
    return Item(file, file, class_of(path), Path(file))


def image_of(query: Image.Image | np.ndarray) -> Image.Image:
    """A query in memory as an image of its own. Raises InputError for one that has no defined colours."""
    if isinstance(query, np.ndarray):
        if query.dtype != np.uint8 or query.ndim != 3 or query.shape[2] not in (3, 4):
            raise InputError(f"image: an array has to be (H, W, 3) uint8, not {query.shape} {query.dtype}")
        return Image.fromarray(query)
    if query.mode == "F":
        raise InputError("image: floating-point grey values have no defined black and white")
    try:
        return query.copy()
    except Exception as error:  # of its file, which is read only now
        raise InputError(str(bad_image("image", error))) from None


def same_files(files: list[Path | None], paths: Sequence[str], folder: Path) -> list[int]:
    """The place in `paths`, relative to a folder, that is each of some files, by whatever path it is named; or -1.

    The disk is asked only for those that have the name of one of the files, or of the file that it is a link to: asking
    for a million takes long.
    """
    names = {os.path.basename(path) for file in files if file for path in (file, os.path.realpath(file))}
    places: dict[tuple[int, int] | None, int] = {}
    for place, path in enumerate(paths if names else []):
        if path.rpartition("/")[2] in names:
            places.setdefault(file_id(os.path.join(folder, path)), place)
    places[None] = -1
    return [places.get(file and file_id(file), -1) for file in files]


# ------------------------------------------------------------------------------------------------ nearest


@torch.inference_mode()
def nearest(
    queries: torch.Tensor, gallery: torch.Tensor, top: int, left_out: Sequence[int], max_block: int = 2**22
) -> tuple[np.ndarray, np.ndarray]:
    """The `top` rows of the gallery `(N, d)` that are most similar to each of the queries `(Q, d)`.

    Returns their similarities `(Q, top) float32` and their numbers `(Q, top) int64`; among equally similar ones, the
    first in the gallery comes first. Similarities are rounded to 1e-6: the order in which products were summed up
    should break no tie. `left_out` `(Q,)` is the place of each query itself in the gallery, or -1; its similarity is
    -inf. At most `max_block` similarities are held at a time, 4 bytes each, but at least one query's.
    """
    similarities = np.empty((len(queries), top), np.float32)
    numbers = np.empty((len(queries), top), np.int64)
    left_out = torch.as_tensor(left_out, device=gallery.device)
    for start, stop in spans(0, len(queries), max(1, max_block // len(gallery))):
        with full_float32(gallery.device.type):
            products = queries[start:stop].to(gallery.device) @ gallery.T
        block = products.mul_(1e6).round_().div_(1e6)
        itself = left_out[start:stop]
        inside = torch.nonzero(itself >= 0)[:, 0]
        block[inside, itself[inside]] = -torch.inf
        # All that reach the last place, sorted by row, similarity and number. The first `top` of each row remain.
        reaching = block >= block.topk(top).values[:, -1:]
        rows, columns = (indices.cpu().numpy() for indices in torch.nonzero(reaching, as_tuple=True))
        values = block[reaching].cpu().numpy()
        order = np.lexsort((columns, -values, rows))
        places = np.searchsorted(rows[order], np.arange(stop - start))[:, None] + np.arange(top)
        similarities[start:stop] = values[order[places]]
        numbers[start:stop] = columns[order[places]]
    return similarities, numbers


# ------------------------------------------------------------------------------------------------ the searcher


class Searcher:
    """Finds the images that are most similar to a query, with the ensemble of a run.

        searcher = Searcher("results/RUN", gallery="photos/")
        for neighbour in searcher.find("photo.jpg", top=8):
            print(neighbour.similarity, neighbour.class_name, neighbour.path)

    Args:
        run: a run folder of train.py.
        gallery: a folder of photos, a class for each folder; None: the gallery of the run's test split.
        embedding: "logits" or "pooled".
        num_members: members 1 to `num_members` are used; None: all that are finished.
        index: where the index of the gallery is kept; None: in the run folder.
        refresh: "always" embeds new and changed photos first, "never" searches the index as it is, "moved" goes on with
            the index of a folder that has another place now.
        ann: whether to search by LanceDB's approximate index, where there are photos enough for one.
        data_path: where the data sets are; None: as in training.

    Raises InputError, one sentence, for what cannot be used. Several threads may search at once.
    """

    def __init__(
        self,
        run: str | Path,
        gallery: str | Path | None = None,
        *,
        embedding: str = "logits",
        num_members: int | None = None,
        device: str | torch.device = "auto",
        index: str | Path | None = None,
        refresh: str = "always",
        ann: bool = False,
        data_path: str | Path | None = None,
    ):
        if embedding not in EMBEDDINGS:
            raise InputError(f"embedding has to be one of {', '.join(EMBEDDINGS)}, not {embedding!r}")
        if refresh not in REFRESHES:
            raise InputError(f"refresh has to be one of {', '.join(REFRESHES)}, not {refresh!r}")
        if num_members is not None and num_members < 1:
            raise InputError("num_members has to be at least 1")
        if refresh == "moved" and gallery is not None and index is None:
            raise InputError("refresh moved needs index: the place of the index that was made before the move")
        self.run = read_run(Path(run), num_members)
        self.embedding = embedding
        self.device = pick_device(str(device))
        self.data_path = self.run.data_path(data_path and Path(data_path))
        self.data_folder = self.data_path / self.run.settings.data_name
        self.photos = None if gallery is None else Path(gallery)
        self.refresh = refresh
        self.ann = ann
        self.index = None
        self.lock = threading.Lock()
        if self.photos is None:
            if not len(self.run.test):
                raise InputError(f"{run}: its data set has no test images to search: name a gallery")
            self.run.require(embedding)
        elif refresh != "never" and not self.photos.is_dir():
            raise InputError(f"gallery {gallery}: no such folder")
        elif is_installed():
            model = model_checksum(self.run, embedding)
            place = Path(index) if index else self.run.folder / "index" / index_name(self.photos, model)
            self.index = PhotoIndex(self.photos, place, model, refresh == "moved")

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
        if self.refresh != "never":
            self.index.refresh(lambda: self.ensemble, self.ann)
        if self.ann and not self.index.has_vector_index():
            print(f"{self.photos}: no vector index yet, or too few photos for one: the search is exact")
            self.ann = False
        return self.index

    @functools.cached_property
    def gallery(self) -> Gallery:
        """All that is searched."""
        if self.photos is None:
            rows = np.flatnonzero(self.run.test.is_gallery)
            vectors = self.saved if len(rows) == len(self.saved) else self.saved[rows]
            return Gallery(self.data_folder, [], vectors, self.run.test, rows)
        if self.index is None:
            print(f"note: every search embeds {self.photos} anew; an index would keep that: pip install lancedb")
            paths, vectors = embed_folder(self.photos, lambda: self.ensemble)
        else:
            paths, vectors = self.fresh_index.read()
        return Gallery(self.photos, paths, vectors.to(self.device))

    # -------------------------------------------------------------------------------------------- queries

    def find(self, query: Query, top: int = 8, far: float | None = None, threshold: float | None = None) -> Answer:
        """The answer to one query, see `find_many`."""
        return self.find_many([query], top, far, threshold)[0]

    def find_many(
        self,
        queries: Sequence[Query] | Sequence[Item],
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
        if top < 1:
            raise InputError("top has to be at least 1")
        if threshold is not None and not math.isfinite(threshold):
            raise InputError(f"threshold has to be a number, not {threshold}")
        if far is not None:
            threshold = self.threshold(far).value
        bad: list[str] = []
        with self.lock:
            items, rows = self.embed(self.items(queries, bad), bad)
            if problems is None:
                refuse("query", bad)
            else:
                problems += bad
            if not items:
                return []
            index = self.fresh_index if self.index else None
            if index is None or not self.ann:
                return self.answers(items, rows, self.gallery, top, threshold)
            answers = []
            for item, row in zip(items, rows, strict=True):
                nearby = Gallery(self.photos, *index.read(row, top + 8))
                answers += self.answers([item], row[None], nearby, top, threshold)
            return answers

    def threshold(self, far: float) -> Threshold:
        """The threshold that evaluate.py has measured for a false-accept rate."""
        if not len(self.run.test):
            raise InputError(f"{self.run.folder}: its data set has no test images, and so no thresholds: name a value")
        return read_threshold(self.run, self.embedding, far)

    def items(self, queries: Sequence[Query] | Sequence[Item], problems: list[str]) -> list[Item]:
        """The images that are asked for. The file of a test image counts as that test image."""
        if all(isinstance(query, Item) for query in queries):
            return list(queries)
        items = []
        for query in queries:
            try:
                items += self.items_of(query, problems)
            except InputError as error:
                problems.append(str(error).removeprefix("query "))
        files = [None if item.row is not None else item.file for item in items]
        rows = same_files(files, self.run.test.path.tolist(), self.data_folder) if any(files) else []
        for place, row in enumerate(rows):
            if row >= 0:
                items[place] = test_item(self.run.test, self.data_folder, row, items[place].name)
        return items

    def items_of(self, query: Query, problems: list[str]) -> list[Item]:
        """The image of one query, or the photos of a folder. Raises InputError if there is none."""
        if isinstance(query, Image.Image | np.ndarray):
            return [Item("image", "image", None, None, image=image_of(query))]
        name = f"test:{query}" if isinstance(query, int | np.integer) else str(query)
        if not is_utf8(name):
            raise InputError(f"{name!a}: the name is not valid UTF-8")
        if name.startswith("test:"):
            number = name.removeprefix("test:")
            if not number.isascii() or not number.isdigit() or int(number) >= len(self.run.test):
                rows = f"INDEX has to be a row of test.csv, in 0..{len(self.run.test) - 1}"
                raise InputError(f"{name}: {rows if len(self.run.test) else 'the data set has no test images'}")
            return [test_item(self.run.test, self.data_folder, int(number), name)]
        if os.path.isdir(name):  # unlike Path.is_dir, also for a text that is too long for a name
            return [photo_item(Path(name), photo.path) for photo in list_photos("query", Path(name), problems)]
        if not os.path.isfile(name):
            raise InputError(f"{name}: no such image or folder (test:INDEX for a test image)")
        return [Item(name, name, None, Path(name))]

    def embed(self, items: list[Item], problems: list[str]) -> tuple[list[Item], torch.Tensor | None]:
        """The images that can be used, and their embeddings `(N, d)`. What is wrong with others goes to `problems`."""
        rows = {place: self.saved[item.row].cpu() for place, item in enumerate(items) if item.row is not None}
        files = [place for place in range(len(items)) if place not in rows]

        def read(place: int, spec: ImageSpec) -> np.ndarray:
            item = items[place]
            return read_pixels(item.file, spec) if item.image is None else resize_test(to_rgb(item.image), spec)

        for batch in embed_images(files, read, lambda: self.ensemble, "query"):
            problems += [str(row) for _, row in batch if isinstance(row, BadImage)]
            rows |= {place: row for place, row in batch if not isinstance(row, BadImage)}
        good = sorted(rows)
        return [items[place] for place in good], torch.stack([rows[place] for place in good]) if good else None

    # -------------------------------------------------------------------------------------------- answers

    def answers(
        self, queries: list[Item], rows: torch.Tensor, gallery: Gallery, top: int, threshold: float | None
    ) -> list[Answer]:
        """The neighbours of each query; row i of `rows` embeds query i."""
        least = -math.inf if threshold is None else round(1e6 * threshold)
        places = gallery.places_of(queries)
        similarities, numbers = nearest(rows, gallery.vectors, min(top, len(gallery.vectors)), places)
        answers = []
        for query, place, values, near in zip(queries, places, similarities.tolist(), numbers.tolist(), strict=True):
            if query.class_name is None and place >= 0:  # a photo that lies in the gallery has its class
                query = query._replace(class_name=gallery.item(place).class_name)
            neighbours = []
            for value, item in zip(values, map(gallery.item, near), strict=True):
                if value > -math.inf:  # else it is the query itself
                    right = self.is_right(query, item)
                    found = round(1e6 * value) >= least
                    neighbours.append(Neighbour(item.path, item.class_name, item.file, item.row, value, right, found))
            answers.append(Answer(query, neighbours, threshold))
        return answers

    def is_right(self, query: Item, item: Item) -> bool | None:
        """Whether an image is of the query's class; None where one of the classes is not known.

        A folder's name says nothing of a test image's class, unless it is that of a class of the test split.
        """
        if query.class_name is None or item.class_name is None:
            return None
        if (query.row is None) != (item.row is None):
            of_folder = query if query.row is None else item
            if of_folder.class_name not in self.class_names:
                return None
        return query.class_name == item.class_name

    @functools.cached_property
    def class_names(self) -> set[str]:
        """The classes of the test images."""
        return set(self.run.test.class_name)

    def confident_errors(self) -> tuple[list[int], int]:
        """The test queries whose first neighbour is of another class, those first that are most similar to it.

        Returns their rows in test.csv and how many queries were searched for: not those whose class has no other image
        in the gallery, which can find nothing right.
        """
        split = self.run.split
        masks = {"is_query": split.is_query, "is_gallery": split.is_gallery}
        neighbours, similarities = first_neighbours(self.saved, split.labels, **masks)
        queries = torch.nonzero(split.is_query)[:, 0]
        counted = ~unmatched_queries(*split)[queries]
        wrong = counted & (split.labels[neighbours] != split.labels[queries])
        order = torch.argsort(similarities[wrong], descending=True, stable=True)
        return queries[wrong][order].tolist(), int(counted.sum())


def refuse(name: str, problems: list[str]) -> None:
    """Raise InputError that says all that is wrong with some images, if anything is."""
    if len(problems) == 1:
        raise InputError(f"{name}: {problems[0]}")
    if problems:
        raise InputError(f"{name}: {len(problems):,} problems:{format_problems(problems, len(problems))}")
