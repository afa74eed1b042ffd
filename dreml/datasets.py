"""The data sets that are known by name: Cars196, CUB-200-2011, Stanford Online Products, In-Shop Clothes.

A new one is a function that lists its images and one entry of PUBLISHED. Classes are sorted by their names, so numbers
need leading zeros.
"""

import csv
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from dreml.cli import InputError, counted, format_problems, one_line
from dreml.files import atomic_open, writable
from dreml.lists import Listing, UnknownLayout, list_csv, list_image_folder, subfolders, text_rows

OTHER_LAYOUT = "train/ and test/ with a folder of images for each class, or images.csv with columns path,label,split"
OTHER_DATA_PATH = "--data_path (a folder of your own there, with links in it to what is in this one)"  # if read-only


def list_car(root: Path) -> Listing | None:
    """List Cars196: `cars_annos.mat` with `car_ims/`, or the devkit, anywhere, with `cars_train/` and `cars_test/`."""
    listing = Listing(root)
    if (root / "cars_annos.mat").is_file() and (root / "car_ims").is_dir():
        add_cars(listing, root / "cars_annos.mat", "relative_im_path", "")
    elif (root / "cars_train").is_dir():
        for part, name in (("cars_train", "cars_train_annos.mat"), ("cars_test", "cars_test_annos_withlabels.mat")):
            file = min(root.rglob(name), default=root / "devkit" / name)
            nested = f"{part}/{part}/" if (root / part / part).is_dir() else f"{part}/"
            add_cars(listing, file, "fname", nested)
    else:
        return None
    return listing


def add_cars(listing: Listing, file: Path, path_field: str, folder: str) -> None:
    """Add the images of one of Cars196's annotation files, whose paths are relative to `folder`."""
    import scipy.io  # takes long, and other data sets do without it

    if not file.is_file():
        listing.problems.append(f"{file}: missing file")
        return
    try:
        content = scipy.io.loadmat(file)
        names_file = next(listing.root.rglob("cars_meta.mat"), None)  # of the devkit
        names = np.ravel((scipy.io.loadmat(names_file) if names_file else content).get("class_names", []))
        annotations = np.ravel(content["annotations"])
        rows = [(str(row[path_field].item()), int(row["class"].item())) for row in annotations]
    except Exception as error:  # scipy raises a dozen kinds for a damaged, empty, HTML or version 7.3 file
        listing.problems.append(f"{file}: not a readable Cars196 annotation file with labels ({one_line(error)})")
        return
    for number, (path, class_id) in enumerate(rows, 1):
        split = "train" if class_id <= 98 else "test"
        label = f"{class_id:03d} {names[class_id - 1].item()}" if class_id <= len(names) else f"{class_id:03d}"
        listing.add_line(f"{file}, entry {number}", folder + path, label, split)


def list_cub(root: Path) -> Listing | None:
    """List CUB-200-2011: `images.txt` ("id path") and `image_class_labels.txt` ("id class")."""
    if not (root / "images.txt").is_file():
        return None
    listing = Listing(root)
    classes = dict(fields for _, fields in text_rows(root / "image_class_labels.txt", 2, listing))
    for where, (image_id, path) in text_rows(root / "images.txt", 2, listing):
        class_id = classes.get(image_id, "missing")
        if class_id.isdecimal():
            split = "train" if int(class_id) <= 100 else "test"
            listing.add_line(where, f"images/{path}", path.split("/")[0], split)
        else:
            listing.problems.append(f"{where}: its class in image_class_labels.txt is {class_id}")
    return listing


def list_sop(root: Path) -> Listing | None:
    """List Stanford Online Products: `Ebay_train.txt` and `Ebay_test.txt`, a header, "image class super_class path"."""
    if not (root / "Ebay_train.txt").is_file() and not (root / "Ebay_test.txt").is_file():
        return None
    listing = Listing(root)
    for split in ("train", "test"):
        for where, (_, class_id, _, path) in text_rows(root / f"Ebay_{split}.txt", 4, listing, skip=1):
            listing.add_line(where, path, class_id.zfill(5), split)
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
            listing.add_line(where, folder + image, item, split, status != "gallery", status != "query")
        else:
            listing.problems.append(f"{where}: {status!r} is not one of train, query, gallery")
    return listing


class Published(NamedTuple):
    """What is known of a data set: how its lists are read, its counts and channel statistics."""

    list_images: Callable[[Path], Listing | None]
    layout: str  # the files that it takes
    counts: dict[str, tuple[int, int]]  # split, or part of the test split -> classes, images
    mean: tuple[float, float, float]  # docs/METHOD.md
    std: tuple[float, float, float]


PUBLISHED = {
    "car": Published(
        list_car,
        "cars_annos.mat and car_ims/, or the devkit: cars_train/, cars_test/, devkit/cars_train_annos.mat and "
        "cars_test_annos_withlabels.mat",
        counts={"train": (98, 8054), "test": (98, 8131)},
        mean=(0.4853, 0.4965, 0.4295),
        std=(0.2237, 0.2193, 0.2568),
    ),
    "cub": Published(
        list_cub,
        "images.txt, image_class_labels.txt and images/ (CUB-200-2011)",
        counts={"train": (100, 5864), "test": (100, 5924)},
        mean=(0.4707, 0.4601, 0.4549),
        std=(0.2767, 0.2760, 0.2850),
    ),
    "sop": Published(
        list_sop,
        "Ebay_train.txt, Ebay_test.txt and *_final/ (Stanford Online Products)",
        counts={"train": (11318, 59551), "test": (11316, 60502)},
        mean=(0.5807, 0.5396, 0.5044),
        std=(0.2901, 0.2974, 0.3095),
    ),
    "isc": Published(
        list_isc,
        "list_eval_partition.txt and img/ (In-Shop Clothes Retrieval of DeepFashion)",
        counts={"train": (3997, 25882), "test": (3985, 26830), "query": (3985, 14218), "gallery": (3985, 12612)},
        mean=(0.8324, 0.8109, 0.8041),
        std=(0.2206, 0.2378, 0.2444),
    ),
}


