"""Trains a deep randomized ensemble and logs its Recall@K for every ensemble size.

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
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from dreml import baseline, cli
from dreml import run_writer as writer
from dreml.backbones import check_backbone, own_scaling, read_weights, weights_tag
from dreml.batches import Targets, epoch_batches, input_memory, prepare
from dreml.cache import Cache, check_unchanged, read_cache
from dreml.checkpoint import SECONDS_BETWEEN_WRITES, Progress, snapshot
from dreml.cli import InputError, RunError
from dreml.datasets import default_recalls
from dreml.files import make_folder, remove_leftovers, sha256
from dreml.optimizers import learning_rate, make_optimizer, with_rates
from dreml.runs import MemberRecord, Members, TestSplit, member_file
from dreml.settings import ALL_CLASSES, EMBEDDINGS, Settings, add_settings, settings_of
from model import Compute, TrainState, build_model, extract_features, load_member, pick_precision
from utils import capped_images, meta_class_partition, recall_at_k, rng_for, similarity_memory, unmatched_queries

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
    progress_help = f"write a progress file every S seconds at most (default: {SECONDS_BETWEEN_WRITES:g})"
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
    """One step on meta-classes. The host never waits for the device.

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
    """One step for each (pixels, targets) of `batches`, with a progress bar.

    Returns loss (mean over the images), accuracy in percent, correct, images, seconds and images_per_second. Raises
    RunError if a loss was not finite.
    """
    start, sums = time.perf_counter(), Sums.zeros(compute.device)
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
    loss, num_correct, finite_steps = (each.item() for each in (sums.loss, sums.correct, sums.finite_steps))  # waits
    seconds, loss, accuracy = time.perf_counter() - start, loss / num_images, 100 * num_correct / num_images
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
        meta, device = self.cache.meta, self.compute.device
        return torch.tensor(meta.mean, device=device), torch.tensor(meta.std, device=device)


def initial_state(experiment: Experiment, member: int) -> TrainState:
    """A member before its first step. Its head, or all of it without initial weights, is drawn for this member."""
    settings, device = experiment.settings, experiment.compute.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng_for(settings.seed, member, 0, "weights").integers(2**63)))
        model = build_model(settings.backbone, settings.meta_class_size, experiment.weights).to(device)
    optimizer = make_optimizer(settings.optimizer, model, settings.lr, device)
    return TrainState(model, optimizer, experiment.compute.grad_scaler())


def train_member(
    experiment: Experiment, member: int, title: str, progress: Progress | None = None
) -> tuple[nn.Module, dict]:
    """Trains one member (docs/METHOD.md, "One member"), from where `progress` stands.

    Returns the network, on the device, with the weights of the epoch of the best training accuracy (counted during the
    epoch; the earlier one on a tie), or for "onecycle" and --mixup of the last epoch, and how it came about: best
    epoch, history and partition.
    """
    settings, compute, cache = experiment.settings, experiment.compute, experiment.cache
    labels, (num_classes, _) = cache.array("train_labels"), cache.counts["train"]
    draw_once = partial(rng_for, settings.seed, member, 0)
    partition = meta_class_partition(num_classes, settings.meta_class_size, draw_once("partition"))
    targets, images = partition[labels], capped_images(labels, MAX_IMAGES_PER_CLASS, draw_once("cut"))
    state = initial_state(experiment, member)
    history, best_epoch, best_model = [], -1, None
    largest = min(settings.batch_size + 1, len(images))  # 1: see `batch_spans`
    memory = input_memory(largest, settings.image_size, compute.device)
    earlier = progress.read() if progress else None
    if earlier:
        state.load_state_dict(earlier)
        history, best_epoch = earlier["history"], earlier["best_epoch"]
        best_model = earlier["best_model"] or snapshot(state.model.state_dict(), compute.device)
        print(f"{title}: goes on after epoch {len(history) - 1}", flush=True)

    for epoch in range(len(history), settings.num_epochs):
        draw = partial(rng_for, settings.seed, member, epoch)
        torch.manual_seed(int(draw("dropout").integers(2**63)))  # for networks that have some; a ResNet draws nothing
        batches = epoch_batches(cache, images, targets, settings, draw, compute.device)
        prepared = ((prepare(batch, *experiment.statistics, memory), batch.targets) for batch in batches)
        paced = with_rates(prepared, state.optimizer, settings, epoch, len(images))
        result = train_epoch(state, compute, paced, len(images), f"{title} epoch {epoch}")
        history = [*history, {"epoch": epoch, "lr": learning_rate(settings, epoch + 0.5)} | result]
        # The last epoch of "onecycle" has the smallest rates; of mixed images, the accuracy does not say which is best.
        keeps_last = settings.schedule == "onecycle" or settings.mixup
        if best_epoch < 0 or keeps_last or result["correct"] > history[best_epoch]["correct"]:
            best_epoch, best_model = epoch, snapshot(state.model.state_dict(), compute.device)
        if progress:
            other_best = None if best_epoch == epoch else best_model  # None: the same as the model
            progress.end_of_epoch(state.state_dict(), history=history, best_epoch=best_epoch, best_model=other_best)
    state.model.load_state_dict(best_model)
    return state.model, {"best_epoch": best_epoch, "history": history, "partition": partition.tolist()}


