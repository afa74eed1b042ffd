"""How fast are preprocessing, input, training step, epoch, embedding and a whole small job?

    python -m benchmarks.training data/cub --image_size 256 --batch_size 32     a data set as data_utils.py reads it
    python -m benchmarks.training data/demo --image_size 32 --batch_size 128 --job      one whole job

The images of the folder, both splits, are repeated as links in a temporary data set until there are --num_images of
each split. Compares with the plain way, benchmarks/plain.py, and with the ceiling: the same step on one resident batch.
"""

import argparse
import contextlib
import io
import itertools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.plain import PlainImages, compare, hardware, plain_step, plain_transforms, row, seconds
from data_utils import Cache, build_cache, list_data_set, num_cores, read_cache, resized, train_size
from model import build_model, member_outputs, pick_precision
from train import Sums, batch_spans, make_optimizer, pick_device, prepared, train_batches, train_member, train_step
from train import parse_args as train_args
from utils import InputError, Parser, RunError, natural_number, run_main


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


def preprocessing(source: Path, folder: Path, num_images: int, size: int, repeats: int) -> Path:
    """data_utils.py with all cores against decoding and resizing alone on one core. Returns the last data folder."""
    folders = [folder / f"run{number}" for number in range(repeats + 1)]  # each time a new cache
    for data in folders:
        repeated(source, data / "images", num_images)
    data = folders[-1]
    entries, waiting = list_data_set("images", data / "images").entries, iter(folders)

    def bare() -> None:
        for entry in entries:
            image = Image.open(data / "images" / entry.path).convert("RGB")
            shorter = train_size(size) if entry.split == "train" else size
            np.asarray(image.resize(resized(*image.size, shorter), Image.Resampling.BILINEAR))

    def ours() -> None:
        build_cache(next(waiting), "images", size, num_cores())

    runs = {f"{num_cores()} processes": ours, "bare decode and resize on one core": bare}
    rates("preprocessing: ", runs, len(entries), repeats, torch.device("cpu"))
    return data


def inputs(cache: Cache, data: Path, args: argparse.Namespace, repeats: int, device: torch.device) -> None:
    """One epoch of batches, nothing computed on them, against PIL and transforms in a DataLoader."""
    paths = [data / "images" / path for path in cache.meta["train"]["paths"]]
    targets = np.array(cache.array("train_labels"))
    mean, std = (torch.tensor(cache.meta[name], device=device) for name in ("mean", "std"))
    plain_set = PlainImages(paths, targets.tolist(), plain_transforms(args.image_size, True, True))

    workers = num_cores()

    def plain() -> None:
        for batch, _ in DataLoader(plain_set, batch_size=args.batch_size, shuffle=True, num_workers=workers):
            batch.to(device)

    def loader() -> None:  # each process cuts whole batches out of the cache, as our thread does
        spans = batch_spans(len(paths), args.batch_size)
        for batch in DataLoader(CachedBatches(cache, spans), batch_size=None, num_workers=workers):
            batch.to(device)

    def pixels() -> None:
        for _ in train_batches(cache, np.arange(len(paths)), targets, args, 1, 0, device):
            pass

    def floats() -> None:
        for batch in train_batches(cache, np.arange(len(paths)), targets, args, 1, 0, device):
            prepared(batch, mean, std)

    runs = {"uint8 on the device": pixels, "the same by a DataLoader": loader, "float, mirrored, normalised": floats}
    rates("input: ", {**runs, f"PIL to float in {workers} workers": plain}, len(paths), repeats, device)


class CachedBatches(Dataset):
    """Whole uint8 batches from the cache, each a random crop of the images in order."""

    def __init__(self, cache: Cache, spans: list[tuple[int, int]]):
        self.cache, self.spans = cache, spans

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> torch.Tensor:
        images = np.arange(*self.spans[index])
        size = self.cache.meta["image_size"]
        corners = np.random.default_rng(index).integers(0, self.cache.array("train_sizes")[images] - size + 1)
        batch = np.empty((len(images), size, size, 3), np.uint8)
        self.cache.train_crops(images, corners, np.full(len(images), size), batch)
        return torch.from_numpy(batch)


class ResidentStep:
    """Our step, again and again on one batch that lies on the device."""

    def __init__(self, cache: Cache, args: argparse.Namespace, precision: str, device: torch.device):
        targets = np.array(cache.array("train_labels")) % args.meta_class_size
        self.batch = next(iter(train_batches(cache, np.arange(len(targets)), targets, args, 1, 0, device)))
        self.model = build_model(args.backbone, args.meta_class_size, None).to(device).train()
        self.optimizer, self.precision = make_optimizer(args.optimizer, self.model, args.lr, device), precision
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.mean, self.std = (torch.tensor(cache.meta[name], device=device) for name in ("mean", "std"))
        self.sums = Sums.zeros(device)

    def __call__(self) -> None:
        pixels, targets = prepared(self.batch, self.mean, self.std), self.batch.targets
        train_step(self.model, self.optimizer, self.scaler, self.precision, pixels, targets, self.sums)


