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
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from dreml.cli import DEVICE_HELP, MANY, InputError, Parser, check_ranges, run_main
from dreml.figures import MAX_ROWS, NoPictures, Thumbnails, check_matplotlib, draw_neighbours
from dreml.files import atomic_open, writable, write_csv
from dreml.index import is_installed
from dreml.runs import SUFFIXES
from dreml.search import Answer, Searcher, refuse
from dreml.settings import EMBEDDINGS
from dreml.thresholds import Threshold

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
    members_help = "members 1 to L (default: all that are finished)"
    group.add_argument("--num_members", type=int, metavar="L", help=members_help)
    embedding_help = "logits (default), or pooled: the features before the last layer"
    group.add_argument("--embedding", choices=EMBEDDINGS, default="logits", metavar="E", help=embedding_help)
    far_help = "as --threshold, for a false-accept rate F such as 0.01"
    group.add_argument("--far", type=float, metavar="F", help=far_help)
    threshold_help = 'neighbours are "not found" below this similarity'
    group.add_argument("--threshold", type=float, metavar="T", help=threshold_help)
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
        raise InputError("nothing to do: give --query, --worst or --export")
    if args.worst and (args.query or args.gallery):
        raise InputError("--worst looks for errors within the test split: it goes without --query and --gallery")
    if args.far is not None and args.threshold is not None:
        raise InputError("--far stands for a threshold: it goes without --threshold")
    if (args.far is not None or args.threshold is not None) and not args.query and not args.worst:
        raise InputError("--far and --threshold mark neighbours: they go with --query or --worst")
    for option in ("index", "refresh", "ann"):
        if getattr(args, option) and not args.gallery:
            raise InputError(f"--{option} is for the photos of --gallery")
        if getattr(args, option) and not is_installed():
            raise InputError(f"--{option} needs LanceDB: pip install lancedb")
    return args


# ------------------------------------------------------------------------------------------------ the retrieval


def run(args: argparse.Namespace) -> None:
    # 1. Whatever can be wrong is found before anything is computed
    searcher = Searcher(
        args.folder,
        args.gallery,
        embedding=args.embedding,
        num_members=args.num_members,
        device=args.device,
        index=args.index,
        refresh=args.refresh or "always",
        ann=args.ann,
        data_path=args.data_path,
    )
    threshold = None if args.threshold is None else Threshold(args.threshold)
    if args.far is not None:
        threshold = searcher.threshold(args.far)
    bad_queries: list[str] = []
    queries = searcher.items(args.query or [], bad_queries)
    if not queries:
        refuse("--query", bad_queries)
    searches = bool(queries or args.worst)
    if searches and not args.no_picture:
        check_matplotlib()

    # 2. What is exported
    suffix = SUFFIXES[args.embedding]
    output = args.output or searcher.run.folder / "retrieval"
    if searches:
        with writable(output, "--output"):
            pass
    if args.export is not None:
        export(searcher, Path(args.export or output), suffix)

    # 3. The neighbours: a CSV, a list, a picture
    name = "neighbours"
    title = "similarity: cosine"
    if searcher.run.num_members > 1:
        title = f"similarity: mean cosine of {searcher.run.num_members} members"
    if args.worst:
        queries = worst_queries(searcher, args.worst)
        name = "worst"
        title += "; wrong first neighbours, the most similar first"
    answers = searcher.find_many(queries, args.top, threshold=threshold and threshold.value, problems=bad_queries)
    if answers:
        path = output / f"{name}{suffix}"
        with writable(output, "--output"):
            write_csv(path.with_suffix(".csv"), answer_table(answers))
        print_answers(answers)
        if threshold:
            print(f"\n{threshold_text(threshold, answers)}")
        print(f"\n{path}.csv")
        if not args.no_picture:
            draw(answers, Thumbnails(searcher.run, searcher.data_path), title, path, args.data_path is not None)
    refuse("--query", bad_queries)  # now that the others are answered


def worst_queries(searcher: Searcher, number: int) -> list[str]:
    """At most `number` test queries for --worst. Prints how many there are."""
    errors, num_queries = searcher.confident_errors()
    worst = errors[:number]
    print(
        f"{len(errors):,} of {num_queries:,} test queries have a wrong first neighbour; {len(worst)} of them follow, "
        "the most confident first (confidence: the similarity of that neighbour)"
    )
    return [f"test:{row}" for row in worst]


def export(searcher: Searcher, path: Path, suffix: str) -> None:
    """Write what is searched as a .npy file, `(N, d) float32`, and a .csv file with a line for each of its rows.

    `path` is the .npy file or a folder for it. Of the test split, all images are exported.
    """
    if searcher.photos:
        suffix = f"_gallery{suffix}"
        rows = searcher.gallery.vectors
        items = [searcher.gallery.item(place) for place in range(len(rows))]
        table = pd.DataFrame([(item.path, item.class_name) for item in items], columns=["path", "class_name"])
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
    """Print each query and its neighbours."""
    words = {True: "right", False: "wrong", None: "-"}
    for answer in answers:
        class_name = f" ({answer.class_name})" if answer.class_name else ""
        nothing = "" if any(neighbour.found for neighbour in answer) else ": none of these"
        print(f"\n{answer.query.name}{class_name}{nothing}")
        for rank, neighbour in enumerate(answer, 1):
            word = words[neighbour.right] if neighbour.found else "not found"
            class_name = neighbour.class_name or "-"
            print(f"{rank:4d}  {neighbour.similarity:7.4f}  {word:<5}  {class_name}  {neighbour.path}")


def answer_table(answers: list[Answer]) -> pd.DataFrame:
    """The CSV: one row for each neighbour. `right` and unknown classes are empty; `found` only with a threshold."""
    rows = []
    for answer in answers:
        for rank, each in enumerate(answer, 1):
            similarity = f"{each.similarity:.6f}"
            rows.append((answer.query.name, rank, each.path, each.class_name, similarity, each.right, each.found))
    columns = ["query", "rank", "path", "class_name", "similarity", "right", "found"]
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


def draw(answers: list[Answer], thumbnails: Thumbnails, title: str, path: Path, required: bool) -> None:
    """Draw the first queries and their neighbours, and print the name of the picture.

    Unless it is `required`, a line says where the images are gone: a search needs only the saved embeddings.
    """
    try:
        with writable(path.parent, "--output"):
            draw_neighbours(answers[:MAX_ROWS], thumbnails, title, path.parent, path.name)
    except NoPictures as error:
        if required:
            raise
        print(str(error))
        return
    rest = f", the first {MAX_ROWS} of {len(answers)} queries" if len(answers) > MAX_ROWS else ""
    print(f"{path}.png{rest}")


def main(argv: list[str] | None = None) -> int:
    save_memory = "fewer --num_members, or --device cpu"
    return run_main("retrieve.py", lambda: run(parse_args(argv)), save_memory, resumable=False)


if __name__ == "__main__":
    sys.exit(main())
