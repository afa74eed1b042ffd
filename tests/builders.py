"""What the tests are built from: images, raw data sets in the real formats, damages to them, their caches."""

import dataclasses
import hashlib
import io
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.io
import torch
from PIL import Image
from torch import nn

import train
from dreml.cache import Cache
from dreml.cache_writer import build_cache
from dreml.cli import InputError
from dreml.files import read_record, sha256, write_record
from dreml.images import ImageSpec, load_rgb, resize_test
from dreml.index import PhotoIndex
from dreml.runs import SAVED, WEIGHTS, MemberRecord, member_path, read_run_record
from model import Ensemble, Head

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # real data beside the checkout, where there is any
SPEC = ImageSpec(32)  # of the caches that the tests make


# ------------------------------------------------------------------------------------------------ images


def random_image(seed: int = 0, width: int = 40, height: int = 36) -> Image.Image:
    """A smooth random RGB image, so that a resize has something to interpolate."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def save_image(path: Path, seed: int = 0, **kwargs) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    random_image(seed, **kwargs).save(path)


def jpeg_bytes(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    random_image(seed).save(buffer, "JPEG")
    return buffer.getvalue()


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
    alpha = generator.integers(0, 256, rgb.shape[:2], dtype=np.uint8)
    alpha[:9], alpha[9:19] = 0, 255  # nothing of the image, and all of it
    cut_out = Image.fromarray(np.dstack([rgb, alpha]))
    add("alpha.WEBP", cut_out, on_white(rgb, alpha), lossless=True, exact=True)
    add("alpha.png", cut_out, on_white(rgb, alpha))
    add("alpha.tif", cut_out, on_white(rgb, alpha))
    grey_on_white = on_white(np.stack([grey] * 3, axis=-1), alpha)
    add("grey_alpha.png", Image.fromarray(np.dstack([grey, alpha])), grey_on_white)
    holes = deep == deep[7, 7]
    add("deep_holes.png", Image.fromarray(deep), on_white(scaled, 255 - 255 * holes), transparency=int(deep[7, 7]))
    colours = generator.integers(0, 256, (16, 3), dtype=np.uint8)
    indices = generator.integers(0, 16, (40, 50), dtype=np.uint8)
    palette = Image.new("P", (50, 40))
    palette.putdata(indices.ravel().tolist())
    palette.putpalette(colours.ravel().tolist())
    add("palette.png", palette, colours[indices])
    add("palette.gif", palette, colours[indices])
    for name in ("holes.png", "holes.gif"):  # one colour of the palette is transparent
        add(name, palette, on_white(colours[indices], 255 - 255 * (indices == 3)), transparency=3)
    colour = colours[indices]
    hidden = on_white(colour, 255 - 255 * (colour == colours[5]).all(2))
    add("rgb_holes.png", Image.fromarray(colour), hidden, transparency=tuple(colours[5].tolist()))
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
        if orientation == 6:
            add("rotated_alpha.png", cut_out, np.rot90(on_white(rgb, alpha), -1), exif=exif)
            add("rotated_holes.png", palette, np.rot90(expected["holes.png"], -1), exif=exif, transparency=3)
    return expected


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """How `(H, W, 3) uint8` colours look on white paper with opacities `(H, W)`, 0 to 255."""
    opacity = alpha[..., None] / 255
    return (rgb * opacity + 255 * (1 - opacity)).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------------ raw data sets


def _matlab_number(value: int) -> np.ndarray:
    """As in the real files: a 1 x 1 array of the smallest unsigned type."""
    return np.array([[value]], dtype=np.uint8 if value < 256 else np.uint16)


def write_car_annotations(path: Path, path_field: str, rows: list[tuple[str, int | None]]) -> None:
    """A Cars196 annotation file: a 1 x N struct array of nested 1 x 1 arrays. A class of None leaves the field out."""
    labelled = all(class_id is not None for _, class_id in rows)
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"] + ["class"] * labelled + [path_field]
    annotations = np.empty((1, len(rows)), dtype=[(name, object) for name in fields])
    for number, (image, class_id) in enumerate(rows):
        box = [_matlab_number(value) for value in (1, 2, 300, 200)]
        label = [_matlab_number(class_id)] if labelled else []
        annotations[0, number] = (*box, *label, np.array([image]))
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {} if path_field == "fname" else {"class_names": CAR_NAMES}  # of the devkit, in a file of their own
    scipy.io.savemat(path, {"annotations": annotations} | names)


CAR_CLASSES = (1, 1, 98, 98, 99, 99, 196, 196)  # the ends of both splits, two images each
CAR_NAMES = np.array([[f"Car {class_id}" for class_id in range(1, 197)]], dtype=object)


def write_car(root: Path) -> None:
    """cars_annos.mat and car_ims/."""
    rows = [(f"car_ims/{number:06d}.jpg", class_id) for number, class_id in enumerate(CAR_CLASSES, 1)]
    write_car_annotations(root / "cars_annos.mat", "relative_im_path", rows)
    for number, (path, _) in enumerate(rows):
        save_image(root / path, number)


def write_car_devkit(root: Path, nested: bool = False, labels_beside: bool = False) -> None:
    """cars_train/, cars_test/ and devkit/; both of the devkit's parts hold images of all classes."""
    rows = [(f"{number:05d}.jpg", class_id) for number, class_id in enumerate(CAR_CLASSES, 1)]
    write_car_annotations(root / "devkit" / "cars_train_annos.mat", "fname", rows[::2])
    scipy.io.savemat(root / "devkit" / "cars_meta.mat", {"class_names": CAR_NAMES})
    labelled = root / ("." if labels_beside else "devkit") / "cars_test_annos_withlabels.mat"
    write_car_annotations(labelled, "fname", rows[1::2])
    write_car_annotations(root / "devkit" / "cars_test_annos.mat", "fname", [(path, None) for path, _ in rows[1::2]])
    for number, (path, _) in enumerate(rows):
        part = "cars_train" if number % 2 == 0 else "cars_test"
        save_image(root / (f"{part}/{part}" if nested else part) / path, number)


