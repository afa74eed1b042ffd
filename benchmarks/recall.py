"""How fast is `recall_at_k`?

    python -m benchmarks.recall            on the GPU if there is one, else on the CPU
    python -m benchmarks.recall --big      also 60,502 images x 8,000 dimensions, with the peak memory

Compares with the bare matrix product (the ceiling of every method that computes all similarities), with a full argsort
and, where they are installed, with faiss (IndexFlatIP) and pytorch-metric-learning (AccuracyCalculator).
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
    """`(N, d) float32`, rows of length 1; images of a class lie a little nearer to each other."""
    labels = random_labels(num_images).to(device)
    centres = torch.randn(int(labels[-1]) + 1, width, device=device)
    return torch.nn.functional.normalize(torch.randn(num_images, width, device=device) + 0.15 * centres[labels])


def random_labels(num_images: int) -> torch.Tensor:
    """Ten or eleven images a class, in order."""
    return torch.arange(num_images) * (num_images // 10) // num_images


def bare_product(embedding: torch.Tensor) -> None:
    """The full similarity matrix in chunks of rows, thrown away."""
    for start, stop in spans(0, len(embedding), 2048):
        embedding[start:stop] @ embedding.T


def faiss_search(embedding: torch.Tensor, k: int) -> np.ndarray:
    """The k nearest neighbours of each row, itself among them."""
    import faiss

    index = faiss.IndexFlatIP(embedding.shape[1])
    index.add(embedding.numpy())
    return index.search(embedding.numpy(), k)[1]


def accuracy_calculator(embedding: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """pytorch-metric-learning's evaluation, at its cheapest: the first neighbour only."""
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(include=("precision_at_1",), k=1, device=embedding.device)
    return calculator.get_accuracy(embedding, labels)


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
    if importlib.util.find_spec("pytorch_metric_learning") and importlib.util.find_spec("faiss"):  # it needs both
        runs["AccuracyCalculator, R@1 only"] = lambda: accuracy_calculator(embedding, labels.to(device))
    if "argsort" in runs:
        plain, ours = runs["argsort"](), runs["recall_at_k"]()[0].tolist()
        assert np.allclose(plain[: len(ours)], ours, atol=2 / num_images), (plain, ours)
    medians = compare(runs, repeats, device)
    ours = medians.pop("recall_at_k")
    for name, median in medians.items():
        row(f"N={num_images:,} d={width:,}: recall_at_k / {name}", f"{ours:.3f} s", f"{median:.3f} s", ours / median)


def curve(num_images: int, members: int, width: int, repeats: int, device: torch.device) -> None:
    """All ensemble sizes against the largest one alone."""
    embeddings, labels = (
        [random_embedding(num_images, width, device) for _ in range(members)],
        random_labels(num_images),
    )
    whole = torch.cat(embeddings, 1)
    runs = {"curve": lambda: recall_at_k(embeddings, labels, KS), "whole": lambda: recall_at_k(whole, labels, KS)}
    medians = compare(runs, repeats, device)
    row(
        f"N={num_images:,}: the curve of {members} members of {width} dimensions / their concatenation",
        f"{medians['curve']:.3f} s",
        f"{medians['whole']:.3f} s",
        medians["curve"] / medians["whole"],
    )


def growth(num_images: int, repeats: int, device: torch.device) -> None:
    """How the time grows with N, with the dimensions d and with the members L of 12 dimensions each."""
    sizes = [(num_images // 4, 1, 576), (num_images // 2, 1, 576), (num_images, 1, 576)]
    sizes += [(num_images // 2, 1, width) for width in (144, 2304)]
    sizes += [(num_images // 2, members, 12) for members in (12, 24, 48)]
    labels = {number: random_labels(number) for number, _, _ in sizes}
    embeddings = {(n, m, d): [random_embedding(n, d, device) for _ in range(m)] for n, m, d in sizes}
    runs = {size: (lambda size=size: recall_at_k(embeddings[size], labels[size[0]], KS)) for size in sizes}
    medians = compare(runs, repeats, device)
    print("\n| N | L | d of a member | recall_at_k |\n|---|---|---|---|")
    for (number, members, width), median in medians.items():
        print(f"| {number:,} | {members} | {width:,} | {median:.3f} s |", flush=True)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process (CPU) or PyTorch (CUDA) has held until now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def big(num_images: int, width: int, device: torch.device) -> None:
    """The size of sop's gallery: has to fit."""
    labels = random_labels(num_images)
    embedding = torch.empty(num_images, width, device=device)
    for start, stop in spans(0, num_images, 100):  # a peak before the call would hide that of the call
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
    add = parser.add_argument
    add("--device", default="auto", help=DEVICE_HELP)
    add("--repeats", type=int, default=3, metavar="N", help="runs of each, in turns (default: 3)")
    add("--scale", type=float, default=1.0, metavar="X", help="this share of the images (default: 1.0)")
    add("--big", action="store_true", help="also 60,502 x 8,000: 2 GB, minutes on a CPU")
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
    curve(round(20_000 * args.scale), 16, 64, args.repeats, device)
    growth(round(20_000 * args.scale), args.repeats, device)


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.recall", lambda: run(parse_args(argv)), "it without --big")


if __name__ == "__main__":
    sys.exit(main())