def embed_test_images(
    experiment: Experiment, model: nn.Module, title: str, embedding: str, scaling: tuple | None = None
) -> torch.Tensor:
    """The features of all test images, `(M, d) float32`, in batches twice as large as in training if they fit."""
    images, scaling = experiment.cache.array("test_images"), scaling or experiment.statistics

    def extract(batch_size: int) -> torch.Tensor:
        return extract_features(model, images, scaling, batch_size, embedding)

    outputs = cli.with_less_memory(extract, 2 * experiment.settings.batch_size)
    if not torch.isfinite(outputs).all():
        raise RunError(f"{title}: its embedding is not finite; {experiment.compute.overflow_remedy()}")
    return outputs


def make_member(experiment: Experiment, members: Members, member: int, embedding: str, title: str) -> str:
    """Trains, embeds and saves what is missing of one member, whose lock is held. Returns in words what was made."""
    what = "pooled features"
    if member not in members.records:
        record = finish_member(experiment, members, member, title)
        what = f"training accuracy {record.history[record.best_epoch]['accuracy']:.2f} % in epoch {record.best_epoch}"
        members.refresh()
    if embedding == "pooled" and member in members.records:
        pool_member(experiment, members, member)
    return what


def finish_member(experiment: Experiment, members: Members, member: int, title: str) -> MemberRecord:
    """Trains, embeds and saves one member. Returns its record."""
    with Progress(members.folder, member, members.settings_hash, experiment.progress_seconds) as progress:
        for name in (member_file(member, "*"), progress.path.name):
            remove_leftovers(members.folder, name)
        if member in members.not_embedded:
            model, record = load_trained(experiment, members, member), members.not_embedded[member]
        else:
            model, result = train_member(experiment, member, title, progress)
            owner = {"member": member, "run": members.settings_hash, "environment": experiment.environment}
            record = MemberRecord(**owner, **result, sha256={})
        logits = embed_test_images(experiment, model, f"member {member}", "logits")
        check_unchanged(experiment.cache)
        writer.save_member(members.folder, record, model, logits)
        progress.remove()
    return record


def pool_member(experiment: Experiment, members: Members, member: int) -> None:
    """Makes and saves the pooled features of one finished member."""
    remove_leftovers(members.folder, member_file(member, "*", "pooled"))
    weights = members.folder / member_file(member, "pth")
    checksum = sha256(weights)
    if checksum != members.records[member].sha256[weights.name]:
        raise RunError(f"{weights} has changed since this run began; run the same command again")
    pooled = embed_test_images(experiment, load_trained(experiment, members, member), f"member {member}", "pooled")
    check_unchanged(experiment.cache)
    writer.save_pooled(members.folder, member, members.settings_hash, checksum, pooled)


def load_trained(experiment: Experiment, members: Members, member: int) -> nn.Module:
    """The saved network of a member, on the device."""
    path, settings = members.folder / member_file(member, "pth"), experiment.settings
    return load_member(path, settings.backbone, settings.meta_class_size).to(experiment.compute.device)


# ------------------------------------------------------------------------------------------------ the ensemble


def score_baseline(experiment: Experiment, members: Members, split: TestSplit, ks: list[int], weights: str) -> None:
    """Scores, once, what finds images without training: the pooled features of the initial weights, and the colours.

    Pretrained weights see images scaled as they were for them; members are trained on the data set's own scaling.
    """
    backbone = experiment.settings.backbone

    def initial_features() -> torch.Tensor:
        state = experiment.weights if experiment.weights is not None else read_weights(backbone, weights)
        initial = replace(experiment, weights=state)
        scaling = own_scaling(backbone, experiment.compute.device) if initial.weights else None
        return embed_test_images(initial, initial_state(initial, 1).model, "initial network", "pooled", scaling)

    def score(features: torch.Tensor, ks: list[int]) -> np.ndarray:
        return recall_percent([features.to(experiment.compute.device)], split, ks)

    images = experiment.cache.array("test_images")
    baseline.update_baseline(members, images, ks, initial_features, score)


