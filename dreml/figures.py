"""Figures: curves of a run, runs compared, and queries with their neighbours.

They look the same whatever the user's matplotlib is set to. Call the draw_ functions that return a figure inside
`drawing()`. matplotlib is imported only where something is drawn.
"""

import contextlib
import functools
import importlib.util
import itertools
import os
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from dreml.cache import Cache
from dreml.cli import InputError
from dreml.files import atomic_open
from dreml.images import BadImage, ImageSpec, read_pixels, resize_test
from dreml.runs import MemberRecord, Run
from dreml.search import Answer, Item, Neighbour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

COLUMN_WIDTH = 3.4  # inches: one of two columns of a page
# Told apart by the colour-blind, and by line and marker without any colour.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito
LINES = ["-", "--", "-.", ":"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
GREY = "#666666"
LEGEND = {"handlelength": 2.6, "columnspacing": 1.2}
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "figure.dpi": 300,
    "savefig.dpi": 300,
    "text.parse_math": False,  # a "$" in a name is a dollar
    "svg.hashsalt": "dreml",  # the same file each time
}
# For characters that DejaVu Sans, matplotlib's own font, lacks: those that are installed, in this order.
WIDE_FONTS = (
    "Noto Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Emoji",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Unifont",
    "Arial Unicode MS",  # macOS
    "Microsoft YaHei",  # Windows
    "Segoe UI Emoji",
)

# ------------------------------------------------------------------------------------------------ matplotlib