def write_car_mirror(root: Path, folder: str = "car_devkit/devkit") -> None:
    """As mirrors pack it: every archive in a folder of its own name."""
    write_car_devkit(root, nested=True)
    (root / folder).parent.mkdir(exist_ok=True)
    (root / "devkit").rename(root / folder)


def write_cub(root: Path, classes: Sequence[int] = (1, 100, 101, 200)) -> None:
    """images.txt, image_class_labels.txt and images/, two images of each class; those up to 100 train."""
    images, labels = [], []
    for number, class_id in enumerate(np.repeat(classes, 2), 1):
        path = f"{class_id:03d}.Bird_{class_id}/Bird_{number:04d}.jpg"
        images.append(f"{number} {path}\n")
        labels.append(f"{number} {class_id}\n")
        save_image(root / "images" / path, number)
    (root / "images.txt").write_text("".join(images))
    (root / "image_class_labels.txt").write_text("".join(labels))


def write_sop(root: Path) -> None:
    """Ebay_train.txt and Ebay_test.txt with their header, and *_final/."""
    number = 0
    for split, classes in (("train", (1, 1, 2, 2)), ("test", (11319, 11319, 11320, 11320))):
        lines = ["image_id class_id super_class_id path\n"]
        for class_id in classes:
            number += 1
            path = f"bicycle_final/{class_id}_{number}.JPG"
            lines.append(f"{number} {class_id} 1 {path}\n")
            (root / "bicycle_final").mkdir(parents=True, exist_ok=True)
            random_image(number).save(root / path, "JPEG")
        (root / f"Ebay_{split}.txt").write_text("".join(lines))


