"""Which way of distilling keeps most? Each try is judged by classes that neither teacher nor student has seen.

    python -m benchmarks.distill_search split data/omniglot
    python -m benchmarks.distill_search try results/RUN --mix cutmix --weight_decay 0.01

`split` makes data/omniglot_fifth of links to the training images: a random fifth of their classes is its test split.
data_utils.py and train.py make a teacher of it. `try` makes a student, and adds a row to RUN/distill_search.csv: R@1
and mAP@R there, and the mean cosine to the members' answers. On real data: for the last word, not for choosing.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from benchmarks.plain import hardware
from distill import (
    WEIGHT_DECAY,
    Lesson,
    answers_of,
    block_loss,
    draw_pairs,
    embed_test_images,
    initial_state,
    learning_rate,
    mix,
    similarity_loss,
    student_step,
)
from dreml.backbones import read_weights
from dreml.console import DEVICE_HELP, InputError, Parser, natural_number, pick_device, run_main, set_up_device
from dreml.data.augment import batch_spans, epoch_batches, prepare
from dreml.data.cache import Cache
from dreml.data.known_sets import list_data_set
from dreml.files import write_csv
from dreml.runs.folder import Run, read_run
from dreml.runs.settings import add_settings, settings_of
from dreml.runs.student import START, StudentSettings, complete_settings
from dreml.unlabelled import JoinedImages
from evaluate import score
from model import Compute, Ensemble, backbone_weights, load_ensemble, unit_blocks
from utils import draws

# ------------------------------------------------------------------------------------------------ the split


def split_classes(source: Path) -> Path:
    """Makes the image folder `<source>_fifth` of links to the training images of a data set. Returns it."""
    target = source.with_name(f"{source.name}_fifth")
    if target.exists():
        raise InputError(f"{target} is there already")
    entries = [entry for entry in list_data_set(source.name, source).entries if entry.split == "train"]
    classes = sorted({str(entry.class_key) for entry in entries})
    if len(classes) < 5:
        raise InputError(f"{source} has {len(classes)} training classes, too few to leave a fifth out")
    held_out = set(np.random.default_rng(0).permutation(classes)[: len(classes) // 5].tolist())
    for number, entry in enumerate(entries):
        part = "test" if str(entry.class_key) in held_out else "train"
        link = target / part / str(entry.class_key).replace("/", "_") / f"{number}{Path(entry.path).suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((source / entry.path).resolve())
    print(f"{target}: {len(classes) - len(held_out)} classes to train on, {len(held_out)} to judge by")
    return target


# ------------------------------------------------------------------------------------------------ mixing


class Mixing(NamedTuple):
    """How the images of a batch are mixed, on the device."""

    partners: torch.Tensor  # (B,) int64
    weights: torch.Tensor  # (B,) float32, the share of the image itself
    centres: torch.Tensor  # (B, 2) float32 in 0..1, of cutmix's boxes


def mixup(pixels: torch.Tensor, mixing: Mixing) -> tuple[torch.Tensor, torch.Tensor]:
    """The method's own. Returns the mixed pixels and the share of each image."""
    return mix(pixels, mixing.partners, mixing.weights), mixing.weights


def cutmix(pixels: torch.Tensor, mixing: Mixing) -> tuple[torch.Tensor, torch.Tensor]:
    """A box of the partner, of area 1 - weight where it lies inside, takes the place of that part of the image."""
    size = pixels.shape[3]
    half = size * (1 - mixing.weights[:, None, None]).sqrt() / 2
    offsets = torch.arange(size, device=pixels.device) + 0.5 - size * mixing.centres[:, :, None]  # (B, 2, S)
    inside = offsets.abs() < half
    box = inside[:, 0, :, None] & inside[:, 1, None, :]  # (B, S, S)
    return torch.where(box[:, None], pixels[mixing.partners], pixels), 1 - box.float().mean((1, 2))


