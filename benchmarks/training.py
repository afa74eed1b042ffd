"""How fast are preprocessing, input, training step, epoch, embedding and a whole small job?

    python -m benchmarks.training data/cub --image_size 256 --batch_size 32     a data set as data_utils.py reads it
    python -m benchmarks.training data/demo --image_size 32 --batch_size 128 --job      one whole job
    TMPDIR=/mnt/disk python -m benchmarks.training data/cub --cold      input from a cache that is not in memory

The images of the folder, both splits, are repeated as links in a temporary data set until there are --num_images of
each split. Compares with the plain way, benchmarks/plain.py, and with the ceiling: the same step on one resident batch.
"""

import argparse
import collections
import contextlib
import io
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.plain import PlainImages, compare, hardware, plain_step, plain_transforms, row, seconds
from dreml.batches import Batch, batch_spans, epoch_batches, input_memory, prepare
from dreml.cache import Cache, read_cache
from dreml.cache_writer import build_cache
from dreml.cli import (
    DEVICE_HELP,
    MANY,
    InputError,
    Parser,
    RunError,
    check_ranges,
    num_cores,
    pick_device,
    run_main,
    set_up_device,
)
from dreml.datasets import list_data_set
from dreml.images import ImageSpec
from dreml.settings import Settings
from model import Compute, extract_features, pick_precision
from train import Experiment, Sums, initial_state, train_member, train_step
from utils import rng_for


def repeated(source: Path, target: Path, num_images: int) -> None:
    """Makes `target`, an image folder with `num_images` links in each of train/ and test/ to the images of `source`."""
    listing = list_data_set(source.name, source)
    for split in ("train", "test"):
        entries = [entry for entry in listing.entries if entry.split == split]
        for number, entry in zip(range(num_images), itertools.cycle(entries), strict=False):
            link = target / split / str(entry.class_key).replace("/", "_") / f"{number}{Path(entry.path).suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((source / entry.path).resolve())


def rates(text: str, runs: dict[str, Callable], num_images: int, repeats: int, device: torch.device) -> None:
    """Times each of `runs`, the last of which is the plain way, and prints images a second and the ratio to it."""
    with contextlib.redirect_stdout(io.StringIO()):  # progress is not for the table
        medians = compare(runs, repeats, device)
    *names, plain = medians
    for name in names:
        ours, other = num_images / medians[name], num_images / medians[plain]
        row(f"{text}{name} / {plain}", f"{ours:,.1f} images/s", f"{other:,.1f} images/s", ours / other)


def preprocessing(source: Path, folder: Path, num_images: int, spec: ImageSpec, repeats: int) -> Path:
    """data_utils.py with all cores against decoding and resizing alone on one core. Returns the last data folder."""
    folders = [folder / f"run{number}" for number in range(repeats + 1)]  # each time a new cache
    for data in folders:
        repeated(source, data / "images", num_images)
    data = folders[-1]
    entries, waiting = list_data_set("images", data / "images").entries, iter(folders)

    def bare() -> None:
        for entry in entries:
            image = Image.open(data / "images" / entry.path).convert("RGB")
            shorter = spec.train_size if entry.split == "train" else spec.size
            np.asarray(image.resize(spec.resized_size(*image.size, shorter), Image.Resampling.BILINEAR))

    def ours() -> None:
        build_cache(next(waiting), "images", spec, num_cores())

    runs = {f"{num_cores()} processes": ours, "bare decode and resize on one core": bare}
    rates("preprocessing: ", runs, len(entries), repeats, torch.device("cpu"))
    return data


def first_epoch(experiment: Experiment, targets: np.ndarray) -> Iterator[Batch]:
    """The batches of the first epoch of member 1, of all training images."""
    draw = partial(rng_for, experiment.settings.seed, 1, 0)
    device = experiment.compute.device
    return epoch_batches(experiment.cache, np.arange(len(targets)), targets, experiment.settings, draw, device)


