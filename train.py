"""Train a deep randomized ensemble and log its Recall@K for every ensemble size.

    python train.py --data_name car --num_epochs 20 --ensemble_size 48     after python data_utils.py --data_name car
    python train.py --data_name demo --image_size 32 --weights none --lr 1e-3 --no_flip      small enough for a CPU

Each member is a classifier of its own random partition of the training classes into meta-classes. A rerun of the same
command trains only what is missing; a larger --ensemble_size adds members to the same run folder. Start reading at
`run`, then `train_member`, `train_epoch`, `train_step`.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from dreml import cli
from dreml import run_writer as writer
from dreml.backbones import check_backbone, read_weights, weights_tag
from dreml.baseline import print_baseline, update_baseline
from dreml.batches import Targets, epoch_batches, input_memory, prepare
from dreml.cache import Cache, check_unchanged, read_cache
from dreml.checkpoint import SECONDS_BETWEEN_WRITES, Progress, remove_progress
from dreml.cli import InputError, RunError
from dreml.datasets import default_recalls, warn_of_changes
from dreml.files import make_folder, remove_leftovers
from dreml.optimizers import learning_rate, make_optimizer, with_rates
from dreml.runs import WEIGHTS, MemberRecord, Members, TestSplit, member_path, pooled_path, run_lock
from dreml.settings import ALL_CLASSES, EMBEDDINGS, Settings, add_settings, settings_of
from model import (
    Compute,
    TrainState,
    channel_statistics,
    extract_features,
    initial_model,
    load_member,
    pick_precision,
)
from utils import capped_images, meta_class_partition, rng_for, unmatched_queries

MAX_IMAGES_PER_CLASS = 300  # docs/METHOD.md, step 5: a larger class is cut to a random 300 for each member
SECONDS_BETWEEN_READINGS = 2  # reading the loss makes the host wait for the device

# ------------------------------------------------------------------------------------------------ options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="train.py", description=__doc__)
    add_settings(parser.add_argument_group("the method (these make another run folder)"))
    group = parser.add_argument_group("the rest")
    group.add_argument("--ensemble_size", type=int, default=12, metavar="L", help="members (default: 12)")
    group.add_argument(
        "--members", type=cli.member_list, metavar="I-J", help="only these, such as 13-24 (default: all)"
    )
    recalls_help = "the K of Recall@K (default: 1,2,4,8; of isc 1,10,20,30)"
    group.add_argument("--recalls", type=cli.recall_list, metavar="K,K", help=recalls_help)
    embedding_help = "what is scored: logits (default), or pooled features"
    group.add_argument("--embedding", choices=EMBEDDINGS, default="logits", metavar="E", help=embedding_help)
    data_help = "folder of the data sets (default: data)"
    group.add_argument("--data_path", type=Path, default=Path("data"), metavar="DIR", help=data_help)
    results_help = "folder of the run folders (default: results)"
    group.add_argument("--results_path", type=Path, default=Path("results"), metavar="DIR", help=results_help)
    group.add_argument("--device", default="auto", metavar="DEVICE", help=cli.DEVICE_HELP)
    progress_help = f"seconds between two progress files of a member, at least (default: {SECONDS_BETWEEN_WRITES:g})"
    group.add_argument(
        "--progress_seconds", type=float, default=SECONDS_BETWEEN_WRITES, metavar="S", help=progress_help
    )
    deterministic_help = "the same bits each time on CUDA too, where it can; slower"
    group.add_argument("--deterministic", action="store_true", help=deterministic_help)
    args = parser.parse_args(argv)
    cli.check_ranges(args, ensemble_size=(1, cli.MAX_ENSEMBLE_SIZE), progress_seconds=(0, cli.MANY))
    settings_of(args)
    if args.members and args.members[-1] > args.ensemble_size:
        raise InputError(f"--members {args.members[-1]} is above --ensemble_size {args.ensemble_size}")
    check_backbone(args.backbone, args.image_size)
    args.recalls = args.recalls or default_recalls(args.data_name)
    return args


# ------------------------------------------------------------------------------------------------ one step


@dataclass
class Sums:
    """What an epoch adds up, on the device."""

    loss: torch.Tensor  # () float32, over the images
    correct: torch.Tensor  # () int64, images
    finite_steps: torch.Tensor  # () int64, steps before the first whose loss is not finite
    steps: int = 0

    @classmethod
    def zeros(cls, device: torch.device) -> "Sums":
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        return cls(torch.zeros((), device=device), counts[0], counts[1])


def cross_entropy(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Plain softmax cross-entropy, the mean over the images, `() float32`. Of a mixed image, both targets by share."""
    if isinstance(targets, torch.Tensor):
        return F.cross_entropy(logits, targets)
    own = F.cross_entropy(logits, targets.own, reduction="none")
    partners = F.cross_entropy(logits, targets.partners, reduction="none")
    return (targets.shares * own + (1 - targets.shares) * partners).mean()


