"""The raw layouts of the data sets that are known by name, and what is wrong with their lists."""

import os
import shutil

import pytest
from builders import (
    SHARED,
    build,
    check_refused,
    paths_of,
    put,
    rewrite,
    save_image,
    write_car,
    write_car_devkit,
    write_car_mirror,
    write_cub,
    write_isc,
    write_sop,
)

from dreml.cli import InputError
from dreml.datasets import PUBLISHED, add_cars, count_images, list_data_set
from dreml.lists import Listing

LAYOUTS = {  # -> data set, its writer, where its images lie
    "car": ("car", write_car, "car_ims/"),
    "car devkit": ("car", write_car_devkit, "cars_"),
    "car devkit, mirror": ("car", write_car_mirror, "cars_"),
    "car devkit, flat mirror": ("car", lambda root: write_car_mirror(root, "car_devkit"), "cars_"),
    "car devkit, labels beside": ("car", lambda root: write_car_devkit(root, labels_beside=True), "cars_"),
    "car devkit, deeper": ("car", lambda root: write_car_devkit(root / "unpacked"), "unpacked/cars_"),
    "cub": ("cub", write_cub, "images/"),
    "cub, deeper": ("cub", lambda root: write_cub(root / "CUB_200_2011"), "CUB_200_2011/images/"),
    "sop": ("sop", write_sop, "bicycle_final/"),
    "isc": ("isc", write_isc, "img/"),
    "isc, list in Anno": ("isc", lambda root: write_isc(root, "Anno"), "img/"),
    "isc, original folders": ("isc", lambda root: write_isc(root, "Eval", "Img"), "Img/img/"),
}
CLASSES = {
    "car": (["001 Car 1", "098 Car 98"], ["099 Car 99", "196 Car 196"]),
    "cub": (["001.Bird_1", "100.Bird_100"], ["101.Bird_101", "200.Bird_200"]),
    "sop": (["00001", "00002"], ["11319", "11320"]),
    "isc": (["id_00000002", "id_00000003"], ["id_00000001", "id_00000004"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_raw_layouts(tmp_path, capsys, threads, layout):
    """Four images of two classes in each split, wherever they lie, cached in order of class."""
    name, write, folder = LAYOUTS[layout]
    write(tmp_path / name)
    cache = build(tmp_path, name)
    said = capsys.readouterr().err
    for part, (classes, images) in PUBLISHED[name].counts.items():
        found = "2 classes and 4 images" if part in ("train", "test") else "2 classes and 2 images"
        assert f"{name}: warning: {part}: {found}, published are {classes:,} and {images:,}\n" in said
    assert cache.counts == {"train": (2, 4), "test": (2, 4)}
    for split in ("train", "test"):
        assert cache.array(f"{split}_labels").tolist() == [0, 0, 1, 1]
        for path in paths_of(cache, split):
            assert path.startswith(folder) and (tmp_path / name / path).is_file()
    if name != "isc":
        assert cache.array("test_is_query").all() and cache.array("test_is_gallery").all()
    assert cache.meta.mean == list(PUBLISHED[name].mean) and cache.meta.std == list(PUBLISHED[name].std)
    assert (cache.meta.train["classes"], cache.meta.test["classes"]) == CLASSES[name]


def test_in_shop_has_queries_and_a_gallery(tmp_path, capsys, threads):
    write_isc(tmp_path / "isc")
    cache = build(tmp_path, "isc")
    assert cache.array("test_is_query").tolist() == [True, False] * 2
    assert cache.array("test_is_gallery").tolist() == [False, True] * 2
    assert cache.array("test_is_query").dtype == cache.array("test_is_gallery").dtype == bool
    assert [path[-14:-12] for path in paths_of(cache, "test")] == ["06", "07", "00", "01"]
    said = capsys.readouterr().out
    assert "isc: query lists 2 classes, 2 images\nisc: gallery lists 2 classes, 2 images\n" in said


def test_in_shop_in_its_published_size_has_no_warning(tmp_path, capsys):
    """A list of 52,712 rows; the images are not looked at."""
    statuses = ["train"] * 25882 + ["query"] * 14218 + ["gallery"] * 12612
    first = {"train": (0, 3997), "query": (3997, 3985), "gallery": (3997, 3985)}
    lines = ["52712", "image_name item_id evaluation_status"]
    for number, status in enumerate(statuses):
        start, items = first[status]
        lines.append(f"img/{number}.jpg  id_{1 + start + number % items:08d}  {status}")
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines))
    list_data_set("isc", tmp_path)
    assert capsys.readouterr().err == ""


def test_a_class_in_both_splits_is_a_warning(tmp_path, capsys):
    for path in ("train/a/1.png", "train/b/1.png", "test/a/1.png"):
        save_image(tmp_path / path)
    list_data_set("mine", tmp_path)
    assert "mine: warning: classes in both train and test: 1, such as 'a'; Recall" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_listed_twice(tmp_path, capsys, split):
    """By whatever path. A test image would find itself: a certain hit."""
    write_sop(tmp_path)
    path = tmp_path / f"Ebay_{split}.txt"
    again = path.read_text().splitlines()[1].replace("bicycle_final/", "./bicycle_final//")
    path.write_text(path.read_text() + again + "\n")
    message = f"1 {split} image listed more than once, such as bicycle_final/"
    if split == "train":
        list_data_set("sop", tmp_path)
        assert message in capsys.readouterr().err
    else:
        with pytest.raises(InputError, match=message):
            list_data_set("sop", tmp_path)


def test_lists_with_windows_line_ends_a_byte_order_mark_and_spaces(tmp_path):
    write_cub(tmp_path)
    text = (tmp_path / "images.txt").read_text().replace("/Bird_0005", "/Vögel am See").replace("\n", "\r\n")
    (tmp_path / "images.txt").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    paths = list_data_set("cub", tmp_path)["path"].tolist()
    assert len(paths) == 8 and "images/101.Bird_101/Vögel am See.jpg" in paths


DAMAGES = {
    "missing list": ("cub", put("image_class_labels.txt", None), "image_class_labels.txt: missing file"),
    "list is a pipe": (
        "cub",
        lambda root: [put("image_class_labels.txt", None)(root), os.mkfifo(root / "image_class_labels.txt")],
        "image_class_labels.txt: missing file",
    ),
    "binary list": ("cub", put("images.txt", b"\xff\xfe\x00"), "images.txt: not valid UTF-8"),
    "malformed line": ("cub", rewrite("images.txt", "1 001.Bird_1/", "1\n"), "line 1: 2 fields expected: '1'"),
    "no class id": (
        "cub",
        rewrite("image_class_labels.txt", "1 1\n", "1 x\n"),
        "line 1: its class in .*labels.txt is x",
    ),
    "HDF .mat": ("car", put("cars_annos.mat", b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM"), "not a readable Cars196"),
    "isc status": (
        "isc",
        rewrite("list_eval_partition.txt", "train", "val"),
        "line 5: 'val' is not one of train, query",
    ),
    "isc queries": (
        "isc",
        lambda root: [rewrite("list_eval_partition.txt", "query", "gallery")(root) for _ in range(2)],
        r"1 problem, nothing written:\n  the query split has no images$",
    ),
}
WRITERS = {"car": write_car, "cub": write_cub, "isc": write_isc}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_input_is_named_and_an_earlier_cache_stays(tmp_path, threads, damage):
    name, apply, message = DAMAGES[damage]
    check_refused(tmp_path, name, WRITERS[name], apply, message)


def test_devkit_without_labels_for_its_test_images(tmp_path):
    """The file is missing, or it is a copy of that without labels."""
    write_car_devkit(tmp_path)
    with_labels = tmp_path / "devkit" / "cars_test_annos_withlabels.mat"
    with_labels.unlink()
    with pytest.raises(InputError, match=r"cars_test_annos_withlabels\.mat: missing file$"):
        list_data_set("car", tmp_path)
    shutil.copy(tmp_path / "devkit" / "cars_test_annos.mat", with_labels)
    with pytest.raises(InputError, match=r"withlabels\.mat: not a readable .* file with labels \(ValueError: no field"):
        list_data_set("car", tmp_path)


needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real annotation files are not on this machine")


@needs_shared
def test_real_cub_lists(tmp_path, capsys):
    (tmp_path / "cub").mkdir()
    for name in ("images.txt", "image_class_labels.txt"):
        shutil.copy(SHARED / "cub_meta" / name, tmp_path / "cub")
    images = list_data_set("cub", tmp_path / "cub")
    assert count_images(images) == {"train": (100, 5864), "test": (100, 5924)}
    assert capsys.readouterr().err == ""  # as published
    with pytest.raises(InputError) as refusal:
        build(tmp_path, "cub")
    message = str(refusal.value)
    assert "cub: 11,788 problems" in message and message.count("missing image") == 20


@needs_shared
def test_real_car_annotations(tmp_path):
    listing = Listing(tmp_path)
    add_cars(listing, SHARED / "car_devkit" / "cars_train_annos.mat", "fname", "cars_train/")
    path, label, split, *_ = listing.columns.values()
    assert len(path) == 8144 and (path[0], label[0]) == ("cars_train/00001.jpg", "014")
    assert split.count("train") == 4052 and len(set(label)) == 196 and not listing.problems
    add_cars(listing, SHARED / "car_devkit" / "cars_test_annos.mat", "fname", "cars_test/")
    assert len(path) == 8144 and len(listing.problems) == 1
