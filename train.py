"""Trains a deep randomized ensemble and logs its Recall@K for every ensemble size.

    python train.py --data_name car --num_epochs 20 --ensemble_size 48     after python data_utils.py --data_name car
    python train.py --data_name demo --image_size 32 --weights none --lr 1e-3 --no_flip      small enough for a CPU

Each member is a classifier of its own random partition of the training classes into meta-classes. A rerun of the same
command trains only what is missing; a larger --ensemble_size adds members to the same run folder.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from tqdm import tqdm

from data_utils import RESIZES, Cache, check_data_name, check_unchanged, read_cache, verify_cache
from model import (
    EMBEDDINGS,
    PRECISIONS,
    autocast,
    backbone_names,
    build_model,
    load_member,
    member_outputs,
    normalize,
    pick_precision,
    read_run_record,
    read_weights,
    resize_windows,
    weights_identity,
)
from utils import (
    MEMBER_RECORD,
    POOLED_RECORD,
    InputError,
    Parser,
    RunError,
    Terminated,
    atomic_open,
    draws,
    flush_folder,
    image_batches,
    member_file,
    member_numbers,
    meta_class_partition,
    natural_number,
    one_line,
    out_of_memory,
    read_record,
    recall_at_k,
    remove_leftovers,
    run_identity,
    run_main,
    sha256,
    size_text,
    take_lock,
    write_record,
)

MAX_ENSEMBLE_SIZE = 10_000  # a typing error is found before its range is listed
MAX_IMAGES_PER_CLASS = 300  # METHOD.md: a larger class is cut to a random 300 for each member
DEVICE_HELP = "auto (default: cuda, else mps, else cpu), cuda, cuda:1, mps or cpu"
SECONDS_BETWEEN_READINGS = 2  # reading the loss makes the host wait for the device


class Recipe(NamedTuple):
    """The learning rate of an optimizer, and after which shares of the epochs it falls to a tenth."""

    lr: float
    milestones: tuple[float, float]


RECIPES = {  # METHOD.md: "One member", step 4
    "adam": Recipe(lr=1e-4, milestones=(0.5, 0.7)),
    "sgd": Recipe(lr=1e-2, milestones=(0.5, 0.8)),  # of the authors' own code, whose momentum is 0.9
}

# ------------------------------------------------------------------------------------------------ options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="train.py", description=__doc__)
    method = parser.add_argument_group("the method (these make another run folder)").add_argument
    method("--data_name", default="car", metavar="NAME", help="car (default), cub, sop, isc, or another with a cache")
    method("--batch_size", type=natural_number, default=128, metavar="B", help="images a step (default: 128)")
    method("--num_epochs", type=natural_number, default=12, metavar="E", help="epochs a member (default: 12)")
    method("--meta_class_size", type=natural_number, default=12, metavar="D", help="meta-classes (default: 12)")
    method("--image_size", type=natural_number, default=256, metavar="S", help="crops, pixels (default: 256)")
    method("--resize", choices=RESIZES, default="crop", metavar="R", help="crop (default), or squash: cuts nothing off")
    method("--backbone", default="resnet18", metavar="NAME", help="a ResNet of torchvision (default: resnet18)")
    method("--weights", default="imagenet", metavar="W", help="imagenet (default), none, or the path of a state dict")
    optimizer_help = "adam (default), or sgd: with momentum 0.9, decay later"
    method("--optimizer", choices=list(RECIPES), default="adam", metavar="O", help=optimizer_help)
    method("--lr", type=positive_float, help="learning rate (default: 1e-4; for sgd 0.01)")
    method("--seed", type=seed_number, default=0, help="start of all random draws (default: 0)")
    method("--no_flip", action="store_true", help="no mirroring, for images whose mirror image is another class")
    scale_help = "random resize: crop windows of random side, from M * S to S, enlarged to S (default: 1.0, all S)"
    method("--scale_min", type=scale, default=1.0, metavar="M", help=scale_help)
    precision_help = "auto (default: bf16, or fp16, where the device is fast in it, else fp32), fp32, bf16 or fp16"
    method("--precision", choices=["auto", *PRECISIONS], default="auto", metavar="P", help=precision_help)
    rest = parser.add_argument_group("the rest").add_argument
    rest("--ensemble_size", type=natural_number, default=12, metavar="L", help="members (default: 12)")
    rest("--members", type=member_list, metavar="I-J", help="train only these of them, such as 13-24 (default: all)")
    recalls_help = "Recall@K (default: 1,2,4,8; isc: 1,10,20,30)"
    rest("--recalls", type=recall_list, metavar="K,K", help=recalls_help)
    embedding_help = "logits (default), or pooled: the features before the last layer, of the same members"
    rest("--embedding", choices=EMBEDDINGS, default="logits", metavar="E", help=embedding_help)
    rest("--data_path", type=Path, default=Path("data"), metavar="DIR", help="data sets (default: data)")
    rest("--results_path", type=Path, default=Path("results"), metavar="DIR", help="run folders (default: results)")
    rest("--device", default="auto", help=DEVICE_HELP)
    rest("--deterministic", action="store_true", help="same bits each time on CUDA too, if it can; slower")
    args = parser.parse_args(argv)
    check_data_name(args.data_name)
    if args.ensemble_size > MAX_ENSEMBLE_SIZE:
        raise InputError(f"--ensemble_size {args.ensemble_size} is over {MAX_ENSEMBLE_SIZE:,}")
    if args.members and args.members[-1] > args.ensemble_size:
        raise InputError(f"--members {args.members[-1]} is above --ensemble_size {args.ensemble_size}")
    if args.batch_size < 2:
        raise InputError("--batch_size has to be at least 2: BatchNorm needs more than one image")
    if args.backbone not in backbone_names():
        raise InputError(f"--backbone {args.backbone!r} is not one of {', '.join(backbone_names())}")
    args.lr = args.lr or RECIPES[args.optimizer].lr
    args.recalls = args.recalls or default_recalls(args.data_name)
    return args


def default_recalls(data_name: str) -> list[int]:
    """The K of Recall@K that the papers on a data set report."""
    return [1, 10, 20, 30] if data_name == "isc" else [1, 2, 4, 8]


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def scale(text: str) -> float:
    """argparse type: a number above 0 and at most 1."""
    number = positive_float(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is above 1")
    return number


def seed_number(text: str) -> int:
    """argparse type: an integer in 0..2**32-1."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer in 0..2**32-1")
    return int(text)


