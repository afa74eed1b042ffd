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
import functools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dreml.approximate import ApproximateSearch
from dreml.cli import (
    DEVICE_HELP,
    MANY,
    InputError,
    Parser,
    check_ranges,
    pick_device,
    print_text,
    run_main,
    with_less_memory,
)
from dreml.figures import MAX_ROWS, NoPictures, Thumbnails, check_matplotlib, draw_neighbours
from dreml.files import atomic_open, make_folder, writable, write_csv
from dreml.index import PhotoIndex, default_place, is_installed, model_checksum
from dreml.runs import SUFFIXES, Run, TestSplit, read_run
from dreml.search import (
    BATCH_SIZE,
    Found,
    Item,
    SplitItems,
    embed_queries,
    embeddings_of,
    find_neighbours,
    folder_items,
    nearest,
    places_of,
    query_items,
    refuse,
    test_item,
    unit_rows,
)
from dreml.settings import EMBEDDINGS
from dreml.thresholds import Threshold, read_threshold
from model import Ensemble, load_ensemble
from utils import unmatched_queries

# ------------------------------------------------------------------------------------------------ options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="retrieve.py", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="a run folder of train.py")
    what = parser.add_argument_group("what is done (at least one)").add_argument
    query_help = "images, folders, or test:INDEX (row of test.csv, from 0)"
    what("--query", nargs="+", metavar="Q", help=query_help)
    worst_help = "N test queries (default: 10), surest errors first"
    what("--worst", nargs="?", type=int, const=10, metavar="N", help=worst_help)
    export_help = "what is searched, as .npy (default: into --output)"
    what("--export", nargs="?", const="", metavar="PATH", help=export_help)
    how = parser.add_argument_group("how it is searched").add_argument
    gallery_help = "search the images below DIR, a class for each subfolder (default: the gallery of the test split)"
    how("--gallery", type=Path, metavar="DIR", help=gallery_help)
    how("--top", type=int, default=8, metavar="K", help="neighbours of each query (default: 8)")
    how("--num_members", type=int, metavar="L", help="members 1 to L (default: all that are finished)")
    embedding_help = "logits (default), or pooled: the features before the last layer"
    how("--embedding", choices=EMBEDDINGS, default="logits", metavar="E", help=embedding_help)
    far_help = "as --threshold, for a false-accept rate F such as 0.01"
    how("--far", type=float, metavar="F", help=far_help)
    how("--threshold", type=float, metavar="T", help='neighbours are "not found" below this similarity')
    keep = parser.add_argument_group("the index of --gallery (needs LanceDB: pip install lancedb)").add_argument
    keep("--index", type=Path, metavar="DIR", help="where it is kept (default: in RUN_FOLDER/index)")
    refresh_help = "always (default): embed new photos first; or never"
    keep("--refresh", choices=("always", "never"), metavar="WHEN", help=refresh_help)
    keep("--ann", action="store_true", help="approximate, by a vector index; prints its recall at K")
    rest = parser.add_argument_group("the rest").add_argument
    rest("--output", type=Path, metavar="DIR", help="folder of what is written (default: RUN_FOLDER/retrieval)")
    rest("--data_path", type=Path, metavar="DIR", help="data sets, for the picture (default: as in training)")
    rest("--no_picture", action="store_true", help="no picture: matplotlib is not needed")
    rest("--device", default="auto", help=DEVICE_HELP)
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
    # 1. The images; whatever can be wrong is found before anything is computed
    device = pick_device(args.device)
    trained = read_run(args.folder, args.num_members)
    if not len(trained.test):
        check_without_test_images(args)
    threshold = chosen_threshold(args.far, args.threshold, trained, args.embedding)
    data_path = trained.data_path(args.data_path)
    data_folder = data_path / trained.settings.data_name
    queries, bad_queries = query_items(args.query or [], trained.test, data_folder)
    if not queries:
        refuse("--query", bad_queries, shown=len(bad_queries))
    index = find_index(trained, args.embedding, args.gallery, args.index) if args.gallery else None
    if args.gallery:
        gallery = [] if index else folder_items("--gallery", args.gallery)  # [] for now
    else:
        gallery = SplitItems(trained.test, data_folder, np.flatnonzero(trained.test.is_gallery))
    searches = bool(queries or args.worst)
    if searches and not args.no_picture:
        check_matplotlib()
    if searches and not index:
        places_of(queries or [any_query(trained.test, data_folder)], gallery, args.top)
    has_test_images = not args.gallery or any(item.row is not None for item in queries)
    if has_test_images:
        trained.require(args.embedding)

    # 2. Where the results go
    output, suffix = args.output or trained.folder / "retrieval", SUFFIXES[args.embedding]
    export_path = None
    if args.export is not None:
        export_path = export_file(Path(args.export or output), f"_gallery{suffix}" if args.gallery else suffix)
    if searches:
        make_folder(output)
    if export_path:
        make_folder(export_path.parent)

    # 3. The embeddings: the saved ones of the test split and of the index, new ones of other image files
    load = functools.cache(lambda: load_ensemble(trained.folder, device, args.embedding, trained.num_members))
    saved = query_rows = gallery_rows = approximate = None
    if has_test_images:
        saved = unit_rows(trained.embeddings(args.embedding, device))
    if queries:
        queries, query_rows = embed_queries(queries, saved, load, bad_queries)
    if index:
        update(index, args.refresh != "never", load)
        approximate = ApproximateSearch(index, may_build=args.refresh != "never") if args.ann else None
    if index and (export_path or not approximate):
        gallery = index.photos()
        gallery_rows = gallery.vectors.to(device)
    elif args.gallery and not index:
        gallery_rows = embeddings_of("--gallery", gallery, saved, load)
    elif not index:
        gallery_rows = saved if len(gallery) == len(saved) else saved[gallery.rows]
    if export_path and args.gallery:
        table = pd.DataFrame([(item.path, item.class_name) for item in gallery], columns=["path", "class_name"])
        export(export_path, gallery_rows, table)
    elif export_path:
        export(export_path, saved, trained.test)

    # 4. The queries of --worst
    name, title = "neighbours", "similarity: cosine"
    if trained.num_members > 1:
        title = f"similarity: mean cosine of {trained.num_members} members"
    if args.worst:
        rows = worst_queries(trained.split, saved, gallery_rows, args.worst)
        queries = [test_item(trained.test, data_folder, row)._replace(name=f"test:{row}") for row in rows]
        query_rows = saved[rows]
        name, title = "worst", f"{title}; wrong first neighbours, the most similar first"
    if not queries:
        return

    # 5. The neighbours: a CSV, a list, a picture
    if approximate:
        approximate.print_recall(args.top)
        found = approximate.find(queries, query_rows, args.top)
    else:
        found = find_neighbours(queries, query_rows, gallery, gallery_rows, args.top)
    for each in found if threshold else []:
        each.threshold = threshold.value
    path = output / f"{name}{suffix}"
    with writable(output, "--output"):
        write_csv(path.with_suffix(".csv"), found_table(found))
    print_found(found)
    if threshold:
        num_gallery = approximate.table.count_rows() if approximate else len(gallery)
        print(f"\n{threshold_text(threshold, found, num_gallery)}")
    print_text(f"\n{path}.csv")
    if not args.no_picture:
        draw(found, Thumbnails(trained, data_path), title, path, required=args.data_path is not None)
    refuse("--query", bad_queries, shown=len(bad_queries))  # now that the others are answered


