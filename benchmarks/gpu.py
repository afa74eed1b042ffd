"""What does a GPU give, and what could be better on it? At most four minutes on a fast card.

    python -m benchmarks.gpu                          on the GPU; the table is stored in gpu.json, and printed
    python -m benchmarks.gpu --device cpu --small     the same code in seconds

The parts stand in the order of their worth. Each is stored as it is done: the same command goes on where it stopped.
A part that fails is named, does not stop the others, and is tried again the next time.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import dreml.batches
import train
from benchmarks import training
from benchmarks.plain import compare, hardware, seconds, synchronize
from benchmarks.progress import end_of_epoch
from benchmarks.recall import bare_product, random_embedding, random_labels
from dreml.batches import Batch, prepare
from dreml.cache import Cache, read_cache
from dreml.checkpoint import Progress
from dreml.cli import DEVICE_HELP, InputError, Parser, RunError, one_line, pick_device, run_main, set_up_device
from dreml.demo import draw_demo
from dreml.files import read_record, write_record
from dreml.settings import Settings
from model import Compute, pick_precision
from utils import full_float32, recall_at_k

ROOT = Path(__file__).resolve().parents[1]
Row = list[str]  # what, ours, other, how many times faster ours is


@dataclass(frozen=True)
class Plan:
    """The device to measure, and the sizes: full, or small ones that only show that the code runs."""

    device: torch.device
    small: bool
    folder: Path  # for data and runs

    def of(self, whole: int, small: int) -> int:
        """Return the size for this plan."""
        return small if self.small else whole

    def settings(self, backbone: str = "resnet18", image_size: int = 256) -> Settings:
        """Return the settings to measure."""
        size = self.of(image_size, 32)
        return Settings(data_name="images", backbone=backbone, image_size=size, batch_size=self.of(128, 4))

    def compute(self) -> Compute:
        """Return the device with the precision that train.py chooses for it."""
        return Compute(self.device, pick_precision(self.device, "resnet18"))

    def resident(self, **settings: object) -> training.ResidentStep:
        """Make a step on a resident batch, in the precision of `compute`."""
        return training.ResidentStep(self.settings(**settings), self.compute())

    @functools.cached_property
    def photos(self) -> Path:
        """Make a data folder of random photographs and their cache, for 20 training batches."""
        generator = np.random.default_rng(0)
        for number in range(24):
            path = self.folder / "photos" / f"{number % 12}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8))
            coarse.resize((self.of(500, 48), self.of(375, 36)), Image.Resampling.BICUBIC).save(path)
        training.repeated(self.folder / "photos", self.folder / "images", self.of(2560, 24))
        training.make_cache(self.folder, self.settings().image_size)
        return self.folder

    def experiment(self) -> train.Experiment:
        """Make an experiment on `photos`, with a newly opened cache."""
        settings = self.settings()
        cache = read_cache(self.photos, "images", settings.image_spec)
        return train.Experiment(cache=cache, settings=settings, weights=None, compute=self.compute(), environment={})

    @functools.cached_property
    def demo(self) -> list[str]:
        """Draw the demo. Returns train.py's options for members of one epoch each."""
        draw_demo(self.folder / "demo" / "images", self.of(100, 12), self.of(20, 2))
        training.make_cache(self.folder / "demo", 32)
        options = ["--data_path", str(self.folder / "demo"), "--data_name", "images", "--image_size", "32"]
        options += ["--weights", "none", "--no_flip", "--lr", "1e-3", "--num_epochs", "1"]
        return [*options, "--device", str(self.device)]


def speed_row(what: str, ours: float, other: float) -> Row:
    """Make a row of two rates in images per second."""
    return [what, f"{ours:,.0f} images/s", f"{other:,.0f} images/s", f"{ours / other:.2f}"]


def time_row(what: str, ours: float, other: float) -> Row:
    """Make a row of two times in seconds."""
    return [what, f"{ours:.4g} s", f"{other:.4g} s", f"{other / ours:.2f}"]


# ------------------------------------------------------------------------------------------------ the code as it is


def several(run: Callable[[], object], number: int, kind: str = "tf32") -> Callable[[], None]:
    """Return a function that calls `run` `number` times. Float32 convolutions are of `kind` "ieee" or "tf32"."""

    def call() -> None:
        convolutions = torch.backends.cudnn.conv
        before = convolutions.fp32_precision
        try:
            convolutions.fp32_precision = kind
            for _ in range(number):
                run()
        finally:
            convolutions.fp32_precision = before

    return call