def write_isc(root: Path, list_folder: str = "", image_folder: str = "") -> None:
    """list_eval_partition.txt, its columns padded as in the real one, and img/; the list is not in order of item."""
    rows, roles = [], ("query", "gallery")
    for number, item in enumerate((4, 4, 3, 3, 2, 2, 1, 1)):
        status = "train" if item in (2, 3) else roles[number % 2]
        path = f"img/WOMEN/Dresses/id_{item:08d}/0{number}_1_front.jpg"
        rows.append(f"{path:<70} id_{item:08d}    {status}\n")
        save_image(root / image_folder / path, number)
    (root / list_folder).mkdir(exist_ok=True)
    header = f"{len(rows)}\nimage_name item_id evaluation_status\n"
    (root / list_folder / "list_eval_partition.txt").write_text(header + "".join(rows))


CSV_ROWS = (  # path, label, split, is_query, is_gallery
    ("photos/1.png", "zebra", "train", "1", "1"),
    ("photos/2.png", "ant", "train", "1", "1"),
    ("photos/3.png", "fox", "test", "1", "0"),
    ("photos/4.png", "cat", "test", "0", "1"),
    ("photos/5.png", "fox", "test", "0", "1"),
    ("photos/6.png", "cat", "test", "1", "1"),
)


def write_csv(root: Path) -> None:
    """images.csv and the images it names."""
    for number, (path, *_) in enumerate(CSV_ROWS):
        save_image(root / path, number)
    lines = ["path,label,split,is_query,is_gallery", *(",".join(row) for row in CSV_ROWS)]
    (root / "images.csv").write_text("\n".join(lines) + "\n")


def write_image_folder(root: Path, classes: int = 2, images: int = 2) -> None:
    """train/ and test/ with `classes` folders of `images` PNG files each."""
    for split in ("train", "test"):
        for class_number in range(classes):
            for number in range(images):
                path = root / split / f"{split}_{class_number}" / f"{number}.png"
                save_image(path, 10 * class_number + number)


# ------------------------------------------------------------------------------------------------ caches and damages


def build(data: Path, name: str, spec: ImageSpec = SPEC, **options) -> Cache:
    """The cache of data/NAME, made by one worker process."""
    return build_cache(data, name, spec, **{"num_workers": 1} | options)


def paths_of(cache: Cache, split: str) -> list[str]:
    return [path.decode() for path in cache.array(f"{split}_paths").tolist()]


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder and its checksum, lock files aside."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip_a_bit(path: Path, place: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


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


def check_refused(data: Path, name: str, write: Callable, damage: Callable, message: str) -> None:
    """Damages a raw data set that has a cache: making it again is refused with this message, and the cache stays."""
    write(data / name)
    build(data, name)
    before = tree(data / name / "cache_32")
    damage(data / name)
    with pytest.raises(InputError) as refusal:
        build(data, name, force=True)
    assert re.search(message, str(refusal.value))
    assert before and tree(data / name / "cache_32") == before
    assert not [path for path in (data / name).glob(".cache*") if path.is_dir()]


# ------------------------------------------------------------------------------------------------ runs

TINY = "--data_name tiny --image_size 32 --weights none --lr 1e-3 --device cpu --num_epochs 2 --batch_size 16".split()
TINY += "--meta_class_size 3 --ensemble_size 2 --recalls 1,4 --precision fp32".split()  # the same on every machine

LABELS = np.repeat(np.arange(4), [4, 3, 3, 2])  # of the test images of `write_run`
CLASS_NAMES = np.array(["Ünï", "жук", "a,b", "d $x$"], dtype=object)
IMAGE_COLORS = np.array([[200, 40 + 15 * number, 20 * number] for number in range(len(LABELS))], np.uint8)


def random_embeddings(seed: int, num_members: int = 2, num_images: int = len(LABELS)) -> list[np.ndarray]:
    """What members could have embedded test images to, `(num_images, 3) float32` each."""
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(num_images, 3)).astype(np.float32) for _ in range(num_members)]