def list_data_set(name: str, folder: Path) -> pd.DataFrame:
    """List the raw data set in `folder` (data/NAME), see `Listing.table`. Paths are relative to the folder.

    Prints warnings. Raises UnknownLayout if the folder has not the layout that its name asks for, InputError with all
    problems of its lists. That the images exist is checked when they are opened.
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
                images = listing.table()
                listing.columns.clear()  # a million images take much memory
                if root != folder:
                    images["path"] = f"{root.name}/" + images["path"]
                check_whole(listing, images, name)
                return images
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    hint = "; for images of your own, choose another name" if is_known and (folder / "train").is_dir() else ""
    raise UnknownLayout(f"{folder} holds no {name}: expected is {layout}; found: {found}{hint}")


def hold_out(data_path: Path, name: str, share: float, seed: int) -> str:
    """Make the data set NAME_holdout, or NAME_holdout3 with seed 3, and return its name.

    Its images.csv lists the training images of NAME. A random share of their classes is its test split. A link in its
    folder leads to the images. Caches of another share are no longer valid. Raises InputError if a split would have
    fewer than two classes, or if something else has that name.
    """
    images = list_data_set(name, data_path / name)
    images = images[images["split"] == "train"]
    labels = images["label"].cat.remove_unused_categories().cat.categories  # in order
    num_held_out = round(share * len(labels))
    num_left = len(labels) - num_held_out
    if num_held_out < 2 or num_left < 2:
        raise InputError(
            f"--holdout {share:g} of {len(labels)} training classes leaves {num_left} to train on and "
            f"{num_held_out} to test on; it takes at least two of each"
        )
    for text in [*labels, *images["path"]]:
        if text != text.strip() or "\\" in text:
            raise InputError(f"{name}: a holdout cannot list {text!r}: rename it (spaces at its ends, a backslash)")
    order = np.random.default_rng((seed, zlib.crc32(b"holdout"))).permutation(len(labels))
    is_held_out = images["label"].isin(labels[order[:num_held_out]])
    columns = {"path": f"{name}/" + images["path"], "label": images["label"]}
    table = pd.DataFrame(columns | {"split": np.where(is_held_out, "test", "train")})
    text = table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_ALL)  # also a carriage return in a name

    folder = data_path / f"{name}_holdout{seed or ''}"
    link = folder / name
    path = folder / "images.csv"
    others = [each.name for each in folder.glob("[!.]*") if not each.name.startswith("cache_")]
    if others and not link.is_symlink():
        raise InputError(f"{folder} is there already, and was not made by --holdout: remove or rename it")
    if path.exists() and path.read_bytes() == text.encode():
        return folder.name
    with writable(folder, OTHER_DATA_PATH):
        if not link.is_symlink():
            link.symlink_to(Path("..", name), target_is_directory=True)
        for meta in folder.glob("cache_*/meta.json"):
            meta.unlink(missing_ok=True)  # of another share
        with atomic_open(path) as file:
            file.write(text)
    return folder.name


def check_whole(listing: Listing, images: pd.DataFrame, name: str) -> None:
    """Print the warnings and refuse the problems of a list, with those that only the whole list shows."""
    warnings = listing.warnings
    problems = listing.problems
    labels = {}
    for split, reports in (("train", warnings), ("test", problems)):  # a test image would find itself
        of_split = images[images["split"] == split]
        repeated = of_split["path"][of_split["path"].duplicated()].unique()
        if len(repeated):
            reports.append(f"{counted(len(repeated), f'{split} image')} listed more than once, such as {repeated[0]}")
        labels[split] = set(of_split["label"])
    both = labels["train"] & labels["test"]
    if both:
        what = "Recall@K is meant for classes that were not trained on"
        warnings.append(f"classes in both train and test: {len(both):,}, such as {min(both)!r}; {what}")
    published = PUBLISHED[name].counts if name in PUBLISHED else {}
    for part, found in count_images(images).items():
        if found[1] == 0 and not problems:
            if part == "test" and not published:
                warnings.append("no test images: all classes are trained on, and nothing can be measured")
            else:
                problems.append(f"the {part} split has no images")
        if found != published.get(part, found):
            numbers = "{:,} and {:,}".format(*published[part])
            warnings.append(f"{part}: {found[0]:,} classes and {found[1]:,} images, published are {numbers}")
    for warning in warnings:
        print(f"{name}: warning: {warning}", file=sys.stderr)
    refuse(name, problems)


def refuse(name: str, problems: list[str], remedy: str = "") -> None:
    """Raise InputError if a data set has problems."""
    if problems:
        what = counted(len(problems), "problem")
        raise InputError(f"{name}: {what}, nothing written{remedy}:{format_problems(problems)}")


def count_images(images: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """Count split -> (classes, images). "query" and "gallery" are counted too, unless all test images are both."""
    is_test = images["split"] == "test"
    parts = {"train": ~is_test, "test": is_test}
    if not (images["is_query"] & images["is_gallery"])[is_test].all():
        parts["query"] = is_test & images["is_query"]
        parts["gallery"] = is_test & images["is_gallery"]
    return {part: (images["label"][rows].nunique(), int(rows.sum())) for part, rows in parts.items()}
