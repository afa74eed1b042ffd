"""Finds the most similar images with a trained ensemble: a list, a CSV, a picture.

    python retrieve.py RUN --query photo.jpg photos/ test:17    searches the test split
    python retrieve.py RUN --query photo.jpg --gallery DIR      searches your own images
    python retrieve.py RUN --worst                              confident errors within the test split
    python retrieve.py RUN --export                             the embedding, for a vector database

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

from dreml.cli import MANY, InputError, Parser, check_ranges, require, run_main
from dreml.confusions import confident_errors
from dreml.figures import MAX_ROWS, draw_neighbours
from dreml.files import atomic_open, writable, write_csv
from dreml.runs import SUFFIXES
from dreml.search import Answer, Searcher, add_search_options, refuse, searcher_of


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="retrieve.py", description=__doc__)
    add_search_options(parser)
    group = parser.add_argument_group("what is done (at least one)")
    group.add_argument("--query", nargs="+", metavar="Q", help="images, folders, or test:INDEX (row of test.csv)")
    group.add_argument("--worst", nargs="?", type=int, const=10, metavar="N", help="N confident errors (default: 10)")
    group.add_argument("--export", nargs="?", const="", metavar="PATH", help="write what is searched as .npy")
    group = parser.add_argument_group("how it is searched")
    group.add_argument("--top", type=int, default=8, metavar="K", help="neighbours of each query (default: 8)")
    refresh_help = "never: search the index of --gallery as it is; always (default): embed new photos first"
    group.add_argument("--refresh", choices=("always", "never"), metavar="WHEN", help=refresh_help)
    group.add_argument("--ann", action="store_true", help="approximate search of --gallery, by LanceDB's vector index")
    group = group.add_mutually_exclusive_group()
    group.add_argument("--far", type=float, metavar="F", help="as --threshold, for a false-accept rate such as 0.1")
    group.add_argument("--threshold", type=float, metavar="T", help='neighbours are "not found" below this similarity')
    group = parser.add_argument_group("the rest")
    group.add_argument("--output", type=Path, metavar="DIR", help="what is written (default: RUN_FOLDER/retrieval)")
    group.add_argument("--no_picture", action="store_true", help="no picture: matplotlib is not needed")
    args = parser.parse_args(argv)
    check_ranges(args, worst=(1, MANY), top=(1, MANY), far=(1e-9, 1), threshold=(-1, 1))
    finds = args.query or args.worst
    if not finds and args.export is None:
        raise InputError("nothing to do: give --query, --worst or --export")
    if args.worst and (args.query or args.gallery):
        raise InputError("--worst is for the test split, without --query and --gallery; a gallery goes with --query")
    if not finds and (args.far is not None or args.threshold is not None):
        raise InputError("--far and --threshold mark neighbours: they go with --query or --worst")
    if not args.gallery and (args.index or args.refresh or args.ann):
        raise InputError("--index, --refresh and --ann are for the photos of --gallery")
    return args


def run(args: argparse.Namespace) -> None:
    # 1. The run and what is searched
    searcher = searcher_of(args, refresh=args.refresh != "never", ann=args.ann)
    draws = not args.no_picture and (args.query or args.worst)
    if draws:
        require("a picture", "matplotlib")
    suffix = SUFFIXES[args.embedding]
    output = args.output or searcher.run.folder / "retrieval"
    path = output / f"{'worst' if args.worst else 'neighbours'}{suffix}.csv"

    # 2. The neighbours
    queries = args.query or []
    if args.worst:
        errors = confident_errors(searcher.test_queries)
        queries = errors.row[: args.worst].tolist()
        number = searcher.test_queries.counted.sum()
        print(f"wrong first neighbours: {len(errors):,} of {number:,} test queries; listed: {len(queries):,}")
    problems: list[str] = []
    answers = searcher.find_many(queries, args.top, args.far, args.threshold, problems)

    # 3. What is written and printed
    if args.export is not None:
        export(searcher, Path(args.export or output), suffix)
    if answers:
        with writable(output, "--output"):
            replaces = path.exists()
            path.with_suffix(".png").unlink(missing_ok=True)  # of an earlier search
            write_csv(path, answer_table(answers))
        print_answers(answers)
        threshold = answers[0].threshold
        if threshold is not None:
            nothing = sum(not answer.found for answer in answers)
            print(f"\nnot found: nothing for {nothing:,} of {len(answers):,} queries reaches {threshold:.4f}")
        if args.far is not None:
            share = f"of test queries whose class is absent, {100 * args.far:g} % reached it"
            print(f"{share} in {searcher.run.test.is_gallery.sum():,} images, and more do in larger galleries")
        print(f"\n{path}{' (an earlier one was replaced; --output names another folder)' if replaces else ''}")
    if answers and draws:
        rest = f", the first {MAX_ROWS} of {len(answers)} queries" if len(answers) > MAX_ROWS else ""
        with writable(output, "--output"):
            try:
                draw_neighbours(answers[:MAX_ROWS], searcher, output, path.stem)
                print(f"{path.with_suffix('.png')}{rest}")
            except InputError as error:  # there are no images; a search needs only the saved embeddings
                if args.data_path:
                    raise
                print(error)
    refuse("--query", problems, len(answers))  # now that the others are answered


def export(searcher: Searcher, path: Path, suffix: str) -> None:
    """Write what is searched as a .npy file, `(N, d) float32`, and a .csv file with a line for each of its rows.

    `path` is the .npy file or a folder for it. Of the test split, all images are exported.
    """
    if searcher.gallery:
        suffix = f"_gallery{suffix}"
        images, rows, _ = searcher.searched
        table = pd.DataFrame([searcher.item(image) for image in images])[["path", "class_name"]]
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


def print_answers(answers: list[Answer]) -> None:
    """Print each query and its neighbours, by paths that can be the next query."""
    words = {True: "right", False: "wrong", None: "-"}
    for answer in answers:
        class_name = f" ({answer.query.class_name})" if answer.query.class_name else ""
        nothing = "" if answer.found else ": none of these"
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


def main(argv: list[str] | None = None) -> int:
    save_memory = "fewer --num_members, or --device cpu"
    return run_main("retrieve.py", lambda: run(parse_args(argv)), save_memory, resumable=False)


if __name__ == "__main__":
    sys.exit(main())