def either(pixels: torch.Tensor, mixing: Mixing) -> tuple[torch.Tensor, torch.Tensor]:
    """Every other image of the batch by cutmix, the rest by mixup."""
    by_box = torch.arange(len(pixels), device=pixels.device) % 2 == 0
    (boxed, kept), (mixed, weights) = cutmix(pixels, mixing), mixup(pixels, mixing)
    return torch.where(by_box[:, None, None, None], boxed, mixed), torch.where(by_box, kept, weights)


def unmixed(pixels: torch.Tensor, mixing: Mixing) -> tuple[torch.Tensor, torch.Tensor]:
    """No mixing."""
    return pixels, torch.ones_like(mixing.weights)


MIXERS = {"mixup": mixup, "cutmix": cutmix, "either": either, "none": unmixed}

# ------------------------------------------------------------------------------------------------ targets


def hard_label_loss(outputs: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the members' meta-classes in place of their answers, `(B, L, D)` shares: their mean."""
    blocks = outputs.unflatten(1, answers.shape[1:])
    return F.cross_entropy(blocks.flatten(0, 1), answers.flatten(0, 1))


def relaxed_contrastive_loss(outputs: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Kim et al., "Embedding Transfer with Label Relaxation", CVPR 2021, with sigma and delta 1."""
    rows = F.normalize(outputs, dim=1)
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances / distances.mean(1, keepdim=True).clamp(min=1e-6)
    alike = torch.exp(-torch.cdist(answers, answers).square())
    pairs = alike * distances.square() + (1 - alike) * F.relu(1 - distances).square()
    return pairs.fill_diagonal_(0).sum(1).mean() / max(len(rows) - 1, 1)


class Whitened:
    """In the place of the teacher: its answers, reduced by PCA and whitened, to rows `(B, dim)` of length 1."""

    def __init__(self, teacher: Ensemble, batches: Iterable[torch.Tensor], compute: Compute, dim: int):
        rows = torch.cat([answers_of(teacher, compute, pixels) for pixels in batches])
        self.teacher, self.centre = teacher, rows.mean(0)
        # At most as many directions as there are images, and none that rounding alone has made.
        _, scales, directions = torch.linalg.svd(rows - self.centre, full_matrices=False)
        kept = min(dim, int((scales > 1e-4 * scales[0]).sum()))
        self.projection = (directions[:kept] / scales[:kept, None]).T

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize((self.teacher.embed(pixels) - self.centre) @ self.projection, dim=1)


TARGETS = {
    "blocks": "the members' logits, block by block (the method)",
    "cosines": "only the cosines of their logits",
    "pooled": "only the cosines of their pooled features",
    "contrastive": "those, by the relaxed contrastive loss",
    "pca": "their pooled features, whitened",
    "labels": "the meta-classes of each image in place of their answers",
}
OF_LOGITS = ("blocks", "cosines", "labels")  # the others are of pooled features
OF_BLOCKS = ("blocks", "labels")  # the others have an output of any width
WIDTH = 512  # of theirs, unless --dim says otherwise

# ------------------------------------------------------------------------------------------------ one try


def plain_batches(
    lesson: Lesson, labels: np.ndarray, epoch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Mixing]]:
    """The pixels and labels of each batch of an epoch, and how to mix them: all of it as in distill.py's epoch."""
    device, size = lesson.compute.device, lesson.settings.batch_size
    draw = partial(draws, lesson.settings.seed, 0, epoch)
    settings, generator = replace(lesson.of_run, batch_size=size), draw("cutmix")
    batches = epoch_batches(lesson.images, np.arange(len(labels)), labels, settings, draw, device)
    for batch, pairs in zip(batches, draw_pairs(len(labels), size, draw, device), strict=True):
        centres = torch.from_numpy(generator.random((len(batch.targets), 2), np.float32)).to(device)
        yield prepare(batch, lesson.teacher.mean, lesson.teacher.std), batch.targets, Mixing(*pairs, centres)


def average_weights(teacher: Ensemble) -> dict[str, torch.Tensor]:
    """The mean of the members' weights, without those of their last layers."""
    states = [backbone_weights(member) for member in teacher.members]
    columns = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    return {name: rows.mean(0) if rows.is_floating_point() else rows[0] for name, rows in columns.items()}


def meta_classes(run: Run, device: torch.device) -> torch.Tensor:
    """The meta-classes of every training class, `(classes, L, D) float32`, 1 at each member's own and 0 elsewhere."""
    partitions = [run.members.records[member].partition for member in range(1, run.num_members + 1)]
    return F.one_hot(torch.tensor(partitions).T, run.settings.meta_class_size).float().to(device)


def make_lesson(args: argparse.Namespace, run: Run, cache: Cache, device: torch.device) -> Lesson:
    """The lesson of distill.py, with this try's teacher, width and start."""
    settings = complete_settings(settings_of(args, StudentSettings), run)
    if args.targets not in OF_BLOCKS:
        settings = replace(settings, dim=settings.dim or WIDTH)
    embedding = "logits" if args.targets in OF_LOGITS else "pooled"
    teacher = load_ensemble(run.folder, device, embedding, run.num_members)
    weights = average_weights(teacher) if args.average else backbone_weights(teacher.members[0])
    if settings.weights != START:
        weights = read_weights(settings.backbone, args.weights or "imagenet")
    compute = Compute(device, settings.precision)
    compute.keep_weights(teacher)
    return Lesson(run.settings, settings, teacher, JoinedImages([cache]), weights, compute)


def try_recipe(args: argparse.Namespace, run: Run, cache: Cache, device: torch.device) -> dict:
    """Makes one student. Returns its settings, last loss, scores in percent, see `judge`, and the seconds."""
    start, lesson, labels = time.perf_counter(), make_lesson(args, run, cache, device), cache.array("train_labels")
    settings, teacher, compute = lesson.settings, lesson.teacher, lesson.compute
    losses = {"blocks": partial(block_loss, num_blocks=settings.num_blocks), "labels": hard_label_loss}
    losses |= {"contrastive": relaxed_contrastive_loss, "pca": partial(block_loss, num_blocks=1)}
    loss_of, classes = losses.get(args.targets, similarity_loss), meta_classes(run, device)
    if args.targets == "pca":
        images = (pixels for pixels, _, _ in plain_batches(lesson, labels, 0))
        teacher = Whitened(teacher, images, compute, settings.dim)
        settings = replace(settings, dim=teacher.projection.shape[1])
        lesson = replace(lesson, settings=settings)
    state, num_steps = initial_state(lesson), len(batch_spans(len(labels), settings.batch_size))
    state.optimizer.param_groups[0]["weight_decay"] = args.weight_decay
    for epoch in range(settings.num_epochs):
        torch.manual_seed(int(draws(settings.seed, 0, epoch, "dropout").integers(2**63)))
        total, batches = torch.zeros((), device=device), plain_batches(lesson, labels, epoch)
        state.model.train()
        for step, (pixels, targets, mixing) in enumerate(batches, epoch * num_steps):
            rate = learning_rate(settings.lr, step, num_steps * settings.num_epochs)
            state.optimizer.param_groups[0]["lr"] = rate
            pixels, shares = MIXERS[args.mix](pixels, mixing)
            if args.targets == "labels":
                own = classes[targets]
                answers = torch.lerp(own[mixing.partners], own, shares[:, None, None])
            else:
                answers = answers_of(teacher, compute, pixels)
            total += len(pixels) * student_step(state, compute, pixels, answers, loss_of)
        result = {"epoch": epoch, "loss": total.item() / len(labels)}
        if epoch + 1 == settings.num_epochs or (args.every and (epoch + 1) % args.every == 0):
            rows = embed_test_images(state.model, cache.array("test_images"), run.statistics(device), settings)
            result |= judge(rows, run, settings, device)
        print(", ".join(f"{name} {value:.4g}" for name, value in result.items()), flush=True)
    return asdict(settings) | result | {"seconds": time.perf_counter() - start}


def judge(rows: dict[str, torch.Tensor], run: Run, settings: StudentSettings, device: torch.device) -> dict[str, float]:
    """R@1 and mAP@R of both embeddings in the test split, and the mean cosine of blocks to the members' logits."""
    scores = {}
    for name, embedding in rows.items():
        scores[name], scores[f"{name}_map"], _ = score([embedding], run.split, [1])[0].tolist()
    if settings.dim:
        return scores
    members = unit_blocks(torch.cat(run.embeddings("logits", device), dim=1), run.num_members)
    return scores | {"cosine": 100 * (rows["logits"] * members).sum(1).mean().item()}


def add_row(path: Path, values: dict[str, object]) -> None:
    """Adds a row to a table on disk, which begins with it if there is none."""
    earlier = [pd.read_csv(path)] if path.exists() else []
    write_csv(path, pd.concat([*earlier, pd.DataFrame([values])], ignore_index=True))


# ------------------------------------------------------------------------------------------------ the script


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="-m benchmarks.distill_search", description=__doc__)
    parser.add_argument("what", choices=("split", "try"), help="split a data set, or try one recipe")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of split: data/NAME; of try: a run folder")
    recipe = parser.add_argument_group("the recipe").add_argument
    recipe("--mix", choices=MIXERS, default="mixup", metavar="M", help=f"{', '.join(MIXERS)} (default: mixup)")
    targets_help = f"{', '.join(TARGETS)} (default: blocks)"
    recipe("--targets", choices=TARGETS, default="blocks", metavar="T", help=targets_help)
    decay_help = "weight decay (default: 1e-4)"
    recipe("--weight_decay", type=float, default=WEIGHT_DECAY, metavar="W", help=decay_help)
    recipe("--average", action="store_true", help="begin with the mean of the members' weights")
    add_settings(parser.add_argument_group("the student, as of distill.py"), StudentSettings)
    rest = parser.add_argument_group("the rest").add_argument
    rest("--every", type=natural_number, metavar="N", help="score every N epochs too")
    rest("--data_path", type=Path, metavar="DIR", help="data sets (default: as in training)")
    rest("--device", default="auto", help=DEVICE_HELP)
    args = parser.parse_args(argv)
    if args.dim and args.targets in OF_BLOCKS:
        raise InputError(f"--dim does not go with --targets {args.targets}, whose width is that of the members")
    if args.average and (args.weights or args.backbone):
        raise InputError("--average is a start of its own: it does not go with --weights and --backbone")
    return args


def run(args: argparse.Namespace) -> None:
    if args.what == "split":
        split_classes(args.folder)
        return
    device = pick_device(args.device)
    set_up_device(device, deterministic=False)
    trained = read_run(args.folder, args.num_members or None)
    data_path = trained.data_path(args.data_path)
    cache = trained.read_cache(data_path)
    print(f"{hardware(device)}; {trained.settings.data_name}, {args.targets}: {TARGETS[args.targets]}")
    recipe = {"mix": args.mix, "targets": args.targets, "weight_decay": args.weight_decay, "average": args.average}
    row = recipe | try_recipe(args, trained, cache, device)
    row["ensemble"], row["ensemble_map"], _ = score(trained.embeddings("logits", device), trained.split, [1])[-1]
    path = trained.folder / "distill_search.csv"
    add_row(path, row)
    print(f"R@1 of {trained.num_members} members' logits {row['ensemble']:.2f}; a row more in {path}")


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.distill_search", lambda: run(parse_args(argv)), "a smaller --batch_size", False)


if __name__ == "__main__":
    sys.exit(main())
