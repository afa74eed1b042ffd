"""What a run has learned, from the embedding of its test images: its errors, its classes, a map; as pictures."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from dreml.cache import Cache
from dreml.cli import InputError
from dreml.images import BadImage, ImageSpec, read_pixels
from dreml.runs import SUFFIXES, Run
from dreml.search import Searcher
from dreml.thresholds import FARS, threshold_at
from utils import best_similarities, first_neighbours, unmatched_queries

TILE = ImageSpec(180)  # how photos are shown
GREEN = "#1a9641"
RED = "#d7191c"
GREY = "#bbbbbb"
NUM_SHOWN = 24  # pairs of each kind
NUM_COMPARED = 500  # confident errors among which near copies are looked for
COPY_DIFFERENCE = 6  # mean difference of near copies at 16 x 16 pixels, in 0..255
MAX_POINTS = 2000  # of the map
MAP_SIZE = 700  # pixels

# ------------------------------------------------------------------------------------------------ pictures


@functools.lru_cache(4096)
def thumbnail(path: Path) -> Image.Image:
    """A photo as a small square. Grey if it cannot be read."""
    try:
        return Image.fromarray(read_pixels(path, TILE))
    except BadImage:
        return Image.new("RGB", (TILE.size, TILE.size), GREY)


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """Thumbnails in a row, and below them a place for the caption."""
    row = Image.new("RGB", (len(images) * (TILE.size + 4), TILE.size + 28), "white")
    for place, image in enumerate(images):
        row.paste(image, (place * (TILE.size + 4), 0))
    return row


def picture(draw: Callable, width: float, height: float, **layout) -> Image.Image:
    """What `draw(figure)` draws, `width` x `height` inches at 100 pixels an inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=100, **layout)
    canvas = FigureCanvasAgg(figure)
    draw(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


# ------------------------------------------------------------------------------------------------ what was learned


@dataclass(eq=False)
class Learned:
    """What the embedding of the test images says."""

    run: Run
    embedding: str
    folder: Path  # of the data set
    rows: torch.Tensor  # (M, d) float32, of length 1
    queries: pd.DataFrame  # row, neighbour, similarity, class_name, neighbour_class, right
    others: torch.Tensor  # (queries,), similarity to the nearest image of another class
    own: torch.Tensor  # and of the own class
    cache: Cache | None  # for test images whose files are gone

    def photo(self, query: int | Path) -> Image.Image:
        """A test image, by its row of test.csv, or a file, as a small square."""
        file = self.folder / self.run.test.path[query] if isinstance(query, int) else query
        if isinstance(query, int) and self.cache and not file.exists():
            image = Image.fromarray(self.cache.array("test_images")[query])
            return image.resize((TILE.size, TILE.size), Image.Resampling.BICUBIC)
        return thumbnail(file)

    @functools.cached_property
    def errors(self) -> pd.DataFrame:
        """The queries with a neighbour of another class that could find their own, the most similar first."""
        wrong = self.queries[~self.queries.right & self.queries.counted]
        return wrong.sort_values("similarity", ascending=False, kind="stable")

    def confident_errors(self) -> list[tuple[Image.Image, str]]:
        """The first of the `errors`."""
        return self.error_pairs(self.errors.head(NUM_SHOWN))

    def error_pairs(self, table: pd.DataFrame) -> list[tuple[Image.Image, str]]:
        """A picture and a caption for each of some `errors`."""
        pairs = []
        for error in table.itertuples():
            image = side_by_side([self.photo(error.row), self.photo(error.neighbour)])
            pairs.append((image, f"{error.class_name} | {error.neighbour_class}   {error.similarity:.3f}"))
        return pairs

    def classes(self) -> pd.DataFrame:
        """R@1 of each class in percent, worst first."""
        table = self.queries.groupby("class_name").right.agg(["mean", "size"]).reset_index()
        table["mean"] = (100 * table["mean"]).round(2)
        table = table.sort_values(["mean", "class_name"])
        return table.rename(columns={"class_name": "class", "mean": "R@1 (%)", "size": "queries"})

    def confusions(self) -> list[tuple[Image.Image, str]]:
        """The pairs of classes that are most often taken for each other, with two pictures of each class."""
        names = self.errors[["class_name", "neighbour_class"]].to_numpy()
        keys = pd.Series([tuple(sorted(pair)) for pair in names], dtype=object)
        pictures = []
        for (first, second), times in keys.value_counts(sort=True).head(NUM_SHOWN).items():
            images = []
            for name in (first, second):
                rows = np.flatnonzero(self.run.test.class_name == name)[:2]
                images += [self.photo(int(row)) for row in rows]
            pictures.append((side_by_side(images), f"{first} | {second}   {times} times"))
        return pictures

    def copies(self) -> list[tuple[Image.Image, str]]:
        """Pairs of test images that look the same, and have two class names."""

        def small(row: int) -> np.ndarray:
            return np.asarray(self.photo(row).resize((16, 16), Image.Resampling.BOX), np.float32)

        found = []
        seen = set()
        for error in self.errors.head(NUM_COMPARED).itertuples():
            pair = frozenset((error.row, error.neighbour))
            if pair not in seen and np.abs(small(error.row) - small(error.neighbour)).mean() <= COPY_DIFFERENCE:
                found.append(error.Index)
            seen.add(pair)
        return self.error_pairs(self.errors.loc[found[:NUM_SHOWN]])

    def histograms(self) -> Image.Image:
        """Similarities to the own class and to others, with the thresholds."""

        def draw(figure) -> None:
            axes = figure.subplots()
            for values, color, label in (
                (self.own, GREEN, "of its own class"),
                (self.others, RED, "of another class"),
            ):
                values = values[torch.isfinite(values)].numpy()
                axes.hist(values, bins=60, alpha=0.55, color=color, label=label)
            for far, line in zip(FARS, (":", "--", "-"), strict=True):
                threshold = threshold_at(self.others, far)
                if threshold is not None:
                    axes.axvline(threshold, color="black", linestyle=line, label=f"threshold at {100 * far:g} %")
            axes.set(xlabel="similarity", ylabel="queries", title="Similarity of each query to the nearest image")
            axes.legend()

        return picture(draw, 7, 3.5, layout="constrained")

    def recalls(self) -> Image.Image:
        """Recall against the ensemble size, from recall.csv or recall_pooled.csv."""
        path = self.run.folder / f"recall{SUFFIXES[self.embedding]}.csv"
        table = pd.read_csv(path) if path.exists() else pd.DataFrame()
        title = "Recall against the ensemble size" if path.exists() else f"{path.name} is missing"

        def draw(figure) -> None:
            axes = figure.subplots()
            for name in table.filter(like="R@"):
                axes.plot(table.ensemble_size, table[name], marker="o", label=name)
            axes.set(xlabel="ensemble size (members)", ylabel="Recall@K (%)", title=title)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if len(table):
                axes.legend()

        return picture(draw, 7, 3.5, layout="constrained")

    def settings(self) -> pd.DataFrame:
        """The run's settings, and its ensemble size."""
        values = asdict(self.run.settings) | {"ensemble_size": self.run.num_members}
        return pd.DataFrame({"setting": list(values), "value": [str(value) for value in values.values()]})

    @functools.lru_cache(2)  # noqa: B019 - there is one, for as long as the page runs
    def map_points(self, method: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows of test.csv `(P,)` and their places `(P, 2)` on the map in pixels, by "PCA" or "t-SNE"."""
        chosen = np.unique(np.linspace(0, len(self.rows) - 1, MAX_POINTS).astype(int))
        rows = self.rows[chosen]
        if method == "t-SNE":
            from sklearn.manifold import TSNE

            perplexity = min(30, (len(rows) - 1) / 3)
            places = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(rows.numpy())
        else:
            left, values, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
            places = (left[:, :2] * values[:2]).numpy()
        low = places.min(0)
        return chosen, 20 + (MAP_SIZE - 40) * (places - low) / np.maximum(places.max(0) - low, 1e-9)

    def map(self, method: str) -> Image.Image:
        """The test images in two dimensions, coloured by class."""
        chosen, places = self.map_points(method)
        colors = (self.run.test.label.to_numpy()[chosen] * 0.618034) % 1  # neighbours in number differ in colour

        def draw(figure) -> None:
            axes = figure.add_axes((0, 0, 1, 1), xlim=(0, MAP_SIZE), ylim=(MAP_SIZE, 0))
            axes.set_axis_off()
            axes.scatter(places[:, 0], places[:, 1], s=14, c=colors, cmap="hsv", alpha=0.8, linewidths=0)

        return picture(draw, MAP_SIZE / 100, MAP_SIZE / 100)

    def at(self, method: str, x: float, y: float) -> tuple[Image.Image, str]:
        """The photo that lies nearest to a place on the map, and its caption."""
        chosen, places = self.map_points(method)
        row = int(chosen[np.argmin(((places - (x, y)) ** 2).sum(1))])
        return self.photo(row), f"test image {row}: {self.run.test.class_name[row]}"


def map_methods() -> list[str]:
    """How the map can be made here."""
    return ["PCA", "t-SNE"] if importlib.util.find_spec("sklearn") else ["PCA"]


def learn(searcher: Searcher) -> Learned:
    """Find the first neighbour of each test image, and how similar its own class and others are."""
    run = searcher.run
    rows = searcher.saved.cpu()
    split = run.split
    masks = {"is_query": split.is_query, "is_gallery": split.is_gallery}
    neighbours, similarities = first_neighbours(rows, split.labels, **masks)
    others, own = best_similarities(rows, split.labels, **masks)
    names = run.test.class_name.to_numpy()
    is_query = np.flatnonzero(split.is_query)
    queries = pd.DataFrame({"row": is_query, "neighbour": neighbours, "similarity": similarities})
    queries["class_name"] = names[is_query]
    queries["neighbour_class"] = names[neighbours]
    queries["counted"] = ~unmatched_queries(*split)[split.is_query].numpy()
    queries["right"] = (split.labels[is_query] == split.labels[neighbours]).numpy()
    try:
        cache = run.read_cache(searcher.data_path)
    except InputError:
        cache = None
    return Learned(
        run, searcher.embedding, searcher.data_folder, rows, queries[queries.neighbour >= 0], others[-1], own[-1], cache
    )
