"""How long does training wait for its progress files, on a slow disk and with short epochs?

    python -m benchmarks.progress            files as large as they get, 50 MB/s, epochs of a second

Epochs are pauses. Their ends are those of a network that was trained for one step, with an earlier best epoch, which
makes the file as large as it gets. The disk is the one for temporary files, whose writes are made to last longer. In
the first row, which takes a fifth of the epochs, every epoch is written.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from benchmarks.plain import hardware
from dreml import checkpoint
from dreml.checkpoint import SECONDS_BETWEEN_WRITES, Progress
from dreml.cli import DEVICE_HELP, MANY, Parser, check_ranges, pick_device, run_main
from dreml.files import atomic_open
from model import Compute, build_model
from train import Sums, TrainState, copy_weights, make_optimizer, train_step

MEGABYTE = 1e6


class SlowDisk:
    """Stands in for `atomic_open`: what is written takes its time at so many bytes a second. Counts files and bytes."""

    def __init__(self, bytes_per_second: float):
        self.bytes_per_second, self.num_files, self.num_bytes = bytes_per_second, 0, 0

    @contextlib.contextmanager
    def open(self, path: Path, mode: str) -> Iterator:
        start = time.perf_counter()
        with atomic_open(path, mode) as file:
            yield file
            num_bytes = file.seek(0, os.SEEK_END)
            time.sleep(max(0, start + num_bytes / self.bytes_per_second - time.perf_counter()))
        self.num_files, self.num_bytes = self.num_files + 1, self.num_bytes + num_bytes


def trained_state(backbone: str, device: torch.device) -> TrainState:
    """A network after one step of Adam, whose moments exist then."""
    model = build_model(backbone, 12, None).to(device)
    state = TrainState(model, make_optimizer("adam", model, 1e-4, device), Compute(device).grad_scaler())
    pixels, targets = torch.randn(4, 3, 32, 32, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    train_step(state, Compute(device), pixels, targets, Sums.zeros(device))
    return state


def run_epochs(
    state: TrainState, interval: float, num_epochs: int, epoch_seconds: float, disk: SlowDisk
) -> tuple[float, float]:
    """So many epochs of one member, each a pause. Returns the seconds that training stood still, and all of them."""
    done = {"history": [0], "best_epoch": 0, "best_model": copy_weights(state.model)}
    waited = 0.0
    with mock.patch.object(checkpoint, "atomic_open", disk.open), tempfile.TemporaryDirectory() as folder:
        progress = Progress(Path(folder), 1, "benchmark", interval)
        start = time.perf_counter()
        for _ in range(num_epochs):
            time.sleep(epoch_seconds)
            before = time.perf_counter()
            progress.end_of_epoch(state.state_dict() | done)
            waited += time.perf_counter() - before
        return waited, time.perf_counter() - start


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="-m benchmarks.progress", description=__doc__)
    add = parser.add_argument
    add("--backbone", default="resnet18", metavar="NAME", help="a ResNet of torchvision (default: resnet18)")
    add("--num_epochs", type=int, default=60, metavar="E", help="epochs (default: 60)")
    add("--epoch_seconds", type=float, default=1.0, metavar="S", help="length of an epoch (default: 1)")
    add("--megabytes", type=float, default=50.0, metavar="M", help="MB/s of the disk (default: 50)")
    add("--device", default="auto", help=DEVICE_HELP)
    args = parser.parse_args(argv)
    check_ranges(args, num_epochs=(1, MANY), epoch_seconds=(1e-9, MANY), megabytes=(1e-9, MANY))
    return args


def run(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    print(f"{hardware(device)}; {args.backbone}, Adam; epochs of {args.epoch_seconds:g} s, {args.megabytes:g} MB/s")
    print("\n| a progress file | epochs | files | MB each | waited | share of the run |\n|---|---|---|---|---|---|")
    state = trained_state(args.backbone, device)
    runs = {"after each epoch": (0, max(1, args.num_epochs // 5))}
    runs[f"each {SECONDS_BETWEEN_WRITES:g} s"] = SECONDS_BETWEEN_WRITES, args.num_epochs
    for name, (interval, num_epochs) in runs.items():
        disk = SlowDisk(args.megabytes * MEGABYTE)
        waited, total = run_epochs(state, interval, num_epochs, args.epoch_seconds, disk)
        size = f"{disk.num_bytes / MEGABYTE / disk.num_files:.0f}" if disk.num_files else ""
        print(
            f"| {name} | {num_epochs} | {disk.num_files} | {size} | {waited:.2f} s | {waited / total:.2%} |", flush=True
        )


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.progress", lambda: run(parse_args(argv)), "another --backbone", resumable=False)


if __name__ == "__main__":
    sys.exit(main())