def train_step(state: TrainState, compute: Compute, pixels: torch.Tensor, targets: Targets, sums: Sums) -> None:
    """Train one step on meta-classes. The host never waits for the device.

    The backbone computes in `compute.precision`, its head and the loss in fp32.
    """
    with compute.autocast():
        logits = state.model(pixels)
    loss = cross_entropy(logits, targets)
    state.optimizer.zero_grad()
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    loss = loss.detach()
    sums.loss += loss * len(pixels)
    right_answers = targets if isinstance(targets, torch.Tensor) else targets.larger
    sums.correct += (logits.detach().argmax(1) == right_answers).sum()
    sums.finite_steps += torch.isfinite(loss) & (sums.finite_steps == sums.steps)
    sums.steps += 1


def train_epoch(
    state: TrainState,
    compute: Compute,
    batches: Iterable[tuple[torch.Tensor, Targets]],
    num_images: int,
    title: str,
) -> dict[str, float]:
    """Train one epoch: a step for each (pixels, targets) of `batches`, with a progress bar.

    Returns loss (mean over the images), accuracy in percent, correct, images, seconds and images_per_second. Raises
    RunError if a loss was not finite.
    """
    start = time.perf_counter()
    sums = Sums.zeros(compute.device)
    state.model.train()
    with tqdm(
        total=num_images,
        desc=title,
        unit=" images",
        mininterval=SECONDS_BETWEEN_READINGS,
        leave=False,
        disable=True if "WORLD_SIZE" in os.environ else None,  # None: without a terminal
    ) as bar:
        next_reading = start + SECONDS_BETWEEN_READINGS
        for pixels, targets in batches:
            train_step(state, compute, pixels, targets, sums)
            bar.update(len(pixels))
            if not bar.disable and time.perf_counter() > next_reading:
                accuracy = sums.correct.item() / bar.n
                bar.set_postfix(loss=f"{sums.loss.item() / bar.n:.4f}", accuracy=f"{accuracy:.2%}", refresh=False)
                next_reading = time.perf_counter() + SECONDS_BETWEEN_READINGS
    loss = sums.loss.item() / num_images  # waits for the device
    num_correct = sums.correct.item()
    accuracy = 100 * num_correct / num_images
    finite_steps = sums.finite_steps.item()
    seconds = time.perf_counter() - start
    print(f"{title}: loss {loss:.4f}, accuracy {accuracy:.2f}%, {num_images / seconds:,.0f} images/s", flush=True)
    if finite_steps < sums.steps:
        raise RunError(f"{title}, batch {finite_steps}: the loss is not finite; {compute.overflow_remedy()}")
    result = {"loss": loss, "accuracy": accuracy, "correct": num_correct, "images": num_images}
    return result | {"seconds": seconds, "images_per_second": num_images / seconds}


# ------------------------------------------------------------------------------------------------ one member


@dataclass(frozen=True)
class Experiment:
    """What all members of a run share: data, settings, initial weights, device, environment."""

    cache: Cache
    settings: Settings
    weights: dict[str, torch.Tensor] | None  # the backbone's initial weights; None: from scratch
    compute: Compute
    environment: dict[str, str | int | None]
    progress_seconds: float = SECONDS_BETWEEN_WRITES

    @cached_property
    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the data set's channels, `(3,)` each, on the device."""
        return channel_statistics(self.cache.meta, self.compute.device)


