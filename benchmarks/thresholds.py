"""How well do the thresholds of "none of these" hold?

    python -m benchmarks.thresholds results/RUN                            from the saved embeddings of the test split
    python -m benchmarks.thresholds results/RUN --elsewhere photos other   and for 100 images of each of these folders

Three tables. 1: thresholds estimated on a random half of the test classes, used on the other half. 2: thresholds
estimated in a random half and a tenth of the gallery, used in all of it, and the reverse. 3: the share of images
of something else, drawn noise and drawn screens among them, for which the whole test gallery would have an answer.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from benchmarks.plain import hardware
from dreml.console import DEVICE_HELP, Parser, natural_number, pick_device, progress_bar, run_main
from dreml.data.images import resize_test
from dreml.runs.folder import TestSplit, read_run
from dreml.runs.settings import EMBEDDINGS
from dreml.search import embed_batch, embed_images, folder_items, nearest, unit_rows
from dreml.thresholds import FARS, accepted_share, found_share, threshold_at
from model import Ensemble, load_ensemble
from utils import TIE_TOLERANCE, best_similarities

BATCH_SIZE = 128
PARTS = (0.5, 0.1)  # of the gallery

# ------------------------------------------------------------------------------------------------ similarities


class Best(NamedTuple):
    """Each query's similarity to the nearest image of another class, and to that of its own, `(queries,)`."""

    others: torch.Tensor
    own: torch.Tensor


def best_of(rows: torch.Tensor, split: TestSplit, queries: torch.Tensor, gallery: torch.Tensor) -> Best:
    """The similarities of these queries in this gallery, both `(M,) bool` and within the split's own."""
    masks = {"is_query": split.is_query & queries, "is_gallery": split.is_gallery & gallery}
    others, own = best_similarities(rows, split.labels, **masks)
    return Best(others[0], own[0])


def class_halves(labels: torch.Tensor, repeats: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random halves of the classes, as masks `(M,) bool` of their images; each half comes first once."""
    names = torch.unique(labels).numpy()
    for repeat in range(repeats):
        chosen = np.random.default_rng(repeat).permutation(names)[: len(names) // 2]
        first = torch.from_numpy(np.isin(labels.numpy(), chosen))
        yield first, ~first
        yield ~first, first


def random_part(mask: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """A random share of the images of a mask."""
    places = torch.nonzero(mask)[:, 0].numpy()
    chosen = np.random.default_rng(seed).permutation(places)[: max(1, round(share * len(places)))]
    part = torch.zeros_like(mask)
    part[torch.from_numpy(chosen)] = True
    return part


# ------------------------------------------------------------------------------------------------ tables


def percent(value: float) -> str:
    """A share in percent, with three digits."""
    return f"{100 * value:.3g} %"


def spread(values: list[float], text=percent) -> str:
    """The mean of some measurements and their range."""
    return f"{text(float(np.mean(values)))} ({text(min(values))} – {text(max(values))})"


def table(title: str, *names: str) -> None:
    """Prints the head of a table."""
    print(f"\n{title}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)


def line(*cells: str) -> None:
    """Prints a row of a table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def other_half(rows: torch.Tensor, split: TestSplit, repeats: int) -> None:
    """Table 1."""
    pairs = []
    for here, there in progress_bar(class_halves(split.labels, repeats), "halves", 2 * repeats, " halves"):
        pairs.append((best_of(rows, split, here, here), best_of(rows, split, there, there)))
    title = f"Thresholds of one half of the classes, used on the other half, {len(pairs)} times: mean (least – most)"
    table(title, "FAR asked", "FAR on the other half", "within a factor of 2", "found, same half", "found, other half")
    for far in FARS:
        accepted, found, found_here = [], [], []
        for here, there in pairs:
            threshold = threshold_at(here.others, far)
            if threshold is not None:
                accepted.append(accepted_share(there.others, threshold))
                found.append(found_share(*there, threshold, TIE_TOLERANCE))
                found_here.append(found_share(*here, threshold, TIE_TOLERANCE))
        if accepted:
            close = np.mean([far / 2 <= share <= 2 * far for share in accepted])
            line(percent(far), spread(accepted), percent(close), spread(found_here), spread(found))
        else:
            line(percent(far), "too few queries", "", "", "")


def gallery_sizes(rows: torch.Tensor, split: TestSplit, repeats: int) -> None:
    """Table 2."""
    every = torch.ones_like(split.is_query)
    whole, num_gallery = best_of(rows, split, every, every), int(split.is_gallery.sum())
    names = ("FAR asked", "images", "threshold", "FAR of the whole gallery's threshold", "FAR in the whole gallery")
    table(f"Random parts of the gallery, all queries, {repeats} parts of each size: mean (least – most)", *names)
    for share in PARTS:
        parts = [random_part(split.is_gallery, share, seed) for seed in range(repeats)]
        best = [best_of(rows, split, every, part) for part in progress_bar(parts, "parts", repeats, " parts")]
        for far in FARS:
            threshold = threshold_at(whole.others, far)
            of_parts = [threshold_at(of_part.others, far) for of_part in best]
            if threshold is None or None in of_parts:
                continue
            if share == PARTS[0]:
                line(percent(far), f"{num_gallery:,}", f"{threshold:.4f}", percent(far), percent(far))
            used = spread([accepted_share(of_part.others, threshold) for of_part in best])
            back = spread([accepted_share(whole.others, value) for value in of_parts])
            line(percent(far), f"{int(parts[0].sum()):,}", spread(of_parts, "{:.4f}".format), used, back)


def elsewhere(rows: torch.Tensor, split: TestSplit, queries: dict[str, torch.Tensor]) -> None:
    """Table 3. `queries`: name -> embeddings of images of something else."""
    every = torch.ones_like(split.is_query)
    whole, gallery = best_of(rows, split, every, every), rows[split.is_gallery.to(rows.device)]
    thresholds = {far: threshold_at(whole.others, far) for far in FARS}
    known = {far: value for far, value in thresholds.items() if value is not None}
    names = ("images", "number", "similarity, median (least – most)", *(f"pass FAR {percent(far)}" for far in known))
    table("Images of something else, searched in the whole test gallery", *names)
    found = {name: torch.from_numpy(nearest(of, gallery, 1, [-1] * len(of))[0][:, 0]) for name, of in queries.items()}
    found["all of these"] = torch.cat(list(found.values()))
    found["test queries, another class"] = whole.others
    for name, values in found.items():
        shares = [percent(accepted_share(values, threshold)) for threshold in known.values()]
        similarity = f"{values.median():.4f} ({values.min():.4f} – {values.max():.4f})"
        line(name, f"{len(values):,}", similarity, *shares)


# ------------------------------------------------------------------------------------------------ something else


def draw_noise(generator: np.random.Generator, side: int = 256) -> Image.Image:
    """Random pixels, or random colours blurred to clouds of a random size."""
    image = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
    if generator.random() < 0.5:
        return image
    cells = int(generator.integers(2, 24))
    small = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))


