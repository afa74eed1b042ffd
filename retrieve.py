"""Finds the most similar images with a trained ensemble: a list, a CSV, a picture.

    python retrieve.py RUN --query photo.jpg photos/ test:17  of the test split
    python retrieve.py RUN --query photo.jpg --gallery DIR    your own images
    python retrieve.py RUN --worst        confident errors within the test split
    python retrieve.py RUN --export       the embedding, for a vector database

The similarity is the mean of the members' cosines, from -1 to 1. In the picture,
neighbours of the query's class have a solid green frame and a check mark, others
a dashed red one and a cross; grey: the class is not known. docs/SEARCH.md: more.
"""

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from dreml.cli import DEVICE_HELP, MANY, InputError, Parser, check_ranges, run_main
from dreml.figures import MAX_ROWS, NoPictures, check_matplotlib, draw_neighbours
from dreml.files import atomic_open, writable, write_csv
from dreml.index import is_installed
from dreml.runs import SUFFIXES
from dreml.search import Answer, Searcher, refuse
from dreml.settings import EMBEDDINGS
from dreml.thresholds import Threshold, read_threshold

# ------------------------------------------------------------------------------------------------ options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="retrieve.py", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="a run folder of train.py")
    group = parser.add_argument_group("what is done (at least one)")
    query_help = "images, folders, or test:INDEX (row of test.csv, from 0)"
    group.add_argument("--query", nargs="+", metavar="Q", help=query_help)
    worst_help = "N test queries (default: 10), surest errors first"
    group.add_argument("--worst", nargs="?", type=int, const=10, metavar="N", help=worst_help)
    export_help = "write what is searched as .npy (default: into --output)"
    group.add_argument("--export", nargs="?", const="", metavar="PATH", help=export_help)
    group = parser.add_argument_group("how it is searched")
    gallery_help = "search the images below DIR, a class for each folder (default: the gallery of the test split)"
    group.add_argument("--gallery", type=Path, metavar="DIR", help=gallery_help)
    group.add_argument("--top", type=int, default=8, metavar="K", help="neighbours of each query (default: 8)")
    group.add_argument("--num_members", type=int, metavar="L", help="members 1 to L (default: all that are finished)")
    embedding_help = "logits (default), or pooled: the features before the last layer"
    group.add_argument("--embedding", choices=EMBEDDINGS, default="logits", metavar="E", help=embedding_help)
    far_help = "as --threshold, for a false-accept rate F such as 0.1"
    group = group.add_mutually_exclusive_group()
    group.add_argument("--far", type=float, metavar="F", help=far_help)
    group.add_argument("--threshold", type=float, metavar="T", help='neighbours are "not found" below this similarity')
    group = parser.add_argument_group("the index of --gallery (needs LanceDB: pip install lancedb)")
    group.add_argument("--index", type=Path, metavar="DIR", help="where it is kept (default: in RUN_FOLDER/index)")
    refresh_help = "always (default): embed new photos first; never; or moved: the photos have another place now"
    group.add_argument("--refresh", choices=("always", "never", "moved"), metavar="WHEN", help=refresh_help)
    group.add_argument("--ann", action="store_true", help="approximate search, by LanceDB's vector index")
    group = parser.add_argument_group("the rest")
    output_help = "folder of what is written (default: RUN_FOLDER/retrieval)"
    group.add_argument("--output", type=Path, metavar="DIR", help=output_help)
    data_help = "data sets, for the picture (default: as in training)"
    group.add_argument("--data_path", type=Path, metavar="DIR", help=data_help)
    group.add_argument("--no_picture", action="store_true", help="no picture: matplotlib is not needed")
    group.add_argument("--device", default="auto", help=DEVICE_HELP)
    args = parser.parse_args(argv)
    check_ranges(args, worst=(1, MANY), top=(1, MANY), num_members=(1, MANY), far=(1e-9, 1), threshold=(-1, 1))
    if not args.query and not args.worst and args.export is None:
        wanted = "--query or --export" if args.gallery else "--query, --worst or --export"
        raise InputError(f"nothing to do: give {wanted}")
    if args.worst and (args.query or args.gallery):
        raise InputError("--worst is for the test split, without --query and --gallery; a gallery goes with --query")
    if (args.far is not None or args.threshold is not None) and not args.query and not args.worst:
        raise InputError("--far and --threshold mark neighbours: they go with --query or --worst")
    for option in ("index", "refresh", "ann"):
        if getattr(args, option) and not args.gallery:
            raise InputError(f"--{option} is for the photos of --gallery")
    if args.ann and not is_installed():
        raise InputError("--ann: an index needs LanceDB: pip install lancedb")
    return args


# ------------------------------------------------------------------------------------------------ the retrieval


