"""How curves look, fonts, and saving a figure (frames of the retrieval picture: neighbours.py).

matplotlib is imported only where something is drawn.
"""

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dreml.cli import InputError
from dreml.files import atomic_open

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN_WIDTH = 3.4  # inches: one of two columns of a page
# Told apart by the colour-blind, and by line and marker without any colour.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito
LINES, MARKERS = ["-", "--", "-.", ":"], ["o", "s", "^", "D", "v", "P", "X"]
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


def check_matplotlib() -> None:
    """Raises InputError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("drawing needs matplotlib: pip install -r requirements.txt")


@contextlib.contextmanager
def drawing(style: dict | None = None) -> Iterator[None]:
    """matplotlib's settings while a figure is made and saved.

    A character that no font has becomes a box, and matplotlib warns of it once.
    """
    import matplotlib
    from matplotlib import font_manager

    installed = font_manager.get_font_names()
    families = ["DejaVu Sans", *(name for name in WIDE_FONTS if name in installed)]
    with matplotlib.rc_context({"font.family": families, **STYLE, **(style or {})}), warnings.catch_warnings():
        warnings.filterwarnings("module", "Glyph .* missing from")  # `text_measure` and `save_figure` both warn
        yield


def printable(text: str) -> str:
    """A name with boxes in place of its line breaks and other control characters."""
    return "".join(character if character.isprintable() else "□" for character in text)


def text_measure(figure: "Figure", font_size: float) -> Callable[[str], float]:
    """A function that tells how many inches wide a line of text will be in this figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.font_manager import FontProperties

    renderer, font = FigureCanvasAgg(figure).get_renderer(), FontProperties(size=font_size)
    return lambda text: renderer.get_text_width_height_descent(text, font, False)[0] / figure.dpi


def new_figure(height: float) -> "Figure":
    """A figure for one column, `height` inches; its layout keeps texts apart."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and picks a window system

    return Figure((COLUMN_WIDTH, height), layout="constrained")


def save_figure(figure: "Figure", folder: Path, name: str, suffixes: Sequence[str] = ("png", "svg")) -> None:
    """Writes NAME.png and NAME.svg."""
    for suffix in suffixes:
        with atomic_open(folder / f"{name}.{suffix}", "wb") as file:
            figure.savefig(file, format=suffix, metadata={"Date": None} if suffix == "svg" else None)


def line_style(number: int, num_points: int) -> dict:
    """Colour, line and marker of the curve with this number; about ten markers on a long curve."""
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markevery": max(1, -(-num_points // 12)),
    }
