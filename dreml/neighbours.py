"""The retrieval picture: each row a query and its neighbours."""

import functools
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dreml.cache import Cache
from dreml.cli import InputError
from dreml.images import BadImage, ImageSpec, read_test_image, resize_test
from dreml.runs import Run
from dreml.search import Answer, Item, Neighbour
from dreml.style import drawing, printable, save_figure, text_measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
TILE, QUERY_GAP = 1.0, 0.2  # inches: side of an image; more space after the query
PITCH = (TILE + 0.2, TILE + 0.42)  # from one image to the next, right and down
MARGIN, FONT_SIZE = 0.12, 6.5  # inches, points
PICTURE_STYLE = {"font.size": FONT_SIZE, "figure.dpi": DPI, "savefig.dpi": DPI}
MARKS = {True: "✓", False: "✗", None: "–"}  # whether a neighbour is of the query's class
QUERY_FRAME = {"edgecolor": "black", "linewidth": 0.8}
FRAMES = {
    True: {"edgecolor": "#1a9641", "linewidth": 2.6},
    False: {"edgecolor": "#d7191c", "linewidth": 2.6, "linestyle": (0, (2.2, 1.1))},
    None: {"edgecolor": "#999999", "linewidth": 1.2},
}
NOT_FOUND, FADED = {"edgecolor": "#999999", "linewidth": 1.2, "linestyle": (0, (1, 1.5))}, 0.35  # below the threshold
MEANINGS = {True: "green ✓: the query's class", False: "dashed red ✗: another class", None: "grey: class not known"}


class NoPictures(InputError):
    """The test images are not there: neither their files nor the cache of this run."""


@dataclass
class Thumbnails:
    """Small pictures as the network sees them. A test image whose file is gone comes from the run's cache."""

    run: Run
    data_path: Path

    @functools.cached_property
    def cache(self) -> Cache:
        """The cache of this very run. Raises InputError if it is not there."""
        return self.run.read_cache(self.data_path)

    def pixels(self, item: Item | Neighbour) -> np.ndarray:
        """`(S, S, 3) uint8`, S pixels for a tile. Raises InputError for a bad image, NoPictures if there is none."""
        spec = ImageSpec(round(TILE * DPI), self.run.settings.resize)
        if item.file.exists() or item.row is None:
            try:
                return read_test_image(item.file, spec)
            except BadImage as error:
                raise InputError(f"no picture: {error}") from None
        name = self.run.settings.data_name
        if not (self.data_path / name).is_dir():
            raise NoPictures(f"no picture: the images of {name} are not in {self.data_path}/ (see --data_path)")
        try:
            image = Image.fromarray(self.cache.array("test_images")[item.row])
        except InputError as error:
            raise NoPictures(f"no picture: {item.file} is missing (see --data_path), and {error}") from None
        return resize_test(image, spec)


def draw_neighbours(found: list[Answer], thumbnails: Thumbnails, title: str, folder: Path, name: str) -> None:
    """Writes NAME.png."""
    with drawing(PICTURE_STYLE):
        save_figure(neighbours_figure(found, thumbnails, title), folder, name, ["png"])


def neighbours_figure(found: list[Answer], thumbnails: Thumbnails, title: str) -> "Figure":
    """Rows of images with frames and captions, and below them a line that says what the frames mean."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    last_left, last_top = tile_corner(len(found) - 1, max(len(each.neighbours) for each in found))
    width = last_left + TILE + MARGIN
    legend = textwrap.fill(f"{legend_text(found)}; {title}", round(19 * width))
    height = last_top + PITCH[1] + 0.13 * (legend.count("\n") + 1) + MARGIN
    figure = Figure((width, height))
    axes = figure.add_axes((0, 0, 1, 1))  # its coordinates are inches from the top left corner
    axes.set_axis_off()
    width_of = text_measure(figure, FONT_SIZE)

    def fits(text: str) -> bool:
        return width_of(text) <= PITCH[0] - 0.08

    def put(row: int, column: int, item: Item | Neighbour, frame: dict, captions: list[str]) -> None:
        left, top = tile_corner(row, column)
        look = {"alpha": FADED if frame is NOT_FOUND else 1}
        axes.imshow(thumbnails.pixels(item), extent=(left, left + TILE, top + TILE, top), **look)
        edge = frame["linewidth"] / 72 / 2  # the frame lies around the image: gaps in a dashed one are white
        axes.add_patch(Rectangle((left - edge, top - edge), TILE + 2 * edge, TILE + 2 * edge, fill=False, **frame))
        for line, caption in enumerate(captions):
            text = shortened(printable(caption), fits)
            look = {"color": "#999999" if frame is NOT_FOUND else "black", "ha": "center", "va": "baseline"}
            axes.text(left + TILE / 2, top + TILE + 0.15 + 0.13 * line, text, **look)

    for row, each in enumerate(found):
        put(row, 0, each.query, QUERY_FRAME, [each.query.caption, each.query.class_name or ""])
        for rank, item in enumerate(each, 1):
            second = item.class_name or item.file.name
            frame, mark = (FRAMES[item.right], MARKS[item.right]) if item.found else (NOT_FOUND, "not found")
            put(row, rank, item, frame, [f"{rank}   {mark}   {item.similarity:.3f}", second])
    axes.text(MARGIN, height - MARGIN, legend, va="bottom", color="#555555")
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


def tile_corner(row: int, column: int) -> tuple[float, float]:
    """(left, top) of an image in inches; column 0 is the query."""
    left, top = MARGIN + column * PITCH[0], MARGIN + row * PITCH[1]
    return (left + QUERY_GAP if column else left), top


def legend_text(found: list[Answer]) -> str:
    """What the frames that occur mean."""
    pairs = [(item.right, item.found) for each in found for item in each]
    texts = [meaning for right, meaning in MEANINGS.items() if (right, True) in pairs]
    if not all(passes for _, passes in pairs):
        texts.append(f"dotted grey: not found, below {found[0].threshold:.3f}")
    return ", ".join(texts)


def shortened(text: str, fits: Callable[[str], bool]) -> str:
    """The text, or as much of its beginning and end as fits with "…" between them."""
    if fits(text):
        return text
    shorter = (f"{text[: -(-kept // 2)]}…{text[len(text) - kept // 2 :]}" for kept in range(min(len(text), 99), 0, -1))
    return next(filter(fits, shorter), "…")