def member_list(text: str) -> list[int]:
    """argparse type: members such as "13-24" or "1,5,7-9", sorted."""
    members = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        bounds = natural_number(first), natural_number(last if dash else first)
        if not bounds[0] <= bounds[1] <= MAX_ENSEMBLE_SIZE:
            raise argparse.ArgumentTypeError(f"{part!r} is no range of members")
        members.update(range(bounds[0], bounds[1] + 1))
    return sorted(members)


def recall_list(text: str) -> list[int]:
    """argparse type: distinct positive integers, separated by commas."""
    ks = [natural_number(k) for k in text.split(",")]
    if len(set(ks)) < len(ks):
        raise argparse.ArgumentTypeError(f"{text!r} names a K twice")
    return ks


def pick_device(name: str) -> torch.device:
    """The device for `auto`, `cuda`, `cuda:i`, `mps` or `cpu`. Raises InputError for one that is not there.

    Under torchrun, `auto` and `cuda` are each process's own GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    local_rank = os.environ.get("LOCAL_RANK", "")
    if name == "cuda" and local_rank.isdecimal() and torch.cuda.device_count():
        name = f"cuda:{int(local_rank) % torch.cuda.device_count()}"  # some launchers show each process its GPU only
    kind, _, index = name.partition(":")
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if (
        kind not in available
        or name.endswith(":")
        or (index and not (kind == "cuda" and index.isascii() and index.isdigit()))
    ):
        raise InputError(f"--device {name} is not one of auto, cuda, cuda:i, mps, cpu")
    if int(index or 0) >= available[kind]:
        raise InputError(f"--device {name} is not there: this machine offers {available[kind]} of the kind {kind}")
    return torch.device(name)


# ------------------------------------------------------------------------------------------------ one member


def learning_rate(initial: float, epoch: int, num_epochs: int, milestones: tuple[float, float]) -> float:
    """The rate in an epoch, counted from 0: for each milestone a tenth from int(milestone * E) on, never in epoch 0."""
    return initial / 10 ** sum(epoch >= max(int(milestone * num_epochs), 1) for milestone in milestones)


def batch_spans(num_images: int, batch_size: int) -> list[tuple[int, int]]:
    """(start, stop) of each batch. A last batch of one image joins the one before it: BatchNorm needs two."""
    starts = list(range(0, num_images, batch_size))
    if num_images % batch_size == 1 and len(starts) > 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_images], strict=True))


def member_images(labels: np.ndarray, seed: int, member: int) -> np.ndarray:
    """The training images of a member, sorted `(n,) int64`: all, but of a class with more than 300 a random 300."""
    shuffled = draws(seed, member, 0, "cut").permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    starts = np.searchsorted(labels[by_class], labels[by_class])  # where each image's class starts
    return np.sort(by_class[np.arange(len(labels)) - starts < MAX_IMAGES_PER_CLASS])


class Batch(NamedTuple):
    """A batch of training images, on the device. See `prepared`."""

    images: torch.Tensor  # (B, S, S, 3) uint8, each image's window in its top left corner
    targets: torch.Tensor  # (B,) int64, meta-classes
    num_mirrored: int  # the first so many images are to be mirrored
    sides: torch.Tensor | None  # (B,) int64, the windows' sides; None: all S


def train_batches(
    cache: Cache,
    images: np.ndarray,
    targets: np.ndarray,
    args: argparse.Namespace,
    member: int,
    epoch: int,
    device: torch.device,
) -> Iterator[Batch]:
    """The batches of one epoch. Order, windows and mirroring are functions of (seed, member, epoch)."""
    size, smallest = args.image_size, max(1, round(args.scale_min * args.image_size))
    order = draws(args.seed, member, epoch, "order").permutation(images)
    sides = draws(args.seed, member, epoch, "scale").integers(smallest, size + 1, len(order))
    ranges = cache.array("train_sizes")[order] - sides[:, None] + 1
    corners = draws(args.seed, member, epoch, "crop").integers(0, ranges)
    mirrored = draws(args.seed, member, epoch, "flip").random(len(order)) < (0.0 if args.no_flip else 0.5)

    # Within a batch, images to be mirrored come first, so that mirroring is one slice: a mask took 30 times as long.
    spans = batch_spans(len(order), args.batch_size)
    batch_of = np.repeat(np.arange(len(spans)), [stop - start for start, stop in spans])
    sorting = np.lexsort((~mirrored, batch_of))
    order, sides, corners = order[sorting], sides[sorting], corners[sorting]
    num_mirrored = np.bincount(batch_of, mirrored).astype(int).tolist()

    def fill(start: int, stop: int, out: np.ndarray) -> None:
        cache.train_crops(order[start:stop], corners[start:stop], sides[start:stop], out)

    epoch_targets = torch.from_numpy(targets[order]).to(device)
    epoch_sides = torch.from_numpy(sides).to(device) if args.scale_min < 1 else None
    loaded = image_batches(fill, spans, size, device)
    for (start, stop), pixels, mirror in zip(spans, loaded, num_mirrored, strict=True):
        batch_sides = None if epoch_sides is None else epoch_sides[start:stop]
        yield Batch(pixels, epoch_targets[start:stop], mirror, batch_sides)


def prepared(batch: Batch, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """The network's input, `(B, 3, S, S) float32`: enlarged, mirrored (in place) and normalised."""
    images = batch.images if batch.sides is None else resize_windows(batch.images, batch.sides)
    images[: batch.num_mirrored] = images[: batch.num_mirrored].flip(2)
    return normalize(images, mean, std)