def initial_state(experiment: Experiment, member: int) -> TrainState:
    """A member before its first step, on the device."""
    settings, compute = experiment.settings, experiment.compute
    model = initial_model(settings, member, experiment.weights).to(compute.device)
    optimizer = make_optimizer(settings.optimizer, model, settings.lr, compute.device)
    return TrainState(model, optimizer, compute.grad_scaler())


def copy_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict that does not change with the network."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def train_member(
    experiment: Experiment, member: int, title: str, progress: Progress | None = None
) -> tuple[nn.Module, dict]:
    """Train one member (docs/METHOD.md, "One member"), from where `progress` stands.

    Returns the network, on the device, and how it came about: best epoch, history and partition. Its weights are those
    of the epoch with the best training accuracy, counted during the epoch; the earlier one on a tie. For "onecycle" and
    --mixup they are those of the last epoch.
    """
    settings, compute, cache = experiment.settings, experiment.compute, experiment.cache
    labels = cache.array("train_labels")
    num_classes, _ = cache.counts["train"]
    draw_once = partial(rng_for, settings.seed, member, 0)
    partition = meta_class_partition(num_classes, settings.meta_class_size, draw_once("partition"))
    targets = partition[labels]
    images = capped_images(labels, MAX_IMAGES_PER_CLASS, draw_once("cut"))
    state = initial_state(experiment, member)
    history, best_epoch, best_model = [], -1, None
    largest = min(settings.batch_size + 1, len(images))  # 1: see `batch_spans`
    memory = input_memory(largest, settings.image_size, compute.device)
    earlier = progress.read() if progress else None
    if earlier:
        state.load_state_dict(earlier)
        history = earlier["history"]
        best_epoch = earlier["best_epoch"]
        best_model = earlier["best_model"] or copy_weights(state.model)
        del earlier  # its memory
        print(f"{title}: goes on after epoch {len(history) - 1}", flush=True)

    for epoch in range(len(history), settings.num_epochs):
        draw = partial(rng_for, settings.seed, member, epoch)
        torch.manual_seed(int(draw("dropout").integers(2**63)))  # for networks that have some; a ResNet draws nothing
        batches = epoch_batches(cache, images, targets, settings, draw, compute.device)
        prepared = ((prepare(batch, *experiment.statistics, memory), batch.targets) for batch in batches)
        paced = with_rates(prepared, state.optimizer, settings, epoch, len(images))
        result = train_epoch(state, compute, paced, len(images), f"{title} epoch {epoch}")
        history.append({"epoch": epoch, "lr": learning_rate(settings, epoch + 0.5)} | result)
        # The last epoch of "onecycle" has the smallest rates; of mixed images, the accuracy does not say which is best.
        keeps_last = settings.schedule == "onecycle" or settings.mixup
        if best_epoch < 0 or keeps_last or result["correct"] > history[best_epoch]["correct"]:
            best_epoch = epoch
            best_model = copy_weights(state.model)
        if progress:
            other_best = None if best_epoch == epoch else best_model  # None: the same as the model
            done = {"history": history, "best_epoch": best_epoch, "best_model": other_best}
            progress.end_of_epoch(state.state_dict() | done)
    state.model.load_state_dict(best_model)
    return state.model, {"best_epoch": best_epoch, "history": history, "partition": partition.tolist()}


def embed_test_images(experiment: Experiment, model: nn.Module, member: int, embedding: str) -> torch.Tensor:
    """The features of all test images, `(M, d) float32`, in batches twice as large as in training if they fit."""
    images, batch_size = experiment.cache.array("test_images"), 2 * experiment.settings.batch_size
    outputs = extract_features(model, images, experiment.statistics, batch_size, embedding)
    if not torch.isfinite(outputs).all():
        raise RunError(f"member {member}: its embedding is not finite; {experiment.compute.overflow_remedy()}")
    check_unchanged(experiment.cache)
    return outputs


def make_member(experiment: Experiment, members: Members, member: int, embedding: str, title: str) -> str:
    """Train or re-embed one member. The caller holds its lock. Returns a log message."""
    message = "pooled features"
    if member not in members.records:
        record = finish_member(experiment, members, member, title)
        accuracy = record.history[record.best_epoch]["accuracy"]
        message = f"training accuracy {accuracy:.2f} % in epoch {record.best_epoch}"
        members.refresh()
    if embedding == "pooled" and member in members.records:
        pool_member(experiment, members, member)
    return message


