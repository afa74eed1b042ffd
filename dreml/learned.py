"""What a run has learned, from the embedding of its test images: its errors, its classes, a map; as pictures."""

import functools
import importlib.util

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw

from dreml.cli import InputError
from dreml.confusions import confident_errors, confusion_table
from dreml.figures import drawing, new_figure, thumbnail
from dreml.runs import SUFFIXES
from dreml.search import FARS, Item, Searcher, threshold_at

SIDE = 150  # pixels of a thumbnail
NUM_SHOWN = 24  # pairs of each kind
NUM_COMPARED = 200  # confident errors among which near copies are looked for
COPY_DIFFERENCE = 6  # mean difference of near copies at 16 x 16 pixels, in 0..255
MAX_POINTS = 2000  # of the map
MAP_SIZE = 700  # pixels
MAP_METHODS = ["PCA", "t-SNE"] if importlib.util.find_spec("sklearn") else ["PCA"]
Picture = tuple[Image.Image, str]  # with its caption


class Learned:
    """What the embedding of the test images says."""

    def __init__(self, searcher: Searcher):
        self.searcher = searcher
        self.run = searcher.run
        self.queries = searcher.test_queries
        self.errors = confident_errors(self.queries)

    def photo(self, image: Item | int) -> Image.Image:
        """An image, or a test image by its row, as a small square. Grey if it cannot be read."""
        item = image if isinstance(image, Item) else self.searcher.item(int(image))
        try:
            return Image.fromarray(thumbnail(self.searcher, item))
        except InputError:
            return Image.new("RGB", (SIDE, SIDE), "lightgrey")

    def side_by_side(self, rows: list[int]) -> Image.Image:
        """Test images, two in a row, and below them a place for a caption."""
        picture = Image.new("RGB", (2 * (SIDE + 4), len(rows) // 2 * (SIDE + 4) + 60), "white")
        for place, row in enumerate(rows):
            picture.paste(self.photo(row), (place % 2 * (SIDE + 4), place // 2 * (SIDE + 4)))
        return picture

    def pairs(self, errors: pd.DataFrame) -> list[Picture]:
        """Queries and their neighbours, of the first rows of `errors`."""
        pictures = []
        for error in errors.head(NUM_SHOWN).itertuples():
            caption = f"{error.class_name} | {error.neighbour_class}   {error.similarity:.3f}"
            pictures.append((self.side_by_side([error.row, error.neighbour]), caption))
        return pictures

    def confusions(self) -> list[Picture]:
        """The classes that are most often taken for another one, and two pictures of both."""
        pictures = []
        for each in confusion_table(self.errors, self.run.test).head(NUM_SHOWN).itertuples():
            names = [each.class_name, each.neighbour_class]
            rows = [row for name in names for row in np.resize(np.flatnonzero(self.run.test.class_name == name), 2)]
            pictures.append((self.side_by_side(rows), f"{names[0]} → {names[1]}   {each.times} times"))
        return pictures

    def copies(self) -> list[Picture]:
        """Errors of which both images look the same: near copies under two class names, each pair once."""
        pairs = {}
        for error in self.errors.head(NUM_COMPARED).itertuples():
            rows = (error.row, error.neighbour)
            photos = [self.photo(row).resize((16, 16), Image.Resampling.BOX) for row in rows]
            first, second = (np.asarray(photo, np.float32) for photo in photos)
            if abs(first - second).mean() <= COPY_DIFFERENCE:
                pairs.setdefault(frozenset(rows), error.Index)
        return self.pairs(self.errors.loc[list(pairs.values())])

    def histograms(self):
        """A figure of the similarities to the own class and to others, with the thresholds."""
        with drawing():
            figure = new_figure(7, 3.5, dpi=100)
            axes = figure.subplots()
            for values, name in ((self.queries.own, "its own class"), (self.queries.other, "another class")):
                axes.hist(values[np.isfinite(values)], 60, alpha=0.55, label=f"of {name}")
            for far, line in zip(FARS, (":", "--", "-"), strict=True):
                threshold = threshold_at(self.queries, far)
                if threshold is not None:
                    axes.axvline(threshold, color="black", linestyle=line, label=f"threshold at {100 * far:g} %")
            axes.set(xlabel="similarity", ylabel="queries", title="Similarity of each query to the nearest image")
            axes.legend()
        return figure

    def recalls(self) -> pd.DataFrame:
        """Recall against the ensemble size, a row for each K and size: the longer table of train.py and evaluate.py."""
        suffix = SUFFIXES[self.searcher.embedding]
        files = [self.run.folder / f"{name}{suffix}.csv" for name in ("recall", "evaluation")]
        tables = [pd.read_csv(file) for file in files if file.exists()]
        table = max(tables, key=len, default=pd.DataFrame({"ensemble_size": []}))
        return table.melt("ensemble_size", list(table.filter(like="R@")), "K", "recall (%)")

    @functools.lru_cache(2)  # noqa: B019 - there is one, for as long as the page runs
    def map_points(self, method: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows of test.csv `(P,)` and their places `(P, 2)` on the map in pixels, by one of MAP_METHODS."""
        chosen = np.unique(np.linspace(0, len(self.run.test) - 1, MAX_POINTS).astype(int))
        rows = self.searcher.saved[torch.from_numpy(chosen)].cpu()
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
        image = Image.new("RGB", (MAP_SIZE, MAP_SIZE), "white")
        pen = ImageDraw.Draw(image)
        for row, (x, y) in zip(*self.map_points(method), strict=True):
            hue = self.run.test.label[row] * 222.5 % 360  # neighbours in number differ in colour
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=f"hsv({hue:.0f}, 80%, 85%)", outline="white")
        return image

    def at(self, method: str, x: float, y: float) -> Picture:
        """The photo that lies nearest to a place on the map."""
        chosen, places = self.map_points(method)
        row = chosen[np.argmin(((places - (x, y)) ** 2).sum(1))]
        return self.photo(row), f"test image {row}: {self.run.test.class_name[row]}"