def inputs(experiment: Experiment, data: Path, repeats: int) -> None:
    """One epoch of batches, nothing computed on them, against PIL and transforms in a DataLoader."""
    cache, settings, device = experiment.cache, experiment.settings, experiment.compute.device
    paths = [data / "images" / path for path in cache.paths("train")]
    targets, workers = np.array(cache.array("train_labels")), num_cores()
    plain_set = PlainImages(paths, targets.tolist(), plain_transforms(settings.image_size, True, True))

    def plain() -> None:
        for batch, _ in DataLoader(plain_set, batch_size=settings.batch_size, shuffle=True, num_workers=workers):
            batch.to(device)

    def loader() -> None:  # each process cuts whole batches out of the cache, as our thread does
        spans = batch_spans(len(paths), settings.batch_size)
        for batch in DataLoader(CachedBatches(cache, spans), batch_size=None, num_workers=workers):
            batch.to(device)

    def pixels() -> None:
        for _ in first_epoch(experiment, targets):
            pass

    def floats() -> None:
        memory = input_memory(settings.batch_size + 1, settings.image_size, device)
        for batch in first_epoch(experiment, targets):
            prepare(batch, *experiment.statistics, memory)

    runs = {"uint8 on the device": pixels, "the same by a DataLoader": loader, "float, mirrored, normalised": floats}
    rates("input: ", {**runs, f"PIL to float in {workers} workers": plain}, len(paths), repeats, device)


class FaultedCache(Cache):
    """A cache that is read by page faults alone."""

    def read_ahead(self, *windows: np.ndarray) -> None:
        pass


def cold_rate(data: Path, settings: Settings, kind: type[Cache]) -> float:
    """Images a second of an epoch of uint8 batches of which nothing is in memory before."""
    opened, device = read_cache(data, "images", settings.image_spec), torch.device("cpu")
    cache = kind(opened.folder, opened.meta, opened.fingerprint)  # a new one: pages that are mapped cannot be evicted
    experiment = Experiment(cache, settings, None, Compute(device), {})
    targets, pixels = np.array(cache.array("train_labels")), cache.folder / "train_pixels.npy"
    evict(pixels)
    before = bytes_from_disk()
    elapsed = seconds(lambda: collections.deque(first_epoch(experiment, targets), maxlen=0), device)
    if bytes_from_disk() - before < pixels.stat().st_size / 2:
        raise RunError(f"{data}: its files stay in memory; choose a folder on a disk by TMPDIR")
    return len(targets) / elapsed


def cold_input(data: Path, settings: Settings, repeats: int) -> None:
    """The input from a cold cache: asked for ahead, and by page faults alone."""
    rounds = [[cold_rate(data, settings, kind) for kind in (Cache, FaultedCache)] for _ in range(repeats)]
    ours, other = (statistics.median(values) for values in zip(*rounds, strict=True))
    text = "input: uint8 from a cold cache, asked for ahead / by page faults alone"
    row(text, f"{ours:,.1f} images/s", f"{other:,.1f} images/s", ours / other)


def evict(path: Path) -> None:
    """Drops a file that is not open elsewhere from Linux's page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk() -> int:
    """What Linux has read from disks for this process."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["read_bytes"])


class CachedBatches(Dataset):
    """Whole uint8 batches from the cache, each a random crop of the images in order."""

    def __init__(self, cache: Cache, spans: list[tuple[int, int]]):
        self.cache, self.spans = cache, spans

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> torch.Tensor:
        images = np.arange(*self.spans[index])
        size = self.cache.spec.size
        corners = np.random.default_rng(index).integers(0, self.cache.array("train_sizes")[images] - size + 1)
        batch = np.empty((len(images), size, size, 3), np.uint8)
        self.cache.train_crops(images, corners, np.full(len(images), size), batch)
        return torch.from_numpy(batch)


