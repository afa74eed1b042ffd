"""The plain way to do what this project does, for the benchmarks to compare with, and their stopwatch.

    python -m benchmarks.plain data/demo --image_size 32 --no_flip --lr 1e-3 --num_epochs 3 --ensemble_size 2

trains members from scratch on an image folder as most repositories do: images decoded by PIL in a DataLoader, float32,
contiguous memory, `loss.item()` in each step, and Recall@K from the sorted N x N similarity matrix.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

# ------------------------------------------------------------------------------------------------ stopwatch


def hardware(device: torch.device) -> str:
    """The device, the processor, its threads and the versions, on one line."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        processor = names[0] if names else processor
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, numpy {np.__version__}"
    return f"{gpu}{processor}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """The wall time of one call."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def compare(
    runs: dict[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: bool = True
) -> dict[str, float]:
    """The median seconds of each of `runs`, which take turns, so that a slow minute of the machine meets them all."""
    times = {name: [] for name in runs}
    for repeat in range(repeats + warm_up):
        for name, run in runs.items():
            elapsed = seconds(run, device)
            if repeat >= warm_up:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def row(what: str, ours: str, other: str, ratio: float) -> None:
    """One line of a table; the ratio says how many times faster, or what share of the time, as `what` tells."""
    print(f"| {what} | {ours} | {other} | {ratio:.2f} |", flush=True)


# ------------------------------------------------------------------------------------------------ baseline


class PlainImages(Dataset):
    """Images and labels, decoded and transformed one by one."""

    def __init__(self, paths: list[Path], labels: list[int], transform: Callable):
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.open(self.paths[index]).convert("RGB")), self.labels[index]


def plain_transforms(size: int, flip: bool, train: bool) -> transforms.Compose:
    """The same pipeline as ours: resize, crop, mirror, normalise."""
    if train:
        steps = [transforms.Resize(int(1.1 * size)), transforms.RandomCrop(size)]
        steps += [transforms.RandomHorizontalFlip()] * flip
    else:
        steps = [transforms.Resize(size), transforms.CenterCrop(size)]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)])


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, targets: torch.Tensor
) -> float:
    """Float32, contiguous, and the host waits for the loss."""
    loss = F.cross_entropy(model(images), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def plain_recall(embedding: torch.Tensor, labels: torch.Tensor, ks: list[int]) -> list[float]:
    """Recall@K from the whole similarity matrix, each row sorted."""
    similarity = embedding @ embedding.T
    similarity.fill_diagonal_(-torch.inf)
    found = labels[similarity.argsort(dim=1, descending=True)] == labels[:, None]
    return [found[:, :k].any(1).float().mean().item() for k in ks]


def class_folders(folder: Path) -> tuple[list[Path], list[int], int]:
    """Paths, labels and number of classes of an image folder, its classes at any depth."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    names = sorted({path.parent for path in paths})
    return paths, [names.index(path.parent) for path in paths], len(names)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="-m benchmarks.plain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="image folder with train/ and test/")
    add("--image_size", type=int, default=256, metavar="S", help="pixels (default: 256)")
    add("--batch_size", type=int, default=128, metavar="B", help="images a step (default: 128)")
    add("--num_epochs", type=int, default=12, metavar="E", help="epochs a member (default: 12)")
    add("--ensemble_size", type=int, default=12, metavar="L", help="members (default: 12)")
    add("--meta_class_size", type=int, default=12, metavar="D", help="meta-classes (default: 12)")
    add("--num_workers", type=int, default=2, metavar="N", help="processes of the DataLoader (default: 2)")
    add("--lr", type=float, default=1e-4, help="learning rate of Adam (default: 1e-4)")
    add("--no_flip", action="store_true", help="no mirroring")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda, else cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    (paths, labels, num_classes), (test_paths, test_labels, _) = (
        class_folders(args.folder / split) for split in ("train", "test")
    )
    train_transform, test_transform = (plain_transforms(args.image_size, not args.no_flip, t) for t in (True, False))
    test_set = PlainImages(test_paths, test_labels, test_transform)
    embeddings = []
    for _ in range(args.ensemble_size):
        partition = torch.randperm(num_classes) % args.meta_class_size
        train_set = PlainImages(paths, partition[labels].tolist(), train_transform)
        model = torchvision.models.resnet18(num_classes=args.meta_class_size).to(args.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
        options = {"batch_size": args.batch_size, "num_workers": args.num_workers}
        for epoch in range(args.num_epochs):
            total = 0.0
            for images, targets in DataLoader(train_set, shuffle=True, **options):
                total += plain_step(model, optimizer, images.to(args.device), targets.to(args.device))
            print(f"epoch {epoch}: mean loss {total / -(-len(paths) // args.batch_size):.4f}", flush=True)
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(images.to(args.device)) for images, _ in DataLoader(test_set, **options)])
        embeddings.append(F.normalize(logits))
        recalls = plain_recall(torch.cat(embeddings, 1), torch.tensor(test_labels, device=args.device), [1, 2, 4, 8])
        print(f"{len(embeddings)} members: R@1, 2, 4, 8: {', '.join(f'{100 * recall:.2f}' for recall in recalls)}")


if __name__ == "__main__":
    main()
