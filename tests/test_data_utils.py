"""Raw layouts, pixels, the cache and its refusals."""

import hashlib
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import filelock
import numpy as np
import pytest
import scipy.io
import torch
import torchvision.transforms.functional as TF
from conftest import (
    SHARED,
    jpeg_bytes,
    random_image,
    save_image,
    write_car,
    write_car_annotations,
    write_car_devkit,
    write_csv,
    write_cub,
    write_image_folder,
    write_isc,
    write_sop,
)
from PIL import Image

import data_utils
from data_utils import draw_demo, list_data_set, load_rgb, read_cache, resize_test, resize_train
from utils import read_record, write_record

SIZE = 32


def build(data: Path, *options: str) -> int:
    return data_utils.main(["--data_path", str(data), "--image_size", str(SIZE), "--num_workers", "2", *options])


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder and its checksum, lock files aside."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ------------------------------------------------------------------------------------------------ pixels


def odd_images(folder: Path) -> dict[str, np.ndarray]:
    """Writes one file of every kind and returns the RGB pixels that it should load as, made without `load_rgb`."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    rgb = np.asarray(random_image(1, 57, 91))
    expected = {}

    def add(name: str, image: Image.Image, pixels: np.ndarray, **kwargs):
        image.save(folder / name, **kwargs)
        expected[name] = pixels

    add("portrait.png", Image.fromarray(rgb), rgb)
    add("landscape.bmp", Image.fromarray(rgb.transpose(1, 0, 2)), rgb.transpose(1, 0, 2))
    add("exact.png", random_image(2, 32, 35), np.asarray(random_image(2, 32, 35)))
    add("small.tiff", random_image(3, 7, 5), np.asarray(random_image(3, 7, 5)))
    grey = rgb[..., 0]
    add("grey.png", Image.fromarray(grey), np.stack([grey] * 3, axis=-1))
    deep = generator.integers(0, 65536, (61, 45), dtype=np.uint16)
    deep[0, :4] = (0, 255, 257, 65535)
    scaled = np.stack([np.round(deep / 257).astype(np.uint8)] * 3, axis=-1)
    add("deep.png", Image.fromarray(deep), scaled)
    add("deep.tif", Image.fromarray(deep), scaled)
    alpha = np.dstack([rgb, generator.integers(0, 256, rgb.shape[:2], dtype=np.uint8)])
    add("alpha.WEBP", Image.fromarray(alpha), rgb, lossless=True, exact=True)
    colours = generator.integers(0, 256, (16, 3), dtype=np.uint8)
    indices = generator.integers(0, 16, (40, 50), dtype=np.uint8)
    palette = Image.new("P", (50, 40))
    palette.putdata(indices.ravel().tolist())
    palette.putpalette(colours.ravel().tolist())
    add("palette.png", palette, colours[indices])
    add("palette.gif", palette, colours[indices])
    cmyk = Image.fromarray(rgb).convert("CMYK")
    add("cmyk.tif", cmyk, 255 - np.asarray(cmyk)[..., :3])  # Pillow's CMYK has no black: the colours are complements
    for orientation, turned in {  # what the viewer should see, from the stored pixels `rgb`
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.transpose(1, 0, 2),
        6: np.rot90(rgb, -1),
        7: np.rot90(rgb, 2).transpose(1, 0, 2),
        8: np.rot90(rgb),
    }.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        add(f"rotated_{orientation}.png", Image.fromarray(rgb), turned, exif=exif)
    return expected


@pytest.mark.parametrize(("image_size", "shorter"), [(256, 281), (128, 140), (32, 35)])
def test_train_size(image_size, shorter):
    assert data_utils.train_size(image_size) == shorter


def test_load_rgb(tmp_path):
    for name, pixels in odd_images(tmp_path / "odd").items():
        image = load_rgb(tmp_path / "odd" / name)
        assert image.mode == "RGB", name
        np.testing.assert_array_equal(np.asarray(image), pixels, err_msg=name)


def test_load_rgb_applies_the_orientation_of_a_jpeg(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    random_image(0, 50, 30).save(tmp_path / "a.jpg", exif=exif)
    random_image(0, 50, 30).save(tmp_path / "b.jpg")
    upright = np.asarray(Image.open(tmp_path / "b.jpg"))
    np.testing.assert_array_equal(np.asarray(load_rgb(tmp_path / "a.jpg")), np.rot90(upright, -1))


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("size", [SIZE, 33])
def test_cache_equals_the_torchvision_pipeline(tmp_path, size, resize):
    odd_images(tmp_path / "odd")
    for split in ("train", "test"):
        for path in (tmp_path / "odd").iterdir():
            folder = tmp_path / "data" / "mine" / split / f"class_{path.stem[0]}"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder)
    options = ["--data_path", str(tmp_path / "data"), "--image_size", str(size), "--resize", resize]
    assert data_utils.main(options) == 0
    cache = read_cache(tmp_path / "data", "mine", size, resize)
    larger, smaller = ([side, side] if resize == "squash" else side for side in (int(1.1 * size), size))

    pixels, offsets, sizes = (cache.array(f"train_{name}") for name in ("pixels", "offsets", "sizes"))
    assert len(cache.meta["train"]["paths"]) == len(sizes) == 18 and offsets[-1] == len(pixels)
    for number, path in enumerate(cache.meta["train"]["paths"]):
        image = load_rgb(tmp_path / "data" / "mine" / path)
        expected = np.asarray(TF.resize(image, larger))
        cached = pixels[offsets[number] : offsets[number + 1]].reshape(*sizes[number], 3)
        np.testing.assert_array_equal(cached, expected, err_msg=path)
        np.testing.assert_array_equal(resize_train(image, size, resize), expected, err_msg=path)
    assert cache.array("test_images").shape == (18, size, size, 3)
    for number, path in enumerate(cache.meta["test"]["paths"]):
        image = load_rgb(tmp_path / "data" / "mine" / path)
        expected = np.asarray(TF.center_crop(TF.resize(image, smaller), size))
        np.testing.assert_array_equal(cache.array("test_images")[number], expected, err_msg=path)
        np.testing.assert_array_equal(resize_test(image, size, resize), expected, err_msg=path)


def test_squash_keeps_both_ends_of_a_wide_image_and_crop_does_not():
    stripes = Image.new("RGB", (120, 40), "green")
    stripes.paste("red", (0, 0, 30, 40))
    stripes.paste("blue", (90, 0, 120, 40))
    red, blue = ([255, 0, 0], [0, 0, 255])
    squashed = resize_test(stripes, SIZE, "squash")
    assert (squashed[:, 0] == red).all() and (squashed[:, -1] == blue).all()
    assert not (resize_test(stripes, SIZE)[..., [0, 2]] > 0).any()
    with pytest.raises(ValueError, match="resize has to be one of crop, squash, not 'pad'"):
        resize_test(stripes, SIZE, "pad")


def test_both_caches_of_a_data_set_lie_beside_each_other(tmp_path, capsys):
    """And --verify, the summary and the refusals speak of the one that is asked for."""
    write_image_folder(tmp_path / "mine")
    random_image(0, 1, 14_000).save(tmp_path / "mine/train/train_0/0.png")  # too large for the crop
    assert build(tmp_path, "--resize", "squash") == 0
    folder = tmp_path / "mine" / "cache_32_squash"
    with pytest.raises(data_utils.InputError, match=r"cache_32/meta\.json is missing"):
        read_cache(tmp_path, "mine", SIZE)
    random_image(0).save(tmp_path / "mine/train/train_0/0.png")
    before = tree(folder)
    assert build(tmp_path) == 0
    assert tree(folder) == before
    crop, squash = read_cache(tmp_path, "mine", SIZE), read_cache(tmp_path, "mine", SIZE, "squash")
    assert [cache.meta["resize"] for cache in (crop, squash)] == ["crop", "squash"]
    assert (squash.array("train_sizes") == 35).all() and (crop.array("train_sizes") != 35).any()

    content = bytearray((folder / "test_images.npy").read_bytes())
    content[-5] ^= 1
    (folder / "test_images.npy").write_bytes(content)
    assert build(tmp_path, "--verify") == 0
    capsys.readouterr()
    assert build(tmp_path, "--verify", "--resize", "squash") == 2
    remedy = f"python data_utils.py --data_name mine --data_path {tmp_path} --image_size 32 --resize squash"
    assert f"damaged: test_images; make it again with: {remedy} --force\n" in capsys.readouterr().err
    shutil.rmtree(folder)
    assert build(tmp_path, "--verify", "--resize", "squash") == 2
    assert f"no cache_32_squash found in {tmp_path}/" in capsys.readouterr().err
    crop.folder.rename(folder)  # of other settings than its name says
    with pytest.raises(data_utils.InputError, match=f"other settings; make it with: {re.escape(remedy)}$"):
        read_cache(tmp_path, "mine", SIZE, "squash")


def test_crops_are_windows_of_the_cached_image(tiny_data):
    cache = read_cache(tiny_data, "tiny", SIZE)
    corners, sides = np.array([[0, 0], [3, 1], [0, 3], [10, 14]]), np.array([SIZE, SIZE, SIZE, 20])
    crops = np.full((4, SIZE, SIZE, 3), 99, np.uint8)
    cache.train_crops(np.array([5, 0, 5, 7]), corners, sides, crops)
    for crop, index, (top, left), side in zip(crops, (5, 0, 5, 7), corners, sides, strict=True):
        image = TF.resize(load_rgb(tiny_data / "tiny" / cache.meta["train"]["paths"][index]), int(1.1 * SIZE))
        expected = np.zeros((SIZE, SIZE, 3), np.uint8)
        expected[:side, :side] = np.asarray(image)[top : top + side, left : left + side]
        np.testing.assert_array_equal(crop, expected)


# ------------------------------------------------------------------------------------------------ raw layouts


def write_car_mirror(root: Path) -> None:
    """As mirrors pack it: every archive in a folder of its own name."""
    write_car_devkit(root, nested=True)
    (root / "car_devkit").mkdir()
    (root / "devkit").rename(root / "car_devkit" / "devkit")


def write_car_flat_mirror(root: Path) -> None:
    write_car_devkit(root, nested=True)
    (root / "devkit").rename(root / "car_devkit")


LAYOUTS = {
    "car": ("car", write_car, "car_ims/"),
    "car devkit": ("car", write_car_devkit, "cars_"),
    "car devkit, nested": ("car", lambda root: write_car_devkit(root, nested=True), "cars_"),
    "car devkit, mirror": ("car", write_car_mirror, "cars_"),
    "car devkit, flat mirror": ("car", write_car_flat_mirror, "cars_"),
    "car devkit, labels beside": ("car", lambda root: write_car_devkit(root, labels_beside=True), "cars_"),
    "cub": ("cub", write_cub, "images/"),
    "sop": ("sop", write_sop, "bicycle_final/"),
    "isc": ("isc", write_isc, "img/"),
    "isc, list in Anno": ("isc", lambda root: write_isc(root, "Anno"), "img/"),
    "isc, original folders": ("isc", lambda root: write_isc(root, "Eval", "Img"), "Img/img/"),
}


@pytest.mark.parametrize("deeper", ["", "as_unpacked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_raw_layouts(tmp_path, capsys, layout, deeper):
    """Four images of two classes in each split, wherever they lie, cached in order of class."""
    name, write, folder = LAYOUTS[layout]
    write(tmp_path / name / deeper)
    assert build(tmp_path) == 0
    output = capsys.readouterr()
    train, test, *_ = data_utils.PUBLISHED[name].counts.values()
    assert f"train: 2 classes and 4 images, published are {train[0]:,} and {train[1]:,}" in output.err
    assert f"test: 2 classes and 4 images, published are {test[0]:,} and {test[1]:,}" in output.err
    assert re.search(rf"{name} +2 classes 4 images +2 classes 4 images +\d", output.out)

    cache = read_cache(tmp_path, name, SIZE)
    for split in ("train", "test"):
        assert cache.array(f"{split}_labels").tolist() == [0, 0, 1, 1]
        for path in cache.meta[split]["paths"]:
            assert path.startswith(f"{deeper}/{folder}" if deeper else folder)
            assert (tmp_path / name / path).is_file()
    if name != "isc":
        assert cache.array("test_is_query").all() and cache.array("test_is_gallery").all()
    assert cache.meta["mean"] == list(data_utils.PUBLISHED[name].mean)
    classes = {
        "car": (["1", "98"], ["99", "196"]),
        "cub": (["001.Bird_1", "100.Bird_100"], ["101.Bird_101", "200.Bird_200"]),
        "sop": (["1", "2"], ["11319", "11320"]),
        "isc": (["id_00000002", "id_00000003"], ["id_00000001", "id_00000004"]),
    }[name]
    if layout.startswith("car devkit"):
        classes = (["Car 1", "Car 98"], ["Car 99", "Car 196"])
    assert (cache.meta["train"]["classes"], cache.meta["test"]["classes"]) == classes


def test_in_shop_has_queries_and_a_gallery(tmp_path, capsys):
    write_isc(tmp_path / "isc")
    assert build(tmp_path) == 0
    output, cache = capsys.readouterr(), read_cache(tmp_path, "isc", SIZE)
    assert cache.array("test_is_query").tolist() == [True, False] * 2
    assert cache.array("test_is_gallery").tolist() == [False, True] * 2
    assert cache.array("test_is_query").dtype == cache.array("test_is_gallery").dtype == bool
    assert [path[-14:-12] for path in cache.meta["test"]["paths"]] == ["06", "07", "00", "01"]
    assert "isc: query lists 2 classes, 2 images\nisc: gallery lists 2 classes, 2 images\n" in output.out
    assert "query: 2 classes and 2 images, published are 3,985 and 14,218" in output.err
    assert "gallery: 2 classes and 2 images, published are 3,985 and 12,612" in output.err
    assert "train: 2 classes and 4 images, published are 3,997 and 25,882" in output.err


def test_in_shop_in_its_published_size_has_no_warning(tmp_path):
    """A list of 52,712 rows; the images are not looked at."""
    statuses = ["train"] * 25882 + ["query"] * 14218 + ["gallery"] * 12612
    first = {"train": (0, 3997), "query": (3997, 3985), "gallery": (3997, 3985)}
    lines = ["52712", "image_name item_id evaluation_status"]
    for number, status in enumerate(statuses):
        start, items = first[status]
        lines.append(f"img/{number}.jpg  id_{1 + start + number % items:08d}  {status}")
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines))
    listing = list_data_set("isc", tmp_path)
    assert not listing.problems and not listing.warnings


def test_csv_data_set(tmp_path, capsys):
    """As spreadsheets write it; train/ and test/ beside it, with other images, are not looked at."""
    write_image_folder(tmp_path / "listed")
    write_csv(tmp_path / "listed")
    lines = [
        "path , label,id,split,is_query,is_gallery",
        "photos/1.png,zebra,7,train,1,1",
        "photos/2.png,ant,7,train,1,1",
        'photos/3.png,fox,7,"test",1,0',
        '"photos/4.png","Grüße, ""cat""",7,test,0,1',
        "photos/5.png, fox ,7,test,0,1",
        'photos/6.png,"Grüße, ""cat""",,test,1,1',
        "",
    ]
    (tmp_path / "listed" / "images.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert build(tmp_path, "--data_name", "listed") == 0
    cache = read_cache(tmp_path, "listed", SIZE)
    assert cache.meta["train"]["classes"] == ["ant", "zebra"]
    assert cache.meta["test"]["classes"] == ['Grüße, "cat"', "fox"]
    assert cache.meta["train"]["paths"] == ["photos/2.png", "photos/1.png"]
    assert cache.meta["test"]["paths"] == [f"photos/{number}.png" for number in (4, 6, 3, 5)]
    assert cache.array("test_labels").tolist() == [0, 0, 1, 1]
    assert cache.array("test_is_query").tolist() == [False, True, True, False]
    assert cache.array("test_is_gallery").tolist() == [True, True, False, True]
    output = capsys.readouterr()
    assert "listed: query lists 2 classes, 2 images\nlisted: gallery lists 2 classes, 3 images" in output.out
    assert output.err == ""


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_csv_line_ends_and_fields_over_two_lines(tmp_path, line_end):
    """The line of a problem is where its row starts; a row without any field is a blank line."""
    lines = ["", "path,label,split,note", 'a.png,x,train,"two', 'lines"', ",,,", "b.png,x,toast,", "c.png,y,test"]
    (tmp_path / "images.csv").write_bytes(line_end.join(lines).encode())
    listing = list_data_set("listed", tmp_path)
    assert [entry.path for entry in listing.entries] == ["a.png"]
    assert [problem.split(f"{tmp_path}/")[1] for problem in listing.problems] == [
        "images.csv, line 6: the split 'toast' is neither train nor test",
        "images.csv, line 7: malformed line: 3 fields, the header has 4",
    ]


def test_csv_roles_default_to_both_and_take_words(tmp_path):
    lines = ["label,path,split", "x,a.png,train", "y,b.png,test"]
    (tmp_path / "images.csv").write_text("\n".join(lines))
    assert [entry[4:] for entry in list_data_set("listed", tmp_path).entries] == [(True, True)] * 2
    assert data_utils.count(list_data_set("listed", tmp_path).entries) == {"train": (1, 1), "test": (1, 1)}
    lines = ["label,path,split,is_query", "x,a.png,train,", "y,b.png,test,TRUE", "y,c.png,test,False", "y,d.png,test,0"]
    (tmp_path / "images.csv").write_text("\n".join(lines))
    listing = list_data_set("listed", tmp_path)
    assert not listing.problems
    assert [entry.is_query for entry in listing.entries] == [True, True, False, False]
    assert all(entry.is_gallery for entry in listing.entries)


def test_csv_as_pandas_and_other_libraries_write_it(tmp_path):
    lines = ["Path,label,SPLIT,is_query", "a.png,1,Train,", "b.png,2,validation,1.0", "c.png,2,validation,0.0"]
    (tmp_path / "images.csv").write_text("\n".join(lines))
    listing = list_data_set("listed", tmp_path)
    assert not listing.problems
    assert [(entry.split, entry.is_query) for entry in listing.entries[1:]] == [("test", True), ("test", False)]
    (tmp_path / "images.csv").write_text("\n".join([*lines, "d.png,3,test,1", "e.png,3,test,1"]))
    (problem,) = list_data_set("listed", tmp_path).problems
    assert "line 5: the list has both test and validation images" in problem


def test_image_folder(tmp_path, capsys):
    root = tmp_path / "mine"
    for path in ("train/a/1.JPG", "train/a/2.png", "train/b/deep/er/3.Tiff", "test/c/4.webp", "test/c/.hidden.png"):
        save_image(root / path)
    for path in ("train/loose.png", "train/.cache/x/5.png"):
        save_image(root / path)
    (root / "train/a/notes.txt").write_text("no image")
    (root / "test/empty").mkdir()
    (root / "test/ü c").symlink_to(root / "test/c", target_is_directory=True)  # a link is fine
    (root / "train/a/loop").symlink_to(root / "train", target_is_directory=True)  # and ends where it would go round
    assert build(tmp_path) == 0
    meta = read_cache(tmp_path, "mine", SIZE).meta
    assert meta["train"]["classes"] == ["a", "b/deep/er"] and meta["test"]["classes"] == ["c", "ü c"]
    assert meta["train"]["paths"] == ["train/a/1.JPG", "train/a/2.png", "train/b/deep/er/3.Tiff"]
    assert meta["test"]["paths"] == ["test/c/4.webp", "test/ü c/4.webp"]
    assert "1 images outside any class folder are left out" in capsys.readouterr().err


def test_a_class_in_both_splits_is_a_warning(tmp_path, capsys):
    for path in ("train/a/1.png", "train/b/1.png", "test/a/1.png"):
        save_image(tmp_path / "mine" / path)
    assert build(tmp_path) == 0
    assert "classes in both train and test: 1 (a)" in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_listed(tmp_path, capsys, monkeypatch):
    write_image_folder(tmp_path / "mine")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("train_1"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert build(tmp_path) == 2
    assert re.search(r"mine: 1 problems.*\n.*train_1: unreadable folder", capsys.readouterr().err)


@pytest.mark.parametrize(("split", "code"), [("train", 0), ("test", 2)])
def test_images_listed_twice(tmp_path, capsys, split, code):
    """By whatever path. A test image would find itself: a certain hit."""
    write_sop(tmp_path / "sop")
    path = tmp_path / "sop" / f"Ebay_{split}.txt"
    again = path.read_text().splitlines()[1].replace("bicycle_final/", "./bicycle_final//")
    path.write_text(path.read_text() + again + "\n")
    assert build(tmp_path) == code
    assert f"1 {split} images are listed more than once, such as bicycle_final/" in capsys.readouterr().err


def test_an_isc_list_of_another_length_than_it_says_is_a_warning(tmp_path, capsys):
    write_isc(tmp_path / "isc")
    path = tmp_path / "isc" / "list_eval_partition.txt"
    path.write_text(path.read_text().replace("8\n", "52712\n", 1))
    assert build(tmp_path) == 0
    assert "list_eval_partition.txt: 52712 images by its first line, 8 by its rows" in capsys.readouterr().err


def test_lists_with_windows_line_ends_a_byte_order_mark_and_spaces(tmp_path):
    write_cub(tmp_path / "cub")
    old, new = "101.Bird_101/Bird_0005.jpg", "101.Bird_101/Vögel am See.jpg"
    (tmp_path / "cub" / "images" / old).rename(tmp_path / "cub" / "images" / new)
    lines = (tmp_path / "cub" / "images.txt").read_text().replace(old, new).replace("\n", "\r\n")
    (tmp_path / "cub" / "images.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\r\n\r\n")
    assert build(tmp_path) == 0
    assert f"images/{new}" in read_cache(tmp_path, "cub", SIZE).meta["test"]["paths"]


def test_statistics_of_other_sets_come_from_the_cached_training_pixels(tiny_data):
    cache = read_cache(tiny_data, "tiny", SIZE)
    pixels = cache.array("train_pixels").reshape(-1, 3) / 255
    np.testing.assert_allclose(cache.meta["mean"], pixels.mean(0), atol=1e-6)
    np.testing.assert_allclose(cache.meta["std"], pixels.std(0), atol=1e-6)


# ------------------------------------------------------------------------------------------------ bad input


def rewrite(path: str, old: str, new: str):
    """A damage: replaces text in a list of the raw data set."""

    def damage(root: Path) -> None:
        text = (root / path).read_text()
        assert old in text
        (root / path).write_text(text.replace(old, new, 1))

    return damage


def put(path: str, content: bytes | None):
    """A damage: gives a file this content, or removes it."""

    def damage(root: Path) -> None:
        (root / path).unlink()
        if content is not None:
            (root / path).write_bytes(content)

    return damage


def car_entry(path: str, class_id: int):
    """A damage: an annotation file with this one entry."""

    def damage(root: Path) -> None:
        write_car_annotations(root / "cars_annos.mat", "relative_im_path", [(path, class_id)])

    return damage


BIRD = "images/001.Bird_1/Bird_0001.jpg"
DAMAGES = {
    "missing image": ("cub", put(BIRD, None), rf"{BIRD}: missing image"),
    "unreadable image": ("cub", put(BIRD, b"<html>"), rf"{BIRD}: unreadable \(.*not an image of a known format"),
    "truncated image": ("cub", put(BIRD, jpeg_bytes()[:-200]), rf"{BIRD}: unreadable \(.*truncated"),
    "other format": ("cub", put(BIRD, b"%!PS-Adobe-3.0 EPSF-3.0\n"), rf"{BIRD}: unreadable"),
    "missing list": ("cub", put("image_class_labels.txt", None), "image_class_labels.txt: missing file"),
    "list is a folder": (
        "cub",
        lambda root: [(root / "images.txt").rename(root / "old.txt"), (root / "images.txt").mkdir()],
        "no data set found",
    ),
    "labels are a folder": (
        "cub",
        lambda root: [put("image_class_labels.txt", None)(root), (root / "image_class_labels.txt").mkdir()],
        "image_class_labels.txt: not a readable text file",
    ),
    "binary list": ("cub", put("images.txt", b"\xff\xfe\x00"), "images.txt: not a readable text file in UTF-8"),
    "malformed line": ("cub", rewrite("images.txt", "1 001.Bird_1/", "1\n"), "images.txt, line 1: malformed line"),
    "no class id": ("cub", rewrite("image_class_labels.txt", "1 1\n", "1 x\n"), "'x' is no class id"),
    "unlabelled": ("cub", rewrite("image_class_labels.txt", "1 1\n", ""), "image 1 has no class"),
    "repeated id": ("cub", rewrite("images.txt", "\n2 ", "\n1 "), "line 2: image id 1 stands in the list twice"),
    "class 0": ("cub", rewrite("image_class_labels.txt", "1 1\n", "1 0\n"), "class id 0 is out of range 1..200"),
    "class 201": ("cub", rewrite("image_class_labels.txt", "1 1\n", "1 201\n"), "201 is out of range 1..200"),
    "absolute": ("cub", rewrite("images.txt", "1 001.Bird_1", "1 /etc"), "line 1: absolute path, '..' or"),
    "drive": ("cub", rewrite("images.txt", "1 001.Bird_1", "1 C:\\x"), "line 1: absolute path, '..' or"),
    "dots": ("cub", rewrite("images.txt", "1 001.Bird_1", "1 a/../../b"), "line 1: absolute path, '..' or"),
    "other dots": ("cub", rewrite("images.txt", "1 001.Bird_1", "1 a\\..\\..\\b"), "line 1: absolute path, '..' or"),
    "missing folder": ("car", lambda root: shutil.rmtree(root / "car_ims"), "car_ims: missing folder"),
    "empty .mat": ("car", put("cars_annos.mat", b""), "cars_annos.mat: not a readable Cars196 annotation file"),
    "HTML .mat": ("car", put("cars_annos.mat", b"<html>" * 99), "cars_annos.mat: not a readable Cars196"),
    "HDF .mat": ("car", put("cars_annos.mat", b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM"), "not a readable Cars196"),
    "car class": ("car", car_entry("car_ims/000001.jpg", 197), "class id 197 is out of range 1..196"),
    "car path": ("car", car_entry("../x.jpg", 1), "entry 1: absolute path, '..' or"),
    "sop header": ("sop", rewrite("Ebay_train.txt", "image_id class_id", "1 1"), "the header .* is missing"),
    "sop line": ("sop", rewrite("Ebay_test.txt", "5 11319 1 bicycle_final/", "5 11319 1\n"), "line 2: malformed line"),
    "sop class": ("sop", rewrite("Ebay_test.txt", "5 11319", "5 22635"), "22635 is out of range 1..22634"),
    "sop list": ("sop", put("Ebay_test.txt", None), "Ebay_test.txt: missing file"),
    "no test folder": ("mine", lambda root: shutil.rmtree(root / "test"), "test: missing folder"),
    "empty split": (
        "mine",
        lambda root: [path.unlink() for path in root.glob("test/*/*")],
        "the test split has no images",
    ),
    "isc header": ("isc", rewrite("list_eval_partition.txt", "8\n", ""), "line 2: the header .* is missing"),
    "isc status": (
        "isc",
        rewrite("list_eval_partition.txt", "train", "val"),
        "line 5: 'val' is not one of train, query",
    ),
    "isc line": ("isc", rewrite("list_eval_partition.txt", " id_00000004", ""), "line 3: malformed line: 3 fields"),
    "isc path": ("isc", rewrite("list_eval_partition.txt", "img/", "/"), "line 3: absolute path, '..' or"),
    "isc queries": (
        "isc",
        lambda root: [rewrite("list_eval_partition.txt", "query", "gallery")(root) for _ in range(2)],
        r"1 problems, nothing written:\n  the query split has no images\n$",
    ),
    "csv empty": ("csv", put("images.csv", b" \n"), "images.csv: empty; its first line has to be path,label,split"),
    "csv column": ("csv", rewrite("images.csv", "label", "class"), "line 1: no column 'label' in the header"),
    "csv columns": (
        "csv",
        rewrite("images.csv", "is_query,is_gallery", "split,split"),
        "line 1: two columns 'split' in the header 'path,label,split,split,split'",
    ),
    "csv separator": (
        "csv",
        put("images.csv", b"path;label;split\n"),
        "no column 'path', .* in the header 'path;label",
    ),
    "csv split": ("csv", rewrite("images.csv", "zebra,train", "zebra,"), "line 2: the split '' is neither train nor"),
    "csv label": ("csv", rewrite("images.csv", "zebra", " "), "line 2: the label is empty"),
    "csv absolute": ("csv", rewrite("images.csv", "photos/1", "/photos/1"), "line 2: absolute path, '..' or"),
    "csv dots": ("csv", rewrite("images.csv", "photos/1", "../photos/1"), "line 2: absolute path, '..' or"),
    "csv no path": ("csv", rewrite("images.csv", "photos/1.png", ""), "line 2: absolute path, '..' or"),
    "csv short": ("csv", rewrite("images.csv", "zebra,", ""), "line 2: malformed line: 4 fields, the header has 5"),
    "csv long": ("csv", rewrite("images.csv", "zebra,", "a,b,"), "line 2: malformed line: 6 fields, the header has 5"),
    "csv quote": ("csv", rewrite("images.csv", "zebra,", '"zebra,'), "line 2: not valid CSV, read no further"),
    "csv bytes": ("csv", put("images.csv", b"path,label\n\n\xff"), r"images.csv: not a readable .* UTF-8 \(line 3: "),
    "csv NUL": ("csv", rewrite("images.csv", "fox", "f\0x"), "images.csv, line 4: a NUL byte"),
    "csv truth": (
        "csv",
        rewrite("images.csv", "test,1", "test,yes"),
        "line 4: is_query and is_gallery have to be 0, 1,",
    ),
    "csv neither": ("csv", rewrite("images.csv", "test,1,0", "test,0,0"), "line 4: a test image has to be a query, in"),
    "csv gallery": (
        "csv",
        lambda root: [rewrite("images.csv", f"test,{old}", "test,1,0")(root) for old in ("0,1", "0,1", "1,1")],
        "the gallery split has no images",
    ),
    "csv image": ("csv", put("photos/1.png", None), "photos/1.png: missing image"),
    "1-pixel-wide": (
        "mine",
        lambda root: random_image(0, 1, 14_000).save(root / "train/train_0/0.png"),
        "35 x 490000 after the resize is over 16,000,000 pixels",
    ),
}
WRITERS = {
    "car": write_car,
    "cub": write_cub,
    "sop": write_sop,
    "isc": write_isc,
    "csv": write_csv,
    "mine": write_image_folder,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_input_is_named_and_an_earlier_cache_stays(tmp_path, capsys, damage):
    name, apply, message = DAMAGES[damage]
    WRITERS[name](tmp_path / name)
    assert build(tmp_path) == 0
    before = tree(tmp_path / name / f"cache_{SIZE}")
    apply(tmp_path / name)
    capsys.readouterr()
    assert build(tmp_path, "--force") == 2
    assert re.search(message, capsys.readouterr().err)
    assert tree(tmp_path / name / f"cache_{SIZE}") == before
    assert not [path for path in (tmp_path / name).glob(".cache*") if path.is_dir()]


def test_devkit_without_the_labelled_file(tmp_path, capsys):
    write_car_devkit(tmp_path / "car")
    (tmp_path / "car" / "devkit" / "cars_test_annos_withlabels.mat").unlink()
    assert build(tmp_path) == 2
    assert "the file needed is cars_test_annos_withlabels.mat" in capsys.readouterr().err


def test_label_less_annotations_under_the_labelled_name(tmp_path, capsys):
    write_car_devkit(tmp_path / "car")
    devkit = tmp_path / "car" / "devkit"
    shutil.copy(devkit / "cars_test_annos.mat", devkit / "cars_test_annos_withlabels.mat")
    assert build(tmp_path) == 2
    assert "has no labels; the file needed is cars_test_annos_withlabels.mat" in capsys.readouterr().err


def test_all_problems_are_counted_and_the_first_20_listed(tmp_path, capsys):
    write_image_folder(tmp_path / "mine", classes=2, images=15)
    for path in sorted((tmp_path / "mine" / "train").rglob("*.png"))[:25]:
        path.write_bytes(b"")
    put("train/train_1/9.png", (tmp_path / "mine/test/test_0/0.png").read_bytes()[:-60])(tmp_path / "mine")
    assert build(tmp_path) == 2
    message = capsys.readouterr().err
    assert "mine: 26 problems, nothing written; --skip_bad goes on without bad images" in message
    assert message.count(": unreadable") == 20


def test_skip_bad_leaves_them_out_and_lists_them(tmp_path, capsys):
    write_image_folder(tmp_path / "clean", classes=3, images=3)
    write_image_folder(tmp_path / "mine", classes=3, images=3)
    for data_set, change in (("clean", Path.unlink), ("mine", lambda path: path.write_bytes(path.read_bytes()[:-60]))):
        for path in ("train/train_0/1.png", "test/test_2/0.png"):
            change(tmp_path / data_set / path)
    (tmp_path / "mine/train/train_1/notes.jpg").write_text("no image")
    assert build(tmp_path, "--data_name", "mine") == 2
    assert build(tmp_path, "--data_name", "mine", "clean", "--skip_bad") == 0
    assert tree(tmp_path / "mine" / "cache_32") == tree(tmp_path / "clean" / "cache_32")
    listed = (tmp_path / "mine" / "cache_32_skipped.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [
        str(tmp_path / "mine" / path)
        for path in ("train/train_0/1.png", "train/train_1/notes.jpg", "test/test_2/0.png")
    ]
    assert not (tmp_path / "clean" / "cache_32_skipped.txt").exists()


def test_skip_bad_does_not_excuse_a_data_set_without_queries(tmp_path, capsys):
    write_csv(tmp_path / "csv")
    for number in (3, 6):
        (tmp_path / "csv" / "photos" / f"{number}.png").write_bytes(b"")
    assert build(tmp_path, "--skip_bad") == 2
    assert "no image is left in query" in capsys.readouterr().err


def test_the_list_of_skipped_images_goes_when_none_is_skipped(tmp_path):
    write_image_folder(tmp_path / "mine")
    bad, listed = tmp_path / "mine" / "train" / "train_0" / "0.png", tmp_path / "mine" / "cache_32_skipped.txt"
    good = bad.read_bytes()
    bad.write_bytes(b"")
    assert build(tmp_path, "--skip_bad") == 0 and listed.exists()
    bad.write_bytes(good)
    assert build(tmp_path, "--force") == 0 and not listed.exists()


def test_skip_bad_needs_no_second_place_on_the_disk(tmp_path, monkeypatch):
    """The pixels of the first try are gone before the second, without the damaged image, is measured and written."""
    write_image_folder(tmp_path / "mine")
    path = tmp_path / "mine" / "train" / "train_0" / "0.png"
    path.write_bytes(path.read_bytes()[:-60])
    real = shutil.disk_usage(tmp_path)

    def usage(folder):
        used = sum(file.stat().st_size for file in folder.iterdir())
        return real._replace(free=2**24 + 30_000 - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert build(tmp_path, "--skip_bad") == 0


def test_skip_bad_does_not_excuse_an_empty_split(tmp_path, capsys):
    write_image_folder(tmp_path / "mine")
    for path in (tmp_path / "mine" / "test").rglob("*.png"):
        path.write_bytes(b"")
    assert build(tmp_path, "--skip_bad") == 2
    assert "no image is left in test" in capsys.readouterr().err


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the patched function reaches forks only")
def test_pixels_never_leave_their_place(tmp_path, capsys, monkeypatch):
    """An image that decodes to another size than its header said is refused, not written over the next one."""
    write_image_folder(tmp_path / "mine")
    monkeypatch.setattr(data_utils, "load_rgb", lambda path: random_image(0, 40, 99))
    assert build(tmp_path) == 2
    assert "mine: 4 problems" in (error := capsys.readouterr().err) and "another size than its pixels" in error


def test_decompression_bomb_is_refused(tmp_path, capsys, monkeypatch):
    write_image_folder(tmp_path / "mine")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # the images have 1440: for Pillow only a warning
    assert build(tmp_path) == 2
    assert "DecompressionBombError: 40 x 36 pixels are over" in capsys.readouterr().err


def test_full_disk_is_found_before_the_work(tmp_path, capsys, monkeypatch):
    write_image_folder(tmp_path / "mine")
    usage = shutil.disk_usage(tmp_path)._replace(free=2**24)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert build(tmp_path) == 2
    # 4 training images of 38 x 35 and 4 test images of 32 x 32, 3 bytes a pixel
    assert "the cache needs 28.2 kB, only 16.8 MB are free" in capsys.readouterr().err
    assert not list((tmp_path / "mine").glob("*cache_32"))


# ------------------------------------------------------------------------------------------------ the command


def test_one_bad_set_does_not_stop_the_others(tmp_path, capsys):
    write_cub(tmp_path / "cub")
    write_sop(tmp_path / "sop")
    (tmp_path / "cub" / BIRD).unlink()
    (tmp_path / "papers").mkdir()
    assert build(tmp_path) == 2
    output = capsys.readouterr()
    assert f"{tmp_path / 'papers'}: no data set, passed over" in output.out
    assert "cub: 1 problems" in output.err and re.search(r"\nsop +2 classes", output.out)
    assert read_cache(tmp_path, "sop", SIZE).counts["test"] == (2, 4)


def test_no_data_set_at_all(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "missing"):
        assert build(folder) == 2
        message = capsys.readouterr().err
        assert "no data set found" in message and "python data_utils.py --data_name demo" in message


def test_named_set_that_is_not_there(tmp_path, capsys):
    (tmp_path / "car").mkdir()
    assert build(tmp_path, "--data_name", "cub", "car") == 2
    message = capsys.readouterr().err
    assert f"{tmp_path / 'cub'}: no such folder" in message and f"{tmp_path / 'car'} holds no data set" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data_name", "../x"], "'../x' is not the name of a folder"),
        (["--image_size", "0"], "'0' is not a positive integer"),
        (["--image_size", "5000"], "over 2048"),
        (["--verify", "--force"], "--verify only reads"),
        (["--a\nb"], "unrecognized arguments: --a b"),
        (["--num_workers", "many"], "'many' is not a positive integer"),
        (["--forc"], "unrecognized arguments: --forc"),
        (["--resize", "pad"], "argument --resize: invalid choice: 'pad'"),
    ],
)
def test_wrong_options(tmp_path, capsys, options, message):
    assert data_utils.main(["--data_path", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_good_cache_is_kept_and_force_makes_it_again(tmp_path, capsys):
    write_image_folder(tmp_path / "mine")
    cache = tmp_path / "mine" / "cache_32"
    assert build(tmp_path) == 0
    first = cache.stat().st_ino, tree(cache)
    assert build(tmp_path) == 0 and "is there already" in capsys.readouterr().out
    assert cache.stat().st_ino == first[0]
    assert build(tmp_path, "--force", "--num_workers", "1") == 0
    assert cache.stat().st_ino != first[0]
    assert tree(cache) == first[1]  # whatever the number of workers
    assert sorted(path.name for path in cache.parent.iterdir()) == [".cache_32.lock", "cache_32", "test", "train"]


def test_a_cache_set_aside_by_a_killed_run_comes_back(tmp_path):
    """Killed between its two renames, a run leaves the earlier cache under its temporary name only."""
    write_image_folder(tmp_path / "mine")
    assert build(tmp_path) == 0
    cache = tmp_path / "mine" / "cache_32"
    before = tree(cache)
    cache.rename(cache.with_name(".cache_32.old-123"))
    shutil.rmtree(tmp_path / "mine" / "test")
    assert build(tmp_path) == 0
    assert tree(cache) == before


def test_the_old_cache_returns_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    write_image_folder(tmp_path / "mine")
    assert build(tmp_path) == 0
    before, rename = tree(tmp_path / "mine" / "cache_32"), os.rename

    def refuse(source, target):
        if ".new-" in str(source):
            raise OSError("refused")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    assert build(tmp_path, "--force") == 1
    assert before and tree(tmp_path / "mine" / "cache_32") == before


def _die(*_):
    os._exit(1)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the patched function reaches forks only")
def test_a_killed_worker_is_named(tmp_path, capsys, monkeypatch):
    write_image_folder(tmp_path / "mine")
    monkeypatch.setattr(data_utils, "_store_image", _die)
    assert build(tmp_path) == 1
    assert "a worker process was killed" in capsys.readouterr().err


def test_a_set_that_fails_while_running_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    for name in ("first", "second"):
        write_image_folder(tmp_path / name)
    original = data_utils.build_cache

    def build_cache(data_path, name, *options):
        if name == "first":
            raise OSError(28, "No space left on device")
        return original(data_path, name, *options)

    monkeypatch.setattr(data_utils, "build_cache", build_cache)
    assert build(tmp_path) == 1
    output = capsys.readouterr()
    assert "first: [Errno 28] No space left" in output.err and re.search(r"\nsecond +2 classes", output.out)


def test_a_cache_in_the_making_is_not_disturbed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_utils, "SECONDS_FOR_A_LOCK", 0.1)
    write_image_folder(tmp_path / "mine")
    with filelock.FileLock(tmp_path / "mine" / ".cache_32.lock"):
        assert build(tmp_path) == 2
    assert "is being made by another process" in capsys.readouterr().err


def test_annotations_that_crash_their_reader_are_refused(tmp_path, capsys, monkeypatch):
    """As scipy's does on some damaged files, which the generated ones of test_inputs.py contain."""
    write_car(tmp_path / "car")
    monkeypatch.setattr(scipy.io, "loadmat", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    assert build(tmp_path) == 2
    message = "cars_annos.mat: not a readable Cars196 annotation file (it crashes scipy's reader)"
    assert message in capsys.readouterr().err


def test_leftovers_of_a_killed_run_go(tmp_path):
    write_image_folder(tmp_path / "mine")
    (tmp_path / "mine" / ".cache_32_skipped.txt.tmp-123").write_text("half")
    (tmp_path / "mine" / ".cache_32.new-123").mkdir()
    (tmp_path / "mine" / ".cache_32.new-123" / "train_pixels.npy").write_bytes(b"half")
    assert build(tmp_path) == 0
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert names == {"train", "test", "cache_32", ".cache_32.lock"}


def damage_meta(change):
    def damage(folder: Path) -> None:
        meta = read_record(folder / "meta.json", {})
        change(meta)
        write_record(folder / "meta.json", meta)

    return damage


CACHE_DAMAGES = {
    "missing": (shutil.rmtree, "is missing"),
    "no meta.json": (lambda folder: (folder / "meta.json").unlink(), "meta.json is missing"),
    "truncated meta.json": (lambda folder: (folder / "meta.json").write_text('{"version": 1'), "is damaged"),
    "older version": (damage_meta(lambda meta: meta.update(version=0)), "another version"),
    "other size": (damage_meta(lambda meta: meta.update(image_size=64)), "other settings"),
    "changed entry": (
        lambda folder: (folder / "meta.json").write_text((folder / "meta.json").read_text().replace("train/", "test/")),
        "its checksum does not fit",
    ),
    "entry of another kind": (damage_meta(lambda meta: meta.update(mean="grey")), "of another version"),
    "two channels": (damage_meta(lambda meta: meta.update(std=[0.1, 0.1])), "three channels"),
    "other number of images": (damage_meta(lambda meta: meta["test"]["paths"].pop()), "does not fit test_labels.npy"),
    "missing array": (lambda folder: (folder / "test_labels.npy").unlink(), "test_labels.npy is missing"),
    "no array": (
        lambda folder: (folder / "test_is_gallery.npy").write_bytes(
            (folder / "test_is_gallery.npy").read_bytes().replace(b"NUMPY", b"OTHER")
        ),
        "is damaged",
    ),
    "truncated array": (lambda folder: (folder / "test_images.npy").write_bytes(b"x"), "has the wrong size"),
}


@pytest.mark.parametrize("damage", CACHE_DAMAGES)
def test_reader_refuses_a_bad_cache_and_names_the_command(tiny_data, tmp_path, damage):
    apply, message = CACHE_DAMAGES[damage]
    shutil.copytree(tiny_data / "tiny" / "cache_32", tmp_path / "tiny" / "cache_32")
    apply(tmp_path / "tiny" / "cache_32")
    with pytest.raises(data_utils.InputError) as error:
        read_cache(tmp_path, "tiny", SIZE)
    assert message in str(error.value)
    assert f"python data_utils.py --data_name tiny --data_path {tmp_path} --image_size 32" in str(error.value)


def test_verify_finds_a_flipped_bit(tmp_path, capsys):
    write_image_folder(tmp_path / "mine")
    assert build(tmp_path) == 0 and build(tmp_path, "--verify", "--data_name", "mine") == 0
    (tmp_path / "papers").mkdir()
    assert build(tmp_path, "--verify") == 0  # looks at what has a cache
    assert build(tmp_path, "--verify", "--image_size", "64") == 2
    assert "no cache_64 found" in capsys.readouterr().err
    path = tmp_path / "mine" / "cache_32" / "test_images.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert build(tmp_path) == 0  # sizes alone do not show it
    assert build(tmp_path, "--verify", "--data_name", "mine") == 2
    assert "damaged: test_images" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the demo


def test_demo_is_drawn_once_and_never_over_another(tmp_path, monkeypatch):
    tiny = {"num_classes": 2, "images_per_class": 3, "image_side": 40}
    monkeypatch.setattr(data_utils, "draw_demo", lambda folder: draw_demo(folder, **tiny))
    assert build(tmp_path / "data", "--data_name", "demo") == 0
    drawn = tree(tmp_path / "data" / "demo" / "train")
    assert len(drawn) == 6 and read_cache(tmp_path / "data", "demo", SIZE).counts["test"] == (2, 6)
    draw_demo(tmp_path / "again", **tiny)
    draw_demo(tmp_path / "other", **tiny, seed=1)
    assert tree(tmp_path / "again" / "train") == drawn
    assert not set(tree(tmp_path / "other" / "train").values()) & set(drawn.values())

    write_image_folder(tmp_path / "mine" / "demo")
    mine = tree(tmp_path / "mine" / "demo" / "train")
    assert build(tmp_path / "mine", "--data_name", "demo", "--force") == 0
    assert tree(tmp_path / "mine" / "demo" / "train") == mine


def test_a_half_drawn_demo_goes(tmp_path):
    (tmp_path / ".demo.new-123" / "train").mkdir(parents=True)
    draw_demo(tmp_path / "demo", num_classes=1, images_per_class=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".demo.lock", "demo"]


def test_demo_images_of_a_class_are_alike_but_never_the_same(tmp_path):
    draw_demo(tmp_path / "demo", num_classes=4, images_per_class=5)
    images = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "demo").glob("*/*/*.png"))])
    assert images.shape == (40, 64, 64, 3) and len({image.tobytes() for image in images}) == 40
    # Ink where it is darker than the middle between a picture's darkest and lightest: the classes show in its overlap.
    grey = torch.from_numpy(images).float().mean(3)
    ink = (grey < (grey.amax((1, 2), keepdim=True) + grey.amin((1, 2), keepdim=True)) / 2).flatten(1).float()
    overlap = (ink @ ink.T) / (ink.sum(1)[:, None] + ink.sum(1) - ink @ ink.T)
    labels = torch.arange(40) // 5
    same = (labels[:, None] == labels) & ~torch.eye(40, dtype=torch.bool)
    assert overlap[same].mean() > 1.5 * overlap[labels[:, None] != labels].mean()


# ------------------------------------------------------------------------------------------------ the real lists

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real annotation files are not on this machine")


@needs_shared
def test_real_cub_lists(tmp_path, capsys):
    for name in ("images.txt", "image_class_labels.txt"):
        (tmp_path / "cub").mkdir(exist_ok=True)
        shutil.copy(SHARED / "cub_meta" / name, tmp_path / "cub")
    listing = list_data_set("cub", tmp_path / "cub")
    assert not listing.problems and not listing.warnings
    assert data_utils.count(listing.entries) == {"train": (100, 5864), "test": (100, 5924)}
    assert build(tmp_path) == 2
    message = capsys.readouterr().err
    assert "cub: 11,788 problems" in message and message.count("missing image") == 20
    assert [path.name for path in (tmp_path / "cub").iterdir() if "cache" in path.name] == [".cache_32.lock"]


@needs_shared
def test_real_car_annotations():
    entries = data_utils.read_car_annotations(SHARED / "car_devkit" / "cars_train_annos.mat")
    assert len(entries) == 8144 and entries[0] == ("00001.jpg", 14)
    assert sum(class_id <= 98 for _, class_id in entries) == 4052
    with pytest.raises(data_utils.InputError, match=r"has no labels.*cars_test_annos_withlabels\.mat"):
        data_utils.read_car_annotations(SHARED / "car_devkit" / "cars_test_annos.mat")
    names = scipy.io.loadmat(SHARED / "car_devkit" / "cars_meta.mat")["class_names"]
    assert names.shape == (1, 196)