class ResidentStep:
    """Our step, again and again on one batch that lies on the device."""

    def __init__(self, experiment: Experiment):
        targets = np.array(experiment.cache.array("train_labels")) % experiment.settings.meta_class_size
        self.batch = next(first_epoch(experiment, targets))
        self.state, self.experiment = initial_state(experiment, 1), experiment
        self.state.model.train()
        self.sums = Sums.zeros(experiment.compute.device)
        self.memory = input_memory(len(self.batch.targets), experiment.settings.image_size, experiment.compute.device)

    def __call__(self) -> None:
        pixels = prepare(self.batch, *self.experiment.statistics, self.memory)
        train_step(self.state, self.experiment.compute, pixels, self.batch.targets, self.sums)


def steps(resident: ResidentStep, repeats: int) -> None:
    """Our step, from uint8, against the plain one on a batch that is float already; and the embedding."""
    experiment, batch_size = resident.experiment, len(resident.batch.targets)
    settings, compute, size = experiment.settings, experiment.compute, experiment.settings.image_size
    model = torchvision.models.get_model(settings.backbone, weights=None, num_classes=settings.meta_class_size)
    model = model.to(compute.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    images = torch.randn(batch_size, 3, size, size, device=compute.device)

    def plain() -> None:
        plain_step(model, optimizer, images, resident.batch.targets)

    text = f"{settings.backbone}, {size} px, batch {batch_size}"
    runs = {compute.precision: resident, "fp32, contiguous": plain}
    rates(f"step, {text}: ", runs, batch_size, 3 * repeats, compute.device)

    test_images = np.tile(resident.batch.images.cpu().numpy(), (4, 1, 1, 1))

    def embed_ours() -> None:
        extract_features(resident.state.model, test_images, experiment.statistics, 2 * batch_size)

    @torch.no_grad()
    def embed_plain() -> None:
        model.eval()
        for _ in range(4):
            model(images)

    runs = {"fp32, channels_last": embed_ours, "fp32, contiguous": embed_plain}
    rates(f"embedding, {text}: ", runs, 4 * batch_size, repeats, compute.device)
    resident.state.model.train()


def epoch(resident: ResidentStep, repeats: int) -> None:
    """Epochs of train_member against as many steps on a resident batch."""
    experiment, device = resident.experiment, resident.experiment.compute.device
    batch_size = experiment.settings.batch_size
    num_steps = experiment.cache.counts["train"][1] // batch_size
    two_epochs = replace(experiment, settings=replace(experiment.settings, num_epochs=2))  # the first one warms up
    ours, ceilings = [], []
    for _ in range(repeats):
        with contextlib.redirect_stdout(io.StringIO()):
            _, result = train_member(two_epochs, 1, "member 1")
        ours.append(result["history"][1]["images_per_second"])
        elapsed = seconds(lambda: [resident() for _ in range(num_steps)], device)
        ceilings.append(num_steps * batch_size / elapsed)
    ours, ceiling = statistics.median(ours), statistics.median(ceilings)
    text = f"epoch of {num_steps} steps / the same step on one resident batch"
    row(text, f"{ours:,.1f} images/s", f"{ceiling:,.1f} images/s", ours / ceiling)


def job(source: Path, size: int, batch_size: int, repeats: int, device: torch.device) -> None:
    """Two members of three epochs with their evaluation, imports included: train.py from its cache, and plain.py."""
    num_meta_classes = min(12, read_cache(source.parent, source.name, ImageSpec(size)).counts["train"][0])
    shared = ["--image_size", str(size), "--num_epochs", "3", "--ensemble_size", "2", "--lr", "1e-3", "--no_flip"]
    shared += ["--meta_class_size", str(num_meta_classes), "--batch_size", str(batch_size), "--device", str(device)]

    def call(*command: str | Path) -> None:
        done = subprocess.run([sys.executable, *command, *shared], capture_output=True, text=True)
        if done.returncode:
            raise RunError(done.stderr.strip().splitlines()[-1])

    def ours() -> None:
        with tempfile.TemporaryDirectory() as results:
            data = ["--data_path", source.parent, "--data_name", source.name, "--results_path", results]
            call("train.py", *data, "--weights", "none")

    def plain() -> None:
        call("-m", "benchmarks.plain", source, "--num_workers", str(num_cores()))

    medians = compare({"ours": ours, "plain": plain}, repeats, torch.device("cpu"), warm_up=False)
    text = f"a whole job from its cache, {source.name}, {size} px, 2 members, 3 epochs: plain.py / train.py"
    row(text, f"{medians['ours']:.1f} s", f"{medians['plain']:.1f} s", medians["plain"] / medians["ours"])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="-m benchmarks.training", description=__doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="FOLDER", help="folder of a data set, such as data/cub")
    add("--image_size", type=int, default=256, metavar="S", help="pixels (default: 256)")
    add("--batch_size", type=int, default=32, metavar="B", help="images a step (default: 32)")
    add("--num_images", type=int, metavar="N", help="of each split, repeated (default: 1600)")
    add("--num_steps", type=int, metavar="N", help="of the epoch that is timed (default: 10)")
    add("--device", default="auto", help=DEVICE_HELP)
    add("--repeats", type=int, default=3, metavar="N", help="runs of each, in turns (default: 3)")
    add("--job", action="store_true", help="only a whole job on an image folder that has its cache")
    add("--cold", action="store_true", help="only the input from a cache that is not in memory (Linux)")
    args = parser.parse_args(argv)
    counts = {name: (1, MANY) for name in ("image_size", "batch_size", "num_images", "num_steps", "repeats")}
    check_ranges(args, **counts)
    if args.cold and (args.job or sys.platform != "linux"):
        raise InputError("--cold needs Linux, and does not go with --job")
    if args.job and (args.num_images or args.num_steps):
        raise InputError("--job takes the whole data set: it does not go with --num_images or --num_steps")
    args.num_images, args.num_steps = args.num_images or 1600, args.num_steps or 10
    return args


