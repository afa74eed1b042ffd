"""dreml/figures.py: curves show their tables, the retrieval picture, characters that fonts lack."""

import dataclasses
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from builders import IMAGE_COLORS, random_embeddings, refused, write_colored_run
from PIL import Image
from processes import ROOT

import retrieve
from dreml import figures
from dreml.cache import read_cache
from dreml.figures import DPI, drawing, tile_corner
from dreml.files import read_record, write_record
from dreml.images import ImageSpec
from dreml.runs import read_run
from dreml.search import Answer, Item

GREEN, RED, GREY, WHITE = (26, 150, 65), (215, 25, 28), (153, 153, 153), (255, 255, 255)


def drawn(text: str) -> np.ndarray:
    """A picture of the text, `(H, W) uint8`."""
    with drawing():
        figure = figures.new_figure(3.4, 1)
        figure.text(0.1, 0.5, text)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("L"))


def test_characters_that_dejavu_lacks(monkeypatch, recwarn):
    """They come from another font, here STIX, or are boxes and named once; a "$" is no formula."""
    monkeypatch.setattr(figures, "WIDE_FONTS", ("No Such Font", "STIXGeneral"))
    assert (drawn("$\\frac{$ é \u1d81") < 128).any() and not recwarn
    monkeypatch.setattr(figures, "WIDE_FONTS", ())
    with pytest.warns(UserWarning, match="missing from"):
        assert (drawn("猫") < 128).any()


SAVE_A_FIGURE = """
from pathlib import Path
import pandas as pd
from dreml.figures import draw_recall, drawing, save_figure
with drawing():
    sizes = pd.DataFrame({"ensemble_size": [1, 2], "R@1": [10.0, 20.0]})
    save_figure(draw_recall(sizes, sizes.rename(columns={"ensemble_size": "member"})), Path.cwd(), "figure")
"""


def test_figures_do_not_depend_on_the_settings_of_matplotlib(tmp_path, monkeypatch):
    """Neither on what is set already, nor on a backend that is not installed here, nor on a matplotlibrc in Latin-1."""
    import matplotlib

    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "matplotlibrc").write_text("font.size: 30  # é", encoding="latin-1")
    variables = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "no_such_backend", "MPLCONFIGDIR": str(tmp_path)}
    command = [sys.executable, "-c", SAVE_A_FIGURE]
    subprocess.run(command, cwd=tmp_path / "there", env=os.environ | variables, check=True)
    monkeypatch.chdir(tmp_path / "here")
    with matplotlib.rc_context({"font.size": 30, "savefig.bbox": "tight", "axes.facecolor": "red"}):
        exec(SAVE_A_FIGURE, {})
    for name in ("figure.png", "figure.svg"):
        assert Path(name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_the_curves_show_the_tables():
    sizes = pd.DataFrame({"ensemble_size": [1, 2, 3], "R@1": [10.0, 20, 30], "R@5": [40.0, 50, 60], "mAP@R": [1.0] * 3})
    alone = pd.DataFrame({"member": [1, 2, 3], "R@1": [10.0, 14, 12], "R@5": [0.0] * 3})
    baseline = pd.DataFrame({"baseline": ["a", "b"], "R@1": [7.0, 8], "R@5": [0.0, 0]})
    with drawing():
        axes = figures.draw_recall(sizes, alone, baseline).axes[0]
        others = figures.draw_recall(sizes, alone, baseline[["baseline", "R@5"]]).axes[0].lines
    lines = {line.get_label(): line for line in axes.lines}
    means = ["their mean, R@1 12.0 %", "a, R@1 7.0 %", "b, R@1 8.0 %"]
    assert list(lines) == ["R@1", "R@5", "each member alone, R@1", *means] and len(others) == 4
    assert lines["R@5"].get_xydata().tolist() == [[1, 40], [2, 50], [3, 60]]
    assert lines["each member alone, R@1"].get_xydata().tolist() == [[1, 10], [2, 14], [3, 12]]
    assert [lines[name].get_ydata()[0] for name in means] == [12, 7, 8]
    assert len({lines[name].get_linestyle() for name in means[1:]}) == 2
    styles = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines[:2]]
    assert all(first != second for first, second in zip(*styles, strict=True))
    assert axes.get_xlabel() == "ensemble size (members)" and axes.get_ylabel() == "Recall@K (%)"


