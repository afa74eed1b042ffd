"""How fast is an exported model, run by onnxruntime, against PyTorch?

    python -m benchmarks.export results/RUN
    python -m benchmarks.export results/RUN --num_members 1
    python -m benchmarks.export results/RUN --student

Images a second, from uint8 pixels to embeddings, one and 32 images at a time, on one core and on two. Both take turns.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.plain import compare, hardware, row
from dreml.console import InputError, Parser, natural_number, num_cores, run_main
from dreml.exported import GRAPH, WEIGHTS, check_packages, open_graph, write_graph
from dreml.runs.settings import EMBEDDINGS
from dreml.runs.student import read_run_or_student
from model import load_ensemble, load_student

BATCH_SIZES = (1, 32)
CORES = (1, 2)


def measure(network: nn.Module, folder: Path, image_size: int, repeats: int) -> None:
    """Prints a row for each number of cores and batch size: onnxruntime, PyTorch, their ratio."""
    threads = torch.get_num_threads()
    try:
        for cores in (number for number in CORES if number <= num_cores()):
            torch.set_num_threads(cores)
            embed = open_graph(folder, cores)
            for batch_size in BATCH_SIZES:
                shape = (batch_size, image_size, image_size, 3)
                images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
                exported, pytorch = (batch_size / each for each in seconds_of(embed, network, images, repeats))
                what = f"{cores} core{'s' * (cores > 1)}, batch {batch_size}"
                row(what, f"{exported:,.1f} images/s", f"{pytorch:,.1f} images/s", exported / pytorch)
    finally:
        torch.set_num_threads(threads)


def seconds_of(embed: Callable, network: nn.Module, images: np.ndarray, repeats: int) -> Iterable[float]:
    """The median seconds in which onnxruntime, and PyTorch, embed these images."""
    runs = {"exported": lambda: embed(images), "PyTorch": lambda: network(torch.from_numpy(images))}
    return compare(runs, repeats, torch.device("cpu")).values()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="-m benchmarks.export", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_FOLDER", help="a run folder of train.py")
    add("--num_members", type=natural_number, metavar="L", help="members 1 to L (default: all that are finished)")
    add("--student", nargs="?", const="", metavar="TAG", help="the run's student (of that TAG) in place of its members")
    embedding_help = "logits (default), or pooled: the features before the last layer (default of --student)"
    add("--embedding", choices=EMBEDDINGS, metavar="E", help=embedding_help)
    add("--repeats", type=natural_number, default=20, metavar="N", help="calls of each (default: 20)")
    args = parser.parse_args(argv)
    if args.student is not None and args.num_members:
        raise InputError("--student is one network: it goes without --num_members")
    args.embedding = args.embedding or ("logits" if args.student is None else "pooled")
    return args


def run(args: argparse.Namespace) -> None:
    trained = read_run_or_student(args.run, args.num_members, args.student)
    check_packages()
    if args.student is None:
        network = load_ensemble(trained.folder, "cpu", args.embedding, trained.num_members)
        words = f"{trained.num_members} x {trained.settings.backbone}"
    else:
        network, words = load_student(args.run, trained.tag, "cpu", args.embedding), f"student {trained.tag}"
    import onnxruntime

    size = trained.settings.image_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_graph(network.one_by_one(), size, folder)
        megabytes = sum((folder / file).stat().st_size for file in (GRAPH, WEIGHTS)) / 1e6
        model = f"{words}, {args.embedding}, {size} px, {megabytes:,.1f} MB"
        print(f"{hardware(torch.device('cpu'))}, onnxruntime {onnxruntime.__version__}, medians of {args.repeats}")
        print(f"\n| {model} | exported | PyTorch | exported / PyTorch |\n|---|---|---|---|")
        measure(network, folder, size, args.repeats)


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.export", lambda: run(parse_args(argv)), "fewer --num_members", resumable=False)


if __name__ == "__main__":
    sys.exit(main())
