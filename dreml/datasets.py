"""The data sets that are known by name: Cars196, CUB-200-2011, Stanford Online Products, In-Shop Clothes.

A new one is a function that lists its images and one entry of PUBLISHED.
"""

import itertools
import posixpath
import zlib
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from dreml.cache import Holdout
from dreml.cli import InputError, is_utf8, one_line
from dreml.lists import (
    Entry,
    Listing,
    list_csv,
    list_image_folder,
    some,
    sort_images,
    subfolders,
    text_rows,
    what_was_meant,
)
from dreml.workers import worker_pool

LAYOUTS = {
    "car": "cars_annos.mat and car_ims/, or the devkit: cars_train/, cars_test/, devkit/cars_train_annos.mat and "
    "cars_test_annos_withlabels.mat",
    "cub": "images.txt, image_class_labels.txt and images/ (CUB-200-2011)",
    "sop": "Ebay_train.txt, Ebay_test.txt and *_final/ (Stanford Online Products)",
    "isc": "list_eval_partition.txt and img/ (In-Shop Clothes Retrieval of DeepFashion)",
    "NAME": "train/ and test/, with a folder of images for each class, or images.csv with the columns path,label,split",
}
ALL_LAYOUTS = "\n".join(f"  data/{name}/  {layout}" for name, layout in LAYOUTS.items())
ALL_LAYOUTS += "\nThe README says where to get them. Without any: python data_utils.py --data_name demo"


class UnknownLayout(InputError):
    """A folder that holds no data set in a layout that is known for its name."""


# ------------------------------------------------------------------------------------------------ Cars196


def list_car(root: Path, prefix: str) -> Listing | None:
    """List Cars196: `cars_annos.mat` with `car_ims/`, or the devkit with `cars_train/` and `cars_test/`."""
    listing = Listing()
    single = root / "cars_annos.mat"
    devkit = find_car_devkit(root)
    if single.is_file() and (root / "car_ims").is_dir():
        tables = [(single, "relative_im_path", prefix)]
        names_file = single
    elif devkit is not None:
        tables = car_devkit_tables(root, prefix, devkit, listing)
        names_file = devkit.with_name("cars_meta.mat")
    elif single.is_file():
        listing.problems.append(f"{root / 'car_ims'}: missing folder")
        return listing
    else:
        return None
    try:
        names = in_own_process(read_car_names, names_file)
        for table, path_field, folder in tables:
            rows = in_own_process(read_car_annotations, table, path_field)
            for number, (path, class_id) in enumerate(rows, 1):
                name = names.get(class_id, str(class_id))
                entry = Entry(folder + path, class_id, name, split_of("car", class_id))
                add_numbered(listing, "car", f"{table}, entry {number}", entry, path)
    except InputError as error:
        listing.problems.append(str(error))
    return listing


def find_car_devkit(root: Path) -> Path | None:
    """The devkit's annotation file of `cars_train/`. Its archive may be unpacked one folder deeper."""
    devkit = first_existing(root / "devkit" / "cars_train_annos.mat", root / "cars_train_annos.mat")
    if devkit is None and (root / "cars_train").is_dir():
        devkit = first_existing(*sorted(root.glob("*/devkit/*_train_annos.mat")), *root.glob("*/*_train_annos.mat"))
    return devkit


def car_devkit_tables(root: Path, prefix: str, devkit: Path, listing: Listing) -> list[tuple[Path, str, str]]:
    """The devkit's annotation files, each with the field of its image names and the folder of its images."""
    labelled = first_existing(
        *(folder / "cars_test_annos_withlabels.mat" for folder in (devkit.parent, devkit.parent.parent, root))
    )
    if labelled is None:
        listing.problems.append(
            f"{devkit.with_name('cars_test_annos_withlabels.mat')}: missing (cars_test_annos.mat has no labels: "
            "the file needed is cars_test_annos_withlabels.mat)"
        )
    tables = []
    for table, part in ((devkit, "cars_train"), (labelled, "cars_test")):
        nested = f"{part}/{part}" if (root / part / part).is_dir() else part
        if table is not None:
            tables.append((table, "fname", f"{prefix}{nested}/"))
    return tables


def in_own_process(read: Callable, path: Path, *args: object) -> object:
    """Return read(path, *args), called in another process: a damaged .mat file can crash scipy 1.17's reader."""
    try:
        with worker_pool(1) as pool:
            return pool.submit(read, path, *args).result()
    except BrokenProcessPool:
        raise InputError(f"{path}: not a readable Cars196 annotation file (it crashes scipy's reader)") from None


