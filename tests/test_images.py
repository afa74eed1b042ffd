"""Opening and resizing images, and what is said of those that cannot be used."""

import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import SPEC, jpeg_bytes, odd_images, random_image
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreml.images import BadImage, ImageSpec, image_suffixes, load_rgb, read_pixels, resize_test


def test_every_kind_of_image_is_read_in_one_way(tmp_path):
    for name, expected in odd_images(tmp_path / "odd").items():
        path = tmp_path / "odd" / name
        image = load_rgb(path)
        assert image.mode == "RGB", name
        np.testing.assert_array_equal(np.asarray(image), expected, err_msg=name)
        for spec in (SPEC, ImageSpec(33, "squash")):
            pixels = read_pixels(path, spec)
            assert pixels.shape == (spec.size, spec.size, 3) and pixels.dtype == np.uint8
            np.testing.assert_array_equal(pixels, resize_test(image, spec))


TURNED = (0x0112, 3, 1, struct.pack("<H", 6))
ODD_EXIF = {
    "none": [],
    "resolution as text": [(0x011B, 2, 3, b"72\0")],
    "resolution unit as a fraction": [(0x0128, 5, 1, struct.pack("<II", 2, 1))],
    "negative fraction": [(0x011A, 10, 1, struct.pack("<ii", -1, 0))],
    "XMP as text": [(0x02BC, 2, 1, b"\0")],
}


