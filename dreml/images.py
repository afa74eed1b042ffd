"""One image: opening it as RGB, resizing it, and what is wrong with it."""

import importlib.util
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from dreml.cli import one_line

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif"}
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "AVIF")  # no other decoder of Pillow sees a file
HEIF_SUFFIXES = {".heic", ".heif"}  # of phones; only where pillow-heif is installed
HEIF_REMEDY = "pip install pillow-heif"
MAX_PIXELS = 89_478_485  # of a file. Pillow's own limit, from which on it warns
MAX_RESIZED_PIXELS = 16_000_000  # a 1 x 10,000 image would grow to 281 x 2,810,000
RESIZES = ("crop", "squash")
IMAGE_VERSION = 2  # of the way from a file to its pixels; 1 showed the hidden colours of transparent images
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> Image.Transpose

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `open_image` refuses such images


class BadImage(Exception):
    """An image that cannot be used. The text names the file and says why, on one line."""


@dataclass(frozen=True)
class ImageSpec:
    """The side of the network's input in pixels, and how an image becomes that.

    "crop": its shorter side to `size`, then a crop; "squash": both sides to `size`. (In training to int(1.1 * size).)
    """

    size: int = 256
    resize: str = "crop"

    @property
    def train_size(self) -> int:
        """The shorter side of a training image before the random crop (docs/METHOD.md, step 5)."""
        return int(1.1 * self.size)


def image_suffixes() -> set[str]:
    """The suffixes of images, in lower case. HEIC is one if pillow-heif is installed."""
    has_heif = importlib.util.find_spec("pillow_heif") is not None
    return IMAGE_SUFFIXES | HEIF_SUFFIXES if has_heif else IMAGE_SUFFIXES


def load_rgb(path: str | Path) -> Image.Image:
    """Open an image as RGB: turned as its EXIF says, 16-bit grey scaled to 8 bits, transparent parts on white.

    Raises BadImage or what Pillow raises for a missing, unreadable or truncated file, see `bad_image`.
    """
    with open_image(path) as image:
        return to_rgb(image)


def open_image(path: str | Path) -> Image.Image:
    """Open an image file and read its header. HEIC needs pillow-heif."""
    is_path = not hasattr(path, "read")  # or else an open file
    if is_path and not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would wait without end
        raise BadImage(f"{path}: unreadable (not a regular file)")
    if is_path and os.path.getsize(path) == 0:
        raise BadImage(f"{path}: unreadable (an empty file)")
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB: editors store much beside an image
    try:
        image = Image.open(path, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        if not is_path or Path(path).read_bytes()[4:8] != b"ftyp":  # HEIC begins so, whatever its name
            raise
        try:
            import pillow_heif  # here, since it takes time
        except ImportError:
            raise BadImage(f"{path}: unreadable (HEIC needs: {HEIF_REMEDY})") from None
        pillow_heif.register_heif_opener()
        image = Image.open(path, formats=("HEIF",))
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise Image.DecompressionBombError(f"over {MAX_PIXELS:,} pixels")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """An open image as RGB, see `load_rgb`."""
    image.load()  # Pillow itself turns TIFF here
    try:
        turn = TURNS.get(image.getexif().get(0x0112))
    except Exception:  # of several kinds, for EXIF that cannot be read
        turn = None
    if image.mode[:1] in ("I", "F"):  # Pillow's own conversion would clip at 255
        image = scaled_grey(image)
    if turn is not None:
        image = image.transpose(Image.Transpose(turn))
    if image.has_transparency_data:  # what lies under transparent pixels is chance, mostly black or white
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    if image.mode == "RGB":
        return image  # its file is closed; a copy would take a fortieth of the time of a photograph
    return image.convert("RGB")


def scaled_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or the 12 bits of some TIFF files, scaled to 8 bits. Raises BadImage for other numbers."""
    if not image.mode.startswith("I;16"):
        name = getattr(image, "filename", "") or "image"
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
        raise BadImage(f"{name}: {kind} grey values have no defined black and white; save it as 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})  # of TIFF
    white = 2 ** tags.get(258, (16,))[0] - 1  # BitsPerSample
    grey = np.asarray(image).astype(np.int64)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a PNG may name one grey value as transparent
        grey[grey == transparent] = white
    if tags.get(262) == 0:  # PhotometricInterpretation: 0 is white
        grey = white - grey
    return Image.fromarray(((255 * grey + white // 2) // white).astype(np.uint8))


def resized(image: Image.Image, spec: ImageSpec, shorter: int, name: str | Path = "image") -> Image.Image:
    """An image with `shorter` as its shorter side, as torchvision's `Resize` makes it; for squash, as both sides.

    Raises BadImage, which names the image, for one that would become too long.
    """
    width, height = shorter, shorter
    if spec.resize == "crop":
        width, height = (int(shorter * side / min(image.size)) for side in image.size)
    if width * height > MAX_RESIZED_PIXELS:
        remedy = "crop it, or use --resize squash"
        raise BadImage(f"{name}: {width} x {height} after the resize is over {MAX_RESIZED_PIXELS:,} pixels: {remedy}")
    return image.resize((width, height), Image.Resampling.BILINEAR)


def resize_test(image: Image.Image, spec: ImageSpec, name: str | Path = "image") -> np.ndarray:
    """A test image as the network sees it: `(size, size, 3) uint8`, the centre of the resized image."""
    image = resized(image, spec, spec.size, name)
    left, top = (round((side - spec.size) / 2) for side in image.size)  # torchvision's rounding
    return np.asarray(image.crop((left, top, left + spec.size, top + spec.size)))


def read_pixels(path: str | Path, spec: ImageSpec) -> np.ndarray:
    """An image file as the network sees it: `resize_test` of `load_rgb`, `(size, size, 3) uint8`. Raises BadImage."""
    try:
        return resize_test(load_rgb(path), spec, path)
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
    if isinstance(error, Image.DecompressionBombError):
        return BadImage(f"{path}: over {MAX_PIXELS / 1e6:.0f} megapixels: save it smaller")
    return BadImage(f"{path}: unreadable ({one_line(error)})")
