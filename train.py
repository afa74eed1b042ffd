"""Train a deep randomized ensemble and log its Recall@K for every ensemble size.

    python train.py --data_name car --num_epochs 20 --ensemble_size 48     after python data_utils.py --data_name car
    python train.py --data_name demo --image_size 32 --weights none --lr 1e-3 --no_flip      small enough for a CPU

Each member is a classifier of its own random partition of the training classes into meta-classes. A rerun of the same
command trains only what is missing; a larger --ensemble_size adds members to the same run folder. Start reading at
`run`, then `train_member`, `train_epoch`, `train_step`.
"""

import argparse
import copy
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from dreml import cli, runs
from dreml.backbones import check_backbone, read_weights, weights_tag
from dreml.baseline import map_percent, print_baseline, print_near_copies, update_baseline
from dreml.batches import epoch_batches, input_memory, prepare
from dreml.cache import Cache, default_recalls, read_cache, verify_cache
from dreml.checkpoint import SECONDS_BETWEEN_WRITES, Progress, remove_progress
from dreml.cli import InputError, RunError
from dreml.files import remove_leftovers, writable
from dreml.lists import warn_of_changes
from dreml.optimizers import learning_rate, make_optimizer, with_rates
from dreml.runs import WEIGHTS, MemberRecord, Members, member_path, read_run_record, run_lock
from dreml.settings import ALL_CLASSES, EMBEDDINGS, Settings, add_settings, settings_of
from model import Compute, TrainState, channel_statistics, extract_features, initial_model, load_member, pick_precision
from utils import capped_images, meta_class_partition, rng_for

MAX_IMAGES_PER_CLASS = 300  # docs/METHOD.md, step 5: a larger class is cut to a random 300 for each member
SECONDS_BETWEEN_READINGS = 2  # of the loss, for the progress bar; each reading waits for the device
SECONDS_BETWEEN_LINES = 60  # of log output, without a terminal
TIMED_STEPS = 20  # steps from which the training time is estimated
OVERFLOW_REMEDY = "try a lower --lr, or --precision fp32"
Pair = tuple[torch.Tensor, torch.Tensor]  # a batch: pixels and targets

# ------------------------------------------------------------------------------------------------ options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="train.py", description=__doc__)
    add_settings(parser.add_argument_group("the method (these make another run folder)"))
    group = parser.add_argument_group("the rest")
    group.add_argument("--ensemble_size", type=int, default=12, metavar="L", help="members (default: 12)")
    group.add_argument("--members", type=cli.number_list, metavar="I-J", help="only these, e.g. 13-24 (default: all)")
    recalls_help = "the K of Recall@K (default: 1,2,4,8; of isc 1,10,20,30)"
    group.add_argument("--recalls", type=cli.number_list, metavar="K,K", help=recalls_help)
    embedding_help = "what is scored: logits (default), or pooled features"
    group.add_argument("--embedding", choices=EMBEDDINGS, default="logits", metavar="E", help=embedding_help)
    group.add_argument("--data_path", type=Path, default=Path("data"), metavar="DIR", help="data sets (default: data)")
    results_help = "folder of the run folders (default: results)"
    group.add_argument("--results_path", type=Path, default=Path("results"), metavar="DIR", help=results_help)
    group.add_argument("--device", default="auto", metavar="DEVICE", help=cli.DEVICE_HELP)
    group.add_argument("--threads", type=int, metavar="N", help="cores to compute on (default: all)")
    wait_help = "seconds between two progress files of a member, at least (default: 30)"
    group.add_argument("--progress_seconds", type=float, default=SECONDS_BETWEEN_WRITES, metavar="S", help=wait_help)
    group.add_argument("--deterministic", action="store_true", help="the same bits on CUDA too, where it can; slower")
    args = parser.parse_args(argv)
    cli.check_ranges(args, ensemble_size=(1, cli.MAX_ENSEMBLE_SIZE), progress_seconds=(0, cli.MANY), threads=(1, 1024))
    settings_of(args)
    if args.members and max(args.members) > args.ensemble_size:
        raise InputError(f"--members {max(args.members)} is above --ensemble_size {args.ensemble_size}")
    check_backbone(args.backbone, args.image_size)
    args.recalls = args.recalls or default_recalls(args.data_name)
    return args


