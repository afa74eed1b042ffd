"""The data sets that are known by name: Cars196, CUB-200-2011, Stanford Online Products, In-Shop Clothes.

A new one is a function that lists its images and one entry of PUBLISHED.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from dreml.cache import Holdout
from dreml.cli import InputError, counted, one_line
from dreml.folders import subfolders
from dreml.lists import Listing, UnknownLayout, list_csv, list_image_folder, sort_images, text_rows

OTHER_LAYOUT = "train/ and test/ with a folder of images for each class, or images.csv with columns path,label,split"


def list_car(root: Path) -> Listing | None:
    """List Cars196: `cars_annos.mat` with `car_ims/`, or the devkit, anywhere, with `cars_train/` and `cars_test/`."""
    names_file = root / "cars_annos.mat"
    if names_file.is_file() and (root / "car_ims").is_dir():
        tables = [(names_file, "relative_im_path", "")]
    elif (root / "cars_train").is_dir():
        tables = []
        for part, name in (("cars_train", "cars_train_annos.mat"), ("cars_test", "cars_test_annos_withlabels.mat")):
            table = min(root.rglob(name), default=root / "devkit" / name)
            nested = f"{part}/{part}/" if (root / part / part).is_dir() else f"{part}/"
            tables.append((table, "fname", nested))
        names_file = tables[0][0].with_name("cars_meta.mat")
    else:
        return None
    listing = Listing(root, class_names=read_car_names(names_file))
    try:
        for table, path_field, folder in tables:
            for number, (path, class_id) in enumerate(read_car_annotations(table, path_field), 1):
                add_numbered(listing, "car", f"{table}, entry {number}", folder + path, class_id)
    except InputError as error:
        listing.problems.append(str(error))
    return listing


def read_car_annotations(path: Path, path_field: str = "fname") -> list[tuple[str, int]]:
    """The (image path, class id) pairs of one of Cars196's annotation files.

    Raises InputError if it cannot be read or has no labels.
    """
    import scipy.io  # takes long, and other data sets do without it

    if not path.is_file():
        raise InputError(f"{path}: missing file")
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
        return {class_id: str(name.item()) for class_id, name in enumerate(class_names, 1)}
    except Exception:  # as above; where the labels are in the same file, reading them says what is wrong
        return {}


def list_cub(root: Path) -> Listing | None:
    """List CUB-200-2011: `images.txt` ("id path") and `image_class_labels.txt` ("id class")."""
    if not (root / "images.txt").is_file():
        return None
    listing = Listing(root)
    classes = dict(fields for _, fields in text_rows(root / "image_class_labels.txt", 2, listing))
    for where, (image_id, path) in text_rows(root / "images.txt", 2, listing):
        if image_id in classes:
            add_numbered(listing, "cub", where, f"images/{path}", classes[image_id], class_name=path.split("/")[0])
        else:
            listing.problems.append(f"{where}: image {image_id} has no class in image_class_labels.txt")
    return listing


def list_sop(root: Path) -> Listing | None:
    """List Stanford Online Products: `Ebay_train.txt` and `Ebay_test.txt`, a header, "image class super_class path"."""
    if not (root / "Ebay_train.txt").is_file() and not (root / "Ebay_test.txt").is_file():
        return None
    listing = Listing(root)
    for split in ("train", "test"):
        for where, (_, class_id, _, path) in text_rows(root / f"Ebay_{split}.txt", 4, listing, skip=1):
            add_numbered(listing, "sop", where, path, class_id, split)
    return listing


def list_isc(root: Path) -> Listing | None:
    """List In-Shop Clothes: `list_eval_partition.txt`, a count, a header, then "image item status", and `img/`."""
    paths = [root / folder / "list_eval_partition.txt" for folder in (".", "Eval", "Anno")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    listing = Listing(root)
    folder = "Img/" if (root / "Img" / "img").is_dir() else ""  # where the original archives put them
    for where, (image, item, status) in text_rows(path, 3, listing, skip=2):
        if status in ("train", "query", "gallery"):
            split = "train" if status == "train" else "test"
            listing.add(where, folder + image, item, split, status != "gallery", status != "query")
        else:
            listing.problems.append(f"{where}: {status!r} is not one of train, query, gallery")
    return listing


def add_numbered(
    listing: Listing, data_set: str, where: str, path: str, class_id: int | str, split: str = "", class_name: str = ""
) -> None:
    """Add one image of a data set whose classes are numbers, or a problem if there is no such class."""
    published = PUBLISHED[data_set]
    if not str(class_id).isdecimal() or not 1 <= int(class_id) <= published.num_classes:
        listing.problems.append(f"{where}: class id {class_id} is not in 1..{published.num_classes}")
        return
    label = int(class_id)
    if class_name:
        listing.class_names[label] = class_name
    listing.add(where, path, label, split or ("train" if label <= published.last_train_class else "test"))


class Published(NamedTuple):
    """What is known of a data set: how its lists are read, its class ids, counts and channel statistics."""

    list_images: Callable[[Path], Listing | None]
    layout: str  # the files that it takes
    last_train_class: int | None  # classes 1..this train, the others test; None: the lists say
    num_classes: int | None  # class ids are 1..this; None: they are names
    counts: dict[str, tuple[int, int]]  # split, or part of the test split -> classes, images
    mean: tuple[float, float, float]  # docs/METHOD.md
    std: tuple[float, float, float]


PUBLISHED = {
    "car": Published(
        list_car,
        "cars_annos.mat and car_ims/, or the devkit: cars_train/, cars_test/, devkit/cars_train_annos.mat and "
        "cars_test_annos_withlabels.mat",
        last_train_class=98,
        num_classes=196,
        counts={"train": (98, 8054), "test": (98, 8131)},
        mean=(0.4853, 0.4965, 0.4295),
        std=(0.2237, 0.2193, 0.2568),
    ),
    "cub": Published(
        list_cub,
        "images.txt, image_class_labels.txt and images/ (CUB-200-2011)",
        last_train_class=100,
        num_classes=200,
        counts={"train": (100, 5864), "test": (100, 5924)},
        mean=(0.4707, 0.4601, 0.4549),
        std=(0.2767, 0.2760, 0.2850),
    ),
    "sop": Published(
        list_sop,
        "Ebay_train.txt, Ebay_test.txt and *_final/ (Stanford Online Products)",
        last_train_class=None,
        num_classes=22634,
        counts={"train": (11318, 59551), "test": (11316, 60502)},
        mean=(0.5807, 0.5396, 0.5044),
        std=(0.2901, 0.2974, 0.3095),
    ),
    "isc": Published(
        list_isc,
        "list_eval_partition.txt and img/ (In-Shop Clothes Retrieval of DeepFashion)",
        last_train_class=None,
        num_classes=None,
        counts={"train": (3997, 25882), "test": (3985, 26830), "query": (3985, 14218), "gallery": (3985, 12612)},
        mean=(0.8324, 0.8109, 0.8041),
        std=(0.2206, 0.2378, 0.2444),
    ),
}


def list_data_set(name: str, folder: Path) -> Listing:
    """List the raw data set in `folder` (data/NAME). `images` is its table, training images first, sorted by class.

    Raises UnknownLayout if the folder has not the layout that its name asks for. Problems with single lines and paths
    are collected; that the images exist is checked when they are opened.
    """
    is_known = name in PUBLISHED
    layout = PUBLISHED[name].layout if is_known else OTHER_LAYOUT
    if not folder.is_dir():
        raise UnknownLayout(f"{folder}: no such folder; expected is {layout}")
    roots = [folder]
    readers = [list_csv, list_image_folder]  # images.csv counts: beside it, train/ may just be where images lie
    if is_known:
        roots += subfolders(folder)  # archives unpack one deeper
        readers = [PUBLISHED[name].list_images]
    for root in roots:
        for list_images in readers:
            listing = list_images(root)
            if listing is not None:
                listing.make_table()
                if root != folder:
                    listing.images["path"] = f"{root.name}/" + listing.images["path"]
                check_whole(listing, name)
                return listing
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    hint = "; for images of your own, choose another name" if is_known and (folder / "train").is_dir() else ""
    raise UnknownLayout(f"{folder} holds no {name}: expected is {layout}; found: {found}{hint}")


def hold_out(data_set: Listing, holdout: Holdout) -> None:
    """Divide the training images of a data set by class into a training and a test split.

    The images of the true test split are left out. Raises InputError if a split would have fewer than two classes.
    """
    images = data_set.images[data_set.images["split"] == "train"].copy()
    labels = images["label"].cat.remove_unused_categories().cat.categories  # in order
    num_held_out = round(holdout.share * len(labels))
    num_left = len(labels) - num_held_out
    if num_held_out < 2 or num_left < 2:
        raise InputError(
            f"--holdout {holdout.share:g} of {len(labels)} training classes leaves {num_left} to train on and "
            f"{num_held_out} to test on; it takes at least two of each"
        )
    order = np.random.default_rng((holdout.seed, zlib.crc32(b"holdout"))).permutation(len(labels))
    held_out = images["label"].isin(labels[order[:num_held_out]])
    images.loc[held_out, "split"] = "test"
    data_set.images = sort_images(images)
    data_set.holdout = holdout.share


def check_whole(data_set: Listing, name: str) -> None:
    """Add the problems and warnings that only the whole list of a data set shows."""
    images = data_set.images
    problems = data_set.problems
    labels = {}
    for split, reports in (("train", data_set.warnings), ("test", problems)):  # a test image would find itself
        of_split = images[images["split"] == split]
        repeated = of_split["path"][of_split["path"].duplicated()].unique()
        if len(repeated):
            reports.append(f"{counted(len(repeated), f'{split} image')} listed more than once, such as {repeated[0]}")
        labels[split] = set(of_split["label"])
    both = labels["train"] & labels["test"]
    if both:
        what = "Recall@K is meant for classes that were not trained on"
        data_set.warnings.append(f"classes in both train and test: {len(both):,}, such as {min(both)!r}; {what}")
    published = PUBLISHED[name].counts if name in PUBLISHED else {}
    for part, found in count_images(images).items():
        if found[1] == 0 and not problems:
            if part == "test" and not published:
                data_set.warnings.append("no test images: all classes are trained on, and nothing can be measured")
            else:
                problems.append(f"the {part} split has no images")
        if found != published.get(part, found):
            numbers = "{:,} and {:,}".format(*published[part])
            data_set.warnings.append(f"{part}: {found[0]:,} classes and {found[1]:,} images, published are {numbers}")


def count_images(images: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """Count split -> (classes, images). "query" and "gallery" are counted too, unless all test images are both."""
    is_test = images["split"] == "test"
    parts = {"train": ~is_test, "test": is_test}
    if not (images["is_query"] & images["is_gallery"])[is_test].all():
        parts["query"] = is_test & images["is_query"]
        parts["gallery"] = is_test & images["is_gallery"]
    return {part: (images["label"][rows].nunique(), int(rows.sum())) for part, rows in parts.items()}