def run(args: argparse.Namespace) -> None:
    # 1. Options, data and device: whatever can be wrong is found before any training
    settings = settings_of(args)
    cache = read_cache(args.data_path, settings.data_name, settings.image_spec)
    if settings.meta_class_size == ALL_CLASSES:
        settings = replace(settings, meta_class_size=cache.counts["train"][0])
    split = TestSplit.from_arrays(*(cache.array(f"test_{name}") for name in TestSplit._fields))
    check_counts(settings, args.recalls, cache, split)
    device = cli.pick_device(args.device)
    cli.set_up_device(device, args.deterministic)
    here = writer.environment(device) | {"deterministic": args.deterministic}

    # 2. The run folder and what it holds
    settings = replace(settings, weights=weights_tag(settings.backbone, args.weights))
    folder, whole = args.results_path / settings.run_name(), range(1, args.ensemble_size + 1)
    wanted = args.members or whole
    make_folder(args.results_path)
    with writer.run_lock(folder):
        earlier = writer.earlier_record(folder)
        if settings.precision == "auto":  # a run goes on, or is scored, as it was begun, on any device
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
    table_of = partial(recall_table, split, args.recalls)
    score = partial(writer.update_logs, members, args.ensemble_size, device, table_of)
    if members.records:
        score("logits")
    if len(split.labels):
        score_baseline(experiment, members, split, args.recalls, args.weights)
    num_made = 0
    while (locked := members.lock_next_missing(wanted, args.embedding)) is not None:
        (member, lock), start = locked, time.perf_counter()
        title, to_train = f"member {member}/{args.ensemble_size}", member not in members.records
        with lock:
            what = make_member(experiment, members, member, args.embedding, title)
        seconds = time.perf_counter() - start
        print(f"{title}: {what}, {seconds:.1f} s")
        if to_train:
            score("logits")
        members.refresh(args.embedding)
        if members.missing([member], args.embedding):
            raise RunError(f"member {member} was finished, but its files read back otherwise: is the disk sound?")
        num_made, remaining = num_made + 1, len(members.missing(wanted, args.embedding))
        if num_made == 1 and remaining:
            writer.print_outlook(folder, member_file(member, "*", "*" if to_train else "pooled"), remaining, seconds)

    # 4. The final recall: the process that finds all members finished computes it
    table, embeddings = score(args.embedding)
    missing = members.missing(whole, args.embedding)
    if missing:
        print(members.unfinished_text(missing, wanted, args.embedding))
        return
    if not len(split.labels):
        print(f"{len(embeddings)} members are finished in {folder}; there are no test images, and so no recall")
        return
    alone = [recall_percent([embedding], split, args.recalls[:1]).item() for embedding in embeddings]
    baseline.print_baseline(folder, members.settings_hash, table)
    print("\n" + table.assign(alone=alone).round(2).to_string(index=False))
    print(f"(alone: R@{args.recalls[0]} of the last member of the row by itself)")
    final = ", ".join(f"{name} {value:.2f}" for name, value in table.iloc[-1, 1:].items())
    print(f"{len(embeddings)} members: {final} in {writer.recall_log(folder, args.embedding)}")


def check_counts(settings: Settings, ks: list[int], cache: Cache, split: TestSplit) -> None:
    """Raises InputError for numbers of meta-classes or K that the data set is too small for."""
    (num_classes, _), num_gallery = cache.counts["train"], int(split.is_gallery.sum())
    if not 2 <= (size := settings.meta_class_size) <= num_classes:
        raise InputError(
            f"--meta_class_size {size} has to be in 2..{num_classes} (training classes), or all: each its own"
        )
    if len(split.labels) and max(ks) >= num_gallery:
        raise InputError(f"--recalls: {max(ks)} is not below the number of gallery images, {num_gallery}")


def print_exceptions(cache: Cache, split: TestSplit, training: bool) -> None:
    """Says which images do not take part as usual: in large classes, outside the gallery, alone in their class."""
    class_sizes, (_, num_images) = np.bincount(cache.array("train_labels")), cache.counts["train"]
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


def recall_table(split: TestSplit, ks: list[int], embeddings: list[torch.Tensor]) -> pd.DataFrame:
    """Recall@K in percent, a row for each ensemble size; no row without test images."""
    is_scored = embeddings and len(split.labels)
    recalls = recall_percent(embeddings, split, ks) if is_scored else np.empty((0, len(ks)))
    table = pd.DataFrame(recalls, columns=[f"R@{k}" for k in ks])
    table.insert(0, "ensemble_size", range(1, len(recalls) + 1))
    return table


def recall_percent(embeddings: list[torch.Tensor], split: TestSplit, ks: list[int]) -> np.ndarray:
    """`recall_at_k` in percent, `(L, len(ks)) float64`."""
    score = partial(recall_at_k, embeddings, split.labels, ks, is_query=split.is_query, is_gallery=split.is_gallery)
    memory = similarity_memory(embeddings[0].device)
    return 100 * cli.with_less_memory(lambda max_bytes: score(max_bytes=max_bytes), memory).numpy()


def main(argv: list[str] | None = None) -> int:
    remedy = "a smaller --batch_size or --image_size, or another --precision"
    return cli.run_main("train.py", lambda: run(parse_args(argv)), remedy)


if __name__ == "__main__":
    sys.exit(main())