def check_without_test_images(args: argparse.Namespace) -> None:
    """Raises InputError for what needs the test images of a run that has none."""
    if not args.gallery:
        raise InputError(f"{args.folder}: its data set has no test images to search: give --gallery DIR")
    if args.far is not None:
        raise InputError(f"{args.folder}: its data set has no test images, and so no thresholds: give --threshold T")


def draw(found: list[Found], thumbnails: Thumbnails, title: str, path: Path, required: bool) -> None:
    """Draws the first queries and their neighbours, and prints the name of the picture.

    Unless it is `required`, a line says where the images are gone: a search needs only the saved embeddings.
    """
    try:
        with writable(path.parent, "--output"):
            draw_neighbours(found[:MAX_ROWS], thumbnails, title, path.parent, path.name)
    except NoPictures as error:
        if required:
            raise
        print_text(str(error))
        return
    rest = f", the first {MAX_ROWS} of {len(found)} queries" if len(found) > MAX_ROWS else ""
    print_text(f"{path}.png{rest}")


def export_file(path: Path, suffix: str) -> Path:
    """The .npy file that --export names, or embedding.npy in the folder that it names."""
    return path if path.suffix == ".npy" else path / f"embedding{suffix}.npy"


# ------------------------------------------------------------------------------------------------ none of these


def chosen_threshold(far: float | None, value: float | None, run: Run, embedding: str) -> Threshold | None:
    """The threshold that --far or --threshold asks for. Raises InputError where evaluate.py has not computed it."""
    if far is None:
        return None if value is None else Threshold(value)
    command = f"python evaluate.py {shlex.quote(str(run.folder))}"
    if embedding != "logits":
        command += f" --embedding {embedding}"
    path = run.folder / f"thresholds{SUFFIXES[embedding]}.csv"
    return read_threshold(path, run.num_members, far, command)


def threshold_text(threshold: Threshold, found: list[Found], num_gallery: int) -> str:
    """How many queries have found nothing, and what the threshold stands for."""
    nothing = sum(not each.passes[0] for each in found)
    text = f"not found: nothing for {nothing:,} of {len(found):,} queries reaches {threshold.value:.4f}"
    if threshold.far is None:
        return text
    return (
        f"{text}; of test queries whose class is absent, {100 * threshold.far:g} % reached it in {threshold.gallery:,} "
        f"images, and here are {num_gallery:,} (docs/THRESHOLDS.md)"
    )