def make_optimizer(name: str, model: nn.Module, lr: float, device: torch.device) -> torch.optim.Optimizer:
    """Adam, or SGD with momentum 0.9; neither with weight decay.

    Fused on CUDA and CPU: one kernel, which also reads fp16's gradient scale without a wait for the device.
    """
    fused = device.type in ("cuda", "cpu")
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, fused=fused)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=fused)
    for parameter in model.parameters():
        # PyTorch's own start, uninitialised memory, is kept if fp16's scale overflows in the first step (2.6 to 2.15).
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@dataclass
class Sums:
    """What an epoch adds up, on the device."""

    loss: torch.Tensor  # () float32, over the images
    correct: torch.Tensor  # () int64, images
    finite_steps: torch.Tensor  # () int64, steps before the first whose loss is not finite
    steps: int = 0

    @classmethod
    def zeros(cls, device: torch.device) -> "Sums":
        whole = {"dtype": torch.int64, "device": device}
        return cls(torch.zeros((), device=device), torch.zeros((), **whole), torch.zeros((), **whole))


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: str,
    pixels: torch.Tensor,
    targets: torch.Tensor,
    sums: Sums,
) -> None:
    """One step. The backbone computes in `precision`, its head and the loss in fp32. The host never waits."""
    with autocast(pixels.device, precision):
        logits = model(pixels)
    loss = F.cross_entropy(logits, targets)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    loss = loss.detach()
    sums.loss += loss * len(targets)
    sums.correct += (logits.detach().argmax(1) == targets).sum()
    sums.finite_steps += torch.isfinite(loss) & (sums.finite_steps == sums.steps)
    sums.steps += 1


