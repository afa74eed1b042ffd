"""dreml/unlabelled.py: photos without labels as training images. test_distill.py has the options."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from builders import build, save_image, write_image_folder

from dreml.console import InputError
from dreml.data.images import ImageSpec, load_rgb, resize_train
from dreml.unlabelled import JoinedImages, find_photos, photos_checksum, store_photos

NO_TEST = pd.DataFrame({"path": []})


def found_in(*folders: Path) -> dict[str, Path]:
    """The photos of folders, where there is no test image."""
    return find_photos(list(folders), NO_TEST, Path("nowhere"))


def crops_of(images, indices: np.ndarray, corners: np.ndarray, sides: np.ndarray) -> np.ndarray:
    out = np.full((len(indices), 32, 32, 3), 77, np.uint8)
    images.train_crops(indices, corners, sides, out)
    return out


def test_photos_follow_the_training_images(threads, tmp_path):
    """Their pixels are those of training images; windows of both come in any order."""
    write_image_folder(tmp_path / "set")
    cache = build(tmp_path, "set")
    for number in range(3):
        save_image(tmp_path / "photos" / f"{number}.png", number, width=50 + number, height=44)
    photos = found_in(tmp_path / "photos")
    joined = JoinedImages([cache, store_photos(photos, tmp_path / "stored", cache)])
    pixels = [resize_train(load_rgb(file), ImageSpec(32)) for file in photos.values()]
    assert len(joined) == 4 + 3
    assert joined.array("train_sizes")[4:].tolist() == [list(image.shape[:2]) for image in pixels]
    np.testing.assert_array_equal(joined.array("train_sizes")[:4], cache.array("train_sizes"))
    indices, sides = np.array([6, 0, 4, 3, 5]), np.array([32, 20, 20, 32, 32])
    corners = np.array([[2, 3], [1, 0], [3, 0], [0, 2], [0, 0]])
    found = crops_of(joined, indices, corners, sides)
    np.testing.assert_array_equal(found[[1, 3]], crops_of(cache, indices[[1, 3]], corners[[1, 3]], sides[[1, 3]]))
    for place in (0, 2, 4):
        (top, left), side = corners[place], sides[place]
        expected = np.zeros((32, 32, 3), np.uint8)
        expected[:side, :side] = pixels[indices[place] - 4][top : top + side, left : left + side]
        np.testing.assert_array_equal(found[place], expected)
    joined.read_ahead(indices, corners, sides)  # test_cache.py looks at what it asks for
    with pytest.raises(ValueError, match="images without labels have no train_labels"):
        joined.array("train_labels")


def test_sets_of_photos_are_told_apart_by_their_contents(tmp_path):
    """Not by names, folders or copies."""
    for name, seed in (("a/0.png", 0), ("a/1.png", 1), ("b/x.png", 0), ("c/0.png", 0), ("c/deep/y.png", 2)):
        save_image(tmp_path / name, seed)
    folders = {name: tmp_path / name for name in "abc"}
    checksums = {}
    for names in ("a", "ab", "ba", "b", "c", "abc"):
        checksums[names] = photos_checksum(found_in(*(folders[name] for name in names)))
    assert checksums["a"] == checksums["ab"] == checksums["ba"]
    assert len({checksums[names] for names in ("a", "b", "c", "abc")}) == 4
    assert list(photos := found_in(folders["a"], folders["c"])) == sorted(photos)  # the order of training images
    assert photos_checksum({}) == "" and len(found_in(folders["a"], folders["b"])) == 2


def test_test_images_are_refused_by_their_contents(tmp_path, capsys):
    """Their folder, links to it, a copy and links of other names; another file of that name or size is none."""
    test = pd.DataFrame({"path": ["test/0.png", "test/1.png"]})
    image = tmp_path / "set" / "test" / "0.png"
    save_image(image)
    (image.parent / "1.png").symlink_to(tmp_path / "target.png")
    save_image(tmp_path / "target.png", 2)
    for name in ("copy", "link", "of_link", "other"):
        (tmp_path / name).mkdir()
    shutil.copy(image, tmp_path / "copy" / "x.png")
    (tmp_path / "link" / "y.png").symlink_to(image)
    (tmp_path / "link_to_all").symlink_to(image.parent)
    (tmp_path / "of_link" / "z.png").symlink_to(tmp_path / "target.png")
    save_image(tmp_path / "other" / "0.png", 1)
    (tmp_path / "other" / "1.png").write_bytes(bytes(image.stat().st_size))
    refused = {"set": 2, "link_to_all": 2, "copy": 1, "link": 1, "of_link": 1}
    for folder, number in refused.items():
        with pytest.raises(InputError, match=rf"--images: {number} of the images are test .*, such as .*{folder}/.*:"):
            find_photos([tmp_path / "other", tmp_path / folder], test, tmp_path / "set")
    assert len(find_photos([tmp_path / "other"], test, tmp_path / "set")) == 2 and not capsys.readouterr().err


def test_test_images_that_cannot_be_read_are_said(tmp_path, capsys):
    """Copies of them would not be noticed."""
    test = pd.DataFrame({"path": ["gone.png", "folder.png", "there.png"]})
    (tmp_path / "set" / "folder.png").mkdir(parents=True)
    for name in ("set/there.png", "photos/0.png"):
        save_image(tmp_path / name, len(name))
    size = (tmp_path / "set" / "folder.png").stat().st_size
    (tmp_path / "photos" / "1.png").write_bytes(bytes(size))
    assert len(find_photos([tmp_path / "photos"], test, tmp_path / "set")) == 2
    text = f"warning: --images: 2 of 3 test images cannot be read in {tmp_path / 'set'}: copies of them"
    assert capsys.readouterr().err == f"{text} are not noticed\n"


def test_photos_that_cannot_be_opened_are_named_and_left_out(tmp_path, capsys):
    save_image(tmp_path / "photos" / "good.png")
    (tmp_path / "photos" / "dangling.png").symlink_to(tmp_path / "gone.png")
    assert list(found_in(tmp_path / "photos").values()) == [tmp_path / "photos" / "good.png"]
    text = f"warning: --images: 1 images cannot be used:\n  {tmp_path / 'photos' / 'dangling.png'}: missing image\n"
    assert capsys.readouterr().err == text
    (tmp_path / "photos" / "good.png").unlink()
    with pytest.raises(InputError, match="--images: no image is left"):
        found_in(tmp_path / "photos")


def test_bad_photos_are_named_and_left_out(threads, tmp_path, capsys):
    write_image_folder(tmp_path / "set")
    cache = build(tmp_path, "set")
    save_image(tmp_path / "photos" / "good.png")
    (tmp_path / "photos" / "bad.png").write_bytes((tmp_path / "photos" / "good.png").read_bytes()[:200])
    photos = found_in(tmp_path / "photos")
    capsys.readouterr()
    assert len(store_photos(photos, tmp_path / "stored", cache).array("train_sizes")) == 1
    assert "warning: --images: 1 images cannot be used:\n  " in (err := capsys.readouterr().err) and "bad.png" in err
    (tmp_path / "photos" / "good.png").unlink()
    shutil.rmtree(tmp_path / "stored")
    with pytest.raises(InputError, match="--images: no image is left"):
        store_photos(found_in(tmp_path / "photos"), tmp_path / "stored", cache)
