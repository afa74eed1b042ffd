"""How long does training wait for its progress files, on a slow disk and with short epochs?

    python -m benchmarks.progress            files as large as they get, 50 MB/s, epochs of a second

Epochs are pauses. Their ends are those of a network after one step, with an earlier best epoch, which makes the file as
large as it gets. The disk is the one for temporary files, whose writes are made to last longer.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from benchmarks.plain import hardware, row
from dreml import checkpoint
from dreml.checkpoint import SECONDS_BETWEEN_WRITES, Progress
from dreml.cli import DEVICE_HELP, MANY, Parser, check_ranges, pick_device, run_main
from dreml.files import atomic_open
from dreml.optimizers import make_optimizer
from model import Compute, TrainState, build_model
from train import train_step


@contextlib.contextmanager
def slow_disk(bytes_per_second: float) -> Iterator[list[int]]:
    """Slow writing down to the speed of a disk. Yields a list that collects the sizes of written files, in bytes."""
    sizes = []

    @contextlib.contextmanager
    def slow_open(path: Path, mode: str) -> Iterator[io.IOBase]:
        start = time.perf_counter()
        with atomic_open(path, mode) as file:
            yield file
            sizes.append(file.seek(0, os.SEEK_END))
            time.sleep(max(0, start + sizes[-1] / bytes_per_second - time.perf_counter()))

    with mock.patch.object(checkpoint, "atomic_open", slow_open):
        yield sizes


def end_of_epoch(device: torch.device) -> dict:
    """Make a state to write: a network after one step of Adam, its moments, and the weights of an earlier epoch."""
    model = build_model("resnet18", 12, None).to(device)
    compute = Compute(device)
    state = TrainState(model, make_optimizer("adam", model, 1e-4, device), compute.grad_scaler())
    best_model = {name: value.clone() for name, value in model.state_dict().items()}
    pixels = torch.randn(4, 3, 32, 32, device=device)
    targets = torch.zeros(4, dtype=torch.int64, device=device)
    train_step(state, compute, pixels, targets)
    return state.state_dict() | {"history": [], "best_epoch": -1, "best_model": best_model}


def waiting(state: dict, interval: float, num_epochs: int, epoch_seconds: float) -> float:
    """Replace a member's epochs by pauses. Returns the share of the time spent waiting for progress files."""
    waited = 0.0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        progress = Progress(Path(folder), 1, "benchmark", interval)
        for _ in range(num_epochs):
            time.sleep(epoch_seconds)
            before = time.perf_counter()
            progress.end_of_epoch(state)
            waited += time.perf_counter() - before
    return waited / (time.perf_counter() - start)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="-m benchmarks.progress", description=__doc__)
    parser.add_argument("--num_epochs", type=int, default=120, metavar="E", help="epochs (default: 120)")
    seconds_help = "length of an epoch in seconds (default: 1)"
    parser.add_argument("--epoch_seconds", type=float, default=1.0, metavar="S", help=seconds_help)
    speed_help = "speed of the disk in MB/s (default: 50)"
    parser.add_argument("--megabytes", type=float, default=50.0, metavar="M", help=speed_help)
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    args = parser.parse_args(argv)
    check_ranges(args, num_epochs=(1, MANY), epoch_seconds=(1e-9, MANY), megabytes=(1e-9, MANY))
    return args


def run(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    print(f"{hardware(device)}; resnet18, Adam, {args.num_epochs} epochs of {args.epoch_seconds:g} s")
    print("\n| progress files | number | size | share of the time |\n|---|---|---|---|")
    state = end_of_epoch(device)
    with slow_disk(1e6 * args.megabytes) as sizes:
        share = waiting(state, SECONDS_BETWEEN_WRITES, args.num_epochs, args.epoch_seconds)
    size = f"{sum(sizes) / 1e6 / max(1, len(sizes)):.0f} MB each"
    row(f"every {SECONDS_BETWEEN_WRITES:g} s at most, {args.megabytes:g} MB/s", f"{len(sizes)}", size, share)


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.progress", lambda: run(parse_args(argv)), "another --device", resumable=False)


if __name__ == "__main__":
    sys.exit(main())