def draw_screen(generator: np.random.Generator, width: int = 480, height: int = 320) -> Image.Image:
    """Something like a screenshot: windows with a bar, lines of text and boxes on a plain background."""

    def color() -> tuple[int, ...]:
        return tuple(generator.integers(0, 256, 3).tolist())

    image = Image.new("RGB", (width, height), color())
    draw = ImageDraw.Draw(image)
    for _ in range(generator.integers(1, 5)):
        left, top = int(generator.integers(0, width // 2)), int(generator.integers(0, height // 2))
        right, bottom = left + int(generator.integers(120, width)), top + int(generator.integers(90, height))
        paper = (255, 255, 255) if generator.random() < 0.7 else (30, 30, 30)
        ink = tuple(255 - value for value in paper)
        draw.rectangle((left, top, right, bottom), fill=paper, outline=color())
        draw.rectangle((left, top, right, top + 14), fill=color())
        for y in range(top + 20, min(bottom - 12, height), 13):
            letters = generator.integers(97, 123, int(generator.integers(3, 40)))
            draw.text((left + 6, y), "".join(map(chr, letters)).replace("e", " "), fill=ink)
        if generator.random() < 0.6:
            x, y = int(generator.integers(left, right - 60)), int(generator.integers(top + 15, bottom - 40))
            draw.rounded_rectangle((x, y, x + 50, y + 24), 5, fill=color())
    return image


def embed_drawn(images: list[Image.Image], ensemble: Ensemble) -> torch.Tensor:
    """The embedding of images in memory, as `embed_images` gives that of files."""
    pixels = np.stack([resize_test(image, ensemble.image_spec) for image in images])
    return torch.cat([embed_batch("drawn", batch, ensemble) for batch in torch.from_numpy(pixels).split(BATCH_SIZE)])


def embed_elsewhere(folders: list[Path], number: int, ensemble: Ensemble) -> dict[str, torch.Tensor]:
    """Name -> the embeddings of at most `number` images: of the drawn kinds, and random ones of each folder."""
    embedded = {}
    for name, draw in (("drawn noise", draw_noise), ("drawn screens", draw_screen)):
        images = [draw(np.random.default_rng(seed)) for seed in range(number)]
        embedded[name] = embed_drawn(images, ensemble)
    for folder in folders:
        items = folder_items("--elsewhere", folder)
        chosen = np.random.default_rng(0).permutation(len(items))[:number]
        embedded[str(folder)] = embed_images("--elsewhere", [items[place] for place in chosen], ensemble, BATCH_SIZE)
    return embedded


# ------------------------------------------------------------------------------------------------ the benchmark


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="-m benchmarks.thresholds", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN_FOLDER", help="a run folder of train.py")
    elsewhere_help = "folders of images of something else"
    add("--elsewhere", nargs="+", type=Path, default=[], metavar="FOLDER", help=elsewhere_help)
    add("--number", type=natural_number, default=100, metavar="N", help="images of each kind (default: 100)")
    add("--num_members", type=natural_number, metavar="L", help="members 1 to L (default: all that are finished)")
    add("--embedding", choices=EMBEDDINGS, default="logits", metavar="E", help="logits (default) or pooled")
    add("--repeats", type=natural_number, default=20, metavar="N", help="random halves, and parts (default: 20)")
    add("--device", default="auto", help=DEVICE_HELP)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    trained = read_run(args.folder, args.num_members)
    trained.require(args.embedding)
    ensemble = load_ensemble(args.folder, device, args.embedding, trained.num_members)
    queries = embed_elsewhere(args.elsewhere, args.number, ensemble)
    rows, split = unit_rows(trained.embeddings(args.embedding, device)), trained.split
    print(f"{args.folder}: {trained.num_members} members, {args.embedding}; {hardware(device)}")
    sizes = f"{int(split.is_query.sum()):,} queries, {int(split.is_gallery.sum()):,} gallery images"
    print(f"test split: {len(torch.unique(split.labels)):,} classes, {sizes}")
    other_half(rows, split, args.repeats)
    gallery_sizes(rows, split, args.repeats)
    elsewhere(rows, split, queries)


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.thresholds", lambda: run(parse_args(argv)), "--device cpu", resumable=False)


if __name__ == "__main__":
    sys.exit(main())
