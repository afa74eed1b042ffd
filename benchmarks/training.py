"""How fast are preprocessing, training step, embedding and epoch?

    python -m benchmarks.training data/cub --image_size 256 --batch_size 32     the images of a data set

The images below the folder are repeated as links in a temporary data set until there are --num_images of each split.
Compares with the plain way, benchmarks/plain.py, and with the ceiling: the same step on one resident batch.
"""

import argparse
import contextlib
import io
import itertools
import statistics
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

import data_utils
from benchmarks.plain import class_folders, compare, hardware, plain_step, row, seconds
from dreml import cli
from dreml.batches import Batch, epoch_batches, input_memory, prepare
from dreml.cache import Cache, read_cache
from dreml.images import ImageSpec, resized
from dreml.settings import Settings
from model import Compute, extract_features, pick_precision
from train import Experiment, initial_state, train_member, train_step
from utils import rng_for


def repeated(source: Path, target: Path, num_images: int) -> None:
    """Make `target`, an image folder with `num_images` links in each of train/ and test/ to images of `source`."""
    paths, labels, _ = class_folders(source)
    if not paths:
        raise cli.InputError(f"{source}: no images below it")
    for split, number in itertools.product(("train", "test"), range(num_images)):
        path, label = paths[number % len(paths)], labels[number % len(paths)]
        link = target / split / f"{split}_{label}" / f"{number}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())


def make_cache(data: Path, size: int) -> Cache:
    """Make the cache of the image folder data/images by data_utils.py with all cores."""
    options = ["--data_path", str(data), "--data_name", "images", "--image_size", str(size)]
    with contextlib.redirect_stdout(io.StringIO()):  # keep its lines out of the table
        if data_utils.main(options):
            raise cli.RunError(f"{data}: its cache could not be made")
    return read_cache(data, "images", ImageSpec(size))


def rates(text: str, runs: dict[str, Callable], num_images: int, repeats: int, device: torch.device) -> None:
    """Print the images per second of each of `runs`, and the ratio to the last one, which is the plain way."""
    medians = compare(runs, repeats, device)
    *names, plain = medians
    for name in names:
        ours = num_images / medians[name]
        other = num_images / medians[plain]
        row(f"{text}{name} / {plain}", f"{ours:,.1f} images/s", f"{other:,.1f} images/s", ours / other)


def preprocessing(source: Path, folder: Path, num_images: int, spec: ImageSpec, repeats: int) -> None:
    """Time data_utils.py with all cores against only decoding and resizing on one core."""
    folders = [folder / f"run{number}" for number in range(repeats + 1)]  # a new cache for each run
    for data in folders:
        repeated(source, data / "images", num_images)
    waiting = iter(folders)

    def ours() -> None:
        make_cache(next(waiting), spec.size)

    def bare() -> None:
        for split, shorter in (("train", spec.train_size), ("test", spec.size)):
            for path in class_folders(folders[-1] / "images" / split)[0]:
                image = Image.open(path).convert("RGB")
                np.asarray(resized(image, spec, shorter))

    runs = {f"{cli.num_cores()} processes": ours, "bare decode and resize on one core": bare}
    rates("preprocessing: ", runs, 2 * num_images, repeats, torch.device("cpu"))


def first_epoch(cache: Cache, settings: Settings, device: torch.device) -> Iterator[Batch]:
    """Yield the batches of member 1's first epoch, with all training images."""
    targets = np.array(cache.array("train_labels")) % settings.meta_class_size
    draw = partial(rng_for, settings.seed, 1, 0)
    return epoch_batches(cache, np.arange(len(targets)), targets, settings, draw, device)


