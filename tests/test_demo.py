"""The drawn data set."""

import numpy as np
import pytest
from builders import tree
from PIL import Image

from dreml.demo import draw_demo, write_character


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


@pytest.mark.parametrize("seed", range(5))
def test_a_stroke_lies_among_its_control_points(seed):
    """All four are near one place of the lower right: there is ink, but none in the middle and at the edge."""
    image = np.asarray(write_character([np.full((4, 2), 0.6)], 40, np.random.default_rng(seed)))
    is_paper = (image == image[0, 0]).all(2)
    assert not is_paper[22:, 22:].all() and is_paper[:21, :21].all() and is_paper[-1].all() and is_paper[:, -1].all()
