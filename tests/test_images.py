"""Opening and resizing images, and what is said of those that cannot be used."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from builders import SPEC, jpeg_bytes, odd_images, random_image
from PIL import Image

from dreml.data.images import BadImage, ImageSpec, load_rgb, probe_size, read_test_image, resize_test


@pytest.mark.parametrize(("image_size", "shorter"), [(256, 281), (128, 140), (32, 35)])
def test_train_size(image_size, shorter):
    assert ImageSpec(image_size).train_size == shorter


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


def test_squash_keeps_both_ends_of_a_wide_image_and_crop_does_not():
    stripes = Image.new("RGB", (120, 40), "green")
    stripes.paste("red", (0, 0, 30, 40))
    stripes.paste("blue", (90, 0, 120, 40))
    red, blue = ([255, 0, 0], [0, 0, 255])
    squashed = resize_test(stripes, ImageSpec(32, "squash"))
    assert (squashed[:, 0] == red).all() and (squashed[:, -1] == blue).all()
    assert not (resize_test(stripes, SPEC)[..., [0, 2]] > 0).any()
    with pytest.raises(ValueError, match="resize has to be one of crop, squash, not 'pad'"):
        ImageSpec(32, "pad")


BAD_IMAGES = {  # content, what is wrong, whether its header tells
    "missing": (None, "missing image", True),
    "HTML": (b"<html>", r"unreadable \(not an image of a known format\)", True),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", r"unreadable \(not an image of a known format\)", True),
    "truncated": (jpeg_bytes()[:-200], r"unreadable \(OSError: image file is truncated", False),
}


def probe_test_image(path: Path, spec: ImageSpec) -> tuple[int, int]:
    return probe_size(path, spec, spec.size)


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_named(tmp_path, kind):
    content, message, by_header = BAD_IMAGES[kind]
    path = tmp_path / "image.jpg"
    if content is not None:
        path.write_bytes(content)
    for read in (read_test_image, probe_test_image) if by_header else (read_test_image,):
        with pytest.raises(BadImage, match=rf"image\.jpg: {message}") as bad:
            read(path, SPEC)
        copy = pickle.loads(pickle.dumps(bad.value))  # as from a worker process
        assert type(copy) is BadImage and str(copy) == str(bad.value)


def test_an_image_that_would_become_too_large_is_refused(tmp_path):
    path = tmp_path / "thin.png"
    random_image(0, 1, 16_000).save(path)
    for read in (read_test_image, probe_test_image):
        with pytest.raises(BadImage, match=r"thin\.png: 32 x 512000 after the resize is over 16,000,000 pixels"):
            read(path, SPEC)
    assert read_test_image(path, ImageSpec(32, "squash")).shape == (32, 32, 3)
    assert probe_test_image(path, ImageSpec(32, "squash")) == (32, 32)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    random_image().save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # the image has 1440: for Pillow only a warning
    for read in (read_test_image, probe_test_image):
        with pytest.raises(BadImage, match=r"bomb\.png: unreadable .*DecompressionBombError: 40 x 36 pixels are over"):
            read(tmp_path / "bomb.png", SPEC)