# ------------------------------------------------------------------------------------------------ one step


def train_step(
    state: TrainState, compute: Compute, pixels: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one training step. Returns the mean loss `()` and the number of correct predictions `()`, on the device.

    `targets`: see `Batch`. The host never waits. The backbone computes in `compute.precision`, head and loss in fp32.
    """
    with compute.autocast():
        logits = state.model(pixels)
    loss = F.cross_entropy(logits, targets)
    state.optimizer.zero_grad()
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    right_answers = targets if targets.ndim == 1 else targets.argmax(1)  # of a mixed image, the larger share
    return loss.detach(), (logits.detach().argmax(1) == right_answers).sum()


def train_epoch(
    state: TrainState, compute: Compute, batches: Iterable[Pair], num_images: int, title: str
) -> dict[str, float]:
    """Train one epoch, one step per batch. Shows a progress bar or, where that is off, prints a line every minute.

    Returns the epoch's numbers for the history; accuracy is in percent. Raises RunError if a loss was not finite.
    """
    start = time.perf_counter()
    total_loss = torch.zeros((), device=compute.device)
    total_correct = torch.zeros((), dtype=torch.int64, device=compute.device)
    state.model.train()
    is_hidden = True if "WORLD_SIZE" in os.environ else None  # None: without a terminal
    bar = tqdm(total=num_images, desc=title, unit=" images", leave=False, disable=is_hidden)
    bar.mininterval = SECONDS_BETWEEN_READINGS
    interval = SECONDS_BETWEEN_LINES if bar.disable else SECONDS_BETWEEN_READINGS
    next_reading = start + interval
    num_done = 0
    with bar:
        for pixels, targets in batches:
            step_loss, step_correct = train_step(state, compute, pixels, targets)
            total_loss += step_loss * len(pixels)
            total_correct += step_correct
            bar.update(len(pixels))
            num_done += len(pixels)
            if time.perf_counter() > next_reading:
                reading = f"{total_loss.item() / num_done:.4f}"
                if bar.disable:
                    print(f"{title}: {num_done:,} of {num_images:,} images, loss {reading}", flush=True)
                bar.set_postfix(loss=reading, accuracy=f"{total_correct.item() / num_done:.2%}", refresh=False)
                next_reading = time.perf_counter() + interval
    loss = total_loss.item() / num_images  # waits for the device
    num_correct = total_correct.item()
    accuracy = 100 * num_correct / num_images
    seconds = time.perf_counter() - start
    print(f"{title}: loss {loss:.4f}, accuracy {accuracy:.2f}%, {num_images / seconds:,.0f} images/s", flush=True)
    if not math.isfinite(loss):
        raise RunError(f"{title}: the loss is not finite in {compute.precision}; {OVERFLOW_REMEDY}")
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
    num_ahead: int = 0  # members in the time estimate that the first one prints; 0: no estimate

    @cached_property
    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the data set's channels, `(3,)` each, on the device."""
        return channel_statistics(self.cache.meta, self.compute.device)


def initial_state(experiment: Experiment, member: int) -> TrainState:
    """Make a member's network, optimizer and gradient scaler before the first step, on the device."""
    settings, compute = experiment.settings, experiment.compute
    model = initial_model(settings, member, experiment.weights).to(compute.device)
    optimizer = make_optimizer(settings.optimizer, model, settings.lr, compute.device)
    return TrainState(model, optimizer, compute.grad_scaler())


def train_member(
    experiment: Experiment, member: int, title: str, progress: Progress | None = None
) -> tuple[nn.Module, dict]:
    """Train one member (docs/METHOD.md, "One member"). Resumes from the state in `progress`, if there is one.

    Returns the network, on the device, and a dict of best_epoch, history and partition. The weights are from the epoch
    with the best training accuracy, counted during the epoch; on a tie, from the earlier epoch. With "onecycle" or
    --mixup, they are from the last epoch.
    """
    settings, compute, cache = experiment.settings, experiment.compute, experiment.cache
    labels = cache.array("train_labels")
    num_classes, _ = cache.counts["train"]
    draw_once = partial(rng_for, settings.seed, member, 0)
    partition = meta_class_partition(num_classes, settings.meta_class_size, draw_once("partition"))
    targets = partition[labels]
    images = capped_images(labels, MAX_IMAGES_PER_CLASS, draw_once("cut"))
    state = initial_state(experiment, member)
    history = []
    best_epoch = -1
    best_model = None
    largest = min(settings.batch_size + 1, len(images))  # + 1: see `batch_spans`
    memory = input_memory(largest, settings.image_size, compute.device)
    earlier = progress.read() if progress else None
    if earlier:
        state.load_state_dict(earlier)
        history = earlier["history"]
        best_epoch = earlier["best_epoch"]
        best_model = earlier["best_model"] or copy.deepcopy(state.model.state_dict())
        del earlier  # frees its memory
        print(f"{title}: goes on after epoch {len(history) - 1}", flush=True)

    first_epoch = len(history)
    for epoch in range(first_epoch, settings.num_epochs):
        draw = partial(rng_for, settings.seed, member, epoch)
        torch.manual_seed(int(draw("dropout").integers(2**63)))  # for networks with dropout; a ResNet draws nothing
        batches = epoch_batches(cache, images, targets, settings, draw, compute.device)
        prepared = ((prepare(batch, *experiment.statistics, memory), batch.targets) for batch in batches)
        paced = with_rates(prepared, state.optimizer, settings, epoch, len(images))
        if epoch == first_epoch and experiment.num_ahead:
            paced = with_outlook(paced, len(images), settings.num_epochs, experiment.num_ahead)
        result = train_epoch(state, compute, paced, len(images), f"{title} epoch {epoch}")
        history.append({"epoch": epoch, "lr": learning_rate(settings, epoch + 0.5)} | result)
        # "onecycle" ends with the smallest rates. With --mixup, the accuracy does not tell which epoch is best.
        keeps_last = settings.schedule == "onecycle" or settings.mixup
        if best_epoch < 0 or keeps_last or result["correct"] > history[best_epoch]["correct"]:
            best_epoch = epoch
            best_model = copy.deepcopy(state.model.state_dict())
        if progress:
            other_best = None if best_epoch == epoch else best_model  # None: same as the current model
            done = {"history": history, "best_epoch": best_epoch, "best_model": other_best}
            progress.end_of_epoch(state.state_dict() | done)
    state.model.load_state_dict(best_model)
    return state.model, {"best_epoch": best_epoch, "history": history, "partition": partition.tolist()}


def with_outlook(batches: Iterable[Pair], num_images: int, num_epochs: int, num_members: int) -> Iterator[Pair]:
    """Yield the batches of a first epoch. After 20 steps, or all of 2 to 19, print how long the members will take."""
    batches = iter(batches)
    yield next(batches)  # the first step is not timed: it also chooses algorithms
    start = time.perf_counter()
    num_timed = 0
    for pixels, targets in islice(batches, TIMED_STEPS - 1):
        yield pixels, targets  # resumes here after the step
        num_timed += len(pixels)
    if num_timed:
        seconds = (time.perf_counter() - start) / num_timed * num_images * num_epochs
        in_all = f", {cli.duration(num_members * seconds)} in all" if num_members > 1 else ""
        print(f"about {cli.duration(seconds)} a member{in_all}", flush=True)
    yield from batches


def make_member(experiment: Experiment, members: Members, member: int, title: str) -> MemberRecord:
    """Train, embed and save one member. The caller holds its lock. If only embeddings are missing, do not train it."""
    folder = members.folder
    remove_leftovers(folder, f"*_{member:03d}.*")
    record = members.trained(member)
    if record:
        model = load_member(member_path(folder, member, WEIGHTS)).to(experiment.compute.device)
    else:
        progress = Progress(folder, member, members.settings_hash, experiment.progress_seconds)
        model, result = train_member(experiment, member, title, progress)
        record = MemberRecord(member, members.settings_hash, **result, environment=experiment.environment, sha256={})
    test_images = experiment.cache.array("test_images")
    embeddings = extract_features(model, test_images, experiment.statistics, 2 * experiment.settings.batch_size)
    if not all(torch.isfinite(rows).all() for rows in embeddings.values()):
        raise RunError(f"member {member}: its embedding is not finite; {OVERFLOW_REMEDY}")
    meta = experiment.cache.meta
    metadata = {"settings": asdict(experiment.settings), "partition": record.partition}
    metadata |= {"mean": meta.mean, "std": meta.std}
    runs.save_member(folder, record, model, metadata, embeddings)
    remove_progress(folder, member)
    return record


# ------------------------------------------------------------------------------------------------ the ensemble


def run(args: argparse.Namespace) -> None:
    # 1. Options, data and device: errors are found before any training
    settings = settings_of(args)
    cache = read_cache(args.data_path, settings.data_name, settings.image_spec)
    if settings.meta_class_size == ALL_CLASSES:
        settings = replace(settings, meta_class_size=cache.counts["train"][0])
    check_counts(settings, args.recalls, cache)
    device = cli.pick_device(args.device)
    cli.set_up_device(device, args.deterministic, args.threads)
    here = cli.environment(device) | {"deterministic": args.deterministic}

    # 2. The run folder and what it holds
    settings = replace(settings, weights=weights_tag(settings.backbone, args.weights))
    folder = args.results_path / settings.run_name()
    whole = range(1, args.ensemble_size + 1)
    wanted = args.members or whole
    with writable(args.results_path, "--results_path"):
        lock = run_lock(folder)
    with lock:
        earlier = read_run_record(folder) if (folder / "args.json").exists() else None
        if settings.precision == "auto":  # a resumed run keeps its precision
            precision = earlier.settings.precision if earlier else pick_precision(device, settings.backbone)
            settings = replace(settings, precision=precision)
        record = runs.make_run_record(settings, cache, vars(args), here)
        members = runs.open_members(folder, earlier, record)
        missing = members.missing(wanted)
        untrained = [member for member in missing if not members.trained(member)]
        weights = read_weights(settings.backbone, args.weights) if untrained else None
        if missing:  # then pixels are read
            verify_cache(cache)
        test = cache.test_table()
        with writable(args.results_path, "--results_path"):
            runs.write_run_record(members, record, test)
    finished = args.ensemble_size - len(members.missing(whole))
    where = f"device {here['device']}, {settings.precision}"
    print(f"{folder}: {finished} of {cli.counted(args.ensemble_size, 'member')} finished; {where}")
    print_exceptions(cache, test, training=bool(untrained))

    # 3. The missing members, one after the other; other processes may train other members at the same time
    compute = Compute(device, settings.precision)
    experiment = Experiment(cache, settings, weights, compute, here, args.progress_seconds, len(untrained))
    if members.records:
        runs.update_logs(members, args.ensemble_size, test, args.recalls, "logits", device)
    if len(test):
        update_baseline(folder, record, args.weights, cache, test, args.recalls, device)
    while (locked := members.lock_next_missing(wanted)) is not None:
        member, lock = locked
        start = time.perf_counter()
        title = f"member {member}/{args.ensemble_size}"
        with lock:
            made = make_member(experiment, members, member, title)
        best = f"training accuracy {made.history[made.best_epoch]['accuracy']:.2f} % in epoch {made.best_epoch}"
        print(f"{title}: {best}, {time.perf_counter() - start:.1f} s")
        runs.update_logs(members, args.ensemble_size, test, args.recalls, "logits", device)
        if member not in members.records:
            raise RunError(f"member {member} was finished, but its files read back otherwise: is the disk sound?")
        if member in untrained:
            experiment = replace(experiment, num_ahead=0)

    # 4. The final recall: the last process to finish computes it
    table, embeddings = runs.update_logs(members, args.ensemble_size, test, args.recalls, args.embedding, device)
    absent = members.missing(whole)
    if absent:
        numbers = ", ".join(map(str, absent))
        print(f"still missing: member {numbers}; the process that finishes the last one scores")
        return
    if not len(test):
        print(f"{cli.counted(len(embeddings), 'member')} finished in {folder}; there are no test images, so no recall")
        return
    alone = [runs.recall_percent([embedding], test, args.recalls[:1]).item() for embedding in embeddings]
    final = table.tail(1).assign(**map_percent(embeddings, test))
    print_baseline(record, final, args.embedding)
    if missing:  # only after training: it reads all test images
        print_near_copies(embeddings, test, cache.array("test_images"))
    print("\n" + table.assign(alone=alone).round(2).to_string(index=False))
    print(f"(alone: {table.columns[1]} of the last member of the row by itself)")
    scores = ", ".join(f"{name} {value:.2f}" for name, value in final.iloc[0, 1:].items())
    dimensions = sum(embedding.shape[1] for embedding in embeddings)
    size = cli.counted(len(table), "member")
    print(f"{size}: {scores} ({dimensions:,} numbers an image) in {folder}/recall{runs.SUFFIXES[args.embedding]}.csv")


def check_counts(settings: Settings, ks: list[int], cache: Cache) -> None:
    """Raise InputError if the data set is too small for --meta_class_size or --recalls."""
    num_classes, _ = cache.counts["train"]
    num_gallery = cache.array("test_is_gallery").sum()
    size = settings.meta_class_size
    if num_classes < 2:
        raise InputError(f"{settings.data_name} has one training class: telling classes apart needs two")
    if not 2 <= size <= num_classes:
        limits = f"2..{num_classes} (training classes), or all: each its own"
        raise InputError(f"--meta_class_size {size} has to be in {limits}")
    if cache.counts["test"][1] and max(ks) >= num_gallery:
        raise InputError(f"--recalls: {max(ks)} is not below the number of gallery images, {num_gallery}")


def print_exceptions(cache: Cache, test: pd.DataFrame, training: bool) -> None:
    """Print which images do not take part: new ones, in large classes, outside the gallery, alone in their class."""
    warn_of_changes(cache)
    class_sizes = np.bincount(cache.array("train_labels"))
    left_out = int((class_sizes - MAX_IMAGES_PER_CLASS).clip(min=0).sum())
    if training and left_out:
        text = f"each member trains on a random {MAX_IMAGES_PER_CLASS} images of each larger class"
        print(f"{text}, and leaves out {left_out:,} of {class_sizes.sum():,} images")
    if not len(test):
        print("no test images: all classes are trained on, and there will be no recall")
    if not (test.is_query & test.is_gallery).all():
        print(f"{test.is_query.sum():,} queries against a gallery of {test.is_gallery.sum():,} images")
    num_in_gallery = test.is_gallery.groupby(test.label).transform("sum")
    unmatched = (test.is_query & (num_in_gallery == test.is_gallery)).sum()  # none, or only the query itself
    if unmatched:
        print(f"queries without another image of their class in the gallery: {unmatched:,}; they count as misses")


def main(argv: list[str] | None = None) -> int:
    remedy = "a smaller --batch_size or --image_size, or another --precision"
    return cli.run_main("train.py", lambda: run(parse_args(argv)), remedy)


if __name__ == "__main__":
    sys.exit(main())