def read_car_annotations(path: Path, path_field: str = "fname") -> list[tuple[str, int]]:
    """The (image path, class id) pairs of one of Cars196's annotation files.

    Raises InputError if it cannot be read or has no labels.
    """
    import scipy.io  # takes long, and other data sets do without it

    try:
        annotations = np.ravel(scipy.io.loadmat(path)["annotations"])
        fields = annotations.dtype.names
        if not fields or "class" in fields:
            return [(str(row[path_field].item()), int(row["class"].item())) for row in annotations]
    except Exception as error:  # scipy raises a dozen kinds for a damaged, empty, HTML or version 7.3 file
        raise InputError(f"{path}: not a readable Cars196 annotation file ({one_line(error)})") from None
    raise InputError(f"{path}: has no labels; the file needed is cars_test_annos_withlabels.mat")


def read_car_names(path: Path) -> dict[int, str]:
    """Class id -> name, from the `class_names` of a .mat file. Empty if they cannot be read: the ids will do."""
    import scipy.io

    try:
        class_names = np.ravel(scipy.io.loadmat(path, variable_names=["class_names"])["class_names"])
        names = {class_id: str(name.item()) for class_id, name in enumerate(class_names, 1)}
    except Exception:  # as above; where the labels are in the same file, reading them says what is wrong
        return {}
    return {class_id: name for class_id, name in names.items() if name and is_utf8(name)}


# ------------------------------------------------------------------------------------------------ CUB, SOP, In-Shop


def list_cub(root: Path, prefix: str) -> Listing | None:
    """List CUB-200-2011: `images.txt` ("id path") and `image_class_labels.txt` ("id class")."""
    if not (root / "images.txt").is_file():
        return None
    listing = Listing()
    classes: dict[str, int] = {}
    for where, (image_id, class_id) in text_rows(root / "image_class_labels.txt", 2, listing):
        if not is_number(class_id):
            listing.problems.append(f"{where}: malformed line: {class_id!r} is no class id")
        elif image_id in classes:
            listing.problems.append(f"{where}: image id {image_id} stands in the list twice")
        else:
            classes[image_id] = int(class_id)
    seen = set()
    for where, (image_id, path) in text_rows(root / "images.txt", 2, listing):
        if image_id in seen:
            listing.problems.append(f"{where}: image id {image_id} stands in the list twice")
        elif image_id not in classes:
            listing.problems.append(f"{where}: image {image_id} has no class in image_class_labels.txt")
        else:
            class_id = classes[image_id]
            class_name = path.split("/")[0]
            entry = Entry(f"{prefix}images/{path}", class_id, class_name, split_of("cub", class_id))
            add_numbered(listing, "cub", where, entry, path)
        seen.add(image_id)
    return listing


def list_sop(root: Path, prefix: str) -> Listing | None:
    """List Stanford Online Products: `Ebay_train.txt` and `Ebay_test.txt`, "image class super_class path" in a row."""
    if not (root / "Ebay_train.txt").is_file() and not (root / "Ebay_test.txt").is_file():
        return None
    listing = Listing()
    for split in ("train", "test"):
        rows = text_rows(root / f"Ebay_{split}.txt", 4, listing)
        header = next(rows, None)
        if header is not None and header[1][0] != "image_id":
            listing.problems.append(f"{header[0]}: the header 'image_id class_id super_class_id path' is missing")
        for where, (_, class_id, _, path) in rows:
            if is_number(class_id):
                entry = Entry(prefix + path, int(class_id), class_id, split)
                add_numbered(listing, "sop", where, entry, path)
            else:
                listing.problems.append(f"{where}: malformed line: {class_id!r} is no class id")
    return listing


def list_isc(root: Path, prefix: str) -> Listing | None:
    """List In-Shop Clothes: `list_eval_partition.txt`, a count, a header, then "image item status", and `img/`."""
    name = "list_eval_partition.txt"
    path = first_existing(root / name, root / "Eval" / name, root / "Anno" / name)
    if path is None:
        return None
    listing = Listing()
    if (root / "Img" / "img").is_dir():  # where the original archives put them
        prefix += "Img/"
    rows = text_rows(path, 3, listing, skip=1)
    header = next(rows, None)
    if header is not None and header[1][0] != "image_name":
        listing.problems.append(f"{header[0]}: the header 'image_name item_id evaluation_status' is missing")
    for where, (image, item, status) in rows:
        if status in ("train", "query", "gallery"):
            split = "train" if status == "train" else "test"
            entry = Entry(prefix + image, item, item, split, status != "gallery", status != "query")
            listing.add(where, entry, image)
        else:
            listing.problems.append(f"{where}: {status!r} is not one of train, query, gallery")
    return listing


