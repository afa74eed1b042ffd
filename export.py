"""Writes a trained ensemble as one ONNX graph, which runs without this program.

    python export.py RUN                       all finished members
    python export.py RUN --num_members 4       the first four
    python export.py RUN --check_recall        and compare R@1 with the run's

The graph maps images, (N, S, S, 3) uint8, to embeddings, (N, d) float32: rows of
length 1, whose dot product is the mean of the members' cosines. It is compared
with PyTorch before it is written. docs/EXPORT.md: how to use it. Needs:
pip install onnx onnxscript onnxruntime
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dreml.batches import spans
from dreml.cache import Cache
from dreml.cli import MANY, InputError, Parser, RunError, check_ranges, print_text, progress_bar, run_main
from dreml.exported import (
    DESCRIPTION,
    GRAPH,
    INPUT,
    OUTPUT,
    PACKAGES,
    WEIGHTS,
    Description,
    check_packages,
    difference,
    file_checksums,
    new_export,
    open_graph,
    preprocess_code,
    write_graph,
)
from dreml.files import writable, write_record
from dreml.index import model_checksum
from dreml.runs import SUFFIXES, Run, TestSplit, read_run
from dreml.search import unit_rows
from dreml.settings import EMBEDDINGS
from model import Ensemble, load_ensemble
from utils import recall_at_k

CPU = torch.device("cpu")
NUM_CHECKED = 32  # images whose embeddings are compared
BATCH_SIZE = 32  # images embedded at a time for --check_recall
MAX_QUERIES_APART = 2  # of which rounding may change the nearest neighbour

# ------------------------------------------------------------------------------------------------ options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="export.py", description=__doc__, epilog="It computes on the CPU.")
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="a run folder of train.py")
    what = parser.add_argument_group("what is exported").add_argument
    what("--num_members", type=int, metavar="L", help="members 1 to L (default: all that are finished)")
    embedding_help = "logits (default), or pooled: the features before the last layer"
    what("--embedding", choices=EMBEDDINGS, default="logits", metavar="E", help=embedding_help)
    rest = parser.add_argument_group("the rest").add_argument
    output_help = "the folder to make (default: RUN_FOLDER/export_L<members>)"
    rest("--output", type=Path, metavar="DIR", help=output_help)
    recall_help = "embed all test images, too, and compare R@1 with that of the saved embeddings"
    rest("--check_recall", action="store_true", help=recall_help)
    data_help = "data sets, for the test images of the check (default: as in training)"
    rest("--data_path", type=Path, metavar="DIR", help=data_help)
    args = parser.parse_args(argv)
    check_ranges(args, num_members=(1, MANY))
    return args


# ------------------------------------------------------------------------------------------------ what is exported


class Source(NamedTuple):
    """What is exported, and with what it is compared."""

    name: str  # of the folder
    words: str
    model: str  # its checksum
    load: Callable[[], Ensemble]
    saved: Callable[[], torch.Tensor]  # the saved embedding of the test images, `(M, d) float32`, rows of length 1


def ensemble_source(trained: Run, embedding: str) -> Source:
    """The ensemble of a run."""
    number = trained.num_members
    return Source(
        f"export_L{number}{SUFFIXES[embedding]}",
        f"{trained.folder.resolve().name}, {number} members, {embedding}",
        model_checksum(trained, embedding),
        lambda: load_ensemble(trained.folder, CPU, embedding, number),
        lambda: unit_rows(trained.embeddings(embedding, CPU)),
    )


# ------------------------------------------------------------------------------------------------ the checks


def images_to_check(cache: Cache | None, image_size: int) -> np.ndarray:
    """Images for the comparison with PyTorch, `(N, S, S, 3) uint8`: of the test split, or, without a cache, drawn."""
    if cache is None:
        shape = (NUM_CHECKED, image_size, image_size, 3)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    test = cache.array("test_images")
    return np.array(test[np.unique(np.linspace(0, len(test) - 1, NUM_CHECKED).astype(int))])  # from all classes


def compare_recall(
    embed: Callable[[np.ndarray], np.ndarray], images: np.ndarray, saved: torch.Tensor, split: TestSplit
) -> dict[str, float]:
    """R@1 in percent, by the exported model and by the saved embedding, of the test images `(M, S, S, 3) uint8`.

    Raises RunError where the two are more than `MAX_QUERIES_APART` queries apart.
    """
    batches = spans(0, len(images), BATCH_SIZE)
    bar = progress_bar(batches, "embedding the test images", len(batches), f" x {BATCH_SIZE} images")
    rows = torch.from_numpy(np.concatenate([embed(images[start:stop]) for start, stop in bar]))
    masks = {"is_query": split.is_query, "is_gallery": split.is_gallery}
    exported, run = (recall_at_k(each, split.labels, [1], **masks).item() for each in (rows, saved))
    num_queries = int(split.is_query.sum())
    apart = round(abs(exported - run) * num_queries)
    text = f"R@1 {100 * exported:.2f}, of the run {100 * run:.2f}: {apart:,} of {num_queries:,} queries apart"
    if apart > MAX_QUERIES_APART:
        raise RunError(f"--check_recall: {text}, and {MAX_QUERIES_APART} may be; nothing is exported")
    print(text)
    return {"R@1": round(100 * exported, 4), "R@1 of the run": round(100 * run, 4), "queries": num_queries}


# ------------------------------------------------------------------------------------------------ the export


def run(args: argparse.Namespace) -> None:
    # 1. Whatever can be wrong is found before anything is computed
    check_packages()
    trained = read_run(args.folder, args.num_members)
    source = ensemble_source(trained, args.embedding)
    if args.check_recall:
        trained.require(args.embedding)
    cache = None
    try:
        if not len(trained.test):
            raise InputError(f"{args.folder}: its data set has no test images")
        cache = trained.read_cache(args.data_path)
    except InputError as error:
        if args.check_recall:
            raise
        print_text(f"note: compared on drawn images, not on test images: {error}")

    # 2. The graph, which appears when all checks have passed
    output = args.output or trained.folder / source.name
    target = output.resolve()
    with writable(target.parent, "--output"), new_export(target, source.model) as folder:
        print_text(f"{source.words}: writing the graph")
        network, size = source.load(), trained.settings.image_size
        write_graph(network.one_by_one(), size, folder)
        embed, images = open_graph(folder, torch.get_num_threads()), images_to_check(cache, size)
        kind = "drawn images" if cache is None else "test images"
        checked = {"images": f"{len(images)} {kind}", "1 - cosine": difference(network, embed, images)}
        if args.check_recall:
            checked |= compare_recall(embed, cache.array("test_images"), source.saved(), trained.split)
        description = describe(trained, source, embed(images[:1]).shape[1], checked, folder)
        write_record(folder / DESCRIPTION, description)

    # 3. What there is now
    print(f"1 - cosine with PyTorch's embedding: at most {checked['1 - cosine']:.1g}, on {checked['images']}")
    megabytes = sum((target / name).stat().st_size for name in (GRAPH, WEIGHTS)) / 1e6
    contents = f"{GRAPH}, {WEIGHTS} ({megabytes:,.1f} MB), {DESCRIPTION}"
    print_text(f"{output}/: {contents}; {description.d:,} numbers an image")


def describe(trained: Run, source: Source, d: int, checked: dict[str, object], folder: Path) -> Description:
    """What model.json says of the graph in `folder`, whose rows have `d` numbers."""
    spec, data = trained.settings.image_spec, trained.record.data
    return Description(
        model=source.model,
        source=source.words,
        image_size=spec.size,
        resize=spec.resize,
        mean=data.mean,
        std=data.std,
        d=d,
        input={"name": INPUT, "shape": ["N", spec.size, spec.size, 3], "dtype": "uint8"},
        output={"name": OUTPUT, "shape": ["N", d], "dtype": "float32"},
        preprocess=preprocess_code(spec),
        checked=checked,
        versions={name: importlib.metadata.version(name) for name in ("torch", *PACKAGES)},
        sha256=file_checksums(folder),
    )


def main(argv: list[str] | None = None) -> int:
    return run_main("export.py", lambda: run(parse_args(argv)), "fewer --num_members", resumable=False)


if __name__ == "__main__":
    sys.exit(main())
