"""Reading a cache: its windows, and the refusal of a damaged one."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torchvision.transforms.functional as TF
from builders import SPEC, build, flip_a_bit, paths_of, random_image, tree, write_image_folder, write_isc

from dreml.cache import read_cache, verify_cache
from dreml.cli import InputError
from dreml.files import read_record, write_record
from dreml.images import ImageSpec, load_rgb
from dreml.runs import TEST_COLUMNS

SIZE, SQUASH = 32, ImageSpec(32, "squash")


def test_crops_are_windows_of_the_cached_image(tiny_data):
    cache = read_cache(tiny_data, "tiny", SPEC)
    corners, sides = np.array([[0, 0], [3, 1], [0, 3], [10, 14]]), np.array([SIZE, SIZE, SIZE, 20])
    crops = np.full((4, SIZE, SIZE, 3), 99, np.uint8)
    cache.train_crops(np.array([5, 0, 5, 7]), corners, sides, crops)
    for crop, index, (top, left), side in zip(crops, (5, 0, 5, 7), corners, sides, strict=True):
        image = TF.resize(load_rgb(tiny_data / "tiny" / paths_of(cache, "train")[index]), int(1.1 * SIZE))
        expected = np.zeros((SIZE, SIZE, 3), np.uint8)
        expected[:side, :side] = np.asarray(image)[top : top + side, left : left + side]
        np.testing.assert_array_equal(crop, expected)


def test_the_test_images_as_a_table(tmp_path, threads):
    """Each with the class that its list names, and its part in the scores."""
    write_isc(tmp_path / "isc")
    cache = build(tmp_path, "isc")
    table = cache.test_table()
    assert list(table) == list(TEST_COLUMNS) and table.path.tolist() == paths_of(cache, "test")
    lines = (tmp_path / "isc" / "list_eval_partition.txt").read_text().splitlines()[2:]
    listed = {image: (item, status) for image, item, status in map(str.split, lines)}
    expected = [listed[path] for path in table.path]
    assert table.class_name.tolist() == [item for item, _ in expected] and table.class_name.nunique() > 1
    assert table.label.tolist() == [sorted(set(table.class_name)).index(item) for item, _ in expected]
    assert table.is_query.tolist() == [status == "query" for _, status in expected]
    assert table.is_gallery.tolist() == [status == "gallery" for _, status in expected]


@pytest.mark.skipif(os.name != "posix", reason="such names are not allowed there")
def test_paths_of_all_kinds(tmp_path, threads):
    write_image_folder(tmp_path / "mine")
    names = [' "1", 2;.png', "a\nb.png", "c\rd.png", "ü 1.png", "жук.png"]
    for name in names:
        shutil.copy(tmp_path / "mine/train/train_0/0.png", tmp_path / "mine/train/train_1" / name)
    cache = build(tmp_path, "mine")
    expected = [f"train/train_1/{name}" for name in ("0.png", "1.png", *names)]
    assert paths_of(cache, "train") == ["train/train_0/0.png", "train/train_0/1.png", *sorted(expected)]
    assert cache.counts == {"train": (2, 9), "test": (2, 4)}


def test_both_caches_of_a_data_set_lie_beside_each_other(tmp_path, threads):
    """And the refusals speak of the one that is asked for."""
    write_image_folder(tmp_path / "mine")
    folder = build(tmp_path, "mine", SQUASH).folder
    assert folder == tmp_path / "mine" / "cache_32_squash"
    with pytest.raises(InputError, match=r"cache_32/meta\.json is missing"):
        read_cache(tmp_path, "mine", SPEC)
    before = tree(folder)
    crop, squash = build(tmp_path, "mine"), read_cache(tmp_path, "mine", SQUASH)
    assert tree(folder) == before
    assert (squash.array("train_sizes") == 35).all() and (crop.array("train_sizes") != 35).any()
    flip_a_bit(folder / "test_images.npy")
    verify_cache(crop)
    remedy = f"python data_utils.py --data_name mine --data_path {tmp_path} --image_size 32 --resize squash --force"
    with pytest.raises(InputError, match=f"damaged: test_images; make it again with: {re.escape(remedy)}$"):
        verify_cache(squash)


def test_an_open_cache_stays_what_it_was_when_it_is_made_anew(tmp_path, threads):
    write_image_folder(tmp_path / "mine")
    cache = build(tmp_path, "mine")
    pixels = cache.array("train_pixels").tobytes()
    random_image(99).save(tmp_path / "mine/train/train_0/0.png")
    anew = build(tmp_path, "mine", force=True)
    assert cache.array("train_pixels").tobytes() == pixels != anew.array("train_pixels").tobytes()
    assert read_record(cache.folder / "meta.json")["holdout"] is None  # as in caches that exist, which stay readable


def set_meta(**entries):
    """A damage: a meta.json with other entries."""

    def damage(folder: Path) -> None:
        write_record(folder / "meta.json", read_record(folder / "meta.json") | entries)

    return damage


CACHE_DAMAGES = {
    "missing": (shutil.rmtree, "is missing"),
    "no meta.json": (lambda folder: (folder / "meta.json").unlink(), "meta.json is missing"),
    "truncated meta.json": (lambda folder: (folder / "meta.json").write_text('{"version": 1'), "is damaged"),
    "older version": (set_meta(version=3), "of another version or"),
    "unknown entry": (set_meta(colour="red"), "is damaged"),
    "other size": (set_meta(image_size=64), "other settings"),
    "other resize": (set_meta(resize="squash"), "other settings"),
    "missing array": (lambda folder: (folder / "test_labels.npy").unlink(), "test_labels.npy is missing"),
    "truncated array": (lambda folder: (folder / "test_images.npy").write_bytes(b"x"), "is damaged"),
}


@pytest.mark.parametrize("damage", CACHE_DAMAGES)
def test_reader_refuses_a_bad_cache_and_names_the_command(tiny_data, tmp_path, damage):
    apply, message = CACHE_DAMAGES[damage]
    shutil.copytree(tiny_data / "tiny" / "cache_32", tmp_path / "tiny" / "cache_32")
    apply(tmp_path / "tiny" / "cache_32")
    with pytest.raises(InputError) as error:
        read_cache(tmp_path, "tiny", SPEC)
    assert message in str(error.value)
    assert f"python data_utils.py --data_name tiny --data_path {tmp_path} --image_size 32" in str(error.value)


def test_a_missing_data_set_is_named_and_the_demo_offered(tmp_path):
    with pytest.raises(InputError) as error:
        read_cache(tmp_path, "car", ImageSpec())
    text = f"{tmp_path / 'car'}: no such folder; put the data set there (README, Data), then: python data_utils.py "
    text += f"--data_name car --data_path {tmp_path} (or, for NAME_holdout, --holdout); to try it without one: "
    assert str(error.value) == f"{text}python data_utils.py --data_name demo --data_path {tmp_path} --image_size 32"