def train_member(
    cache: Cache,
    weights: dict[str, torch.Tensor] | None,
    args: argparse.Namespace,
    member: int,
    device: torch.device,
    precision: str,
    progress: "Progress | None" = None,
) -> tuple[nn.Module, dict]:
    """Trains one member (METHOD.md: "One member"), from where `progress` stands.

    Returns the model, on the device, with the weights of the epoch of the best training accuracy (counted during the
    epoch; the earlier one on a tie), and its record: partition, history and best epoch.
    """
    labels = cache.array("train_labels")
    num_classes = cache.counts["train"][0]
    partition = meta_class_partition(num_classes, args.meta_class_size, draws(args.seed, member, 0, "partition"))
    targets, images = partition[labels], member_images(labels, args.seed, member)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(draws(args.seed, member, 0, "weights").integers(2**63)))
        model = build_model(args.backbone, args.meta_class_size, weights).to(device)
    optimizer = make_optimizer(args.optimizer, model, args.lr, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")  # fp16 gradients would vanish
    mean, std = (torch.tensor(cache.meta[name], device=device) for name in ("mean", "std"))

    history, best_epoch, best_state = [], -1, None
    earlier = progress.read() if progress else None
    if earlier:
        for module, name in ((model, "model"), (optimizer, "optimizer"), (scaler, "scaler")):
            module.load_state_dict(earlier[name])
        history, best_epoch = earlier["history"], earlier["best_epoch"]
        best_state = earlier["best_model"] or snapshot(model.state_dict(), device)
        print(f"member {member}/{args.ensemble_size}: goes on after epoch {len(history) - 1}", flush=True)
    for epoch in range(len(history), args.num_epochs):
        rate = learning_rate(args.lr, epoch, args.num_epochs, RECIPES[args.optimizer].milestones)
        for group in optimizer.param_groups:
            group["lr"] = rate
        try:
            sums, seconds = train_epoch(
                cache, images, targets, args, member, epoch, model, optimizer, scaler, precision, mean, std
            )
        except (KeyboardInterrupt, Terminated) as stop:
            stop.add_note(f"epoch {epoch}")
            raise
        loss, num_correct, finite_steps = sums.loss.item() / len(images), sums.correct.item(), sums.finite_steps.item()
        if finite_steps < sums.steps:
            raise RunError(
                f"member {member}, epoch {epoch}, batch {finite_steps}: the loss is not finite; "
                + lower_rate(args, precision)
            )
        history.append(
            {
                "epoch": epoch,
                "loss": loss,
                "accuracy": 100 * num_correct / len(images),
                "correct": num_correct,
                "images": len(images),
                "lr": rate,
                "seconds": seconds,
                "images_per_second": len(images) / seconds,
            }
        )
        if best_epoch < 0 or num_correct > history[best_epoch]["correct"]:
            best_epoch, best_state = epoch, snapshot(model.state_dict(), device)
        if progress:
            progress.write(
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(),
                history=history,
                best_epoch=best_epoch,
                best_model=None if best_epoch == epoch else best_state,  # None: the same as `model`
            )
    model.load_state_dict(best_state)
    return model, {"best_epoch": best_epoch, "history": history, "partition": partition.tolist()}


def train_epoch(
    cache: Cache,
    images: np.ndarray,
    targets: np.ndarray,
    args: argparse.Namespace,
    member: int,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: str,
    mean: torch.Tensor,
    std: torch.Tensor,
) -> tuple[Sums, float]:
    """One epoch. Returns its sums and its seconds."""
    start, sums = time.perf_counter(), Sums.zeros(mean.device)
    model.train()
    title = f"member {member}/{args.ensemble_size} epoch {epoch}"
    with tqdm(
        total=len(images),
        desc=title,
        unit=" images",
        mininterval=SECONDS_BETWEEN_READINGS,
        leave=False,
        disable=True if "WORLD_SIZE" in os.environ else None,  # None: without a terminal
    ) as bar:
        next_reading = start + SECONDS_BETWEEN_READINGS
        for batch in train_batches(cache, images, targets, args, member, epoch, mean.device):
            train_step(model, optimizer, scaler, precision, prepared(batch, mean, std), batch.targets, sums)
            bar.update(len(batch.targets))
            if not bar.disable and time.perf_counter() > next_reading:
                accuracy = sums.correct.item() / bar.n
                bar.set_postfix(loss=f"{sums.loss.item() / bar.n:.4f}", accuracy=f"{accuracy:.2%}", refresh=False)
                next_reading = time.perf_counter() + SECONDS_BETWEEN_READINGS
    loss, accuracy = sums.loss.item() / len(images), sums.correct.item() / len(images)  # waits for the device
    seconds = time.perf_counter() - start
    if bar.disable:
        rate = f"{len(images) / seconds:,.0f} images/s"
        print(f"{title}: loss {loss:.4f}, accuracy {accuracy:.2%}, {rate}", flush=True)
    return sums, seconds


def snapshot(value: object, device: torch.device | str) -> object:
    """A copy of nested dicts and lists whose tensors lie on the device."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item, device) for key, item in value.items()}
    return [snapshot(item, device) for item in value] if isinstance(value, list) else value


def progress_file(folder: Path, member: int) -> Path:
    """The file of `Progress`."""
    return folder / f"progress_{member:03d}.pt"


class Progress:
    """`progress_007.pt`: what the training of a member needs to go on after its last finished epoch.

    A SHA-256 of 32 bytes, then a torch.save of plain tensors, numbers and lists. It is written in a thread, while the
    next epoch is trained; leaving the context waits for that.
    """

    def __init__(self, folder: Path, member: int, identity: str):
        self.path, self.identity = progress_file(folder, member), f"{identity}, member {member}"
        self.writer, self.writing = ThreadPoolExecutor(1), None
        self.buffer = io.BytesIO()  # kept: new memory of this size costs as much as filling it

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.writer.shutdown()

    def read(self) -> dict | None:
        """What was written last, or None. A file that is damaged or of another run is named and not used."""
        if not self.path.exists():
            return None
        content = self.path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            with contextlib.suppress(pickle.UnpicklingError, AttributeError, KeyError):  # somebody else's
                state = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
                if state.pop("identity") == self.identity:
                    return state
        print(f"warning: {self.path} is damaged or of another run: the member is begun anew", file=sys.stderr)
        return None

    def write(self, **state: object) -> None:
        """Starts to write. Raises OSError if the earlier write failed."""
        if self.writing:
            self.writing.result()
        self.writing = self.writer.submit(self._write, snapshot({"identity": self.identity, **state}, "cpu"))

    def _write(self, state: dict) -> None:
        self.buffer.seek(0)
        torch.save(state, self.buffer)
        self.buffer.truncate()
        with self.buffer.getbuffer() as content, atomic_open(self.path, "wb") as file:
            file.write(hashlib.sha256(content).digest())
            file.write(content)

    def remove(self) -> None:
        """The member is finished; whether the last write went well matters no more."""
        self.writer.shutdown()
        self.path.unlink(missing_ok=True)


def lower_rate(args: argparse.Namespace, precision: str) -> str:
    """What to try when numbers overflow."""
    remedy = f"try a lower --lr than {args.lr:g}"
    return remedy if precision == "fp32" else f"{remedy}, or --precision fp32 ({precision} was used)"


# ------------------------------------------------------------------------------------------------ the run folder


def run_name(args: argparse.Namespace, weights: str) -> str:
    """`<data>_<backbone>_D<D>_e<epochs>_s<seed>` and a tag for each other member-defining option not at its default."""
    name = f"{args.data_name}_{args.backbone}_D{args.meta_class_size}_e{args.num_epochs}_s{args.seed}"
    if args.image_size != 256:
        name += f"_i{args.image_size}"
    if args.resize != "crop":
        name += f"_{args.resize}"
    if args.batch_size != 128:
        name += f"_b{args.batch_size}"
    if args.optimizer != "adam":
        name += f"_{args.optimizer}"
    if args.lr != RECIPES[args.optimizer].lr:
        name += f"_lr{args.lr!r}"
    if args.weights != "imagenet":
        name += f"_w{weights.removeprefix('sha256:')[:8]}"
    if args.no_flip:
        name += "_noflip"
    if args.scale_min != 1:
        name += f"_scale{args.scale_min!r}"
    if args.precision != "auto":
        name += f"_{args.precision}"
    return name


def environment(device: torch.device) -> dict[str, str | int | None]:
    """What a number depends on beside the options: versions, hardware, and the commit of this code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit, changed = "", ""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "commit": commit + ("+changes" if changed else "") or None,
    }


def run_record(args: argparse.Namespace, cache: Cache, weights: str, precision: str, here: dict) -> dict:
    """What `args.json` holds, see `utils.RUN_RECORD`."""
    settings = {
        "data_name": args.data_name,
        "backbone": args.backbone,
        "weights": weights,
        "meta_class_size": args.meta_class_size,
        "num_epochs": args.num_epochs,
        "batch_size": args.batch_size,
        "optimizer": args.optimizer,
        "lr": args.lr,
        "image_size": args.image_size,
        "resize": args.resize,
        "flip": not args.no_flip,
        "scale_min": args.scale_min,
        "precision": precision,
        "seed": args.seed,
    }
    data = {
        "fingerprint": cache.fingerprint,
        "mean": cache.meta["mean"],
        "std": cache.meta["std"],
        "counts": {split: {"classes": c, "images": n} for split, (c, n) in cache.counts.items()},
    }
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {"settings": settings, "data": data, "options": options, "environment": here}


