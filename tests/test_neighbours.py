"""figures/neighbours.py: the retrieval picture."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from builders import IMAGE_COLORS, random_embeddings, refused, save_image, write_colored_run
from PIL import Image

import retrieve
from dreml.cache import read_cache
from dreml.files import read_record, write_record
from dreml.images import ImageSpec
from dreml.neighbours import (
    DPI,
    PICTURE_STYLE,
    PITCH,
    Thumbnails,
    draw_neighbours,
    neighbours_figure,
    shortened,
    tile_corner,
)
from dreml.runs import read_run
from dreml.search import Answer, Item, Neighbour, test_item
from dreml.style import drawing

GREEN, RED, GREY, WHITE = "#1a9641", "#d7191c", "#999999", "#ffffff"


def answer(query: Item, items: list[Item], similarities: list[float], threshold: float | None = None) -> Answer:
    """The answer that these items are, right where they are of the query's class."""
    neighbours = []
    for item, similarity in zip(items, similarities, strict=True):
        right = None if None in (query.class_name, item.class_name) else query.class_name == item.class_name
        neighbours.append(Neighbour(*item[1:5], similarity, right, threshold is None or similarity >= threshold))
    return Answer(query, neighbours, threshold)


def test_images(run, folder: Path) -> list[Item]:
    return [test_item(run.test, folder, row) for row in range(len(run.test))]


