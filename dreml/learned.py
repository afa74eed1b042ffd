"""What a run has learned, from the embedding of its test images: its errors, its classes, a map; as pictures."""

import functools
import importlib.util
from collections.abc import Iterable
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch
from PIL import Image

from dreml.cli import InputError
from dreml.figures import Thumbnails, drawing, new_figure
from dreml.runs import SUFFIXES
from dreml.search import Item, Neighbour, Searcher
from dreml.thresholds import FARS, threshold_at
from utils import best_similarities

SIDE = 150  # pixels of a thumbnail
GREEN = "#1a9641"
RED = "#d7191c"
GREY = "#bbbbbb"
NUM_SHOWN = 24  # pairs of each kind
NUM_COMPARED = 500  # confident errors among which near copies are looked for
COPY_DIFFERENCE = 6  # mean difference of near copies at 16 x 16 pixels, in 0..255
MAX_POINTS = 2000  # of the map
MAP_SIZE = 700  # pixels
Pictures = list[tuple[Image.Image, str]]  # each with its caption


class Learned:
    """What the embedding of the test images says. Its methods run when the page is looked at first."""

    def __init__(self, searcher: Searcher):
        self.searcher = searcher
        self.run = searcher.run
        split = self.run.split
        masks = {"is_query": split.is_query, "is_gallery": split.is_gallery}
        others, own = best_similarities(searcher.saved, split.labels, **masks)
        self.others = others[-1]  # (queries,), similarity to the nearest image of another class
        self.own = own[-1]  # and of the own class
        self.thumbnails = Thumbnails(self.run, searcher.data_path)

    @functools.lru_cache(4096)  # noqa: B019 - there is one, for as long as the page runs
    def photo(self, item: Item | Neighbour) -> Image.Image:
        """An image as a small square. Grey if it cannot be read."""
        try:
            return Image.fromarray(self.thumbnails.pixels(item))
        except InputError:
            return Image.new("RGB", (SIDE, SIDE), GREY)

    def side_by_side(self, rows: Iterable[int]) -> Image.Image:
        """Test images in a row, and below them a place for the caption."""
        photos = [self.photo(self.searcher.item(self.searcher.test, row)) for row in rows]
        picture = Image.new("RGB", (len(photos) * (SIDE + 4), SIDE + 28), "white")
        for place, photo in enumerate(photos):
            picture.paste(photo, (place * (SIDE + 4), 0))
        return picture

    def pairs(self, errors: pd.DataFrame) -> Pictures:
        """Some of the searcher's errors: each query and its neighbour."""
        return [
            (
                self.side_by_side([each.row, each.neighbour]),
                f"{each.class_name} | {each.neighbour_class}   {each.similarity:.3f}",
            )
            for each in errors.itertuples()
        ]

    def confident_errors(self) -> Pictures:
        """The errors that are most similar to their neighbours."""
        return self.pairs(self.searcher.confident_errors.head(NUM_SHOWN))

    def classes(self) -> pd.DataFrame:
        """R@1 of each class in percent, worst first."""
        table = self.searcher.test_queries.groupby("class_name").right.agg(["mean", "size"]).reset_index()
        table["mean"] = (100 * table["mean"]).round(2)
        table.columns = ["class", "R@1 (%)", "queries"]
        return table.sort_values(["R@1 (%)", "class"])

    def confusions(self) -> Pictures:
        """The pairs of classes that are most often taken for each other, with two pictures of each class."""
        names = self.searcher.confident_errors[["class_name", "neighbour_class"]]
        pairs = pd.Series([tuple(sorted(pair)) for pair in names.to_numpy()], dtype=object)
        pictures = []
        for (first, second), times in pairs.value_counts().head(NUM_SHOWN).items():
            rows = [row for name in (first, second) for row in np.flatnonzero(self.run.test.class_name == name)[:2]]
            pictures.append((self.side_by_side(rows), f"{first} | {second}   {times} times"))
        return pictures

    def copies(self) -> Pictures:
        """Errors of which both images look the same: near copies under two class names, each pair once."""
        errors = self.searcher.confident_errors.head(NUM_COMPARED)
        pairs = [tuple(sorted(pair)) for pair in errors[["row", "neighbour"]].to_numpy()]
        errors = errors[~pd.Series(pairs, index=errors.index, dtype=object).duplicated()]

        def look_the_same(error: pd.Series) -> bool:
            items = [self.searcher.item(self.searcher.test, row) for row in (error.row, error.neighbour)]
            small = [self.photo(item).resize((16, 16), Image.Resampling.BOX) for item in items]
            first, second = (np.asarray(image, np.float32) for image in small)
            return bool(np.abs(first - second).mean() <= COPY_DIFFERENCE)

        are_copies = [look_the_same(error) for error in errors.itertuples()]
        return self.pairs(errors[are_copies].head(NUM_SHOWN))

    def histograms(self):
        """A figure of the similarities to the own class and to others, with the thresholds."""
        with drawing():
            figure = new_figure(7, 3.5)
            figure.dpi = 100
            axes = figure.subplots()
            for values, color, name in ((self.own, GREEN, "its own class"), (self.others, RED, "another class")):
                axes.hist(values[torch.isfinite(values)].numpy(), 60, alpha=0.55, color=color, label=f"of {name}")
            for far, line in zip(FARS, (":", "--", "-"), strict=True):
                threshold = threshold_at(self.others, far)
                if threshold is not None:
                    axes.axvline(threshold, color="black", linestyle=line, label=f"threshold at {100 * far:g} %")
            axes.set(xlabel="similarity", ylabel="queries", title="Similarity of each query to the nearest image")
            axes.legend()
        return figure

    def recalls(self) -> pd.DataFrame:
        """Recall against the ensemble size, from recall.csv or recall_pooled.csv: a row for each K and size."""
        path = self.run.folder / f"recall{SUFFIXES[self.searcher.embedding]}.csv"
        table = pd.read_csv(path) if path.exists() else pd.DataFrame({"ensemble_size": []})
        return table.melt("ensemble_size", list(table.filter(like="R@")), "K", "recall (%)")

    def settings(self) -> pd.DataFrame:
        """The run's settings, and its ensemble size."""
        values = asdict(self.run.settings) | {"ensemble_size": self.run.num_members}
        return pd.DataFrame({"setting": list(values), "value": [str(value) for value in values.values()]})

    @functools.lru_cache(2)  # noqa: B019 - as above
    def map_points(self, method: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows of test.csv `(P,)` and their places `(P, 2)` on the map in pixels, by "PCA" or "t-SNE"."""
        saved = self.searcher.saved.cpu()
        chosen = np.unique(np.linspace(0, len(saved) - 1, MAX_POINTS).astype(int))
        rows = saved[torch.from_numpy(chosen)]
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
        with drawing():
            figure = new_figure(MAP_SIZE / 100, MAP_SIZE / 100, layout=None)
            figure.dpi = 100
            axes = figure.add_axes((0, 0, 1, 1), xlim=(0, MAP_SIZE), ylim=(MAP_SIZE, 0))
            axes.set_axis_off()
            axes.scatter(places[:, 0], places[:, 1], s=14, c=colors, cmap="hsv", alpha=0.8, linewidths=0)
            figure.canvas.draw()
        return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")

    def at(self, method: str, x: float, y: float) -> tuple[Image.Image, str]:
        """The photo that lies nearest to a place on the map, and its caption."""
        chosen, places = self.map_points(method)
        row = int(chosen[np.argmin(((places - (x, y)) ** 2).sum(1))])
        item = self.searcher.item(self.searcher.test, row)
        return self.photo(item), f"test image {row}: {item.class_name}"


def map_methods() -> list[str]:
    """How the map can be made here."""
    return ["PCA", "t-SNE"] if importlib.util.find_spec("sklearn") else ["PCA"]