def make_folder(folder: Path) -> None:
    """Makes a folder for results. Raises InputError if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flush_folder(folder.parent)
    except OSError as error:
        raise InputError(f"cannot write the results: {error}") from None


def run_lock(folder: Path) -> contextlib.AbstractContextManager:
    """Held by the one process that writes the logs and what the whole run shares."""
    path = folder.with_name(f".{folder.name}.lock")  # outside: a refused run makes no folder
    held = take_lock(path, timeout=2)
    if held is None:
        print(f"{folder}: waiting for another process of this run", flush=True)
        held = take_lock(path)
    return held


def verify_once(folder: Path, cache: Cache) -> None:
    """Compares the cache with its checksums, once for each size and time of change of its files.

    Raises InputError if it is damaged. What was compared is remembered in the run folder.
    """
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(cache.folder.glob("*.npy"))}
    compared, memory = {"cache": cache.fingerprint, "files": files}, folder / "cache_compared.json"
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if json.loads(memory.read_text(encoding="utf-8")) == compared:
            return
    verify_cache(cache)
    make_folder(folder)
    with atomic_open(memory) as file:
        json.dump(compared, file)


def earlier_record(folder: Path) -> dict | None:
    """The `args.json` of a run folder, or None if it is missing or damaged: the members know their run themselves."""
    if not (folder / "args.json").exists():
        return None
    try:
        return read_run_record(folder)
    except InputError as error:
        print(f"warning: {error}", file=sys.stderr)
        return None


def compare_with_earlier(folder: Path, earlier: dict | None, record: dict) -> str | None:
    """Refuses a run folder whose members belong to other settings or data, by InputError.

    For one begun in another environment, keeps that in `record` and returns a warning.
    """
    if earlier is None:
        return None
    before, now = (r["settings"] | {"cache (fingerprint)": r["data"]["fingerprint"]} for r in (earlier, record))
    for key in now:
        if before.get(key) != now[key]:
            raise InputError(
                f"{folder} holds members of other settings: {key} {before.get(key)}, not {now[key]}; "
                "move it away or give another --results_path"
            )
    here, record["environment"] = record["environment"], earlier["environment"]
    begun_in = earlier["environment"]
    changes = [f"{key} {begun_in.get(key)} (now {here[key]})" for key in here if begun_in.get(key) != here[key]]
    return f"this run was begun with {', '.join(changes)}" if changes else None


def write_run_record(folder: Path, record: dict, cache: Cache) -> None:
    """Writes `args.json` and `test.csv`. Raises InputError if that cannot be done."""
    labels = cache.array("test_labels")
    test = {
        "path": cache.meta["test"]["paths"],
        "label": labels,
        "is_query": cache.array("test_is_query"),
        "is_gallery": cache.array("test_is_gallery"),
        "class_name": np.array(cache.meta["test"]["classes"], dtype=object)[labels],
    }
    for name in ("args.json", "cache_compared.json", "*.csv"):
        remove_leftovers(folder, name)
    try:
        write_record(folder / "args.json", record)
        write_csv(folder / "test.csv", pd.DataFrame(test))
    except OSError as error:
        raise InputError(f"cannot write the results: {error}") from None


@dataclass
class Members:
    """The finished members of a run folder, as far as this process has looked."""

    folder: Path
    identity: str
    records: dict[int, dict] = field(default_factory=dict)
    pooled: set[int] = field(default_factory=set)  # those of them whose pooled features are saved
    needed: tuple[str, ...] = ("pth", "npy")  # which files of a member have to be sound
    damaged: dict[str, int] = field(default_factory=dict)  # name of a record -> its time of change
    not_embedded: dict[int, dict] = field(default_factory=dict)  # records of those whose weights alone are good

    def look(self, embedding: str = "logits") -> None:
        """Adds those that have been finished since. Damaged ones and those of other runs are named and not added.

        For "pooled", looks for their pooled features too. Only reads.
        """
        for member in self.missing(member_numbers(self.folder)):
            path = self.folder / member_file(member, "json")
            changed = path.stat().st_mtime_ns
            if self.damaged.get(path.name) == changed:
                continue
            self.not_embedded.pop(member, None)
            record, damaged = self.read(member, path)
            if not damaged:
                self.records[member] = record
                continue
            self.damaged[path.name], names = changed, ", ".join(damaged)
            if damaged == [member_file(member, "npy")]:
                self.not_embedded[member] = record
                print(f"warning: the embedding of member {member} is damaged ({names})", file=sys.stderr)
            else:
                print(f"warning: member {member} counts as not trained, damaged: {names}", file=sys.stderr)
        if embedding == "pooled":
            self.look_for_pooled()

    def look_for_pooled(self) -> None:
        """Adds to `pooled`. Damaged files, and those made from other weights, are named and not added."""
        for member in self.missing(self.records, "pooled"):
            path = self.folder / member_file(member, "json", "pooled")
            changed = path.stat().st_mtime_ns if path.exists() else None
            if changed is None or self.damaged.get(path.name) == changed:
                continue
            try:
                record = read_record(path, POOLED_RECORD)
                weights = self.records[member]["sha256"][member_file(member, "pth")]
                if (record["member"], record["run"], record["weights"]) != (member, self.identity, weights):
                    raise ValueError("of another run, member or weights")
                if sha256(path.with_suffix(".npy")) != record["sha256"]:
                    raise ValueError("the checksum of its .npy does not fit")
                self.pooled.add(member)
            except (ValueError, OSError) as error:
                self.damaged[path.name] = changed
                print(f"warning: {path.name} counts as not made ({one_line(error)})", file=sys.stderr)

    def read(self, member: int, path: Path) -> tuple[dict, list[str]]:
        """A member's record, and which of its files do not match their checksums or are of another run."""
        try:
            record = read_record(path, MEMBER_RECORD)
            if not 0 <= record["best_epoch"] < len(record["history"]):
                raise ValueError("no such best epoch")
            if record["member"] != member or record["run"] != self.identity:
                return record, [f"{path.name} (of another run or member)"]
        except (ValueError, OSError) as error:
            return {}, [f"{path.name} ({one_line(error)})"]
        damaged = []
        for name in (member_file(member, suffix) for suffix in self.needed):
            file = self.folder / name
            if not file.exists() or sha256(file) != record["sha256"].get(name):
                damaged.append(name)
        return record, damaged

    def missing(self, wanted: Iterable[int], embedding: str = "logits") -> list[int]:
        """Those of the wanted members that are not finished, or, for "pooled", whose pooled features are not saved."""
        finished = self.pooled if embedding == "pooled" else self.records
        return [member for member in wanted if member not in finished]

    def claim(self, wanted: Iterable[int], embedding: str) -> tuple[int, contextlib.AbstractContextManager] | None:
        """The first of the wanted members that is missing and not being made, with its lock held, or None."""
        for member in self.missing(wanted, embedding):
            lock = take_lock(self.folder / f".member_{member:03d}.lock", timeout=0)
            if lock is None:  # another process makes it
                continue
            self.look(embedding)
            if self.missing([member], embedding):
                return member, lock
            with lock:  # it was finished in the meantime
                pass
        return None


