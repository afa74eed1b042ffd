"""Makes one network from the ensemble of a run: a student that learns what all members say about an image.

    python distill.py results/RUN                              from all members
    python distill.py results/RUN --images photos/ more/       sees unlabelled photos of your own too
    python retrieve.py results/RUN --student --query photo.jpg

The student's output has a block for each member. Members and student are shown the same images, mixed in pairs, and
each block learns to point where its member's logits point. No labels are used, and no test image before the end.
A rerun of the same command goes on with what is missing. Start reading at `run`. More: docs/STUDENT.md.
"""

if __name__ == "__main__":
    import dreml.interrupt  # noqa: F401  (first: Ctrl-C during the imports below)

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from dreml import console
from dreml.backbones import read_weights
from dreml.console import InputError, RunError
from dreml.data.augment import batch_spans, epoch_batches, prepare
from dreml.data.batches import input_memory
from dreml.data.cache import check_unchanged
from dreml.data.known_sets import default_recalls
from dreml.figures.curves import draw_student
from dreml.figures.style import check_matplotlib, drawing, save_figure
from dreml.files import make_folder, write_csv
from dreml.runs import writer
from dreml.runs.checkpoint import SECONDS_BETWEEN_WRITES, Progress
from dreml.runs.folder import Run, read_run
from dreml.runs.settings import EMBEDDINGS, Settings, add_settings, settings_of
from dreml.runs.student import (
    FOLDER,
    START,
    WEIGHTS,
    StudentRecord,
    StudentRun,
    StudentSettings,
    complete_settings,
    kept_text,
    read_student_run,
)
from dreml.stopwatch import Stopwatch
from dreml.unlabelled import OPTION, JoinedImages, find_photos, photos_checksum, removed_at_the_end, store_photos
from model import (
    Compute,
    Ensemble,
    TrainState,
    backbone_weights,
    build_model,
    extract_features,
    load_ensemble,
    load_member,
    unit_blocks,
)
from utils import draws, recall_at_k, similarity_memory

WEIGHT_DECAY = 1e-4
WARM_UP_STEPS = 100  # in which the learning rate rises; at most a quarter of all

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of the student's outputs and the members' answers

# ------------------------------------------------------------------------------------------------ options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = console.Parser(prog="distill.py", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="a run folder of train.py")
    student = parser.add_argument_group("the student (these make another student)")
    add_settings(student, StudentSettings)
    images_help = "also show it the images below these folders, for a deployment; no labels are needed"
    student.add_argument(OPTION, nargs="+", type=Path, default=[], metavar="DIR", help=images_help)
    rest = parser.add_argument_group("the rest").add_argument
    rest("--data_path", type=Path, metavar="DIR", help="data sets (default: as in training)")
    rest("--device", default="auto", help=console.DEVICE_HELP)
    progress_help = f"a progress file each S seconds at most (default: {SECONDS_BETWEEN_WRITES:g})"
    rest("--progress_seconds", type=console.seconds, default=SECONDS_BETWEEN_WRITES, metavar="S", help=progress_help)
    rest("--deterministic", action="store_true", help="same bits each time on CUDA too, if it can; slower")
    args = parser.parse_args(argv)
    if args.batch_size < 2:
        raise InputError("--batch_size has to be at least 2: images are mixed in pairs")
    return args


# ------------------------------------------------------------------------------------------------ one step