def steps(resident: ResidentStep, args: argparse.Namespace, repeats: int, device: torch.device) -> None:
    """Our step, from uint8, against the plain one on a batch that is float already; and the embedding."""
    batch_size, precision = len(resident.batch.targets), resident.precision
    model = torchvision.models.get_model(args.backbone, weights=None, num_classes=args.meta_class_size).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    images = torch.randn(batch_size, 3, args.image_size, args.image_size, device=device)

    def plain() -> None:
        plain_step(model, optimizer, images, resident.batch.targets)

    text = f"{args.backbone}, {args.image_size} px, batch {batch_size}"
    rates(f"step, {text}: ", {precision: resident, "fp32, contiguous": plain}, batch_size, 3 * repeats, device)

    test_images = np.tile(resident.batch.images.cpu().numpy(), (4, 1, 1, 1))
    statistics_of_channels = resident.mean, resident.std

    def embed_ours() -> None:
        member_outputs(resident.model, test_images, *statistics_of_channels, 2 * batch_size, precision)

    @torch.no_grad()
    def embed_plain() -> None:
        model.eval()
        for _ in range(4):
            model(images)

    runs = {precision: embed_ours, "fp32, contiguous": embed_plain}
    rates(f"embedding, {text}: ", runs, 4 * batch_size, repeats, device)
    resident.model.train()


def epoch(resident: ResidentStep, cache: Cache, args: argparse.Namespace, repeats: int, device: torch.device) -> None:
    """Epochs of train_member against as many steps on a resident batch."""
    num_steps = cache.counts["train"][1] // args.batch_size
    args.num_epochs, ours, ceilings = 2, [], []  # the first epoch warms up
    for _ in range(repeats):
        with contextlib.redirect_stdout(io.StringIO()):
            _, record = train_member(cache, None, args, 1, device, resident.precision)
        ours.append(record["history"][1]["images_per_second"])
        times = seconds(lambda: [resident() for _ in range(num_steps)], device)
        ceilings.append(num_steps * args.batch_size / times)
    ours, ceiling = statistics.median(ours), statistics.median(ceilings)
    text = f"epoch of {num_steps} steps / the same step on one resident batch"
    row(text, f"{ours:,.1f} images/s", f"{ceiling:,.1f} images/s", ours / ceiling)


def job(source: Path, size: int, batch_size: int, repeats: int, device: torch.device) -> None:
    """Two members of three epochs with their evaluation, imports included: train.py from its cache, and plain.py."""
    num_meta_classes = min(12, read_cache(source.parent, source.name, size).counts["train"][0])
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


def run(argv: list[str] | None) -> None:
    parser = Parser(prog="benchmarks.training", description=__doc__)
    parser.add_argument("source", type=Path, help="folder of a data set, such as data/cub")
    parser.add_argument("--image_size", type=natural_number, default=256, help="pixels (default: 256)")
    parser.add_argument("--batch_size", type=natural_number, default=32, help="images (default: 32)")
    parser.add_argument("--num_images", type=natural_number, help="of each split, repeated (default: 1600)")
    parser.add_argument("--num_steps", type=natural_number, help="of the epoch that is timed (default: 10)")
    parser.add_argument("--device", default="auto", help="as for train.py (default: auto)")
    parser.add_argument("--repeats", type=natural_number, default=3, help="runs of each, in turns (default: 3)")
    parser.add_argument("--job", action="store_true", help="only a whole job on an image folder that has its cache")
    options = parser.parse_args(argv)
    if options.job and (options.num_images or options.num_steps):
        raise InputError("--job takes the whole data set: it does not go with --num_images or --num_steps")
    if not options.source.is_dir():
        raise InputError(f"{options.source}: no such folder")
    num_images, num_steps = options.num_images or 1600, options.num_steps or 10
    device, size, repeats = pick_device(options.device), options.image_size, options.repeats
    torch.backends.cudnn.benchmark = True
    args = train_args(["--data_name", "images", "--image_size", str(size), "--batch_size", str(options.batch_size)])

    print(f"{hardware(device)}; {options.source.name}, medians of {repeats}")
    print("\n| what | ours | other | ratio |\n|---|---|---|---|")
    if options.job:
        job(options.source, size, options.batch_size, repeats, device)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = preprocessing(options.source, Path(folder), num_images, size, repeats)
        inputs(read_cache(data, "images", size), data, args, repeats, device)
        repeated(options.source, Path(folder, "epoch", "images"), num_steps * options.batch_size)
        with contextlib.redirect_stdout(io.StringIO()):
            cache = build_cache(Path(folder, "epoch"), "images", size, num_cores())
        args.meta_class_size = min(args.meta_class_size, cache.counts["train"][0])
        resident = ResidentStep(cache, args, pick_precision(device), device)
        steps(resident, args, repeats, device)
        epoch(resident, cache, args, repeats, device)


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.training", lambda: run(argv), "a smaller --batch_size or --image_size")


if __name__ == "__main__":
    sys.exit(main())