def steps(plan: Plan, backbone: str) -> list[Row]:
    """Time our step in each precision, and the plain step with TF32, against the plain step in full float32."""
    settings, number = plan.settings(backbone), plan.of(5, 1)
    plain = training.plain_runs(settings, plan.device)["step"]
    runs = {"plain, fp32": several(plain, number, "ieee"), "plain, TF32": several(plain, number)}
    runs["fp32"] = several(training.ResidentStep(settings, Compute(plan.device)), number, "ieee")
    for name, precision in (("TF32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")):
        runs[name] = several(training.ResidentStep(settings, Compute(plan.device, precision)), number)
    medians = compare(runs, plan.of(5, 1), plan.device)
    rates = {name: number * settings.batch_size / median for name, median in medians.items()}
    other = rates.pop("plain, fp32")
    text = f"step, {backbone}, {settings.image_size} px, batch {settings.batch_size}"
    return [speed_row(f"{text}: {name} / plain, fp32", rate, other) for name, rate in rates.items()]


def epochs(plan: Plan) -> list[Row]:
    """Time epochs of train_member, cold and warm cache, 1 to 4 loader threads, against one resident batch."""
    pixels = read_cache(plan.photos, "images", plan.settings().image_spec).folder / "train_pixels.npy"
    resident = plan.resident()
    resident.rate(plan.of(5, 1))
    ceiling = resident.rate(plan.of(20, 2))
    rows = []
    for threads in (1, 2, 4)[: plan.of(3, 2)]:
        evict(pixels)
        before = bytes_from_disk()
        with mock.patch.object(dreml.batches, "BATCHES_AHEAD", threads):
            cold, warm = training.two_epochs(plan.experiment())
        text = f"loader threads {threads} / one resident batch"
        if bytes_from_disk() - before > pixels.stat().st_size / 2:
            rows.append(speed_row(f"epoch, cold cache, {text}", cold, ceiling))
        else:
            rows.append([f"epoch, cold cache, {text}", "not measured: the files stay in memory", "", ""])
        rows.append(speed_row(f"epoch, warm cache, {text}", warm, ceiling))
    return rows