def finish_member(experiment: Experiment, members: Members, member: int, title: str) -> MemberRecord:
    """Train, embed and save one member. If only its embedding is damaged, do not train it again."""
    folder, meta = members.folder, experiment.cache.meta
    progress = Progress(folder, member, members.settings_hash, experiment.progress_seconds)
    for leftovers in (member_path(folder, member, "*"), progress.path):
        remove_leftovers(folder, leftovers.name)
    if member in members.not_embedded:
        record = members.not_embedded[member]
        model = load_trained(experiment, members, member)
    else:
        model, result = train_member(experiment, member, title, progress)
        record = MemberRecord(member, members.settings_hash, **result, environment=experiment.environment, sha256={})
    logits = embed_test_images(experiment, model, member, "logits")
    metadata = {"settings": asdict(experiment.settings), "partition": record.partition}
    metadata |= {"mean": meta.mean, "std": meta.std}
    writer.save_member(folder, record, model, logits, metadata)
    remove_progress(folder, member)
    return record


def pool_member(experiment: Experiment, members: Members, member: int) -> None:
    """Make and save the pooled features of one finished member."""
    remove_leftovers(members.folder, pooled_path(members.folder, member, "*").name)
    pooled = embed_test_images(experiment, load_trained(experiment, members, member), member, "pooled")
    writer.save_pooled(members.folder, members.records[member], pooled)


def load_trained(experiment: Experiment, members: Members, member: int) -> nn.Module:
    """The saved network of a member, on the device."""
    return load_member(member_path(members.folder, member, WEIGHTS)).to(experiment.compute.device)


# ------------------------------------------------------------------------------------------------ the ensemble


def run(args: argparse.Namespace) -> None:
    # 1. Options, data and device: whatever can be wrong is found before any training
    settings = settings_of(args)
    cache = read_cache(args.data_path, settings.data_name, settings.image_spec)
    warn_of_changes(cache)
    if settings.meta_class_size == ALL_CLASSES:
        settings = replace(settings, meta_class_size=cache.counts["train"][0])
    split = TestSplit.from_arrays(*(cache.array(f"test_{name}") for name in TestSplit._fields))
    check_counts(settings, args.recalls, cache, split)
    device = cli.pick_device(args.device)
    cli.set_up_device(device, args.deterministic)
    here = writer.environment(device) | {"deterministic": args.deterministic}

    # 2. The run folder and what it holds
    settings = replace(settings, weights=weights_tag(settings.backbone, args.weights))
    folder = args.results_path / settings.run_name()
    whole = range(1, args.ensemble_size + 1)
    wanted = args.members or whole
    make_folder(args.results_path)
    with run_lock(folder):
        earlier = writer.earlier_record(folder)
        if settings.precision == "auto":  # a resumed run keeps its precision
            precision = earlier.settings.precision if earlier else pick_precision(device, settings.backbone)
            settings = replace(settings, precision=precision)
        record = writer.make_run_record(settings, cache, vars(args), here)
        warning = writer.compare_with_earlier(folder, earlier, record)
        members = writer.find_members(folder, earlier, record)
        missing = members.missing(wanted)
        weights = read_weights(settings.backbone, args.weights) if missing else None
        writer.verify_once(folder, cache)
        writer.write_run_record(members, record, cache)
    finished = args.ensemble_size - len(members.missing(whole))
    where = f"device {here['device']}, {settings.precision}"
    print(f"{folder}: {finished} of {args.ensemble_size} members are finished; {where}")
    if missing and warning:
        print(f"warning: {warning}", file=sys.stderr)
    print_exceptions(cache, split, training=bool(missing))
    check_unchanged(cache)

    # 3. The members that are missing, one after the other; other processes may train others of them at the same time
    experiment = Experiment(cache, settings, weights, Compute(device, settings.precision), here, args.progress_seconds)
    if members.records:
        writer.update_logs(members, args.ensemble_size, split, args.recalls, "logits", device)
    if len(split.labels):
        update_baseline(members, settings, args.weights, cache, split, args.recalls, device)
    num_made = 0
    while (locked := members.lock_next_missing(wanted, args.embedding)) is not None:
        member, lock = locked
        start = time.perf_counter()
        title = f"member {member}/{args.ensemble_size}"
        to_train = member not in members.records
        with lock:
            message = make_member(experiment, members, member, args.embedding, title)
        seconds = time.perf_counter() - start
        print(f"{title}: {message}, {seconds:.1f} s")
        if to_train:
            writer.update_logs(members, args.ensemble_size, split, args.recalls, "logits", device)
        members.refresh(args.embedding)
        if members.missing([member], args.embedding):
            raise RunError(f"member {member} was finished, but its files read back otherwise: is the disk sound?")
        num_made += 1
        remaining = len(members.missing(wanted, args.embedding))
        if num_made == 1 and remaining:
            files = f"{'*' if to_train else 'pooled'}_{member:03d}.*"
            writer.print_outlook(folder, files, remaining, seconds)

    # 4. The final recall: the last process to finish computes it
    table, embeddings = writer.update_logs(members, args.ensemble_size, split, args.recalls, args.embedding, device)
    missing = members.missing(whole, args.embedding)
    if missing:
        print(members.unfinished_text(missing, wanted, args.embedding))
        return
    if not len(split.labels):
        print(f"{len(embeddings)} members are finished in {folder}; there are no test images, and so no recall")
        return
    first = args.recalls[:1]
    alone = [writer.recall_percent([embedding], split, first).item() for embedding in embeddings]
    print_baseline(folder, members.settings_hash, table)
    print_recalls(table, alone, writer.recall_log(folder, args.embedding))