@pytest.mark.parametrize(("size", "ticks"), [(1, [1]), (48, [1, 5, 10, 15, 20, 25, 30, 35, 40, 45])])
def test_small_and_large_ensembles_have_whole_numbers_at_the_axis(size, ticks):
    sizes = pd.DataFrame({"ensemble_size": range(1, size + 1), "R@1": np.linspace(30, 80, size)})
    with drawing():
        figure = figures.draw_recall(sizes, pd.DataFrame({"member": [1], "R@1": [30.0]}))
    assert figure.axes[0].get_xticks().tolist() == ticks


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def inside(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    """The mean colour of an image in the picture."""
    left, top = (round(DPI * inches) for inches in tile_corner(row, column))
    return picture[top + 5 : top + 145, left + 5 : left + 145].mean((0, 1))


def frame_shares(picture: np.ndarray, column: int) -> list[float]:
    """How many of the pixels around an image of the first row are green, red, grey, white, each 0 to 1."""
    left, top = (round(DPI * inches) for inches in tile_corner(0, column))
    sides = [picture[y, left : left + 150] for y in (top - 2, top + 151)]
    sides += [picture[top : top + 150, x] for x in (left - 2, left + 151)]
    pixels = np.concatenate(sides).astype(int)
    return [float((abs(pixels - color).max(1) < 60).mean()) for color in (GREEN, RED, GREY, WHITE)]


def test_the_picture(tiny_run, tmp_path, monkeypatch):
    """Images, frames and captions: right, wrong, of a class that is not known, not found. A second query below."""
    run = read_run(write_colored_run(tmp_path, tiny_run, random_embeddings(3)), None, "logits")
    folder = tmp_path / "data" / "colors"

    def found(row: int, name: str | None, similarity: float, right: bool | None) -> Item:
        file = folder / f"{row}.png"
        return Item(file.name, name, file, row, similarity=similarity, right=right, found=similarity >= 0.4)

    neighbours = [found(1, "ant", 0.9876, True), found(7, "bee", 0.5, False), found(2, None, 0.45, None)]
    neighbours += [found(3, "ant", 0.3, True), found(9, "bee", -0.25, False)]
    queries = [
        Item("0.png", "ant", folder / "0.png", 0, "test:0"),
        Item("8.png", None, folder / "8.png", name="x/8.png"),
    ]
    answers = [Answer(queries[0], neighbours, 0.4), Answer(queries[1], neighbours[:1], 0.4)]
    texts, save_figure = [], figures.save_figure

    def save(figure, *arguments):
        texts.extend(text.get_text() for text in figure.axes[0].texts)
        save_figure(figure, *arguments)

    monkeypatch.setattr(figures, "save_figure", save)
    searcher = SimpleNamespace(run=run, data_path=tmp_path / "data")
    figures.draw_neighbours(answers, searcher, tmp_path, "x")
    picture = read(tmp_path / "x.png")
    for place, row in (((0, 0), 0), ((0, 1), 1), ((0, 2), 7), ((0, 3), 2), ((1, 0), 8), ((1, 1), 1)):
        np.testing.assert_allclose(inside(picture, *place), IMAGE_COLORS[row], atol=3)
    for place, row in (((0, 4), 3), ((0, 5), 9)):  # faded
        np.testing.assert_allclose(inside(picture, *place), 255 - 0.35 * (255.0 - IMAGE_COLORS[row]), atol=3)
    assert len(picture) / DPI > tile_corner(2, 0)[1] + 0.26  # with two lines that say what the frames mean
    assert frame_shares(picture, 1)[0] > 0.98
    _, red, _, white = frame_shares(picture, 2)
    assert 0.5 < red < 0.8 and 0.15 < white < 0.45  # dashed
    for column in (3, 4, 5):
        green, red, grey, white = frame_shares(picture, column)
        assert green == red == 0 and grey > 0.2 and (white > 0.3) == (column > 3)  # not found: dotted
    lines = ["1   ✓   0.988\nant", "2   ✗   0.500\nbee", "3   –   0.450\n2.png"]
    lines += ["4   not found   0.300\nant", "5   not found   -0.250\nbee", "8.png\n", "1   ✓   0.988\nant"]
    assert texts[:-1] == ["test:0\nant", *lines]
    meanings = "green ✓: the query's class, dashed red ✗: another class, grey –: class not known"
    rest = "dotted grey: not found, below 0.400; similarity: cosine, mean of the ensemble (size 2)"
    assert texts[-1].replace("\n", " ") == f"{meanings}, {rest}"


def test_a_long_name_is_cut_in_its_middle():
    """So that it is about as wide as its image; control characters are boxes."""
    names = {
        "x" * 20: "x" * 20,
        "o\nther\x00": "o□ther□",
        "a" * 30 + "é": "aaaaa…aaaaé",
        "ab" * 20: "ababababa…babababab",
    }
    assert {name: figures.short(name) for name in names} == names
    with drawing():
        figure = figures.new_figure(2, 1, DPI, layout=None)
        for name in ("class_", "Ünï"):
            text = figure.text(0, 0, figures.short(name * 20), fontsize=figures.FONT_SIZE)
            assert 0.5 * DPI < text.get_window_extent().width < figures.PITCH[0] * DPI


def test_test_images_come_from_the_cache_where_the_files_are_gone(tiny_run, tiny_data, tmp_path, capsys):
    """The cache of this very run, or none: then one line says what is missing, after the CSV is written."""
    table, cache = tmp_path / "out" / "neighbours.csv", tmp_path / "data" / "tiny" / "cache_32"
    shutil.copytree(tiny_data / "tiny" / "cache_32", cache)
    arguments = [tiny_run, "--query", "test:20", "--top", "2", "--output", table.parent]
    arguments += ["--data_path", tmp_path / "data"]
    assert retrieve.main([str(argument) for argument in arguments]) == 0
    test = pd.read_csv(tiny_run / "test.csv").path.tolist()
    cached = read_cache(tmp_path / "data", "tiny", ImageSpec(32)).array("test_images")
    picture = read(table.with_suffix(".png"))
    for column, row in enumerate([20, *(test.index(path) for path in pd.read_csv(table).path)]):
        np.testing.assert_allclose(inside(picture, 0, column), cached[row].mean((0, 1)), atol=6)

    meta = read_record(cache / "meta.json")
    (cache / "meta.json").unlink()
    table.unlink()
    assert f"no picture: no cache: {cache / 'meta.json'} is missing" in refused(capsys, retrieve, *arguments)
    assert table.exists()
    write_record(cache / "meta.json", meta | {"mean": [0.5, 0.5, 0.5]})
    assert "is not the cache of this run" in refused(capsys, retrieve, *arguments)


def test_the_picture_shows_what_the_network_sees(tiny_run, tiny_data, tmp_path):
    """The centre crop of a photo that is black but for its white middle, or, for squash, all of it."""
    photo = tmp_path / "photo.png"
    image = Image.new("RGB", (300, 100))
    image.paste((255, 255, 255), (100, 0, 200, 100))
    image.save(photo)
    item, run = Item("", None, photo), read_run(tiny_run, None, "logits")
    for resize, expected in (("crop", 255), ("squash", 85)):
        run.record.settings = dataclasses.replace(run.settings, resize=resize)
        pixels = figures.thumbnail(SimpleNamespace(run=run, data_path=tiny_data), item)
        assert pixels.shape == (150, 150, 3) and pixels.mean() == pytest.approx(expected, abs=2)