def save_member(folder: Path, member: int, model: nn.Module, logits: torch.Tensor, record: dict) -> None:
    """Writes `member_007.pth`, `.npy` and, last, `.json`, which makes the member finished."""
    weights, embedding = folder / member_file(member, "pth"), folder / member_file(member, "npy")
    buffer = io.BytesIO()  # torch.save would report a full disk as a RuntimeError
    torch.save({name: value.cpu() for name, value in model.state_dict().items()}, buffer)
    with atomic_open(weights, "wb") as file:
        file.write(buffer.getbuffer())
    save_array(embedding, logits)
    record = record | {"sha256": {path.name: sha256(path) for path in (weights, embedding)}}
    write_record(folder / member_file(member, "json"), record)


def save_array(path: Path, array: torch.Tensor) -> None:
    with atomic_open(path, "wb") as file:
        np.save(file, array.cpu().numpy(), allow_pickle=False)


def saved_parts(
    folder: Path, members: Members, num_members: int, embedding: str, device: torch.device
) -> list[torch.Tensor]:
    """What is saved of members 1, 2, ... up to `num_members`, or to the first of which it is missing.

    Tensors `(M, d) float32` on the device: for "logits" d is the number of meta-classes, for "pooled" of features. On
    the CPU if the device has no room for them.
    """
    members.look(embedding)
    missing = members.missing(range(1, num_members + 1), embedding)
    last = missing[0] - 1 if missing else num_members
    kind = "pooled" if embedding == "pooled" else "member"
    paths = [folder / member_file(member, "npy", kind) for member in range(1, last + 1)]
    parts = [torch.from_numpy(np.load(path)) for path in paths]
    try:
        return [part.to(device) for part in parts]
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    print(f"warning: the embeddings do not fit on {device}: they are scored on the CPU", file=sys.stderr)
    return parts


def open_run(folder: Path) -> tuple[dict, Members]:
    """The `args.json` of a run folder and the members whose embeddings it has.

    Needs neither data nor weights and writes nothing. Raises InputError if it is no run folder or has no such member.
    """
    record = read_run_record(folder)
    members = Members(folder, run_identity(record), needed=("npy",))
    members.look()
    if not members.records:
        raise InputError(f"{folder} has no finished member")
    return record, members


def remove_progress(members: Members) -> None:
    """Removes the progress of finished members, in case that a process was killed before it could."""
    for member in members.records:
        path = progress_file(members.folder, member)
        path.unlink(missing_ok=True)
        remove_leftovers(members.folder, path.name)


# ------------------------------------------------------------------------------------------------ logs


def write_csv(path: Path, table: pd.DataFrame, **kwargs) -> None:
    with atomic_open(path) as file:
        table.to_csv(file, index=False, lineterminator="\n", **kwargs)


def write_train_log(folder: Path, records: dict[int, dict]) -> None:
    """train.csv: one row for each epoch of each finished member."""
    rows = [{"member": member} | epoch for member in sorted(records) for epoch in records[member]["history"]]
    columns = ["member", "epoch", "loss", "accuracy", "lr", "seconds", "images_per_second"]
    digits = {"loss": 6, "accuracy": 4, "seconds": 3, "images_per_second": 1}
    write_csv(folder / "train.csv", pd.DataFrame(rows)[columns].round(digits))


class Truth(NamedTuple):
    """What the embeddings of the test images are scored by, `(M,)` each."""

    labels: torch.Tensor  # int64
    is_query: torch.Tensor  # bool
    is_gallery: torch.Tensor  # bool

    @classmethod
    def of(cls, cache: Cache) -> "Truth":
        return cls(*(torch.from_numpy(np.array(cache.array(f"test_{name}"))) for name in cls._fields))

    def lone_queries(self) -> torch.Tensor:
        """`(M,) bool`: the queries whose class has no other image in the gallery."""
        in_gallery = torch.bincount(self.labels[self.is_gallery], minlength=int(self.labels.max()) + 1)[self.labels]
        return self.is_query & (in_gallery == self.is_gallery)  # there is none, or only itself


