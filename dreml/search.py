"""Search with a trained run: a gallery, the images nearest to a query, and whether they are near enough."""

import functools
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image

from dreml import index as photo_index
from dreml.batches import spans
from dreml.cli import InputError, RunError, format_problems, is_utf8, pick_device, with_less_memory
from dreml.confusions import confident_errors, first_neighbour_table
from dreml.files import file_id
from dreml.images import read_pixels, resize_test, to_rgb
from dreml.index import PhotoIndex, class_of, embed_folder, embed_images, list_photos
from dreml.runs import read_run
from dreml.settings import EMBEDDINGS
from dreml.thresholds import read_threshold
from model import Ensemble, load_ensemble, unit_rows
from utils import full_float32

REFRESHES = ("always", "never", "moved")
ITSELF = -2.0  # in the place of a query's similarity to itself
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


class Gallery(NamedTuple):
    """What is searched. Row i of both is an image."""

    table: pd.DataFrame  # path (relative to the folder), class_name, row (of test.csv; -1 for a photo)
    vectors: torch.Tensor  # (N, d) float32, rows of length 1


def same_files(files: list[Path | None], paths: Iterable[str], folder: Path) -> list[int]:
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


@torch.inference_mode()
def nearest(
    queries: torch.Tensor, gallery: torch.Tensor, top: int, left_out: Sequence[int], max_block: int = 2**22
) -> tuple[np.ndarray, np.ndarray]:
    """The `top` rows of the gallery `(N, d)` that are most similar to each of the queries `(Q, d)`.

    Returns their similarities `(Q, top) float64` and their numbers `(Q, top) int64`; among equally similar ones, the
    first in the gallery comes first. Similarities are rounded to 1e-6: the order in which products were summed up
    should break no tie. `left_out` `(Q,)` is the place of each query itself in the gallery, or -1; its similarity is
    ITSELF. At most `max_block` similarities are held at a time, but at least one query's.
    """
    size = len(gallery)
    best = torch.empty((len(queries), top), dtype=torch.int64)
    left_out = torch.as_tensor(left_out)
    for start, stop in spans(0, len(queries), max(1, max_block // size)):
        with full_float32(gallery.device.type):
            products = (queries[start:stop].to(gallery.device) @ gallery.T).cpu()
        itself = left_out[start:stop]
        inside = torch.nonzero(itself >= 0)[:, 0]
        products[inside, itself[inside]] = ITSELF
        # One integer holds a similarity and, for ties, how far in front the image is.
        keys = (products * 1e6).round().long() * size - torch.arange(size)
        best[start:stop] = keys.topk(top).values
    numbers = -best % size
    return ((best + numbers) // size / 1e6).double().numpy(), numbers.numpy()


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

    Set `ann` to search by LanceDB's approximate index, and `data_path` where the data sets are not as in training.
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
    ):
        for name, value, values in (("embedding", embedding, EMBEDDINGS), ("refresh", refresh, REFRESHES)):
            if value not in values:
                raise InputError(f"{name} has to be one of {', '.join(values)}, not {value!r}")
        if refresh == "moved" and index is None:
            raise InputError("refresh moved needs index: the place of the index that was made before the move")
        if num_members is not None and num_members < 1:
            raise InputError(f"num_members has to be at least 1, not {num_members}")
        if (index or refresh != "always") and not photo_index.is_installed():
            raise InputError("an index needs LanceDB: pip install lancedb")
        self.run = read_run(Path(run), num_members)
        self.device = pick_device(str(device))
        self.embedding = embedding
        self.data_path = self.run.data_path(None)
        self.photos = None if gallery is None else Path(gallery)
        self.test = self.run.test.assign(row=range(len(self.run.test)))
        self.refresh = refresh
        self.ann = False
        self.index = None
        self.lock = threading.Lock()
        if self.photos is None:
            if not len(self.test):
                raise InputError(f"{run}: its data set has no test images to search: name a gallery")
            self.run.require(embedding)
        elif refresh != "never" and not self.photos.is_dir():
            raise InputError(f"gallery {gallery}: no such folder")
        elif photo_index.is_installed():
            model = photo_index.model_checksum(self.run, embedding)
            place = Path(index) if index else photo_index.default_place(self.run.folder, self.photos, model)
            self.index = PhotoIndex(self.photos, place, model, refresh == "moved")

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
        if self.refresh != "never":
            self.index.refresh(self.embed, self.run.settings.image_spec, self.ann)
        return self.index

    @functools.cached_property
    def gallery(self) -> Gallery:
        """All that is searched."""
        if self.photos is None:
            table = self.test[self.test.is_gallery]
            return Gallery(table, self.saved[torch.tensor(table.row.to_numpy())])
        if self.index is not None:
            return self.photo_gallery(*self.fresh_index.read())
        print(f"note: every search embeds {self.photos} anew; an index would keep that: pip install lancedb")
        return self.photo_gallery(*embed_folder(self.photos, self.embed, self.run.settings.image_spec))

    def photo_gallery(self, paths: list[str], vectors: torch.Tensor) -> Gallery:
        """A gallery of photos, by their paths relative to the folder."""
        table = pd.DataFrame({"path": paths, "class_name": [class_of(path) for path in paths]}, dtype=object)
        return Gallery(table.assign(row=-1), vectors.to(self.device))

    def item(self, table: pd.DataFrame, place: int, name: str | None = None) -> Item:
        """An image of a gallery's table, or of `test`. It is made when it is asked for: a search needs a few."""
        path, class_name, row = (table[column].iloc[place] for column in ("path", "class_name", "row"))
        if row >= 0:
            return Item(name or path, path, class_name, self.data_folder / path, int(row))
        file = self.photos / path
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
            threshold = read_threshold(self.run, self.embedding, far).value
        bad: list[str] = []
        with self.lock:
            items, rows = self.embed_queries(self.items(queries, bad), bad)
            if problems is None:
                refuse("query", bad)
            else:
                problems += bad
            if items and not (self.ann and self.index):
                return self.answers(items, rows, self.gallery, top, threshold)
            answers = []
            for item, row in zip(items, rows, strict=True):
                nearby = self.photo_gallery(*self.fresh_index.read(row, top + 8))  # one may be the query itself
                answers += self.answers([item], [row], nearby, top, threshold)
            return answers

    def items(self, queries: Sequence[Query], problems: list[str]) -> list[Item]:
        """The images that are asked for. The file of a test image counts as that test image."""
        items = []
        for query in queries:
            try:
                items += self.items_of(query, problems)
            except InputError as error:
                problems.append(str(error))
        files = [None if item.row is not None else item.file for item in items]
        rows = same_files(files, self.test.path, self.data_folder)
        found = zip(items, rows, strict=True)
        return [item if row < 0 else self.item(self.test, row, item.name) for item, row in found]

    def items_of(self, query: Query, problems: list[str]) -> list[Item]:
        """The image of one query, or the photos of a folder. Raises InputError if there is none."""
        if isinstance(query, np.ndarray):
            if query.dtype != np.uint8 or query.ndim != 3 or query.shape[2] not in (3, 4) or not query.size:
                raise InputError(f"image: an array has to be (H, W, 3) uint8, not {query.shape} {query.dtype}")
            query = Image.fromarray(query)
        if isinstance(query, Image.Image):
            if query.mode == "F":
                raise InputError("image: floating-point grey values have no defined black and white")
            return [Item("image", "image", None, None, image=query)]
        name = f"test:{query}" if isinstance(query, int | np.integer) else str(query)
        if name.startswith("test:"):
            number = name.removeprefix("test:")
            if not re.fullmatch("[0-9]{1,9}", number) or int(number) >= len(self.test):
                raise InputError(f"{name}: the test split has {len(self.test):,} images, the first is test:0")
            return [self.item(self.test, int(number), name)]
        if not is_utf8(name):
            raise InputError(f"{name!a}: the name is not valid UTF-8")
        if os.path.isdir(name):  # unlike Path.is_dir, also for a text that is too long for a name
            files = [(Path(name, photo.path), class_of(photo.path)) for photo in list_photos(Path(name), problems)]
            return [Item(str(file), str(file), class_name, file) for file, class_name in files]
        if not os.path.isfile(name):
            raise InputError(f"{name}: no such image or folder (test:INDEX for a test image)")
        return [Item(name, name, None, Path(name))]

    def embed_queries(self, items: list[Item], problems: list[str]) -> tuple[list[Item], list[torch.Tensor]]:
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
        good = sorted(rows)
        return [items[place] for place in good], [rows[place] for place in good]

    # -------------------------------------------------------------------------------------------- answers

    def answers(
        self, queries: list[Item], rows: list[torch.Tensor], gallery: Gallery, top: int, threshold: float | None
    ) -> list[Answer]:
        """The neighbours of each query; `rows` are the queries' embeddings."""
        table = gallery.table
        least = -math.inf if threshold is None else round(1e6 * threshold)
        classes = set(table.class_name) - {None}
        test_classes = set(self.test.class_name)
        if self.photos is None:
            places = pd.Index(table.row).get_indexer([-1 if query.row is None else query.row for query in queries])
        else:
            places = same_files([query.file for query in queries], table.path, self.photos)
        similarities, numbers = nearest(torch.stack(rows), gallery.vectors, min(top, len(table)), places)
        answers = []
        for query, place, values, near in zip(queries, places, similarities.tolist(), numbers.tolist(), strict=True):
            if query.row is None and place >= 0:  # a photo that lies in the gallery has the class that it has there
                query = query._replace(class_name=table.class_name.iloc[place])
            # Folders that are no classes of the run or, for two photos, of the gallery are not known as classes.
            known = test_classes if query.row is not None or self.photos is None else classes
            neighbours = []
            for value, item in zip(values, (self.item(table, each) for each in near), strict=True):
                if value != ITSELF:
                    both_known = {query.class_name, item.class_name} <= known
                    right = query.class_name == item.class_name if both_known else None
                    neighbours.append(Neighbour(*item[1:5], value, right, round(1e6 * value) >= least))
            answers.append(Answer(query, neighbours, threshold))
        return answers

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