test_images.__test__ = test_item.__test__ = False  # they are no tests


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def inside(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    """The mean colour of an image in the picture."""
    left, top = (round(DPI * inches) for inches in tile_corner(row, column))
    return picture[top + 5 : top + 145, left + 5 : left + 145].mean((0, 1))


def frame(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    """The pixels just around an image in the picture, `(n, 3)`."""
    left, top = (round(DPI * inches) for inches in tile_corner(row, column))
    sides = [picture[y, left : left + 150] for y in (top - 3, top + 152)]
    sides += [picture[top : top + 150, x] for x in (left - 3, left + 152)]
    return np.concatenate(sides).astype(int)


def share(pixels: np.ndarray, color: str) -> float:
    """How many of the pixels have about this colour."""
    wanted = [int(color[place : place + 2], 16) for place in (1, 3, 5)]
    return float((abs(pixels - wanted).max(1) < 60).mean())


def test_the_picture(tiny_run, tmp_path):
    """Two queries: the images in their places, a whole green frame for right ones, a dashed red one for wrong ones."""
    run = read_run(write_colored_run(tmp_path, tiny_run, random_embeddings(3)))
    items = test_images(run, tmp_path / "data" / "colors")
    found = [
        answer(items[query], [items[row] for row in rows], [0.5] * 5)
        for query, rows in ((0, [1, 7, 2, 9, 3]), (7, [8, 0, 1, 9, 11]))
    ]
    draw_neighbours(found, Thumbnails(run, tmp_path / "data"), "similarity: cosine", tmp_path, "picture")
    picture, seen = read(tmp_path / "picture.png"), set()
    for row, each in enumerate(found):
        np.testing.assert_allclose(inside(picture, row, 0), IMAGE_COLORS[each.query.row], atol=3)
        for column, item in enumerate(each, 1):
            np.testing.assert_allclose(inside(picture, row, column), IMAGE_COLORS[item.row], atol=3)
            pixels = frame(picture, row, column)
            seen.add(item.right)
            if item.right:
                assert share(pixels, GREEN) > 0.98
            else:
                assert 0.5 < share(pixels, RED) < 0.8 and 0.15 < share(pixels, WHITE) < 0.45
    assert seen == {True, False}


def test_the_frame_is_grey_where_the_class_is_not_known(tiny_run, tmp_path):
    run, photo = read_run(tiny_run), tmp_path / "photo.png"
    save_image(photo)
    item = Item(str(photo), str(photo), None, photo)
    found = [answer(item, [item, item._replace(class_name="cat")], [1.0, 0.5])]
    draw_neighbours(found, Thumbnails(run, tmp_path), "similarity: cosine", tmp_path, "picture")
    picture = read(tmp_path / "picture.png")
    for column in (1, 2):
        pixels = frame(picture, 0, column)
        assert share(pixels, GREEN) == share(pixels, RED) == 0 and share(pixels, GREY) + share(pixels, WHITE) > 0.98


def test_captions():
    """Rank, mark and similarity, then the class, or the file where there is none; nothing wider than its image."""
    item = Item("test:3", "a.png", "x" * 99 + "end", Path("a.png"), 3)
    others = [item._replace(class_name=name) for name in (item.class_name, "o\nther", None)]
    found = [answer(item, others, [0.9876, 0.5, -0.25])]

    class BlackThumbnails:
        def pixels(self, item):
            return np.zeros((2, 2, 3), np.uint8)

    with drawing(PICTURE_STYLE):
        figure = neighbours_figure(found, BlackThumbnails(), "similarity: cosine")
        texts = figure.axes[0].texts
        widths = [text.get_window_extent().width / figure.dpi for text in texts[:-1]]
    words = [text.get_text() for text in texts]
    assert words[2::2][:3] == ["1   ✓   0.988", "2   ✗   0.500", "3   –   -0.250"]
    assert words[0] == "test:3" and words[5] == "o□ther" and words[7] == "a.png"
    assert re.fullmatch("x+…x+end", words[1]) and words[1] == words[3]
    assert max(widths) < PITCH[0] and max(widths) > 0.9
    assert words[-1].replace("\n", " ") == (
        "green ✓: the query's class, dashed red ✗: another class, grey: class not known; similarity: cosine"
    )


def test_below_the_threshold_a_neighbour_is_faded_and_grey(tiny_run, tmp_path):
    """Whether it is right or wrong; the legend says so, and only what occurs."""
    run = read_run(write_colored_run(tmp_path, tiny_run, random_embeddings(3)))
    items = test_images(run, tmp_path / "data" / "colors")
    found = [answer(items[0], [items[row] for row in (1, 2, 7)], [0.5, 0.4, 0.3], 0.5)]
    with drawing(PICTURE_STYLE):
        figure = neighbours_figure(found, Thumbnails(run, tmp_path / "data"), "cosine")
    figure.savefig(tmp_path / "picture.png")
    picture, texts = read(tmp_path / "picture.png"), figure.axes[0].texts
    assert share(frame(picture, 0, 1), GREEN) > 0.98
    np.testing.assert_allclose(inside(picture, 0, 1), IMAGE_COLORS[1], atol=3)
    for column, row in ((2, 2), (3, 7)):
        pixels = frame(picture, 0, column)
        assert share(pixels, GREEN) == share(pixels, RED) == 0 and share(pixels, WHITE) > 0.3
        np.testing.assert_allclose(inside(picture, 0, column), 255 - 0.35 * (255.0 - IMAGE_COLORS[row]), atol=3)
    assert [text.get_text() for text in texts[2:-1:2]] == [
        "1   ✓   0.500",
        "2   not found   0.400",
        "3   not found   0.300",
    ]
    assert [text.get_color() for text in texts[2:-1]] == ["black"] * 2 + [GREY] * 4
    legend = texts[-1].get_text().replace("\n", " ")
    assert legend == "green ✓: the query's class, dotted grey: not found, below 0.500; cosine"


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [("short", 5, "short"), ("abcdefgh", 5, "ab…gh"), ("abcdefgh", 4, "ab…h"), ("ab", 1, "…"), ("abcd", 2, "a…")],
)
def test_shortened(text, width, expected):
    assert shortened(text, lambda shorter: len(shorter) <= width) == expected


def test_test_images_come_from_the_cache_where_the_files_are_gone(tiny_run, tiny_data, tmp_path, capsys):
    """The cache of this very run, or none: then one line says what is missing, after the CSV is written."""
    data, table = tmp_path / "data", tmp_path / "out" / "neighbours.csv"
    shutil.copytree(tiny_data / "tiny" / "cache_32", data / "tiny" / "cache_32")
    arguments = [tiny_run, "--query", "test:20", "--top", "2", "--output", tmp_path / "out", "--data_path", data]
    assert retrieve.main([str(argument) for argument in arguments]) == 0
    test = pd.read_csv(tiny_run / "test.csv").path.tolist()
    cached = read_cache(data, "tiny", ImageSpec(32)).array("test_images")
    picture = read(table.with_suffix(".png"))
    for column, row in enumerate([20, *(test.index(path) for path in pd.read_csv(table).path)]):
        np.testing.assert_allclose(inside(picture, 0, column), cached[row].mean((0, 1)), atol=6)

    (data / "tiny" / "cache_32" / "meta.json").unlink()
    table.unlink()
    message = refused(capsys, retrieve, *arguments)
    assert f"no picture: {data / 'tiny' / test[20]} is missing (see --data_path), and no cache" in message
    assert table.exists()
    meta = read_record(tiny_data / "tiny" / "cache_32" / "meta.json")
    write_record(data / "tiny" / "cache_32" / "meta.json", meta | {"mean": [0.5, 0.5, 0.5]})
    assert "is not the cache of this run" in refused(capsys, retrieve, *arguments)


def test_the_picture_shows_what_the_network_sees(tiny_run, tiny_data, tmp_path):
    """The centre crop of a photo that is black but for its white middle, or, for squash, all of it."""
    photo = tmp_path / "photo.png"
    image = Image.new("RGB", (300, 100))
    image.paste((255, 255, 255), (100, 0, 200, 100))
    image.save(photo)
    item, run = Item("", "", None, photo), read_run(tiny_run)
    for resize, expected in (("crop", 255), ("squash", 85)):
        run.record.settings = dataclasses.replace(run.settings, resize=resize)
        pixels = Thumbnails(run, tiny_data).pixels(item)
        assert pixels.shape == (150, 150, 3) and pixels.mean() == pytest.approx(expected, abs=2)