def recall_log(folder: Path, embedding: str) -> Path:
    """recall.csv, or recall_pooled.csv"""
    return folder / ("recall.csv" if embedding == "logits" else f"recall_{embedding}.csv")


def write_logs(
    members: Members, args: argparse.Namespace, truth: Truth, embedding: str, device: torch.device
) -> tuple[pd.DataFrame, list[torch.Tensor]]:
    """The logs, by one process at a time, of all members that are finished by then.

    Recall@K in percent for every ensemble size from 1 to the first member that is missing. Returns that table and
    `saved_parts`.
    """
    with run_lock(members.folder):
        parts = saved_parts(members.folder, members, args.ensemble_size, embedding, device)
        table, ks = pd.DataFrame({"ensemble_size": range(1, len(parts) + 1)}), args.recalls
        recalls = recall_percent(parts, ks, truth) if parts else np.empty((0, len(ks)))
        for k, column in zip(ks, recalls.T, strict=True):
            table[f"R@{k}"] = column
        write_csv(recall_log(members.folder, embedding), table, float_format="%.4f")
        write_train_log(members.folder, members.records)
    return table, parts


def recall_percent(parts: list[torch.Tensor], ks: list[int], truth: Truth) -> np.ndarray:
    """`recall_at_k` in percent, `(L, len(ks)) float64`: 100 * hits / queries, exact to the last printed digit."""

    def recalls(max_bytes: int) -> torch.Tensor:
        return recall_at_k(parts, truth.labels, ks, max_bytes, truth.is_query, truth.is_gallery)

    num_queries = int(truth.is_query.sum())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no other image of their class")  # `run` has said so once
        hits = (with_less_memory(recalls, 2**30).double() * num_queries).round()
    return (100 * hits / num_queries).numpy()


def with_less_memory(call: Callable[[int], torch.Tensor], size: int) -> torch.Tensor:
    """call(size), or of half of it, and so on, while the device is out of memory: no trained member is to be lost."""
    while True:
        try:
            return call(size)
        except RuntimeError as error:
            if size == 1 or not out_of_memory(error):
                raise
        size //= 2  # outside the handler, where what the failed call held is free again


# ------------------------------------------------------------------------------------------------ the ensemble


def run(args: argparse.Namespace) -> None:
    # 1. Options, data and device: whatever can be wrong is found before any training
    cache = read_cache(args.data_path, args.data_name, args.image_size, args.resize)
    num_classes, num_images = cache.counts["train"]
    num_gallery = np.count_nonzero(cache.array("test_is_gallery"))
    if not 2 <= args.meta_class_size <= num_classes:
        raise InputError(f"--meta_class_size {args.meta_class_size} has to be in 2..{num_classes} (training classes)")
    if max(args.recalls) >= num_gallery:
        raise InputError(f"--recalls: {max(args.recalls)} is not below the number of gallery images, {num_gallery}")
    device = pick_device(args.device)
    torch.backends.cudnn.benchmark = not args.deterministic  # picks the fastest convolution for each batch shape
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and changes no result
    if device.index is not None:
        torch.cuda.set_device(device)
    here = environment(device) | {"deterministic": args.deterministic}

    # 2. The run folder and what it holds
    identity = weights_identity(args.backbone, args.weights)
    folder = args.results_path / run_name(args, identity)
    make_folder(args.results_path)
    with run_lock(folder):
        earlier = earlier_record(folder)
        precision = pick_precision(device) if args.precision == "auto" else args.precision
        if args.precision == "auto" and earlier:  # a run goes on, or is scored, as it was begun, on any device
            precision = earlier["settings"]["precision"]
        record = run_record(args, cache, identity, precision, here)
        warning = compare_with_earlier(folder, earlier, record)
        members = Members(folder, run_identity(record))
        members.look()
        if earlier is None and members.damaged and not members.records:
            raise InputError(
                f"{folder} has no sound args.json and no member of these settings and data: move it away or give "
                "another --results_path"
            )
        whole = range(1, args.ensemble_size + 1)
        wanted = args.members or whole
        missing = members.missing(wanted)
        weights = read_weights(args.backbone, args.weights) if missing else None
        verify_once(folder, cache)
        write_run_record(folder, record, cache)
        remove_progress(members)
    finished = args.ensemble_size - len(members.missing(whole))
    print(f"{folder}: {finished} of {args.ensemble_size} members are finished; device {here['device']}, {precision}")
    if missing and warning:
        print(f"warning: {warning}", file=sys.stderr)
    class_sizes = np.bincount(cache.array("train_labels"))
    too_large = class_sizes > MAX_IMAGES_PER_CLASS
    if missing and too_large.any():
        left_out = int((class_sizes[too_large] - MAX_IMAGES_PER_CLASS).sum())
        print(
            f"{too_large.sum()} classes have more than {MAX_IMAGES_PER_CLASS} images: each member trains on a random "
            f"{MAX_IMAGES_PER_CLASS} of each and leaves out {left_out:,} of {num_images:,} images"
        )
    truth = Truth.of(cache)
    check_unchanged(cache)
    if not (truth.is_query & truth.is_gallery).all():
        print(f"{int(truth.is_query.sum()):,} queries against a gallery of {num_gallery:,} images")
    lone = int(truth.lone_queries().sum())
    if lone:
        print(f"{lone} queries have no other image of their class in the gallery: they count as misses")

    # 3. The members that are missing, one after the other; other processes may train others of them at the same time
    if members.records:
        write_logs(members, args, truth, "logits", device)
    made = 0
    while (claimed := members.claim(wanted, args.embedding)) is not None:
        start = time.perf_counter()
        member, lock = claimed
        title, what = f"member {member}/{args.ensemble_size}", "pooled features"
        to_train = member not in members.records
        try:
            with lock:
                if to_train:
                    record = finish_member(members, member, cache, weights, args, device, precision, here)
                    accuracy = record["history"][record["best_epoch"]]["accuracy"]
                    what = f"training accuracy {accuracy:.2f} % in epoch {record['best_epoch']}"
                    members.look()
                if args.embedding == "pooled" and member in members.records:
                    pool_member(members, member, cache, args, device, precision)
        except (KeyboardInterrupt, Terminated) as stop:
            stop.add_note(title)
            raise
        seconds = time.perf_counter() - start
        print(f"{title}: {what}, {seconds:.1f} s")
        if to_train:
            write_logs(members, args, truth, "logits", device)
        members.look(args.embedding)
        if members.missing([member], args.embedding):
            raise RunError(f"member {member} was finished, but its files read back otherwise: is the disk sound?")
        made, remaining = made + 1, len(members.missing(wanted, args.embedding))
        if made == 1 and remaining:
            print_outlook(folder, member_file(member, "*", "*" if to_train else "pooled"), remaining, seconds)

    # 4. The final recall, by whoever finds all members finished
    table, parts = write_logs(members, args, truth, args.embedding, device)
    missing = members.missing(whole, args.embedding)
    if missing:
        which = "not finished" if args.embedding == "logits" else f"without {args.embedding} features"
        print(f"{which}: member {', '.join(map(str, missing))}; the process that finishes the last one scores")
        return
    alone = [recall_percent([part], args.recalls[:1], truth).item() for part in parts]
    print("\n" + table.assign(alone=alone).round(2).to_string(index=False))
    print(f"(alone: R@{args.recalls[0]} of the last member of the row by itself)")
    final = ", ".join(f"{name} {value:.2f}" for name, value in table.iloc[-1, 1:].items())
    print(f"{len(parts)} members: {final} in {recall_log(folder, args.embedding)}")