def evict(path: Path) -> None:
    """Drop a file that is not open elsewhere from Linux's page cache."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk() -> int:
    """Return the bytes that Linux has read from disks for this process; 0 on other systems."""
    counts = Path("/proc/self/io").read_text() if sys.platform == "linux" else "read_bytes: 0"
    return int(dict(line.split(": ") for line in counts.splitlines())["read_bytes"])


def embedding(plan: Plan) -> list[Row]:
    """Time our embedding against the plain one, both in full float32."""
    resident = plan.resident()
    plain = training.plain_runs(plan.settings(), plan.device)["embedding"]
    runs = {"ours": training.embed_resident(resident, copies=4), "plain": several(plain, 1, "ieee")}
    medians = compare(runs, plan.of(5, 1), plan.device)
    num_images = 4 * plan.settings().batch_size
    text = f"embedding, resnet18, {plan.settings().image_size} px, fp32 / plain, fp32"
    return [speed_row(text, num_images / medians["ours"], num_images / medians["plain"])]


def recall(plan: Plan, num_images: int, width: int) -> list[Row]:
    """Time Recall@K against the bare product of all rows."""
    rows, labels = random_embedding(num_images, width, plan.device), random_labels(num_images)
    runs = {"ours": lambda: recall_at_k(rows, labels, [1, 10, 100]), "product": lambda: bare_product(rows)}
    with full_float32(plan.device.type):
        medians = compare(runs, plan.of(2, 1), plan.device)
    text = f"recall_at_k, {num_images:,} x {width:,} / the bare product"
    return [time_row(text, medians["ours"], medians["product"])]


def progress_file(plan: Plan) -> list[Row]:
    """Time the writing of one progress file against 20 steps."""
    state = end_of_epoch(plan.device)
    times = []
    for number in range(plan.of(3, 1)):
        progress = Progress(plan.folder, number, "benchmark", 0)
        times.append(seconds(lambda progress=progress: progress.end_of_epoch(state), plan.device))
    resident = plan.resident()
    resident.rate(plan.of(3, 1))
    epoch = seconds(several(resident, plan.of(20, 1)), plan.device)
    return [time_row("a progress file, resnet18, Adam / 20 steps", statistics.median(times), epoch)]


def first_step(plan: Plan) -> list[Row]:
    """Time train.py from the start of its process to the end of the first step, against the imports alone."""
    own = ["-m", "benchmarks.gpu", "--device", str(plan.device), "--first_step", *plan.demo]
    start = time.time()
    done = subprocess.run([sys.executable, *own], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RunError(done.stderr.strip()[-200:])
    imported, stepped = (float(text) - start for text in done.stdout.split()[-2:])
    return [time_row("from the start of the process to the end of its first step / the imports", stepped, imported)]


def print_first_step(options: list[str]) -> None:
    """Run train.py up to the end of its first step. Print the times when it was imported and when the step was done."""
    imported, step = time.time(), train.train_step

    def first(state: train.TrainState, compute: Compute, *rest: object) -> None:
        step(state, compute, *rest)
        synchronize(compute.device)
        print(f"\n{imported} {time.time()}", flush=True)
        raise SystemExit(0)

    with tempfile.TemporaryDirectory() as results, mock.patch.object(train, "train_step", first):
        raise SystemExit(train.main([*options, "--results_path", results]))


def members(plan: Plan) -> list[Row]:
    """Time many demo members, trained by two processes on one device, against one process."""
    number = plan.of(48, 2)
    times = []
    for num_processes in (2, 1):
        results = ["--ensemble_size", str(number), "--results_path", str(plan.folder / f"by_{num_processes}")]
        command = [sys.executable, "train.py", *plan.demo, *results]
        start = time.perf_counter()
        running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(num_processes)]
        if any([process.wait() for process in running]):
            raise RunError(f"train.py failed, with {num_processes} processes")
        times.append(time.perf_counter() - start)
    return [time_row(f"{number} members of the demo, one epoch each: two processes / one", *times)]


# ------------------------------------------------------------------------------------------------ what could be better


def cuda_graph(plan: Plan) -> list[Row]:
    """Time a whole step as one CUDA graph at 32 px, where the launches take longer than the arithmetic."""
    if plan.device.type != "cuda":
        raise RunError("CUDA graphs need CUDA")
    as_it_is, captured = plan.resident(image_size=32), plan.resident(image_size=32)
    for group in captured.state.optimizer.param_groups:
        group["capturable"] = True
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # steps before a capture must run on a side stream
        several(captured, 3)()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()
    medians = compare({"graph": several(graph.replay, 20), "as is": several(as_it_is, 20)}, 5, plan.device)
    return [time_row("20 steps, resnet18, 32 px: a CUDA graph / as it is", medians["graph"], medians["as is"])]


def compiled(plan: Plan) -> list[Row]:
    """Time steps with torch.compile of the network against steps without."""
    as_it_is, ours = plan.resident(), plan.resident()
    ours.state.model = torch.compile(ours.state.model, backend="eager" if plan.small else "inductor")
    waited = seconds(ours, plan.device)
    medians = compare({"ours": several(ours, 5), "as is": several(as_it_is, 5)}, plan.of(5, 1), plan.device)
    text = f"5 steps, resnet18: torch.compile (its first step took {waited:.0f} s) / as it is"
    return [time_row(text, medians["ours"], medians["as is"])]


class ResidentCache:
    """The training images of a cache on the device. One gather cuts all windows of a batch."""

    def __init__(self, cache: Cache, device: torch.device):
        self.pixels = torch.from_numpy(np.array(cache.array("train_pixels"))).to(device).view(-1, 3)
        self.first = torch.from_numpy(cache.array("train_offsets")[:-1] // 3).to(device)  # (N,) int64, in pixels
        self.sizes = torch.from_numpy(cache.array("train_sizes").astype(np.int64)).to(device)  # (N, 2)

    def crops(self, images: torch.Tensor, corners: torch.Tensor, size: int) -> torch.Tensor:
        """Cut the windows `(B, S, S, 3) uint8` of images `(B,) int64` at corners `(B, 2) int64`."""
        span = torch.arange(size, device=self.pixels.device)
        rows = corners[:, :1] + span  # (B, S)
        starts = self.first[images][:, None] + rows * self.sizes[images, 1:] + corners[:, 1:]
        return self.pixels[starts[:, :, None] + span]

    def random_batches(self, batch_size: int, size: int) -> Iterator[torch.Tensor]:
        """Yield the windows of an epoch, batch by batch."""
        order = torch.randperm(len(self.sizes), device=self.sizes.device)
        ranges = self.sizes[order] - size + 1
        corners = (torch.rand(ranges.shape, device=ranges.device) * ranges).long()
        for images, places in zip(order.split(batch_size), corners.split(batch_size), strict=True):
            yield self.crops(images, places, size)


def resident_cache(plan: Plan) -> list[Row]:
    """Time epochs with the images on the device against a warm cache on disk."""
    experiment, resident = plan.experiment(), plan.resident()
    cache = ResidentCache(experiment.cache, plan.device)

    def step(batch: Batch) -> None:
        pixels = prepare(batch, *resident.statistics, resident.memory)
        train.train_step(resident.state, resident.compute, pixels, batch.targets)

    def from_device() -> None:
        for images in cache.random_batches(plan.settings().batch_size, plan.settings().image_size):
            step(resident.batch._replace(images=images))

    def from_disk() -> None:
        for batch in training.first_epoch(experiment.cache, experiment.settings, plan.device):
            step(batch)

    medians = compare({"ours": from_device, "as is": from_disk}, plan.of(3, 1), plan.device)
    return [time_row("an epoch: images on the device / as it is", medians["ours"], medians["as is"])]


# ------------------------------------------------------------------------------------------------ the table

PARTS = {  # the most useful first
    "step, resnet18": lambda plan: steps(plan, "resnet18"),
    "epoch": epochs,
    "recall, large": lambda plan: recall(plan, plan.of(60_502, 300), plan.of(8000, 64)),
    "first step": first_step,
    "step, resnet50": lambda plan: steps(plan, "resnet50"),
    "embedding": embedding,
    "recall, car": lambda plan: recall(plan, plan.of(8131, 200), plan.of(576, 24)),
    "progress file": progress_file,
    "CUDA graph": cuda_graph,
    "images on the device": resident_cache,
    "members": members,
    "torch.compile": compiled,
}


def measure(plan: Plan, table: dict, path: Path, limit: float) -> dict[str, str]:
    """Measure the parts that the table lacks. Begin none after `limit` seconds. Return the missing parts and why."""
    missing = {}
    start = time.perf_counter()
    for name, part in PARTS.items():
        if name in table["parts"]:
            continue
        if time.perf_counter() - start > limit:
            missing[name] = f"not begun after {limit:g} s; run the same command again"
            continue
        try:
            rows = part(plan)
        except Exception as error:  # an error in one part must not stop the others
            missing[name] = one_line(error)
        else:
            table["parts"][name] = rows
            write_record(path, table)
        print(f"{name}: {missing.get(name, 'done')}, {time.perf_counter() - start:.0f} s", file=sys.stderr)
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
    return missing


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="-m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help=DEVICE_HELP.replace("auto (default", "cuda (default; auto"))
    parser.add_argument("--small", action="store_true", help="small sizes, to see that the code runs")
    first_help = "only one step of train.py with these options, and when it was done"
    parser.add_argument("--first_step", nargs=argparse.REMAINDER, metavar="OPTION", help=first_help)
    file_help = "where the table is stored (default: gpu.json)"
    parser.add_argument("--file", type=Path, default=Path("gpu.json"), metavar="FILE", help=file_help)
    limit_help = "begin nothing after so many seconds (default: 200)"
    parser.add_argument("--seconds", type=float, default=200, metavar="S", help=limit_help)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if args.first_step is not None:
        print_first_step(args.first_step)
    device = pick_device(args.device)
    set_up_device(device, deterministic=False)
    command = "python -m benchmarks.gpu" + (" --small" if args.small else "")
    head = f"{hardware(device)}; {command} --device {args.device}"
    table = read_record(args.file) if args.file.exists() else {"head": head, "parts": {}}
    if table["head"] != head:
        raise InputError(f"{args.file} is of another machine or command; choose another --file")
    with tempfile.TemporaryDirectory() as folder:
        missing = measure(Plan(device, args.small, Path(folder)), table, args.file, args.seconds)
    print(f"{head}\n\n| what | ours | other | ratio |\n|---|---|---|---|")
    for name in PARTS:
        for row in table["parts"].get(name, []):
            print(f"| {' | '.join(row)} |")
    for name, reason in missing.items():
        print(f"| {name} | not measured: {reason} | | |")


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.gpu", lambda: run(parse_args(argv)), "another GPU")


if __name__ == "__main__":
    sys.exit(main())