def check_matplotlib() -> None:
    """Raise InputError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("drawing needs matplotlib: pip install -r requirements.txt")


@contextlib.contextmanager
def drawing(style: dict | None = None) -> Iterator[None]:
    """Use our settings of matplotlib, not the user's, while a figure is made and saved.

    A character that no font has becomes a box, and matplotlib warns of it once.
    """
    (package,) = importlib.util.find_spec("matplotlib").submodule_search_locations
    # With the user's backend or matplotlibrc, the import itself may fail: one is not installed, the other not UTF-8.
    os.environ["MPLBACKEND"] = "agg"
    os.environ["MATPLOTLIBRC"] = f"{package}/mpl-data/matplotlibrc"
    import matplotlib
    from matplotlib import font_manager

    installed = font_manager.get_font_names()
    families = ["DejaVu Sans", *(name for name in WIDE_FONTS if name in installed)]
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # it may have been imported before, with the user's settings
        matplotlib.rcParams.update({"font.family": families, **STYLE, **(style or {})})
        warnings.filterwarnings("module", "Glyph .* missing from")  # measuring a text and drawing it both warn
        yield


def printable(text: str) -> str:
    """Name with boxes in place of its line breaks and other control characters."""
    return "".join(character if character.isprintable() else "□" for character in text)


def new_figure(width: float, height: float, layout: str | None = "constrained") -> "Figure":
    """Empty figure, in inches. Its layout keeps texts apart."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and picks a window system

    figure = Figure((width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", folder: Path, name: str, suffixes: Sequence[str] = ("png", "svg")) -> None:
    """Write NAME.png and NAME.svg."""
    for suffix in suffixes:
        with atomic_open(folder / f"{name}.{suffix}", "wb") as file:
            figure.savefig(file, format=suffix, metadata={"Date": None} if suffix == "svg" else None)


# ------------------------------------------------------------------------------------------------ curves


def draw_recall(sizes: pd.DataFrame, alone: pd.DataFrame, baseline: pd.DataFrame | None = None) -> "Figure":
    """Recall@K against the ensemble size; at the first K, each member alone and the baselines.

    The first two tables are those of evaluate.py, the third is `baseline.csv`.
    """
    figure = new_figure(COLUMN_WIDTH, 2.9)
    axes = figure.subplots()
    names = [name for name in sizes if name.startswith("R@")]
    first = names[0]
    curves = []
    for number, name in enumerate(names):
        curves += axes.plot(sizes.ensemble_size, sizes[name], label=name, **line_style(number, len(sizes)))
    dots = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": GREY, "zorder": 4}
    dots["markersize"] = 5.5 if len(alone) <= 16 else 3
    others = axes.plot(alone.member, alone[first], linestyle="", label=f"each member alone, {first}", **dots)
    levels = [("their mean", alone[first].mean(), (0, (1, 1)))]
    if baseline is not None and first in baseline:
        for row, line in zip(baseline.to_dict("records"), itertools.cycle(["--", "-."]), strict=False):
            levels.append((row["baseline"], row[first], line))
    for label, value, line in levels:
        label = f"{label}, {first} {value:.1f} %"
        others.append(axes.axhline(value, label=label, color=GREY, linestyle=line, linewidth=1))
    axes.set_ylabel("Recall@K (%)")
    set_size_axis(axes, len(sizes))
    figure.legend(handles=curves, loc="outside upper center", ncols=min(len(names), 4), **LEGEND)
    figure.legend(handles=others, loc="outside lower center", **LEGEND)
    return figure


def draw_found(curves: pd.DataFrame) -> "Figure":
    """Share of queries that find their class against the false-accept rate, for a few ensemble sizes.

    `curves` has the columns ensemble_size, far and found (percent).
    """
    figure = new_figure(COLUMN_WIDTH, 2.9)
    axes = figure.subplots()
    for number, (size, rows) in enumerate(curves.groupby("ensemble_size")):
        label = f"{size} members" if size > 1 else "1 member"
        axes.plot(100 * rows.far, rows.found, label=label, **line_style(number, len(rows)))
    axes.set_xscale("log")
    axes.set_xlabel("queries whose class is absent that are accepted (%)")
    axes.set_ylabel("queries that are found, and right (%)")
    axes.xaxis.set_major_formatter("{x:g}")
    if len(curves):
        figure.legend(loc="outside upper center", ncols=4, **LEGEND)
    return figure


def draw_training(records: list[MemberRecord]) -> "Figure":
    """Loss and accuracy of every epoch: all members and their mean."""
    figure = new_figure(COLUMN_WIDTH, 3.6)
    panels = figure.subplots(2, sharex=True)
    draw_histories(panels[0], records, "loss")
    draw_histories(panels[1], records, "accuracy")
    panels[0].set_ylabel("training loss (nats)")
    panels[1].set_ylabel("training accuracy (%)")
    panels[1].set_xlabel("epoch")
    panels[1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, **LEGEND)
    figure.align_ylabels()
    return figure


def draw_histories(axes: "Axes", records: list[MemberRecord], name: str) -> None:
    """Draw a column of the members' histories, the epoch that each member keeps, and the mean."""
    histories = [pd.DataFrame(record.history) for record in records]
    thin = {"color": COLORS[0], "linewidth": 0.7, "alpha": max(0.25, 1 / len(records) ** 0.5)}
    dot = {"color": COLORS[0], "marker": "o", "markersize": 3 if len(records) <= 16 else 2, "linestyle": ""}
    for record, history in zip(records, histories, strict=True):
        best = history.iloc[record.best_epoch]
        (line,) = axes.plot(history.epoch, history[name], **thin)
        (kept,) = axes.plot(best.epoch, best[name], **dot)
    line.set_label("a member")
    kept.set_label("epoch that is kept")
    if len(records) > 1:
        mean = pd.concat(histories).groupby("epoch")[name].mean()
        axes.plot(mean.index, mean, color=COLORS[1], linestyle="--", linewidth=1.5, label=f"mean of {len(records)}")


def line_style(number: int, num_points: int) -> dict:
    """Colour, line and marker of the curve with this number; about ten markers on a long curve."""
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markevery": max(1, -(-num_points // 12)),
    }


def set_size_axis(axes: "Axes", size: int) -> None:
    """Set the horizontal axis for the ensemble sizes 1 to `size`."""
    step = -(-size // 10)
    axes.set_xlabel("ensemble size (members)")
    axes.set_xticks(sorted({1, *range(step, size + 1, step)}))
    axes.set_xlim(0.8 - 0.03 * size, 0.2 + 1.03 * size)


# ------------------------------------------------------------------------------------------------ neighbours

MAX_ROWS = 40  # queries in the picture; the CSV has all
DPI = 150
TILE = 1.0  # inches: side of an image
QUERY_GAP = 0.2  # more space after the query
PITCH = (TILE + 0.2, TILE + 0.42)  # from one image to the next, right and down
MARGIN = 0.12
PICTURE_STYLE = {"font.size": 6.5, "figure.dpi": DPI, "savefig.dpi": DPI}
QUERY_FRAME = {"edgecolor": "black", "linewidth": 0.8}
# Whether a neighbour is of the query's class; None where that is not known.
MARKS = {True: "✓", False: "✗", None: "–"}
FRAMES = {
    True: {"edgecolor": "#1a9641", "linewidth": 2.6},
    False: {"edgecolor": "#d7191c", "linewidth": 2.6, "linestyle": (0, (2.2, 1.1))},
    None: {"edgecolor": "#999999", "linewidth": 1.2},
}
MEANINGS = {True: "green ✓: the query's class", False: "dashed red ✗: another class", None: "grey: class not known"}
NOT_FOUND = {"edgecolor": "#999999", "linewidth": 1.2, "linestyle": (0, (1, 1.5))}  # below the threshold


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
                return read_pixels(item.file, spec)
            except BadImage as error:
                gone = not item.file.exists()  # with refresh never, the photos need not be there
                raise (NoPictures if gone else InputError)(f"no picture: {error}") from None
        name = self.run.settings.data_name
        if not (self.data_path / name).is_dir():
            raise NoPictures(f"no picture: the images of {name} are not in {self.data_path}/ (see --data_path)")
        try:
            image = Image.fromarray(self.cache.array("test_images")[item.row])
        except InputError as error:
            raise NoPictures(f"no picture: {item.file} is missing (see --data_path), and {error}") from None
        return resize_test(image, spec)


def draw_neighbours(found: list[Answer], thumbnails: Thumbnails, title: str, folder: Path, name: str) -> None:
    """Write NAME.png: each row a query and its neighbours."""
    with drawing(PICTURE_STYLE):
        save_figure(neighbours_figure(found, thumbnails, title), folder, name, ["png"])


def neighbours_figure(found: list[Answer], thumbnails: Thumbnails, title: str) -> "Figure":
    """Rows of images with frames and captions, and below them a line that says what the frames mean."""
    last_left, last_top = tile_corner(len(found) - 1, max(len(each.neighbours) for each in found))
    width = last_left + TILE + MARGIN
    legend = textwrap.fill(f"{legend_text(found)}; {title}", round(19 * width))
    height = last_top + PITCH[1] + 0.13 * (legend.count("\n") + 1) + MARGIN
    figure = new_figure(width, height, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))  # its coordinates are inches from the top left corner
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    for row, each in enumerate(found):
        captions = [each.query.caption, each.query.class_name or ""]
        draw_tile(axes, tile_corner(row, 0), thumbnails.pixels(each.query), QUERY_FRAME, captions)
        for rank, neighbour in enumerate(each, 1):
            frame = FRAMES[neighbour.right] if neighbour.found else NOT_FOUND
            mark = MARKS[neighbour.right] if neighbour.found else "not found"
            captions = [f"{rank}   {mark}   {neighbour.similarity:.3f}", neighbour.class_name or neighbour.file.name]
            draw_tile(axes, tile_corner(row, rank), thumbnails.pixels(neighbour), frame, captions)
    axes.text(MARGIN, height - MARGIN, legend, va="bottom", color="#555555")
    return figure


def draw_tile(
    axes: "Axes", corner: tuple[float, float], pixels: np.ndarray, frame: dict, captions: Sequence[str]
) -> None:
    """Draw an image `(S, S, 3) uint8` in its frame, with a line below it for each caption. NOT_FOUND fades it."""
    from matplotlib.patches import Rectangle

    left, top = corner
    faded = frame is NOT_FOUND
    axes.imshow(pixels, extent=(left, left + TILE, top + TILE, top), alpha=0.35 if faded else 1)
    edge = frame["linewidth"] / 72 / 2  # the frame lies around the image: gaps in a dashed one are white
    axes.add_patch(Rectangle((left - edge, top - edge), TILE + 2 * edge, TILE + 2 * edge, fill=False, **frame))
    for line, caption in enumerate(captions):
        place = (left + TILE / 2, top + TILE + 0.15 + 0.13 * line)
        text = axes.text(*place, printable(caption), ha="center", color="#999999" if faded else "black")
        shorten(text, PITCH[0] - 0.08)


def tile_corner(row: int, column: int) -> tuple[float, float]:
    """(left, top) of an image in inches; column 0 is the query."""
    left = MARGIN + column * PITCH[0] + (QUERY_GAP if column else 0)
    return left, MARGIN + row * PITCH[1]


def legend_text(found: list[Answer]) -> str:
    """What the frames that occur mean."""
    pairs = [(neighbour.right, neighbour.found) for each in found for neighbour in each]
    texts = [meaning for right, meaning in MEANINGS.items() if (right, True) in pairs]
    if not all(is_found for _, is_found in pairs):
        texts.append(f"dotted grey: not found, below {found[0].threshold:.3f}")
    return ", ".join(texts)


def shorten(text: "Text", width: float) -> None:
    """Cut out the middle of a text in a figure until it is at most `width` inches wide."""
    whole = text.get_text()
    kept = min(len(whole), 99)
    while kept and text.get_window_extent().width > width * text.figure.dpi:
        kept -= 1
        text.set_text(f"{whole[: -(-kept // 2)]}…{whole[len(whole) - kept // 2 :]}")
