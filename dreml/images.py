"""One image: opening it as RGB, resizing it, and what is wrong with it."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif"}
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "AVIF")  # no other decoder of Pillow sees a file
HEIF_SUFFIXES = {".heic", ".heif"}  # of phones; only where pillow-heif is installed
HEIF_REMEDY = "pip install pillow-heif"
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
MAX_RESIZED_PIXELS = 16_000_000  # a 1 x 10,000 image would grow to 281 x 2,810,000
RESIZES = ("crop", "squash")
IMAGE_VERSION = 2  # of how a file becomes pixels; 1: the hidden colours of transparent images


class BadImage(Exception):
    """An image that cannot be used. The text names the file and says why, on one line."""


def image_suffixes() -> set[str]:
    """The suffixes by which an image is known in a folder, in lower case. HEIC is one if it can be read here."""
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
    """Opens an image as RGB: EXIF orientation applied, 16-bit grey scaled to 8 bits, transparent parts on white.

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
    """Reads the header of an image file. Raises as `load_rgb` does.

    Raises BadImage for grey values in floating point, which have no defined black and white, and for HEIC without
    pillow-heif.
    """
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
    """Teaches Pillow to read HEIC, in each process that meets such a file: the import takes time.

    Raises BadImage, which names `path`, if pillow-heif is not installed.
    """
    if not has_heif():
        raise BadImage(f"{path}: unreadable (HEIC needs: {HEIF_REMEDY})")
    import pillow_heif

    pillow_heif.register_heif_opener()


def resized(image: Image.Image, spec: ImageSpec, shorter: int) -> Image.Image:
    """An image with `shorter` as its shorter side; for squash, as both."""
    return image.resize(spec.resized_size(*image.size, shorter), Image.Resampling.BILINEAR)


def resize_train(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """A training image before the random crop: `(H, W, 3) uint8`, the shorter side int(1.1 * size)."""
    return np.asarray(resized(image, spec, spec.train_size))


def resize_test(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """A test image as the network sees it: `(size, size, 3) uint8`, the centre of the resized image."""
    image = resized(image, spec, spec.size)
    left, top = (round((side - spec.size) / 2) for side in image.size)  # torchvision's rounding
    return np.asarray(image.crop((left, top, left + spec.size, top + spec.size)))


def probe_size(path: Path, spec: ImageSpec, shorter: int) -> tuple[int, int]:
    """Reads one image's header: the (width, height) that it will have with `shorter` as its shorter side.

    Raises BadImage.
    """
    try:
        with open_image(path) as image:
            size = spec.resized_size(*image.size, shorter)
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them raise
        raise bad_image(path, error) from None
    check_resized_size(path, size)
    return size


def read_test_image(path: Path, spec: ImageSpec) -> np.ndarray:
    """An image file as the network sees it, see `resize_test`. Raises BadImage."""
    try:
        image = load_rgb(path)
        check_resized_size(path, spec.resized_size(*image.size, spec.size))
        return resize_test(image, spec)
    except Exception as error:  # as in probe_size
        raise bad_image(path, error) from None


def check_resized_size(path: Path, size: tuple[int, int]) -> None:
    """Raises BadImage for an image that would be too large after the resize."""
    if size[0] * size[1] > MAX_RESIZED_PIXELS:
        raise BadImage(f"{path}: {size[0]} x {size[1]} after the resize is over {MAX_RESIZED_PIXELS:,} pixels")


def bad_image(path: Path, error: Exception) -> BadImage:
    """The BadImage for an error that came while an image was opened or decoded."""
    if isinstance(error, BadImage):
        return error
    if isinstance(error, FileNotFoundError):
        return BadImage(f"{path}: missing image")
    if isinstance(error, UnidentifiedImageError):
        return BadImage(f"{path}: unreadable (not an image of a known format)")
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return BadImage(f"{path}: unreadable ({reason})")