def write_run(
    folder: Path,
    like: Path,
    member_embeddings: list[np.ndarray],
    labels: np.ndarray = LABELS,
    is_query: np.ndarray | None = None,
    is_gallery: np.ndarray | None = None,
    pooled: list[np.ndarray] | None = None,
    **settings,
) -> Path:
    """A finished run with these logits and changed settings, else as the run `like`. Its weights are no weights."""
    folder.mkdir(parents=True)
    record, every = read_run_record(like), np.ones(len(labels), bool)
    record.settings = dataclasses.replace(record.settings, **settings)
    write_record(folder / "args.json", record)
    table = {"path": [f"{number}.png" for number in range(len(labels))], "label": labels}
    table |= {"is_query": every if is_query is None else is_query}
    table |= {"is_gallery": every if is_gallery is None else is_gallery, "class_name": CLASS_NAMES[labels]}
    pd.DataFrame(table).to_csv(folder / "test.csv", index=False)
    pooled = pooled or [rows[::-1] for rows in member_embeddings]  # so whoever reads the wrong ones notices
    for number, embeddings in enumerate(zip(member_embeddings, pooled, strict=True), 1):
        member = read_record(member_path(like, 1, "json"), MemberRecord)
        files = [member_path(folder, number, suffix) for suffix in (WEIGHTS, *SAVED.values())]
        files[0].write_bytes(b"no weights")
        for file, rows in zip(files[1:], embeddings, strict=True):
            np.save(file, rows)
        checksums = {file.name: sha256(file) for file in files}
        member = dataclasses.replace(member, member=number, settings_hash=record.settings_hash, sha256=checksums)
        write_record(member_path(folder, number, "json"), member)
    return folder


def table_of(labels: np.ndarray, is_query: np.ndarray | bool = True, is_gallery: np.ndarray | bool = True):
    """Test images of these classes, without paths."""
    columns = {"label": labels, "is_query": is_query, "is_gallery": is_gallery}
    return pd.DataFrame(columns | {"class_name": labels.astype(str)})


def queries_of(other: np.ndarray, own: np.ndarray | None = None) -> pd.DataFrame:
    """A `first_neighbour_table` of queries with these similarities, right where the own class is more similar."""
    own = np.zeros_like(other) if own is None else own
    return pd.DataFrame({"own": own, "other": other, "right": own > other}).astype({"own": "f4", "other": "f4"})


def write_colored_run(folder: Path, like: Path, member_embeddings: list[np.ndarray], *arguments, **options) -> Path:
    """As `write_run`, at `folder`/run, and the test images, each of one of IMAGE_COLORS, in `folder`/data/colors."""
    run = write_run(folder / "run", like, member_embeddings, *arguments, data_name="colors", **options)
    (folder / "data" / "colors").mkdir(parents=True)
    for number, color in enumerate(IMAGE_COLORS):
        Image.new("RGB", (30, 20), tuple(color.tolist())).save(folder / "data" / "colors" / f"{number}.png")
    return run


def copy_run(run: Path, folder: Path) -> Path:
    """A copy of a run folder that may be changed, without what retrieve.py wrote."""
    return Path(shutil.copytree(run, folder, ignore=lambda *_: ["retrieval"]))


def embed_files(ensemble: Ensemble, files: list[Path]) -> list[np.ndarray]:
    """The members' embeddings of image files, `(N, d)` each: all images in one batch."""
    images = [resize_test(load_rgb(file), ensemble.image_spec) for file in files]
    rows = ensemble(torch.from_numpy(np.stack(images)))
    return [member.numpy() for member in rows.chunk(len(ensemble.members), dim=1)]


class ColorEnsemble:
    """In the place of an `Ensemble` of one member where only the embeddings' way counts: an image's mean colour.

    Counts the images of each batch. As in a network, the last bits hang on the whole batch.
    """

    image_spec = ImageSpec(8)
    members = (None,)

    def __init__(self):
        self.batches = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        colors = images.float().mean((1, 2))
        return nn.functional.normalize(torch.cat([colors - 120, colors[:, :1] * 0.5], 1) + 1e-6 * colors.mean())


