"""Opening and resizing images, and what is said of those that cannot be used."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import SPEC, jpeg_bytes, odd_images, random_image
from PIL import Image

from dreml.images import (
    BadImage,
    ImageSpec,
    image_suffixes,
    load_rgb,
    read_pixels,
    resize_test,
)


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


@pytest.mark.parametrize("suffix", [".avif", ".jfif", ".jpe", ".heic", ".HEIF"])
def test_files_of_phones_and_downloads(tmp_path, suffix, monkeypatch):
    """Read as a JPEG of the same image is, about; HEIC by its content, also where nobody asked for it before."""
    if suffix.lower() in (".heic", ".heif"):
        pytest.importorskip("pillow_heif").register_heif_opener()
    path, kind = tmp_path / f"photo{suffix}", {".avif": "AVIF", ".heic": "HEIF", ".HEIF": "HEIF"}.get(suffix, "JPEG")
    random_image(0, 64, 48).save(path, kind, quality=95)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    assert suffix.lower() in image_suffixes()
    image = load_rgb(path)
    assert image.mode == "RGB" and image.size == (64, 48)
    assert abs(np.asarray(image).astype(int) - np.asarray(random_image(0, 64, 48))).mean() < 4
    other = path.rename(tmp_path / "photo.jpg")  # as some programs name them
    assert np.array_equal(load_rgb(other), image)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_newer_formats_are_turned_and_their_transparent_parts_are_white(tmp_path, kind):
    """They have a turn of their own beside EXIF; it is applied once."""
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    image = Image.new("RGBA", (64, 64), (200, 30, 30, 0))
    image.paste((20, 40, 200, 255), (0, 0, 32, 64))
    image.save(tmp_path / "image", kind, quality=95)
    pixels = np.asarray(load_rgb(tmp_path / "image")).astype(int)
    assert abs(pixels[:, :28] - [20, 40, 200]).max() < 16 and pixels[:, 36:].min() > 240
    exif = Image.Exif()
    exif[0x0112] = 6
    random_image(0, 64, 48).save(tmp_path / "image", kind, quality=95, exif=exif.tobytes())
    upright = np.rot90(np.asarray(random_image(0, 64, 48)), -1).astype(int)
    assert abs(np.asarray(load_rgb(tmp_path / "image")) - upright).mean() < 4


def test_heic_without_the_package_that_reads_it(tmp_path, monkeypatch):
    """It is no image of a folder then; where it is named, one line says what is missing."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    random_image().save(tmp_path / "photo.heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF")
    assert ".heic" not in image_suffixes() and ".avif" in image_suffixes()
    with pytest.raises(BadImage, match=r"photo\.heic: unreadable \(HEIC needs: pip install pillow-heif\)$"):
        read_pixels(tmp_path / "photo.heic", SPEC)


def test_grey_values_in_floating_point_are_refused(tmp_path):
    """Values of 0 to 1 would be black, and nothing says what is white."""
    Image.fromarray(np.random.default_rng(0).random((40, 36), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(BadImage, match=r"float\.tif: floating-point grey values have no defined black and white"):
        load_rgb(tmp_path / "float.tif")


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


def test_a_file_becomes_a_querys_pixels_in_one_way(tmp_path):
    for name in odd_images(tmp_path / "odd"):
        for spec in (SPEC, ImageSpec(33, "squash")):
            pixels = read_pixels(tmp_path / "odd" / name, spec)
            assert pixels.shape == (spec.size, spec.size, 3) and pixels.dtype == np.uint8
            np.testing.assert_array_equal(pixels, resize_test(load_rgb(tmp_path / "odd" / name), spec))


BAD_IMAGES = {
    "missing": (None, "missing image"),
    "HTML": (b"<html>", r"unreadable \(not an image of a known format\)"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", r"unreadable \(not an image of a known format\)"),
    "truncated": (jpeg_bytes()[:-200], r"unreadable \(OSError: image file is truncated"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_named(tmp_path, kind):
    content, message = BAD_IMAGES[kind]
    path = tmp_path / "image.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadImage, match=rf"image\.jpg: {message}"):
        read_pixels(path, SPEC)


def test_an_image_that_would_become_too_large_is_refused(tmp_path):
    path = tmp_path / "thin.png"
    random_image(0, 1, 16_000).save(path)
    with pytest.raises(BadImage, match=r"thin\.png: 32 x 512000 after the resize is over 16,000,000 pixels"):
        read_pixels(path, SPEC)
    assert read_pixels(path, ImageSpec(32, "squash")).shape == (32, 32, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    random_image().save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # the image has 1440: for Pillow only a warning
    with pytest.raises(BadImage, match=r"bomb\.png: unreadable .*DecompressionBombError: 40 x 36 pixels are over"):
        read_pixels(tmp_path / "bomb.png", SPEC)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_what_is_no_file_is_no_image(tmp_path):
    """A named pipe, a device, a folder: nothing waits."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for path in (tmp_path / "pipe.jpg", tmp_path / "folder.jpg", Path(os.devnull)):
        with pytest.raises(BadImage, match=rf"{path}: unreadable \(not a regular file\)"):
            load_rgb(path)
        with pytest.raises(BadImage, match=rf"{path}: unreadable \(not a regular file\)$"):
            read_pixels(path, ImageSpec(32))
