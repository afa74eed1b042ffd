"""A data set of drawn characters, to try everything without a download."""

import math
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dreml.cli import progress_bar
from dreml.files import temporary_name


def draw_demo(folder: Path, num_classes: int = 100, images_per_class: int = 20, image_side: int = 64) -> None:
    """Draw an image folder of handwriting-like characters: `num_classes` to train on and as many unseen ones.

    A character is 2 to 4 random Bezier curves. Each image is that character written anew: the strokes jitter, the whole
    is turned, sheared, scaled and shifted a little, with another pen, ink and paper. The same arguments give the same
    images. The folder appears when it is whole.
    """
    new = temporary_name(folder, "new")
    try:
        for number in progress_bar(range(2 * num_classes), f"drawing {folder.name}", 2 * num_classes, " classes"):
            generator = np.random.default_rng((0, number))
            strokes = [generator.uniform(-0.9, 0.9, (4, 2)) for _ in range(generator.integers(2, 5))]
            class_folder = new / ("train" if number < num_classes else "test") / f"character_{number:03d}"
            class_folder.mkdir(parents=True)
            for image_number in range(images_per_class):
                write_character(strokes, image_side, generator).save(class_folder / f"{image_number:02d}.png")
        os.rename(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_character(strokes: list[np.ndarray], side: int, generator: np.random.Generator) -> Image.Image:
    """One handwritten RGB image of a character, `side` x `side`. A stroke: control points `(4, 2)` in [-1, 1]."""
    angle, shear = generator.normal(0, 0.15, 2)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    affine = turn @ np.array([[1, shear], [0, 1]]) * generator.uniform(0.75, 1.05, 2)
    shift = generator.normal(0, 0.08, 2)
    along = np.linspace(0, 1, 24)[:, None]
    bezier = np.hstack([math.comb(3, k) * along**k * (1 - along) ** (3 - k) for k in range(4)])

    large = 4 * side  # drawn large and reduced: Pillow's lines are not smooth
    canvas = Image.new("L", (large, large))
    draw = ImageDraw.Draw(canvas)
    pen = generator.uniform(0.03, 0.07) * large
    for stroke in strokes:
        points = bezier @ (stroke + generator.normal(0, 0.1, stroke.shape)) @ affine.T + shift
        points = (points * 0.45 + 0.5) * large
        draw.line([tuple(point) for point in points], fill=255, width=round(pen), joint="curve")
        for x, y in (points[0], points[-1]):
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)
    ink_share = np.asarray(canvas.resize((side, side), Image.Resampling.BOX))[..., None] / 255
    paper, ink = generator.uniform(170, 255, 3), generator.uniform(0, 110, 3)
    return Image.fromarray((paper + (ink - paper) * ink_share).round().astype(np.uint8))
