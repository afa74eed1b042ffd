"""How fast is `recall_at_k`?

    python -m benchmarks.recall            on the GPU if there is one, else on the CPU
    python -m benchmarks.recall --big      also 60,502 images x 8,000 dimensions, with the peak memory

Compares with the bare matrix product (the ceiling of every method that computes all similarities), with a full argsort
and, where it is installed, with faiss (IndexFlatIP).
"""

import argparse
import importlib.util
import sys

import numpy as np
import torch

from benchmarks.plain import compare, hardware, plain_recall, row, seconds
from dreml.batches import spans
from dreml.cli import DEVICE_HELP, MANY, Parser, check_ranges, pick_device, run_main
from utils import recall_at_k

KS = [1, 10, 100, 1000]


def random_embedding(num_images: int, width: int, device: torch.device) -> torch.Tensor:
    """Make a random embedding `(N, d) float32`, rows of length 1. Images of a class are a little closer."""
    labels = random_labels(num_images).to(device)
    centres = torch.randn(int(labels[-1]) + 1, width, device=device)
    return torch.nn.functional.normalize(torch.randn(num_images, width, device=device) + 0.15 * centres[labels])


def random_labels(num_images: int) -> torch.Tensor:
    """Make labels `(N,) int64` in order, ten or eleven images per class."""
    return torch.arange(num_images) * (num_images // 10) // num_images


def bare_product(embedding: torch.Tensor) -> None:
    """Compute the full similarity matrix in chunks of rows, and discard it."""
    for start, stop in spans(0, len(embedding), 2048):
        embedding[start:stop] @ embedding.T


def faiss_search(embedding: torch.Tensor, k: int) -> np.ndarray:
    """Return the indices of the k nearest neighbours of each row, which include itself."""
    import faiss

    index = faiss.IndexFlatIP(embedding.shape[1])
    index.add(embedding.numpy())
    return index.search(embedding.numpy(), k)[1]


def against_others(num_images: int, width: int, repeats: int, device: torch.device) -> None:
    embedding, labels = random_embedding(num_images, width, device), random_labels(num_images)
    runs = {
        "recall_at_k": lambda: recall_at_k(embedding, labels, [k for k in KS if k < num_images]),
        "bare product": lambda: bare_product(embedding),
    }
    if importlib.util.find_spec("faiss") and device.type == "cpu":
        runs |= {f"faiss k={k}": (lambda k=k: faiss_search(embedding, k)) for k in (1001, 9) if k < num_images}
    if 3 * 12 * num_images**2 < 10e9:  # the sorted indices are int64
        runs["argsort"] = lambda: plain_recall(embedding, labels.to(device), KS)
    if "argsort" in runs:
        plain, ours = runs["argsort"](), runs["recall_at_k"]()[0].tolist()
        assert np.allclose(plain[: len(ours)], ours, atol=2 / num_images), (plain, ours)
    medians = compare(runs, repeats, device)
    ours = medians.pop("recall_at_k")
    for name, median in medians.items():
        row(f"N={num_images:,} d={width:,}: recall_at_k / {name}", f"{ours:.3f} s", f"{median:.3f} s", ours / median)


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of this process (CPU) or of PyTorch (CUDA) until now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def big(num_images: int, width: int, device: torch.device) -> None:
    """Measure time and memory at the size of sop's gallery."""
    labels = random_labels(num_images)
    embedding = torch.empty(num_images, width, device=device)
    for start, stop in spans(0, num_images, 100):  # in parts: an earlier peak would hide the call's own
        embedding[start:stop] = torch.randn(stop - start, width, device=device)
    recall_at_k(embedding[:100], labels[:100], [1])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = peak_bytes(device)
    elapsed = seconds(lambda: recall_at_k(embedding, labels, KS), device)
    held = embedding.nbytes / 2**30
    extra = (peak_bytes(device) - before) / 2**30
    print(f"\nN={num_images:,} d={width:,}: {elapsed:.1f} s, {extra:.2f} GiB beside the embedding's {held:.2f} GiB")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="-m benchmarks.recall", description=__doc__)
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each, in turns (default: 3)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="this share of the images (default: 1.0)")
    parser.add_argument("--big", action="store_true", help="also 60,502 x 8,000: 2 GB, minutes on a CPU")
    args = parser.parse_args(argv)
    check_ranges(args, repeats=(1, MANY), scale=(0.01, 1))
    return args


def run(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    torch.manual_seed(0)
    print(f"{hardware(device)}; medians of {args.repeats}")
    if args.big:  # first, while the peak of the process is low
        big(round(60_502 * args.scale), 8000, device)
    print("\n| what | ours | other | ratio |\n|---|---|---|---|")
    against_others(round(20_000 * args.scale), 1024, args.repeats, device)
    against_others(round(8131 * args.scale), 576, args.repeats, device)


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.recall", lambda: run(parse_args(argv)), "it without --big")


if __name__ == "__main__":
    sys.exit(main())
