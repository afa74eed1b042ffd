"""The plain implementation that the benchmarks compare with, and their stopwatch.

Networks compute in float32 and contiguous memory, with `loss.item()` in each step; Recall@K comes from the sorted N x N
similarity matrix.
"""

import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

# ------------------------------------------------------------------------------------------------ stopwatch


def hardware(device: torch.device) -> str:
    """Describe the device, processor, threads and versions in one line."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        processor = names[0] if names else processor
    gpu = f"{torch.cuda.get_device_name(device)}, {driver()}, " if device.type == "cuda" else ""
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, numpy {np.__version__}"
    return f"{gpu}{processor}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"


def driver() -> str:
    """Return the versions of the GPU driver, CUDA and cuDNN."""
    version = "unknown"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        version = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
    return f"driver {version}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of one call, including the device's work."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def compare(
    runs: dict[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: bool = True
) -> dict[str, float]:
    """Return the median seconds of each of `runs`. They take turns, so that a slow phase of the machine affects all."""
    times = {name: [] for name in runs}
    for repeat in range(repeats + warm_up):
        for name, run in runs.items():
            elapsed = seconds(run, device)
            if repeat >= warm_up:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def row(what: str, ours: str, other: str, ratio: float) -> None:
    """Print one row of a table. `what` tells whether the ratio is a speed-up or a share of the time."""
    print(f"| {what} | {ours} | {other} | {ratio:.2f} |", flush=True)


# ------------------------------------------------------------------------------------------------ baseline


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, targets: torch.Tensor
) -> float:
    """Train one step in float32 and contiguous memory. The host waits for the loss."""
    loss = F.cross_entropy(model(images), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def plain_recall(embedding: torch.Tensor, labels: torch.Tensor, ks: list[int]) -> list[float]:
    """Compute Recall@K from the whole similarity matrix, each row sorted."""
    similarity = embedding @ embedding.T
    similarity.fill_diagonal_(-torch.inf)
    found = labels[similarity.argsort(dim=1, descending=True)] == labels[:, None]
    return [found[:, :k].any(1).float().mean().item() for k in ks]


def class_folders(folder: Path) -> tuple[list[Path], list[int], int]:
    """Return the paths, labels and number of classes of an image folder. Each folder with images is a class."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    names = sorted({path.parent for path in paths})
    return paths, [names.index(path.parent) for path in paths], len(names)
