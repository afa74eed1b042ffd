"""Figures: curves of a run, and queries with their neighbours.

They look the same whatever the user's matplotlib is set to. Call the draw_ functions that return a figure inside
`drawing()`. matplotlib is imported only where something is drawn.
"""

import contextlib
import importlib.util
import os
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from dreml.cli import InputError
from dreml.files import atomic_open
from dreml.images import BadImage, ImageSpec, read_pixels, resize_test
from dreml.search import Answer, Item, Searcher

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN_WIDTH = 3.4  # inches: one of two columns of a page
# Told apart by the colour-blind, and by line and marker without any colour.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito
CURVES = {
    "color": COLORS * 4,
    "linestyle": ["-", "--", "-.", ":"] * 7,
    "marker": ["o", "s", "^", "D", "v", "P", "X"] * 4,
}
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
    "text.parse_math": False,  # a "$" in a name is a dollar
    "svg.hashsalt": "dreml",  # the same file each time
}
# Other fonts that are tried for characters that DejaVu Sans, matplotlib's own font, lacks.
WIDE_FONTS = ("Noto Sans CJK JP", "WenQuanYi Zen Hei", "Unifont", "Arial Unicode MS", "Microsoft YaHei")


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Use our settings of matplotlib, not the user's, while a figure is made and saved."""
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
        matplotlib.rcParams.update({"font.family": families, **STYLE})
        # A character that no font has becomes a box. Measuring a text and drawing it both warn of it.
        warnings.filterwarnings("module", "Glyph .* missing from")
        yield