@pytest.mark.parametrize("kind", ODD_EXIF)
def test_a_photo_is_turned_whatever_else_its_exif_holds(tmp_path, kind):
    """Also where Pillow could not write that EXIF again."""
    offset = 8 + 2 + 12 * (1 + len(ODD_EXIF[kind])) + 4
    entries = b""
    rest = b""
    for tag, number_type, count, value in (TURNED, *ODD_EXIF[kind]):
        if len(value) > 4:
            start = struct.pack("<I", offset + len(rest))
            rest += value
            value = start
        entries += struct.pack("<HHI", tag, number_type, count) + value.ljust(4, b"\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1 + len(ODD_EXIF[kind])) + entries + bytes(4) + rest
    random_image(0, 50, 30).save(tmp_path / "turned.jpg", exif=exif)
    random_image(0, 50, 30).save(tmp_path / "upright.jpg")
    upright = np.asarray(Image.open(tmp_path / "upright.jpg"))
    np.testing.assert_array_equal(np.asarray(load_rgb(tmp_path / "turned.jpg")), np.rot90(upright, -1))


@pytest.mark.parametrize("turn", [2, 3, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_a_tiff_is_turned_once(tmp_path, mode, turn):
    """Pillow turns it itself when it loads it."""
    image = random_image(0, 50, 30).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    image.save(tmp_path / "turned.tiff", tiffinfo={0x0112: turn}, compression="tiff_lzw")
    image.save(tmp_path / "plain.png")
    method = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}[turn]
    expected = load_rgb(tmp_path / "plain.png").transpose(method)
    np.testing.assert_array_equal(np.asarray(load_rgb(tmp_path / "turned.tiff")), np.asarray(expected))


def text_chunk(**options) -> PngInfo:
    """A PNG chunk of 3 MB of text."""
    info = PngInfo()
    info.add_text("workflow", "x" * 3_000_000, **options)
    return info


def not_hexadecimal() -> PngInfo:
    info = PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n     10\nnot hexadecimal")
    return info


ODD_FILES = {
    "long text": ("PNG", {"pnginfo": text_chunk(zip=True)}),
    "large colour profile": ("PNG", {"icc_profile": bytes(1_500_000)}),
    "EXIF that is none": ("WEBP", {"exif": b"Exif\0\0garbage", "lossless": True}),
    "EXIF that is no number": ("PNG", {"pnginfo": not_hexadecimal()}),
}


@pytest.mark.parametrize("kind", ODD_FILES)
def test_what_lies_beside_the_pixels_does_not_matter(tmp_path, kind):
    image_format, options = ODD_FILES[kind]
    file = tmp_path / "image"
    random_image().save(file, image_format, **options)
    np.testing.assert_array_equal(np.asarray(load_rgb(file)), np.asarray(random_image()))


def write_grey(path: Path, values: list[int], bits: int, number_type: int = 1, black: int = 1) -> Path:
    """A TIFF file of one row. `black` 0: the value 0 is white."""
    digits = "".join(f"{value & (2**bits - 1):0{bits}b}" for value in values)
    packed = int(digits, 2).to_bytes(len(digits) // 8, "big")
    if bits != 12:  # in the byte order of the file
        packed = np.frombuffer(packed, f">u{bits // 8}").astype(f"<u{bits // 8}").tobytes()
    entries = [(256, len(values)), (257, 1), (258, bits), (259, 1), (262, black), (273, 8), (277, 1), (278, 1)]
    entries += [(279, len(packed)), (339, number_type)]
    table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in entries)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + table + bytes(4))
    return path


WHITE_IS_LARGE = ([0, 257, 25700, 65535], 16)
GREY = {  # -> values, bits and more of a TIFF file, and what they become
    "16 bits": (WHITE_IS_LARGE, [0, 1, 100, 255]),
    "0 is white": ((*WHITE_IS_LARGE, 1, 0), [255, 254, 155, 0]),
    "12 bits": (([0, 1606, 2048, 4095], 12), [0, 100, 128, 255]),
    "32 bits": (([0, 2**31], 32), None),  # nothing says what is white
    "signed": (([-5, 500], 16, 2), None),
}


@pytest.mark.parametrize("kind", GREY)
def test_grey_values_are_scaled_as_a_viewer_does(tmp_path, kind):
    options, expected = GREY[kind]
    path = write_grey(tmp_path / "grey.tif", *options)
    if expected is not None:
        assert np.asarray(load_rgb(path))[0, :, 0].tolist() == expected
    else:
        with pytest.raises(BadImage, match=r"grey\.tif: .* grey values have no defined black and white; save it as 8"):
            load_rgb(path)


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


def test_squash_keeps_both_ends_of_a_wide_image_and_crop_does_not():
    stripes = Image.new("RGB", (120, 40), "green")
    stripes.paste("red", (0, 0, 30, 40))
    stripes.paste("blue", (90, 0, 120, 40))
    red, blue = ([255, 0, 0], [0, 0, 255])
    squashed = resize_test(stripes, ImageSpec(32, "squash"))
    assert (squashed[:, 0] == red).all() and (squashed[:, -1] == blue).all()
    assert not (resize_test(stripes, SPEC)[..., [0, 2]] > 0).any()


NO_IMAGE = r"unreadable \(not an image of a known format\)"
NO_FILE = r"unreadable \(not a regular file\)"
BAD_IMAGES = {
    "missing": (lambda path: None, "missing image"),
    "HTML": (lambda path: path.write_bytes(b"<html>"), NO_IMAGE),
    "PostScript": (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), NO_IMAGE),
    "truncated": (lambda path: path.write_bytes(jpeg_bytes()[:-200]), r"unreadable \(OSError: image file is truncated"),
    "empty": (Path.touch, r"unreadable \(an empty file\)"),
    "folder": (Path.mkdir, NO_FILE),
    "pipe": (lambda path: os.mkfifo(path), NO_FILE),
    "link to itself": (lambda path: path.symlink_to(path), r"unreadable \(OSError: .*symbolic links"),
    "108 megapixels": (
        lambda path: Image.new("1", (12000, 9000)).save(path, "PNG"),
        "over 89 megapixels: save it small",
    ),
    "200 megapixels": (lambda path: Image.new("1", (20000, 10000)).save(path, "PNG"), "over 89 megapixels: save it"),
    "floats": (lambda path: Image.new("F", (40, 36)).save(path, "TIFF"), "floating-point grey values have no defined"),
    "thin": (
        lambda path: random_image(0, 1, 16_000).save(path),
        "32 x 512000 after the resize is over 16,000,000 pixels: crop it, or use --resize squash",
    ),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as dreml.images does, but pytest undoes it
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_named_in_one_line(tmp_path, kind):
    """Nothing waits."""
    write, message = BAD_IMAGES[kind]
    path = tmp_path / "image.jpg"
    if kind == "pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("has no named pipes")
    write(path)
    with pytest.raises(BadImage, match=rf"image\.jpg: {message}"):
        read_pixels(path, SPEC)
    if kind == "thin":
        assert read_pixels(path, ImageSpec(32, "squash")).shape == (32, 32, 3)