def save_colors(folder: Path, names: list[str], seed: int = 0) -> None:
    """Small images, each of its own random colour."""
    for name, color in zip(names, np.random.default_rng(seed).integers(0, 256, (len(names), 3)), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), tuple(color.tolist())).save(folder / name)


def index_rows(place: Path) -> dict[str, dict]:
    """The rows of the index of a photo folder, by path, read with LanceDB's own API. Each path has one row."""
    import lancedb

    rows = lancedb.connect(place).open_table("photos").to_arrow().to_pylist()
    found = {row["path"]: row for row in rows}
    assert len(found) == len(rows)
    return found


PHOTO_NAMES = [f"{number}.png" for number in range(3)]
PHOTO_NAMES += [f"{name}/{n:02d}.png" for name in ("ant", "bee", "bee/hive", "bee hive", "cat") for n in range(9)]


class Indexed:
    """A photo folder, its index, and the ensemble that embeds it."""

    def __init__(self, folder: Path):
        self.photos, self.place, self.ensemble = folder / "photos", folder / "index", ColorEnsemble()
        save_colors(self.photos, PHOTO_NAMES)

    def index(self, model: str = "m" * 64) -> PhotoIndex:
        return PhotoIndex(self.photos, self.place, model)

    def refresh(self) -> int:
        """How many photos were embedded."""
        return self.index().refresh(self.ensemble, self.ensemble.image_spec)

    def check(self) -> None:
        """The index is what the folder says."""
        rows = index_rows(self.place)
        files = {str(path.relative_to(self.photos)): path for path in self.photos.rglob("*.png")}
        assert rows.keys() == files.keys()
        for name, file in files.items():
            stat, row = file.stat(), rows[name]
            assert (row["size"], row["mtime"], row["hash"]) == (stat.st_size, stat.st_mtime_ns, sha256(file))
            assert row["class"] == (name.rpartition("/")[0] or None)
        vectors = embed_files(ColorEnsemble(), list(files.values()))[0]
        np.testing.assert_allclose([rows[name]["vector"] for name in files], vectors, atol=1e-3)


def refused(capsys, script, *arguments: str | Path) -> str:
    """Runs a script that has to refuse its arguments. Returns the one line that it says."""
    capsys.readouterr()
    assert script.main([str(argument) for argument in arguments]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "Traceback" not in line
    return line


# ------------------------------------------------------------------------------------------------ training


class SmallNetwork(nn.Module):
    """In the place of a ResNet where a test asks nothing of it: its layers' names and order, a thousandth of its time.

    As in a ResNet on small images, BatchNorm sees one value of an image, and cannot do with one image.
    """

    def __init__(self, num_meta_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 5, stride=4)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.bn1 = nn.BatchNorm2d(16)
        self.fc = Head(16, num_meta_classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bn1(self.avgpool(self.relu(self.conv1(pixels)))).flatten(1))


def build_small_model(backbone: str, num_meta_classes: int, weights: dict | None) -> SmallNetwork:
    """In the place of `model.build_model`."""
    network = SmallNetwork(num_meta_classes)
    if weights is not None:
        network.load_state_dict(weights | {f"fc.{name}": value for name, value in network.fc.state_dict().items()})
    return network.to(memory_format=torch.channels_last)


class Payload:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def train_tiny(data: Path, results: Path, *options: str) -> int:
    """Runs train.py with the options TINY; those given here override them."""
    return train.main([*TINY, "--data_path", str(data), "--results_path", str(results), *options])


def only_folder(results: Path) -> Path:
    """The one run folder."""
    (folder,) = (path for path in results.iterdir() if path.is_dir())
    return folder


def digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    """File name -> checksum."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


def edit_record(path: Path, *keys: str, value: object) -> None:
    """Changes one entry of a record, whose checksum fits again."""
    record = read_record(path)
    inner = record
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    write_record(path, record)