def finish_member(
    members: Members,
    member: int,
    cache: Cache,
    weights: dict[str, torch.Tensor] | None,
    args: argparse.Namespace,
    device: torch.device,
    precision: str,
    here: dict,
) -> dict:
    """Trains, embeds and saves one member, whose lock is held. Returns its record."""
    with Progress(members.folder, member, members.identity) as progress:
        for name in (member_file(member, "*"), progress.path.name):
            remove_leftovers(members.folder, name)
        if member in members.not_embedded:
            record, path = members.not_embedded[member], members.folder / member_file(member, "pth")
            model = load_member(path, args.backbone, args.meta_class_size).to(device)
        else:
            model, record = train_member(cache, weights, args, member, device, precision, progress)
            record = {"member": member, "run": members.identity, **record, "environment": here}
        logits = embedded(model, cache, args, member, device, precision, "logits")
        check_unchanged(cache)
        save_member(members.folder, member, model, logits, record)
        progress.remove()
    return record


def pool_member(
    members: Members, member: int, cache: Cache, args: argparse.Namespace, device: torch.device, precision: str
) -> None:
    """Makes the pooled features of one finished member, whose lock is held.

    Writes `pooled_007.npy` and, last, `.json`.
    """
    remove_leftovers(members.folder, member_file(member, "*", "pooled"))
    weights, path = members.folder / member_file(member, "pth"), members.folder / member_file(member, "npy", "pooled")
    record = {"member": member, "run": members.identity, "weights": sha256(weights)}
    if record["weights"] != members.records[member]["sha256"][weights.name]:
        raise RunError(f"{weights} has changed since this run began; run the same command again")
    model = load_member(weights, args.backbone, args.meta_class_size).to(device)
    features = embedded(model, cache, args, member, device, precision, "pooled")
    check_unchanged(cache)
    save_array(path, features)
    write_record(path.with_suffix(".json"), record | {"sha256": sha256(path)})


def embedded(
    model: nn.Module,
    cache: Cache,
    args: argparse.Namespace,
    member: int,
    device: torch.device,
    precision: str,
    embedding: str,
) -> torch.Tensor:
    """`member_outputs` of all test images, `(M, d) float32`, in batches twice as large as in training if they fit."""
    images = cache.array("test_images")
    mean, std = (torch.tensor(cache.meta[name], device=device) for name in ("mean", "std"))

    def outputs(batch_size: int) -> torch.Tensor:
        return member_outputs(model, images, mean, std, batch_size, precision, embedding)

    result = with_less_memory(outputs, 2 * args.batch_size)
    if not torch.isfinite(result).all():
        raise RunError(f"member {member}: its embedding is not finite; {lower_rate(args, precision)}")
    return result


def print_outlook(folder: Path, files: str, remaining: int, seconds: float) -> None:
    """Says what the remaining members will need, judged by the one just finished, whose files match `files`."""
    needed = remaining * sum(path.stat().st_size for path in folder.glob(files))
    free = shutil.disk_usage(folder).free
    minutes, hours = remaining * seconds / 60, remaining * seconds / 3600
    duration = f"{hours:.1f} hours" if hours >= 1.5 else f"{minutes:.1f} minutes"
    print(f"the other {remaining} members need about {duration} and {size_text(needed)} ({size_text(free)} are free)")
    if needed > free:
        print("warning: the disk will be full before the ensemble is finished", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    remedy = "a smaller --batch_size or --image_size, or another --precision"
    return run_main("train.py", lambda: run(parse_args(argv)), remedy)


if __name__ == "__main__":
    sys.exit(main())