# ------------------------------------------------------------------------------------------------ what is published


class Published(NamedTuple):
    """What is known of a data set: how its lists are read, its class ids, counts and channel statistics."""

    list_images: Callable[[Path, str], Listing | None]
    last_train_class: int | None  # classes 1..this train, the others test; None: the lists say
    num_classes: int | None  # class ids are 1..this; None: they are names
    counts: dict[str, tuple[int, int]]  # split, or part of the test split -> classes, images
    mean: tuple[float, float, float]  # docs/METHOD.md
    std: tuple[float, float, float]
    recalls: tuple[int, ...] = (1, 2, 4, 8)  # the K of Recall@K that the papers on it report


PUBLISHED = {
    "car": Published(
        list_car,
        last_train_class=98,
        num_classes=196,
        counts={"train": (98, 8054), "test": (98, 8131)},
        mean=(0.4853, 0.4965, 0.4295),
        std=(0.2237, 0.2193, 0.2568),
    ),
    "cub": Published(
        list_cub,
        last_train_class=100,
        num_classes=200,
        counts={"train": (100, 5864), "test": (100, 5924)},
        mean=(0.4707, 0.4601, 0.4549),
        std=(0.2767, 0.2760, 0.2850),
    ),
    "sop": Published(
        list_sop,
        last_train_class=None,
        num_classes=22634,
        counts={"train": (11318, 59551), "test": (11316, 60502)},
        mean=(0.5807, 0.5396, 0.5044),
        std=(0.2901, 0.2974, 0.3095),
    ),
    "isc": Published(
        list_isc,
        last_train_class=None,
        num_classes=None,
        counts={"train": (3997, 25882), "test": (3985, 26830), "query": (3985, 14218), "gallery": (3985, 12612)},
        mean=(0.8324, 0.8109, 0.8041),
        std=(0.2206, 0.2378, 0.2444),
        recalls=(1, 10, 20, 30),
    ),
}


def default_recalls(data_name: str) -> list[int]:
    """The K of Recall@K that the papers on a data set report."""
    if data_name in PUBLISHED:
        return list(PUBLISHED[data_name].recalls)
    return list(Published._field_defaults["recalls"])


# ------------------------------------------------------------------------------------------------ any data set


class RawDataSet(NamedTuple):
    """The images that a raw data set lists, and what is wrong with the lists."""

    images: pd.DataFrame  # see Listing.table
    problems: list[str]
    warnings: list[str]


def list_data_set(name: str, folder: Path) -> RawDataSet:
    """List the images of the raw data set in `folder` (data/NAME), training images first, sorted by class.

    Raises UnknownLayout if the folder has not the layout that its name asks for, InputError if it nearly has. Problems
    with single lines and paths are collected; that the images exist is checked when they are opened.
    """
    data_set = read_lists(name, folder)
    check_whole(data_set, name)
    return data_set


def read_lists(name: str, folder: Path) -> RawDataSet:
    """Find and read the lists of a raw data set. Raises as `list_data_set` does."""
    if name in PUBLISHED:
        readers = [PUBLISHED[name].list_images]
        roots = [folder, *subfolders(folder)]  # archives unpack one deeper
    else:
        readers = [list_csv, list_image_folder]  # images.csv counts: beside it, train/ may just be where images lie
        roots = [folder]
    for root, list_images in itertools.product(roots, readers):
        listing = list_images(root, f"{root.relative_to(folder).as_posix()}/" if root != folder else "")
        if listing is not None:
            return RawDataSet(listing.table(), listing.problems, listing.warnings)
    if name not in PUBLISHED:
        raise UnknownLayout(f"{folder}: {what_was_meant(folder)}")
    hint = "; for images of your own, choose another name" if (folder / "train").is_dir() else ""
    raise UnknownLayout(f"{folder} holds no {name}; expected is {LAYOUTS[name]}{hint}")


