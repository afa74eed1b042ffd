"""One image: opening it as RGB, resizing it, and what is wrong with it."""

import importlib.util
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dreml.cli import one_line

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif"}
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "AVIF")  # no other decoder of Pillow sees a file
HEIF_SUFFIXES = {".heic", ".heif"}  # of phones; only where pillow-heif is installed
HEIF_REMEDY = "pip install pillow-heif"
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
MAX_RESIZED_PIXELS = 16_000_000  # a 1 x 10,000 image would grow to 281 x 2,810,000
RESIZES = ("crop", "squash")
IMAGE_VERSION = 2  # of the way from a file to its pixels; 1 showed the hidden colours of transparent images


class BadImage(Exception):
    """An image that cannot be used. The text names the file and says why, on one line."""


def image_suffixes() -> set[str]:
    """The suffixes of images, in lower case. HEIC is one if pillow-heif is installed."""
    return IMAGE_SUFFIXES | HEIF_SUFFIXES if has_heif() else IMAGE_SUFFIXES


def has_heif() -> bool:
    """Whether pillow-heif is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


@dataclass(frozen=True)
class ImageSpec:
    """The side of the network's input in pixels, and how an image becomes that.

    "crop": its shorter side to `size`, then a crop; "squash": both sides to `size`. (In training to int(1.1 * size).)
    """

    size: int = 256
    resize: str = "crop"

    def __post_init__(self):
        if self.resize not in RESIZES:
            raise ValueError(f"resize has to be one of {', '.join(RESIZES)}, not {self.resize!r}")

    @property
    def train_size(self) -> int:
        """The shorter side of a training image before the random crop (docs/METHOD.md, step 5)."""
        return int(1.1 * self.size)

    def resized_size(self, width: int, height: int, shorter: int) -> tuple[int, int]:
        """The (width, height) that torchvision's `Resize(shorter)` gives; for squash, `Resize((shorter, shorter))`."""
        if self.resize == "squash":
            return shorter, shorter
        if width <= height:
            return shorter, int(shorter * height / width)
        return int(shorter * width / height), shorter


def load_rgb(path: str | Path) -> Image.Image:
    """Open an image as RGB: EXIF orientation applied, 16-bit grey scaled to 8 bits, transparent parts on white.

    Raises BadImage as `open_image` does, and what Pillow raises for a missing, unreadable or truncated file. An image
    over Pillow's limit against decompression bombs (`Image.MAX_IMAGE_PIXELS`, 89 megapixels) is an error too.
    """
    with open_image(path) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An open image as RGB, see `load_rgb`. The image itself may be changed."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        if isinstance(image.info.get("transparency"), int):  # a PNG may name one grey value as transparent
            grey[grey == image.info["transparency"]] = 65535
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:  # what lies under transparent pixels is chance, mostly black or white
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    if image.mode == "RGB":
        image.load()
        return image  # its file is closed; a copy would take a fortieth of the time of a photograph
    return image.convert("RGB")


def open_image(path: str | Path) -> Image.Image:
    """Open an image file and read its header.

    Raises BadImage for grey values in floating point, which have no defined black and white, for HEIC without
    pillow-heif, and for what is no file: opening a named pipe would wait without end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise BadImage(f"{path}: unreadable (not a regular file)")
    try:
        image = Image.open(path, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        if not is_heif(path):
            raise
        register_heif(path)
        image = Image.open(path, formats=("HEIF",))
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow only warns of up to twice as many
        image.close()
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are over Pillow's limit")
    if image.mode == "F":
        image.close()
        raise BadImage(f"{path}: floating-point grey values have no defined black and white; save it as 8 or 16 bits")
    return image


def is_heif(path: str | Path) -> bool:
    """Whether the first bytes of a file are those of HEIC or HEIF, whatever its name."""
    with open(path, "rb") as file:
        start = file.read(12)
    return start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS


def register_heif(path: str | Path) -> None:
    """Teach Pillow to read HEIC. Called where the first such file is met, since the import takes time.

    Raises BadImage, which names `path`, if pillow-heif is not installed.
    """
    if not has_heif():
        raise BadImage(f"{path}: unreadable (HEIC needs: {HEIF_REMEDY})")
    import pillow_heif

    pillow_heif.register_heif_opener()


def resized(image: Image.Image, spec: ImageSpec, shorter: int) -> Image.Image:
    """An image with `shorter` as its shorter side; for squash, as both sides. Raises BadImage for one too long."""
    width, height = spec.resized_size(*image.size, shorter)
    if width * height > MAX_RESIZED_PIXELS:
        raise BadImage(f"image: {width} x {height} after the resize is over {MAX_RESIZED_PIXELS:,} pixels")
    return image.resize((width, height), Image.Resampling.BILINEAR)


def centre(image: Image.Image, size: int) -> np.ndarray:
    """The centre of a resized image: `(size, size, 3) uint8`."""
    left, top = (round((side - size) / 2) for side in image.size)  # torchvision's rounding
    return np.asarray(image.crop((left, top, left + size, top + size)))


def resize_test(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """A test image as the network sees it: `(size, size, 3) uint8`, the centre of the resized image."""
    return centre(resized(image, spec, spec.size), spec.size)


def read_pixels(path: str | Path, spec: ImageSpec) -> np.ndarray:
    """An image file as the network sees it: `resize_test` of `load_rgb`, `(size, size, 3) uint8`. Raises BadImage."""
    return centre(read_resized(path, spec, spec.size), spec.size)


def read_resized(path: str | Path, spec: ImageSpec, shorter: int) -> Image.Image:
    """An image file as RGB with `shorter` as its shorter side; for squash, as both sides. Raises BadImage."""
    try:
        image = load_rgb(path)
        width, height = spec.resized_size(*image.size, shorter)
        if width * height > MAX_RESIZED_PIXELS:
            raise BadImage(f"{path}: {width} x {height} after the resize is over {MAX_RESIZED_PIXELS:,} pixels")
        return resized(image, spec, shorter)
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them raise
        raise bad_image(path, error) from None


def bad_image(path: str | Path, error: Exception) -> BadImage:
    """The BadImage for an error that came while an image was opened or decoded."""
    if isinstance(error, BadImage):
        return error
    if isinstance(error, FileNotFoundError):
        return BadImage(f"{path}: missing image")
    if isinstance(error, UnidentifiedImageError):
        return BadImage(f"{path}: unreadable (not an image of a known format)")
    return BadImage(f"{path}: unreadable ({one_line(error)})")
