"""The drawn data set."""

import numpy as np
from builders import tree
from PIL import Image

from dreml.demo import draw_demo


def test_demo_is_the_same_each_time(tmp_path):
    for name in ("demo", "again"):
        draw_demo(tmp_path / name, num_classes=2, images_per_class=3, image_side=40)
    drawn = tree(tmp_path / "demo")
    assert len(drawn) == 12 and tree(tmp_path / "again") == drawn


def test_demo_images_of_a_class_are_alike_but_never_the_same(tmp_path):
    draw_demo(tmp_path / "demo", num_classes=4, images_per_class=5)
    images = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "demo").glob("*/*/*.png"))])
    assert images.shape == (40, 64, 64, 3) and len({image.tobytes() for image in images}) == 40
    # Ink where it is darker than the middle between a picture's darkest and lightest: the classes show in its overlap.
    grey = images.mean(3).reshape(40, -1)
    ink = (grey < (grey.max(1, keepdims=True) + grey.min(1, keepdims=True)) / 2).astype(float)
    overlap = (ink @ ink.T) / (ink.sum(1)[:, None] + ink.sum(1) - ink @ ink.T)
    labels = np.arange(40) // 5
    same = (labels[:, None] == labels) & ~np.eye(40, dtype=bool)
    assert overlap[same].mean() > 1.5 * overlap[labels[:, None] != labels].mean()