def export(path: Path, rows: torch.Tensor, table: pd.DataFrame) -> None:
    """Writes the matrix as NAME.npy, `(N, d) float32`, and NAME.csv with a line for each of its rows."""
    with writable(path.parent, "--export"):
        with atomic_open(path, "wb") as file:
            np.save(file, rows.cpu().numpy(), allow_pickle=False)
        write_csv(path.with_suffix(".csv"), table)
    size = f"{rows.shape[0]:,} x {rows.shape[1]:,} float32"
    print_text(f"{path}: {size}, rows of length 1; {path.with_suffix('.csv').name}")


# ------------------------------------------------------------------------------------------------ the index


def find_index(trained: Run, embedding: str, photos: Path, place: Path | None) -> PhotoIndex | None:
    """The index of a photo folder. Without LanceDB there is none, and a line says what it would bring."""
    if not is_installed():
        print(f"note: every search embeds {photos} anew; an index would keep the embeddings: pip install lancedb")
        return None
    model = model_checksum(trained, embedding)
    return PhotoIndex(photos, place or default_place(trained, photos, model), model)


def update(index: PhotoIndex, refresh: bool, load: Callable[[], Ensemble]) -> None:
    """Embeds the photos that are new or have changed, unless the index is searched as it is."""
    if refresh:
        with_less_memory(lambda size: index.refresh(load, size), BATCH_SIZE)


# ------------------------------------------------------------------------------------------------ --worst


def any_query(test: pd.DataFrame, folder: Path) -> Item:
    """A query of the test split, one that lies in the gallery too if there is one."""
    rows = np.flatnonzero(test.is_query & test.is_gallery)
    return test_item(test, folder, int(rows[0] if len(rows) else np.flatnonzero(test.is_query)[0]))


def worst_queries(split: TestSplit, rows: torch.Tensor, gallery_rows: torch.Tensor, number: int) -> list[int]:
    """Finds at most `number` test queries for --worst and prints how many there are. Returns their rows in test.csv."""
    errors, num_queries = confident_errors(split, rows, gallery_rows)
    worst = errors[:number]
    print(
        f"{len(errors):,} of {num_queries:,} test queries have a wrong first neighbour; {len(worst)} of them follow, "
        "the most confident first (confidence: the similarity of that neighbour)"
    )
    return worst


def confident_errors(split: TestSplit, rows: torch.Tensor, gallery_rows: torch.Tensor) -> tuple[list[int], int]:
    """The test queries whose first neighbour is of another class, those first that are most similar to it.

    Returns their rows in test.csv and how many queries were searched for: not those whose class has no other image in
    the gallery, which can find nothing right. `rows` embed all test images, `gallery_rows` those of the gallery.
    """
    queries = torch.nonzero(split.is_query & ~unmatched_queries(*split))[:, 0]
    gallery = torch.nonzero(split.is_gallery)[:, 0]
    places = torch.full_like(split.labels, -1)
    places[gallery] = torch.arange(len(gallery))
    similarities, numbers = nearest(rows[queries], gallery_rows, 1, places[queries])
    neighbours = gallery[torch.from_numpy(numbers[:, 0])]
    wrong = torch.nonzero(split.labels[neighbours] != split.labels[queries])[:, 0].numpy()
    order = np.argsort(-similarities[wrong, 0], kind="stable")
    return queries.numpy()[wrong[order]].tolist(), len(queries)


# ------------------------------------------------------------------------------------------------ list and CSV


def print_found(found: list[Found]) -> None:
    """Prints each query and its neighbours."""
    words = {True: "right", False: "wrong", None: "-"}
    for each in found:
        class_name = f" ({each.query.class_name})" if each.query.class_name else ""
        print_text(f"\n{each.query.name}{class_name}{'' if each.passes[0] else ': none of these'}")
        neighbours = zip(each.neighbours, each.similarities, each.right, each.passes, strict=True)
        for rank, (item, similarity, right, passes) in enumerate(neighbours, 1):
            word = words[right] if passes else "not found"
            print_text(f"{rank:4d}  {similarity:7.4f}  {word:<5}  {item.class_name or '-'}  {item.path}")


def found_table(found: list[Found]) -> pd.DataFrame:
    """The CSV: one row for each neighbour. `right` and unknown classes are empty; `found` only with a threshold."""
    rows = []
    for each in found:
        neighbours = zip(each.neighbours, each.similarities, each.right, each.passes, strict=True)
        for rank, (item, similarity, right, passes) in enumerate(neighbours, 1):
            rows.append((each.query.name, rank, item.path, item.class_name, f"{similarity:.6f}", right, passes))
    columns = ["query", "rank", "path", "class_name", "similarity", "right", "found"]
    table = pd.DataFrame(rows, columns=columns, dtype=object)
    return table if found[0].threshold is not None else table.drop(columns="found")


def main(argv: list[str] | None = None) -> int:
    save_memory = "fewer --num_members, or --device cpu"
    return run_main("retrieve.py", lambda: run(parse_args(argv)), save_memory, resumable=False)


if __name__ == "__main__":
    sys.exit(main())