class ResidentStep:
    """Our training step, repeated on one batch of random pixels that stays on the device."""

    def __init__(self, settings: Settings, compute: Compute):
        device = compute.device
        shape = (settings.batch_size, settings.image_size, settings.image_size, 3)
        images = torch.randint(256, shape, dtype=torch.uint8, device=device)
        targets = torch.randint(settings.meta_class_size, shape[:1], device=device)
        self.batch = Batch(images, targets, num_mirrored=settings.batch_size // 2, sides=None)
        self.compute = compute
        self.statistics = (torch.full((3,), 0.5, device=device), torch.full((3,), 0.25, device=device))
        self.memory = input_memory(settings.batch_size, settings.image_size, device)
        nothing = {"cache": None, "weights": None, "environment": {}}
        self.state = initial_state(Experiment(settings=settings, compute=compute, **nothing), 1)
        self.state.model.train()

    def __call__(self) -> None:
        pixels = prepare(self.batch, *self.statistics, self.memory)
        train_step(self.state, self.compute, pixels, self.batch.targets)

    def rate(self, num_steps: int) -> float:
        """Return the images per second of `num_steps` steps. The host waits once, at the end."""
        elapsed = seconds(lambda: [self() for _ in range(num_steps)], self.compute.device)
        return num_steps * len(self.batch.targets) / elapsed


def plain_runs(settings: Settings, device: torch.device) -> dict[str, Callable]:
    """Return the plain "step", and "embedding" of four batches, on one batch that is float already."""
    model = torchvision.models.get_model(settings.backbone, weights=None, num_classes=settings.meta_class_size)
    model = model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    images = torch.randn(settings.batch_size, 3, settings.image_size, settings.image_size, device=device)
    targets = torch.randint(settings.meta_class_size, (settings.batch_size,), device=device)

    def step() -> None:
        model.train()
        plain_step(model, optimizer, images, targets)

    @torch.no_grad()
    def embedding() -> None:
        model.eval()
        for _ in range(4):
            model(images)

    return {"step": step, "embedding": embedding}


def embed_resident(resident: ResidentStep, copies: int) -> Callable[[], None]:
    """Return a function that embeds `copies` batches from the memory of the host."""
    images = np.tile(resident.batch.images.cpu().numpy(), (copies, 1, 1, 1))
    batch_size = 2 * len(resident.batch.targets)

    def embed() -> None:
        extract_features(resident.state.model, images, resident.statistics, batch_size)
        resident.state.model.train()

    return embed


def steps(resident: ResidentStep, settings: Settings, repeats: int) -> None:
    """Time our step, from uint8, and our embedding against the plain ones."""
    plain = plain_runs(settings, resident.compute.device)
    text = f"{settings.backbone}, {settings.image_size} px, batch {settings.batch_size}"
    runs = {resident.compute.precision: resident, "fp32, contiguous": plain["step"]}
    rates(f"step, {text}: ", runs, settings.batch_size, 3 * repeats, resident.compute.device)
    runs = {"fp32, channels_last": embed_resident(resident, copies=4), "fp32, contiguous": plain["embedding"]}
    rates(f"embedding, {text}: ", runs, 4 * settings.batch_size, repeats, resident.compute.device)


def two_epochs(experiment: Experiment) -> list[float]:
    """Train a member for two epochs. Returns the images per second of each."""
    experiment = replace(experiment, settings=replace(experiment.settings, num_epochs=2))
    with contextlib.redirect_stdout(io.StringIO()):
        _, result = train_member(experiment, 1, "member 1")
    return [epoch["images_per_second"] for epoch in result["history"]]


def epoch(experiment: Experiment, resident: ResidentStep, num_steps: int, repeats: int) -> None:
    """Time the second epoch of train_member against `num_steps` steps on a resident batch."""
    ours, ceilings = [], []
    for _ in range(repeats):
        ours.append(two_epochs(experiment)[1])
        ceilings.append(resident.rate(num_steps))
    ours, ceiling = statistics.median(ours), statistics.median(ceilings)
    text = f"epoch of {num_steps} steps / the same step on one resident batch"
    row(text, f"{ours:,.1f} images/s", f"{ceiling:,.1f} images/s", ours / ceiling)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="-m benchmarks.training", description=__doc__)
    parser.add_argument("source", type=Path, metavar="FOLDER", help="folder of a data set, such as data/cub")
    size_help = "side of the square crops in pixels (default: 256)"
    parser.add_argument("--image_size", type=int, default=256, metavar="S", help=size_help)
    parser.add_argument("--batch_size", type=int, default=32, metavar="B", help="images of a step (default: 32)")
    images_help = "images of each split, repeated (default: 1600)"
    parser.add_argument("--num_images", type=int, default=1600, metavar="N", help=images_help)
    steps_help = "steps of the epoch that is timed (default: 10)"
    parser.add_argument("--num_steps", type=int, default=10, metavar="N", help=steps_help)
    parser.add_argument("--device", default="auto", help=cli.DEVICE_HELP)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each, in turns (default: 3)")
    args = parser.parse_args(argv)
    counts = {name: (1, cli.MANY) for name in ("image_size", "batch_size", "num_images", "num_steps", "repeats")}
    cli.check_ranges(args, **counts)
    return args


def run(args: argparse.Namespace) -> None:
    source, repeats, device = args.source, args.repeats, cli.pick_device(args.device)
    if not source.is_dir():
        raise cli.InputError(f"{source}: no such folder")
    cli.set_up_device(device, deterministic=False)
    print(f"{hardware(device)}; {source.name}, medians of {repeats}")
    print("\n| what | ours | other | ratio |\n|---|---|---|---|")
    settings = Settings(data_name="images", image_size=args.image_size, batch_size=args.batch_size)
    compute = Compute(device, pick_precision(device, settings.backbone))
    with tempfile.TemporaryDirectory() as folder:
        preprocessing(source, Path(folder), args.num_images, settings.image_spec, repeats)
        repeated(source, Path(folder, "epoch", "images"), args.num_steps * settings.batch_size)
        cache = make_cache(Path(folder, "epoch"), settings.image_size)
        settings = replace(settings, meta_class_size=min(settings.meta_class_size, cache.counts["train"][0]))
        resident = ResidentStep(settings, compute)
        steps(resident, settings, repeats)
        experiment = Experiment(cache=cache, settings=settings, weights=None, compute=compute, environment={})
        epoch(experiment, resident, args.num_steps, repeats)


def main(argv: list[str] | None = None) -> int:
    return cli.run_main("benchmarks.training", lambda: run(parse_args(argv)), "a smaller --batch_size or --image_size")


if __name__ == "__main__":
    sys.exit(main())