def hold_out(data_set: RawDataSet, holdout: Holdout) -> RawDataSet:
    """Divide the training images of a data set by class into a training and a test split.

    The images of the true test split are left out. Raises InputError if a split would have fewer than two classes.
    """
    images = data_set.images[data_set.images["split"] == "train"].copy()
    labels = images["label"].cat.remove_unused_categories().cat.categories  # in order
    num_held_out = round(holdout.share * len(labels))
    if num_held_out < 2 or len(labels) - num_held_out < 2:
        raise InputError(
            f"--holdout {holdout.share:g} of {len(labels)} training classes leaves {len(labels) - num_held_out} to "
            f"train on and {num_held_out} to test on; it takes at least two of each"
        )
    order = np.random.default_rng((holdout.seed, zlib.crc32(b"holdout"))).permutation(len(labels))
    held_out = images["label"].isin(labels[order[:num_held_out]])
    images.loc[held_out, "split"] = "test"
    return data_set._replace(images=sort_images(images))


def check_whole(data_set: RawDataSet, name: str) -> None:
    """Add the problems and warnings that only the whole list of a data set shows."""
    images, problems, warnings = data_set
    is_test = images["split"] == "test"
    labels = {"train": images["label"][~is_test], "test": images["label"][is_test]}
    both = sorted(set(labels["train"].unique()) & set(labels["test"].unique()))
    if both:
        shown = ", ".join(map(str, both[:3])) + (", …" if len(both) > 3 else "")
        warnings.append(
            f"classes in both train and test: {len(both)} ({shown}); Recall@K is meant for classes that were not "
            "trained on"
        )
    for split, reports in (("train", warnings), ("test", problems)):  # a test image would find itself
        repeated = repeated_paths(images["path"][images["split"] == split])
        if repeated:
            reports.append(f"{len(repeated)} {split} images are listed more than once, such as {repeated[0]}")
    if name not in PUBLISHED:
        warn_of_single_images(images, warnings)
    for part, found in count_images(images).items():
        if found[1] == 0 and part == "test" and name not in PUBLISHED and not problems:
            warnings.append("no test images: all classes are trained on, and nothing can be measured")
        elif found[1] == 0 and not problems:
            problems.append(f"the {part} split has no images")
        published = PUBLISHED[name].counts.get(part, found) if name in PUBLISHED else found
        if found != published:
            numbers = "{:,} and {:,}".format(*published)
            warnings.append(f"{part}: {found[0]:,} classes and {found[1]:,} images, published are {numbers}")


def warn_of_single_images(images: pd.DataFrame, warnings: list[str]) -> None:
    """Add a warning of the classes of one image."""
    for split, why in (("train", "one image teaches little"), ("test", "as a query it can only miss")):
        of_split = images[["label", "class_name"]][images["split"] == split]
        single = of_split["class_name"][~of_split["label"].duplicated(keep=False)].tolist()
        if single:
            warnings.append(f"{split}: classes of one image: {some(single)}; {why}: add some, or leave it out")


def repeated_paths(paths: pd.Series) -> list[str]:
    """The paths that stand in a list more than once, however they are written."""
    # Found by hashes, 8 bytes each: the texts themselves would take 100.
    hashes = np.fromiter((hash(posixpath.normpath(path)) for path in paths), np.int64, len(paths))
    suspects = paths[pd.Series(hashes).duplicated(keep=False).to_numpy()].map(posixpath.normpath)
    return suspects[suspects.duplicated()].unique().tolist()


def count_images(images: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """Count split -> (classes, images). "query" and "gallery" are counted too, unless all test images are both."""
    is_test = images["split"] == "test"
    parts = {"train": ~is_test, "test": is_test}
    if not (images["is_query"] & images["is_gallery"])[is_test].all():
        parts["query"] = is_test & images["is_query"]
        parts["gallery"] = is_test & images["is_gallery"]
    return {part: (images["label"][rows].nunique(), int(rows.sum())) for part, rows in parts.items()}


def split_of(data_set: str, class_id: int) -> str:
    """The split of a class, for a data set whose first classes train and whose others test."""
    return "train" if class_id <= PUBLISHED[data_set].last_train_class else "test"


def add_numbered(listing: Listing, data_set: str, where: str, entry: Entry, path: str) -> None:
    """Add one image of a data set whose classes are numbers, or a problem if there is no such class."""
    num_classes = PUBLISHED[data_set].num_classes
    if 1 <= entry.label <= num_classes:
        listing.add(where, entry, path)
    else:
        listing.problems.append(f"{where}: class id {entry.label} is out of range 1..{num_classes}")


def first_existing(*paths: Path) -> Path | None:
    """The first of these files that exists."""
    return next((path for path in paths if path.is_file()), None)


def is_number(text: str) -> bool:
    """Whether a field of a list is a class id or a count."""
    return text.isascii() and text.isdigit() and len(text) < 10