def run(args: argparse.Namespace) -> None:
    # 1. The run and what is searched
    searcher = Searcher(
        args.folder,
        args.gallery,
        embedding=args.embedding,
        num_members=args.num_members,
        device=args.device,
        index=args.index,
        refresh=args.refresh or "always",
    )
    searcher.ann = args.ann
    searcher.data_path = args.data_path or searcher.data_path
    threshold = None if args.threshold is None else Threshold(args.threshold)
    if args.far is not None:
        threshold = read_threshold(searcher.run, args.embedding, args.far)
    draws = not args.no_picture and bool(args.query or args.worst)
    if draws:
        check_matplotlib()
    suffix = SUFFIXES[args.embedding]
    output = args.output or searcher.run.folder / "retrieval"
    path = output / f"{'worst' if args.worst else 'neighbours'}{suffix}.csv"

    # 2. The neighbours
    problems: list[str] = []
    queries = worst_queries(searcher, args.worst) if args.worst else args.query or []
    answers = searcher.find_many(queries, args.top, threshold=threshold and threshold.value, problems=problems)

    # 3. What is written and printed
    if args.export is not None:
        export(searcher, Path(args.export or output), suffix)
    if answers:
        with writable(output, "--output"):
            replaces = path.exists()
            path.with_suffix(".png").unlink(missing_ok=True)  # of an earlier search
            write_csv(path, answer_table(answers))
        print_answers(answers)
        if threshold:
            print(f"\n{threshold_text(threshold, answers)}")
        print(f"\n{path}{' (an earlier one was replaced; --output names another folder)' if replaces else ''}")
        if draws:
            title = f"similarity: cosine, mean of the ensemble (size {searcher.run.num_members})"
            title += "; wrong first neighbours, the most similar first" if args.worst else ""
            draw(answers, searcher, title, path, args.data_path is not None)
    refuse("--query", problems, len(answers))  # now that the others are answered


def worst_queries(searcher: Searcher, number: int) -> list[int]:
    """At most `number` test queries for --worst. Prints how many there are."""
    errors = searcher.confident_errors
    print(
        f"wrong first neighbours: {len(errors):,} of {searcher.test_queries.counted.sum():,} test queries; listed: "
        f"{len(errors[:number]):,}, the most confident first (confidence: the similarity of that neighbour)"
    )
    return errors.row[:number].tolist()


def export(searcher: Searcher, path: Path, suffix: str) -> None:
    """Write what is searched as a .npy file, `(N, d) float32`, and a .csv file with a line for each of its rows.

    `path` is the .npy file or a folder for it. Of the test split, all images are exported.
    """
    if searcher.photos:
        suffix = f"_gallery{suffix}"
        table, rows = searcher.gallery
        table = table[["path", "class_name"]].assign(path=[str(searcher.photos / path) for path in table.path])
    else:
        rows = searcher.saved
        table = searcher.run.test
    if path.suffix != ".npy":
        path = path / f"embedding{suffix}.npy"
    with writable(path.parent, "--export"):
        with atomic_open(path, "wb") as file:
            np.save(file, rows.cpu().numpy(), allow_pickle=False)
        write_csv(path.with_suffix(".csv"), table)
    size = f"{rows.shape[0]:,} x {rows.shape[1]:,} float32"
    print(f"{path}: {size}, rows of length 1; {path.with_suffix('.csv').name}")


# ------------------------------------------------------------------------------------------------ list, CSV, picture


def print_answers(answers: list[Answer]) -> None:
    """Print each query and its neighbours, by paths that can be the next query."""
    words = {True: "right", False: "wrong", None: "-"}
    for answer in answers:
        class_name = f" ({answer.query.class_name})" if answer.query.class_name else ""
        nothing = "" if any(neighbour.found for neighbour in answer) else ": none of these"
        print(f"\n{answer.query.name}{class_name}{nothing}")
        for rank, neighbour in enumerate(answer, 1):
            word = words[neighbour.right] if neighbour.found else "not found"
            is_gone = neighbour.row is not None and not neighbour.file.exists()
            path = f"test:{neighbour.row}" if is_gone else shlex.quote(str(neighbour.file))
            print(f"{rank:4d}  {neighbour.similarity:7.4f}  {word:<5}  {neighbour.class_name or '-'}  {path}")


def answer_table(answers: list[Answer]) -> pd.DataFrame:
    """The CSV: one row for each neighbour. `right` and unknown classes are empty; `found` only with a threshold."""
    rows = []
    for answer in answers:
        query = (answer.query.name, answer.query.path, answer.query.class_name)
        for rank, each in enumerate(answer, 1):
            similarity = f"{each.similarity:.6f}"
            rows.append((*query, rank, each.path, each.class_name, similarity, each.right, each.found))
    columns = ["query", "query_path", "query_class", "rank", "path", "class_name", "similarity", "right", "found"]
    table = pd.DataFrame(rows, columns=columns, dtype=object)
    return table if answers[0].threshold is not None else table.drop(columns="found")


def threshold_text(threshold: Threshold, answers: list[Answer]) -> str:
    """How many queries have found nothing, and what the threshold stands for."""
    nothing = sum(not any(neighbour.found for neighbour in answer) for answer in answers)
    text = f"not found: nothing for {nothing:,} of {len(answers):,} queries reaches {threshold.value:.4f}"
    if threshold.far is None:
        return text
    share = f"of test queries whose class is absent, {100 * threshold.far:g} % reached it"
    return f"{text}; {share} in {threshold.gallery:,} images, and more do in larger galleries (docs/SEARCH.md)"


def draw(answers: list[Answer], searcher: Searcher, title: str, path: Path, required: bool) -> None:
    """Draw the first queries and their neighbours beside the CSV, and print the name of the picture.

    Unless it is `required`, a line says where the images are gone: a search needs only the saved embeddings.
    """
    try:
        with writable(path.parent, "--output"):
            draw_neighbours(answers[:MAX_ROWS], searcher, title, path.parent, path.stem)
    except NoPictures as error:
        if required:
            raise
        print(str(error))
        return
    rest = f", the first {MAX_ROWS} of {len(answers)} queries" if len(answers) > MAX_ROWS else ""
    print(f"{path.with_suffix('.png')}{rest}")


def main(argv: list[str] | None = None) -> int:
    save_memory = "fewer --num_members, or --device cpu"
    return run_main("retrieve.py", lambda: run(parse_args(argv)), save_memory, resumable=False)


if __name__ == "__main__":
    sys.exit(main())