def mix(pixels: torch.Tensor, partners: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mixes each image with another one of its batch: weight * image + (1 - weight) * partner (mixup).

    So the members are asked about images unlike those of any class that they have learned. `pixels` is
    `(B, 3, S, S) float32`, `partners` `(B,) int64` the other images' places, `weights` `(B,) float32` in 0..1.
    """
    return pixels[partners].lerp_(pixels, weights[:, None, None, None])  # the partners are a copy already


@torch.no_grad()
def answers_of(teacher: Ensemble, compute: Compute, pixels: torch.Tensor) -> torch.Tensor:
    """What all members say about the images, `(B, L * D) float32`: a block of length 1 / sqrt(L) for each member."""
    with compute.autocast():
        return teacher.embed(pixels)


def block_loss(outputs: torch.Tensor, answers: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """1 - cosine between a block of the student's outputs and its member's answer: the mean over blocks and images."""
    return 1 - (unit_blocks(outputs, num_blocks) * answers).sum(1).mean()


def similarity_loss(outputs: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """For outputs of another width: the squared error of their cosines, between all pairs of images of the batch.

    The cosine of two rows of answers is the mean of the members' cosines.
    """
    rows = F.normalize(outputs, dim=1)
    return (rows @ rows.T - answers @ answers.T).square().mean()


def student_step(
    state: TrainState, compute: Compute, pixels: torch.Tensor, answers: torch.Tensor, loss_of: Loss
) -> torch.Tensor:
    """One step of the student. Returns its loss, `() float32` on the device, for which the host does not wait."""
    with compute.autocast():
        outputs = state.model(pixels)
    loss = loss_of(outputs, answers)
    state.optimizer.zero_grad()
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return loss.detach()


def learning_rate(highest: float, step: int, num_steps: int) -> float:
    """The rate of a step, counted from 0 over all epochs: a linear rise, and a cosine down to 0."""
    warm_up = max(1, min(WARM_UP_STEPS, num_steps // 4))
    return highest * min(1, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / num_steps)) / 2


# ------------------------------------------------------------------------------------------------ the training


@dataclass(frozen=True)
class Lesson:
    """All that a student is made from."""

    of_run: Settings  # size, resize and mirroring of the images are the members'
    settings: StudentSettings
    teacher: Ensemble  # on the device
    images: JoinedImages
    weights: dict[str, torch.Tensor] | None  # initial ones, without those of the last layer; None: drawn
    compute: Compute

    @property
    def loss_of(self) -> Loss:
        return similarity_loss if self.settings.dim else partial(block_loss, num_blocks=self.settings.num_blocks)


def initial_state(lesson: Lesson) -> TrainState:
    """The student before its first step. What `weights` does not fill, at least its last layer, is drawn."""
    settings, device = lesson.settings, lesson.compute.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(draws(settings.seed, 0, 0, "weights").integers(2**63)))
        model = build_model(settings.backbone, settings.width(lesson.of_run), lesson.weights).to(device)
    options = {"lr": settings.lr, "weight_decay": WEIGHT_DECAY, "fused": device.type in ("cuda", "cpu")}
    return TrainState(model, torch.optim.AdamW(model.parameters(), **options), lesson.compute.grad_scaler())


def draw_pairs(
    num_images: int, batch_size: int, draw: Callable[[str], np.random.Generator], device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Partners and weights for each batch of an epoch, see `mix`. They go to the device once an epoch."""
    spans, generator = batch_spans(num_images, batch_size), draw("mix")
    partners = np.concatenate([generator.permutation(stop - start) for start, stop in spans])
    weights = generator.random(num_images, np.float32)
    partners, weights = torch.from_numpy(partners).to(device), torch.from_numpy(weights).to(device)
    return [(partners[start:stop], weights[start:stop]) for start, stop in spans]


def mixed_batches(lesson: Lesson, draw: Callable[[str], np.random.Generator]) -> Iterator[torch.Tensor]:
    """The batches of an epoch, `(B, 3, S, S) float32` on the device: cropped, mirrored, normalised, mixed in pairs."""
    device, num_images, batch_size = lesson.compute.device, len(lesson.images), lesson.settings.batch_size
    settings, no_labels = replace(lesson.of_run, batch_size=batch_size), np.zeros(num_images, np.int64)
    batches = epoch_batches(lesson.images, np.arange(num_images), no_labels, settings, draw, device)
    memory = input_memory(min(batch_size + 1, num_images), settings.image_size, device)
    for batch, pairs in zip(batches, draw_pairs(num_images, batch_size, draw, device), strict=True):
        yield mix(prepare(batch, lesson.teacher.mean, lesson.teacher.std, memory), *pairs)


def train_epoch(state: TrainState, lesson: Lesson, epoch: int) -> dict[str, float]:
    """One epoch of steps, with a progress bar. Returns HISTORY_COLUMNS. Raises RunError if the loss is not finite."""
    settings, compute, num_images = lesson.settings, lesson.compute, len(lesson.images)
    draw = partial(draws, settings.seed, 0, epoch)  # members are counted from 1
    torch.manual_seed(int(draw("dropout").integers(2**63)))  # for networks that have some
    num_steps = len(batch_spans(num_images, settings.batch_size))
    start, watch, total = time.perf_counter(), Stopwatch(compute.device), torch.zeros((), device=compute.device)
    state.model.train()
    bar = console.progress_bar(mixed_batches(lesson, draw), f"epoch {epoch}", num_steps, " batches")
    for step, pixels in enumerate(bar, epoch * num_steps):
        rate = learning_rate(settings.lr, step, num_steps * settings.num_epochs)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        with watch.time("teacher"):
            answers = answers_of(lesson.teacher, compute, pixels)
        with watch.time("student"):
            total += len(pixels) * student_step(state, compute, pixels, answers, lesson.loss_of)
    loss = total.item() / num_images  # waits for the device
    seconds, parts = time.perf_counter() - start, [watch.seconds(name) for name in ("teacher", "student")]
    shares = ", ".join(f"{name} {part / seconds:.0%}" for name, part in zip(("teacher", "student"), parts, strict=True))
    print(f"epoch {epoch}: loss {loss:.4f}, {num_images / seconds:,.0f} images/s ({shares} of the time)", flush=True)
    if not math.isfinite(loss):
        raise RunError(f"epoch {epoch}: the loss is not finite; {compute.overflow_remedy()}")
    result = {"epoch": epoch, "loss": loss, "lr": rate, "seconds": seconds, "images_per_second": num_images / seconds}
    return result | {"teacher_seconds": parts[0], "student_seconds": parts[1]}


def train_student(lesson: Lesson, progress: Progress | None = None) -> tuple[nn.Module, list[dict]]:
    """Trains a student from where `progress` stands. Returns the network after its last epoch, and its history."""
    state, history = initial_state(lesson), []
    earlier = progress.read() if progress else None
    if earlier:
        state.load_state_dict(earlier)
        history = earlier["history"]
        print(f"goes on after epoch {len(history) - 1}", flush=True)
    for epoch in range(len(history), lesson.settings.num_epochs):
        with console.name_interruption(f"epoch {epoch}"):
            history = [*history, train_epoch(state, lesson, epoch)]
        if progress:
            progress.end_of_epoch(state.state_dict(), history=history)
    return state.model, history


# ------------------------------------------------------------------------------------------------ what comes of it


def embed_test_images(
    model: nn.Module, images: np.ndarray, statistics: tuple[torch.Tensor, torch.Tensor], settings: StudentSettings
) -> dict[str, torch.Tensor]:
    """The student's embeddings of the test images, in float32: name -> rows of length 1, `(M, d) float32`."""
    rows, extract = {}, partial(extract_features, model, images, statistics)
    for name in EMBEDDINGS:
        outputs = console.with_less_memory(partial(extract, embedding=name), 2 * settings.batch_size)
        rows[name] = unit_blocks(outputs, settings.num_blocks if name == "logits" else 1)
        if not torch.isfinite(rows[name]).all():
            raise RunError("the student's embedding is not finite; try a lower --lr")
    return rows


def recall_table(student: StudentRun, of_run: Run, device: torch.device) -> pd.DataFrame:
    """Recall@K in percent of the student and of every ensemble size, by logits, and by pooled features if saved.

    Columns: model, embedding, ensemble_size (1 for the student), dimensions, R@K; and `kept`: the first R@K
    as a share of that of all members' logits, in percent.
    """
    split, tables = of_run.split, []
    masks = {"is_query": split.is_query, "is_gallery": split.is_gallery}
    ks = [k for k in default_recalls(of_run.settings.data_name) if k < int(split.is_gallery.sum())]
    for model, run in (("student", student), ("ensemble", of_run)):
        for name in run.saved_embeddings():
            embeddings = run.embeddings(name, device)
            score = partial(recall_at_k, embeddings, split.labels, ks, **masks)
            recalls = console.with_less_memory(lambda size, call=score: call(max_bytes=size), similarity_memory(device))
            widths = np.cumsum([embedding.shape[1] for embedding in embeddings])
            columns = {
                "model": model,
                "embedding": name,
                "ensemble_size": range(1, len(widths) + 1),
                "dimensions": widths,
            }
            columns |= {f"R@{k}": 100 * recall for k, recall in zip(ks, recalls.numpy().T, strict=True)}
            tables.append(pd.DataFrame(columns))
    table = pd.concat(tables, ignore_index=True)
    recall = table.columns[4]
    whole = table[(table.model == "ensemble") & (table.embedding == "logits")][recall].iloc[-1]
    return table.assign(kept=100 * table[recall] / whole)


# ------------------------------------------------------------------------------------------------ the student


def run(args: argparse.Namespace) -> None:
    # 1. The run, its data, the device: whatever can be wrong is found before any training
    check_matplotlib()
    device = console.pick_device(args.device)
    console.set_up_device(device, args.deterministic)
    of_run = read_run(args.folder, args.num_members or None)
    settings = complete_settings(settings_of(args, StudentSettings), of_run)
    data_path = of_run.data_path(args.data_path)
    cache = of_run.read_cache(data_path)
    with writer.run_lock(of_run.folder.resolve()):  # a training that begins removes half-written files there
        writer.verify_once(of_run.folder, cache)
    photos = find_photos(args.images, of_run.test, data_path / of_run.settings.data_name) if args.images else {}
    settings = replace(settings, photos=photos_checksum(photos))

    # 2. The student's folder and what it holds; a second process that wants the same student waits here
    tag, here = settings.tag(of_run.settings), writer.environment(device) | {"deterministic": args.deterministic}
    folder = of_run.folder / f"{FOLDER}{tag}"
    pixels = folder / "photos"
    new = StudentRecord(of_run.record.settings_hash, of_run.weights, settings, {}, [], here, {})
    with writer.run_lock(folder), removed_at_the_end(pixels):
        finished, model = writer.earlier_student(folder, new), None
        what = "is finished" if finished else f"learns from {of_run.num_members} members"
        console.print_text(f"{folder}: {what}; device {here['device']}, {settings.precision}")

        # 3. The training; of a finished student, only what is missing
        with Progress(folder, 0, new.owner, args.progress_seconds) as progress:
            if finished is None:
                images = [cache]
                if photos:  # first: it starts worker processes, which want no CUDA, and may find no good photo
                    images.append(store_photos(photos, pixels, cache))
                    num_photos = len(images[1].array("train_sizes"))
                    new.photos = {"folders": [str(each) for each in args.images], "images": num_photos}
                teacher = load_ensemble(of_run.folder, device, num_members=of_run.num_members)
                weights = backbone_weights(teacher.members[0])
                if settings.weights != START:
                    weights = read_weights(settings.backbone, args.weights or "imagenet")
                make_folder(folder)
                compute = Compute(device, settings.precision)
                compute.keep_weights(teacher)
                lesson = Lesson(of_run.settings, settings, teacher, JoinedImages(images), weights, compute)
                model, new.history = train_student(lesson, progress)
            elif not finished.is_embedded(folder):
                model = load_member(folder / WEIGHTS, settings.backbone, settings.width(of_run.settings)).to(device)
            if model is not None:
                rows = embed_test_images(model, cache.array("test_images"), of_run.statistics(device), settings)
                check_unchanged(cache)
                writer.save_student(folder, finished or new, model, rows)
            progress.remove()

        # 4. What it keeps of the ensemble's recall
        if not len(of_run.test):
            print("no test images: there is no recall")
            return
        table = recall_table(read_student_run(of_run.folder, tag), of_run, device)
        powers = [2**power for power in range(of_run.num_members.bit_length())]
        shown = table[(table.model == "student") | table.ensemble_size.isin([*powers, of_run.num_members])]
        write_csv(folder / "recall.csv", shown, float_format="%.4f")
        with drawing():
            save_figure(draw_student(table), folder, "recall")
    print("\n" + shown.round(2).to_string(index=False))
    print(kept_text(table))
    console.print_text(f"in {folder}")


def main(argv: list[str] | None = None) -> int:
    remedy = "a smaller --batch_size, fewer --num_members, or another --precision"
    return console.run_main("distill.py", lambda: run(parse_args(argv)), remedy)


if __name__ == "__main__":
    sys.exit(main())