def check_counts(settings: Settings, ks: list[int], cache: Cache, split: TestSplit) -> None:
    """Raise InputError for numbers of meta-classes or K that the data set is too small for."""
    num_classes, _ = cache.counts["train"]
    num_gallery = int(split.is_gallery.sum())
    size = settings.meta_class_size
    if num_classes < 2:
        raise InputError(f"{settings.data_name} has {num_classes} training class: telling classes apart needs two")
    if not 2 <= size <= num_classes:
        raise InputError(
            f"--meta_class_size {size} has to be in 2..{num_classes} (training classes), or all: each its own"
        )
    if len(split.labels) and max(ks) >= num_gallery:
        raise InputError(f"--recalls: {max(ks)} is not below the number of gallery images, {num_gallery}")


def print_exceptions(cache: Cache, split: TestSplit, training: bool) -> None:
    """Say which images do not take part as usual: in large classes, outside the gallery, alone in their class."""
    class_sizes = np.bincount(cache.array("train_labels"))
    _, num_images = cache.counts["train"]
    too_large = class_sizes > MAX_IMAGES_PER_CLASS
    if training and too_large.any():
        left_out = int((class_sizes[too_large] - MAX_IMAGES_PER_CLASS).sum())
        print(
            f"{too_large.sum()} classes have more than {MAX_IMAGES_PER_CLASS} images: each member trains on a random "
            f"{MAX_IMAGES_PER_CLASS} of each and leaves out {left_out:,} of {num_images:,} images"
        )
    if not len(split.labels):
        print("no test images: all classes are trained on, and there will be no recall")
    if not (split.is_query & split.is_gallery).all():
        print(f"{int(split.is_query.sum()):,} queries against a gallery of {int(split.is_gallery.sum()):,} images")
    unmatched = int(unmatched_queries(*split).sum())
    if unmatched:
        print(f"{unmatched} queries have no other image of their class in the gallery: they count as misses")


def print_recalls(table: pd.DataFrame, alone: list[float], log: Path) -> None:
    """Print Recall@K of every ensemble size, with that of its last member by itself, and the last row again."""
    print("\n" + table.assign(alone=alone).round(2).to_string(index=False))
    print(f"(alone: {table.columns[1]} of the last member of the row by itself)")
    final = ", ".join(f"{name} {value:.2f}" for name, value in table.iloc[-1, 1:].items())
    print(f"{len(table)} members: {final} in {log}")


def main(argv: list[str] | None = None) -> int:
    remedy = "a smaller --batch_size or --image_size, or another --precision"
    return cli.run_main("train.py", lambda: run(parse_args(argv)), remedy)


if __name__ == "__main__":
    sys.exit(main())
