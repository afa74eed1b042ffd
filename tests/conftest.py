"""Tiny data sets for the tests, drawn or written in the real raw formats. No network, no GPU."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

import data_utils
import train

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # real data beside the checkout, where there is any
TINY = ["--data_name", "tiny", "--image_size", "32", "--weights", "none", "--lr", "1e-3", "--device", "cpu"]
TINY += [
    "--num_epochs",
    "2",
    "--batch_size",
    "16",
    "--meta_class_size",
    "3",
    "--ensemble_size",
    "2",
    "--recalls",
    "1,4",
    "--precision",  # the same on every machine
    "fp32",
]


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A data folder with the drawn set `tiny`, 6 + 6 classes of 6 images, cached at 32 pixels. Not to be changed."""
    data = tmp_path_factory.mktemp("data")
    data_utils.draw_demo(data / "tiny", num_classes=6, images_per_class=6, image_side=40)
    assert data_utils.main(["--data_path", str(data), "--data_name", "tiny", "--image_size", "32"]) == 0
    return data


@pytest.fixture(scope="session")
def tiny_run(tiny_data, tmp_path_factory) -> Path:
    """The run folder of two members trained on `tiny`. Not to be changed."""
    results = tmp_path_factory.mktemp("results")
    assert train.main([*TINY, "--data_path", str(tiny_data), "--results_path", str(results)]) == 0
    (folder,) = (path for path in results.iterdir() if path.is_dir())
    return folder


@pytest.fixture(scope="session")
def pooled_run(tiny_data, tiny_run, tmp_path_factory) -> Path:
    """A copy of `tiny_run` with the pooled features of its members. Not to be changed."""
    folder = tmp_path_factory.mktemp("pooled") / tiny_run.name
    shutil.copytree(tiny_run, folder)
    options = ["--data_path", str(tiny_data), "--results_path", str(folder.parent), "--embedding", "pooled"]
    assert train.main([*TINY, *options]) == 0
    return folder


def random_image(seed: int = 0, width: int = 40, height: int = 36) -> Image.Image:
    """A smooth random RGB image, so that a resize has something to interpolate."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def save_image(path: Path, seed: int = 0, **kwargs) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    random_image(seed, **kwargs).save(path)


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
    scipy.io.savemat(path, {"annotations": annotations})


CAR_CLASSES = (1, 1, 98, 98, 99, 99, 196, 196)  # the ends of both splits, two images each


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
    labelled = root / ("." if labels_beside else "devkit") / "cars_test_annos_withlabels.mat"
    write_car_annotations(labelled, "fname", rows[1::2])
    write_car_annotations(root / "devkit" / "cars_test_annos.mat", "fname", [(path, None) for path, _ in rows[1::2]])
    names = np.array([[f"Car {class_id}" for class_id in range(1, 197)]], dtype=object)
    scipy.io.savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    for number, (path, _) in enumerate(rows):
        part = "cars_train" if number % 2 == 0 else "cars_test"
        save_image(root / (f"{part}/{part}" if nested else part) / path, number)


def write_cub(root: Path) -> None:
    """images.txt, image_class_labels.txt and images/; classes 1, 100 | 101, 200."""
    images, labels = [], []
    for number, class_id in enumerate((1, 1, 100, 100, 101, 101, 200, 200), 1):
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


def jpeg_bytes(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    random_image(seed).save(buffer, "JPEG")
    return buffer.getvalue()