def run(args: argparse.Namespace) -> None:
    # 1. The hardware, and the head of the table
    source, repeats, device = args.source, args.repeats, pick_device(args.device)
    if not source.is_dir():
        raise InputError(f"{source}: no such folder")
    set_up_device(device, deterministic=False)
    print(f"{hardware(device)}; {source.name}, medians of {repeats}")
    print("\n| what | ours | other | ratio |\n|---|---|---|---|")

    # 2. A whole job, or
    if args.job:
        job(source, args.image_size, args.batch_size, repeats, device)
        return

    # 3. the input from a cold cache, or
    settings = Settings(data_name="images", image_size=args.image_size, batch_size=args.batch_size)
    spec = settings.image_spec
    if args.cold:
        with tempfile.TemporaryDirectory() as folder:
            repeated(source, Path(folder, "images"), args.num_images)
            with contextlib.redirect_stdout(io.StringIO()):
                build_cache(Path(folder), "images", spec, num_cores())
            cold_input(Path(folder), settings, repeats)
        return

    # 4. each part alone: the cache, the input, the step and the embedding, the epoch
    compute = Compute(device, pick_precision(device, settings.backbone))
    with tempfile.TemporaryDirectory() as folder:
        data = preprocessing(source, Path(folder), args.num_images, spec, repeats)
        inputs(Experiment(read_cache(data, "images", spec), settings, None, compute, {}), data, repeats)
        repeated(source, Path(folder, "epoch", "images"), args.num_steps * settings.batch_size)
        with contextlib.redirect_stdout(io.StringIO()):
            cache = build_cache(Path(folder, "epoch"), "images", spec, num_cores())
        settings = replace(settings, meta_class_size=min(settings.meta_class_size, cache.counts["train"][0]))
        resident = ResidentStep(Experiment(cache, settings, None, compute, {}))
        steps(resident, repeats)
        epoch(resident, repeats)


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.training", lambda: run(parse_args(argv)), "a smaller --batch_size or --image_size")


if __name__ == "__main__":
    sys.exit(main())