def new_figure(width: float, height: float, dpi: int = 300, layout: str | None = "constrained") -> "Figure":
    """Empty figure, in inches. Its layout keeps texts apart."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and picks a window system

    return Figure((width, height), dpi=dpi, layout=layout)


def save_figure(figure: "Figure", folder: Path, name: str, suffixes: Sequence[str] = ("png", "svg")) -> None:
    """Write NAME.png and NAME.svg."""
    for suffix in suffixes:
        with atomic_open(folder / f"{name}.{suffix}", "wb") as file:
            figure.savefig(file, format=suffix, metadata={"Date": None} if suffix == "svg" else None)


def draw_recall(sizes: pd.DataFrame, alone: pd.DataFrame, baseline: pd.DataFrame | None = None) -> "Figure":
    """Recall@K against the ensemble size; at the first K, each member alone and the baselines.

    The first two tables are those of evaluate.py, the third is `baseline.csv`.
    """
    figure = new_figure(COLUMN_WIDTH, 2.9)
    axes = figure.subplots()
    axes.set_prop_cycle(**CURVES)
    size = len(sizes)
    names = [name for name in sizes if name.startswith("R@")]
    first = names[0]
    curves = []
    for name in names:
        curves += axes.plot(sizes.ensemble_size, sizes[name], label=name, markevery=-(-size // 12))
    dots = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": GREY, "zorder": 4}
    dots["markersize"] = 5.5 if len(alone) <= 16 else 3
    others = axes.plot(alone.member, alone[first], linestyle="", label=f"each member alone, {first}", **dots)
    levels = {"their mean": alone[first].mean()}
    if baseline is not None and first in baseline:
        levels |= dict(zip(baseline.baseline, baseline[first], strict=True))
    for (name, value), line in zip(levels.items(), ((0, (1, 1)), "--", "-."), strict=False):
        label = f"{name}, {first} {value:.1f} %"
        others.append(axes.axhline(value, label=label, color=GREY, linestyle=line, linewidth=1))
    axes.set_xlabel("ensemble size (members)")
    axes.set_ylabel("Recall@K (%)")
    step = -(-size // 10)
    axes.set_xticks(sorted({1, *range(step, size + 1, step)}))
    axes.set_xlim(0.8 - 0.03 * size, 0.2 + 1.03 * size)
    figure.legend(handles=curves, loc="outside upper center", ncols=min(len(names), 4), **LEGEND)
    figure.legend(handles=others, loc="outside lower center", **LEGEND)
    return figure


MAX_ROWS = 40  # queries in the picture; the CSV has all
DPI = 150
TILE = 1.0  # inches: side of an image
PITCH = (TILE + 0.2, TILE + 0.42)  # from one image to the next, right and down
MARGIN = 0.12
QUERY_GAP = 0.2  # more space after the query
FONT_SIZE = 6.5
QUERY_FRAME = {"edgecolor": "black", "linewidth": 0.8}
# Whether a neighbour is of the query's class; None where that is not known.
MARKS = {True: "✓", False: "✗", None: "–"}
FRAMES = {
    True: {"edgecolor": "#1a9641", "linewidth": 2.6},
    False: {"edgecolor": "#d7191c", "linewidth": 2.6, "linestyle": (0, (2.2, 1.1))},
    None: {"edgecolor": "#999999", "linewidth": 1.2},
}
NOT_FOUND = {"edgecolor": "#999999", "linewidth": 1.2, "linestyle": (0, (1, 1.5))}  # below the threshold
MEANINGS = "green ✓: the query's class, dashed red ✗: another class, grey –: class not known"


def thumbnail(searcher: Searcher, item: Item) -> np.ndarray:
    """An image as the network sees it, `(S, S, 3) uint8`, S pixels for a tile.

    A test image whose file is gone comes from the run's cache. Raises InputError where there is no image.
    """
    spec = ImageSpec(round(TILE * DPI), searcher.run.settings.resize)
    try:
        if item.row is None or item.file.exists():
            return read_pixels(item.file, spec)
        if not searcher.data_folder.is_dir():
            raise InputError(
                f"the images of {searcher.data_folder.name} are not in {searcher.data_path}/ (see --data_path)"
            )
        images = searcher.run.read_cache(searcher.data_path).array("test_images")
    except (BadImage, InputError) as error:
        raise InputError(f"no picture: {error}") from None
    return resize_test(Image.fromarray(images[item.row]), spec)


def draw_neighbours(answers: list[Answer], searcher: Searcher, folder: Path, name: str) -> None:
    """Write NAME.png: rows of a query and its neighbours, with frames and captions, and what the frames mean."""
    width = tile_corner(0, 1 + max(len(answer.neighbours) for answer in answers))[0]
    threshold = answers[0].threshold
    below = "" if threshold is None else f", dotted grey: not found, below {threshold:.3f}"
    similarity = f"similarity: cosine, mean of the ensemble (size {searcher.run.num_members})"
    legend = textwrap.fill(f"{MEANINGS}{below}; {similarity}", round(19 * width))
    height = PITCH[1] * len(answers) + 0.13 * (legend.count("\n") + 1) + 2 * MARGIN
    with drawing():
        figure = new_figure(width, height, DPI, layout=None)
        axes = figure.add_axes((0, 0, 1, 1))  # its coordinates are inches from the top left corner
        axes.set_axis_off()
        axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
        for row, answer in enumerate(answers):
            query = answer.query
            text = f"{short(Path(query.name).name)}\n{short(query.class_name or '')}"
            draw_tile(axes, tile_corner(row, 0), thumbnail(searcher, query), QUERY_FRAME, text)
            for rank, neighbour in enumerate(answer, 1):
                frame = FRAMES[neighbour.right] if neighbour.found else NOT_FOUND
                mark = MARKS[neighbour.right] if neighbour.found else "not found"
                caption = short(neighbour.class_name or neighbour.file.name)
                text = f"{rank}   {mark}   {neighbour.similarity:.3f}\n{caption}"
                draw_tile(axes, tile_corner(row, rank), thumbnail(searcher, neighbour), frame, text)
        axes.text(MARGIN, height - MARGIN, legend, va="bottom", color="#555555", fontsize=FONT_SIZE)
        save_figure(figure, folder, name, ["png"])


def draw_tile(axes: "Axes", corner: tuple[float, float], pixels: np.ndarray, frame: dict, text: str) -> None:
    """Draw an image `(S, S, 3) uint8` in its frame, and a text below it. NOT_FOUND fades both."""
    from matplotlib.patches import Rectangle

    left, top = corner
    is_faded = frame is NOT_FOUND
    axes.imshow(pixels, extent=(left, left + TILE, top + TILE, top), alpha=0.35 if is_faded else 1)
    edge = frame["linewidth"] / 72 / 2  # the frame lies around the image: gaps in a dashed one are white
    axes.add_patch(Rectangle((left - edge, top - edge), TILE + 2 * edge, TILE + 2 * edge, fill=False, **frame))
    color = "#999999" if is_faded else "black"
    axes.text(left + TILE / 2, top + TILE + 0.08, text, ha="center", va="top", color=color, fontsize=FONT_SIZE)


def tile_corner(row: int, column: int) -> tuple[float, float]:
    """(left, top) of an image in inches; column 0 is the query, which stands apart."""
    return MARGIN + column * PITCH[0] + QUERY_GAP * (column > 0), MARGIN + row * PITCH[1]


def short(name: str) -> str:
    """A name that fits below its image: boxes for control characters, an ellipsis in the middle of a long one."""
    name = "".join(character if character.isprintable() else "□" for character in name)
    kept = 9 if name.isascii() else 5  # at both ends; letters of other scripts may be twice as wide
    if len(name) <= 2 * kept + 2:
        return name
    return f"{name[:kept]}…{name[-kept:]}"
