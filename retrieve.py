"""Finds the most similar images with a trained ensemble: a list, a CSV and one picture of queries and neighbours.

    python retrieve.py results/RUN --query photo.jpg photos/ test:17    images, folders, images of the test split
    python retrieve.py results/RUN --query photo.jpg --gallery photos/  searches your own images
    python retrieve.py results/RUN --worst                              the most confident errors of the test split
    python retrieve.py results/RUN --export                             the embedding for faiss or a vector database

The similarity is the mean of the members' cosines, from -1 to 1. In the picture, neighbours of the query's class have a
solid green frame and a check mark, others a dashed red one and a cross; grey: the class is not known.
"""

import argparse
import functools
import math
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from data_utils import (
    Cache,
    class_folders,
    is_utf8,
    listed,
    num_cores,
    read_cache,
    read_test_image,
    resize_test,
)
from evaluate import (
    Run,
    add_embedding_option,
    check_matplotlib,
    drawing,
    read_run,
    save_figure,
    show,
    writable,
)
from model import Ensemble, embed, load_ensemble
from train import DEVICE_HELP, make_folder, pick_device, with_less_memory, write_csv
from utils import InputError, Parser, RunError, atomic_open, image_batches, natural_number, run_main, spans, stop_here

if TYPE_CHECKING:  # matplotlib is imported where something is drawn
    from matplotlib.figure import Figure

BATCH_SIZE = 128  # images embedded at a time
MAX_BLOCK = 2**22  # similarities held at a time: 16 MB
MAX_ROWS = 40  # queries in the picture; the CSV has all

# ------------------------------------------------------------------------------------------------ options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="retrieve.py", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="a run folder of train.py")
    what = parser.add_argument_group("what is done (at least one)").add_argument
    query_help = "search for these: images, folders of images, or test:INDEX, a row of test.csv from 0"
    what("--query", nargs="+", metavar="Q", help=query_help)
    worst_help = "the N test queries (default: 10) whose first neighbour is wrong and most similar"
    what("--worst", nargs="?", type=natural_number, const=10, metavar="N", help=worst_help)
    export_help = "write what is searched as a matrix, to a .npy file or a folder (default: the output folder)"
    what("--export", nargs="?", const="", metavar="PATH", help=export_help)
    how = parser.add_argument_group("how it is searched").add_argument
    gallery_help = "search the images below DIR, a class for each subfolder (default: the gallery of the test split)"
    how("--gallery", type=Path, metavar="DIR", help=gallery_help)
    how("--top", type=natural_number, default=8, metavar="K", help="neighbours of each query (default: 8)")
    how("--num_members", type=natural_number, metavar="L", help="members 1 to L (default: all that are finished)")
    add_embedding_option(how)
    rest = parser.add_argument_group("the rest").add_argument
    rest("--output", type=Path, metavar="DIR", help="folder of what is written (default: RUN_FOLDER/retrieval)")
    rest("--data_path", type=Path, metavar="DIR", help="data sets, for the picture (default: as in training)")
    rest("--device", default="auto", help=DEVICE_HELP)
    args = parser.parse_args(argv)
    if not args.query and not args.worst and args.export is None:
        raise InputError("nothing to do: give --query, --worst or --export")
    if args.worst and (args.query or args.gallery):
        raise InputError("--worst looks for errors within the test split: it goes without --query and --gallery")
    return args


# ------------------------------------------------------------------------------------------------ images


class Item(NamedTuple):
    """An image to search for or among."""

    name: str  # its path, or test:17 for a query
    path: str  # of a test image: relative to the data set's folder
    class_name: str | None  # None: not known
    file: Path
    row: int | None = None  # in test.csv; None: not of the test split

    @property
    def caption(self) -> str:
        """A short name, for the picture."""
        return self.file.name if self.row is None else self.name


def test_items(run: Run, folder: Path) -> list[Item]:
    """All images of the test split, whose raw data set is, or was, in `folder`."""
    pairs = zip(run.test.path, run.test.class_name, strict=True)
    return [Item(path, path, name, folder / path, row) for row, (path, name) in enumerate(pairs)]


def folder_items(option: str, folder: Path) -> list[Item]:
    """All images below a folder; the class is the first folder below it on the way. Refuses an empty one."""
    if not os.path.isdir(folder):
        raise InputError(f"{option} {folder}: no such folder")
    problems, items = [], []
    for name, files in class_folders(folder, problems):
        class_name = name.split("/")[0] or None
        for file in (folder / name / file for file in files):
            if is_utf8(str(file)):
                items.append(Item(str(file), str(file), class_name, file))
            else:
                problems.append(f"{str(file)!a}: the name is not valid UTF-8")
    refuse(option, problems)
    if not items:
        raise InputError(f"{option} {folder}: no images below it")
    return items


def refuse(option: str, problems: list[str]) -> None:
    """Raises InputError with all the problems, if there are any."""
    if problems:
        text = f" {problems[0]}" if len(problems) == 1 else f" {len(problems):,} problems:{listed(problems)}"
        raise InputError(f"{option}:{text}")


def query_items(texts: list[str], test: list[Item]) -> list[Item]:
    """The images that --query asks for, in its order. The file of a test image is that image."""
    items = []
    for text in texts:
        if not is_utf8(text):
            raise InputError(f"--query {text!a}: the name is not valid UTF-8")
        if text.startswith("test:"):
            number = text.removeprefix("test:")
            if not number.isascii() or not number.isdigit() or len(number) > 9 or int(number) >= len(test):
                raise InputError(f"--query {text}: INDEX has to be in 0..{len(test) - 1}, a row of test.csv")
            items.append(test[int(number)]._replace(name=text))
        elif os.path.isdir(text):  # unlike Path.is_dir, also for a text that is too long for a name
            items += folder_items("--query", Path(text))
        elif os.path.isfile(text):
            items.append(Item(text, text, None, Path(text)))
        else:
            raise InputError(f"--query {text}: no such image or folder (test:INDEX for a test image)")
    if any(item.row is None for item in items):
        of_test = {os.path.realpath(item.file): item for item in test}
        for place, item in enumerate(items):
            known = of_test.get(os.path.realpath(item.file)) if item.row is None else None
            items[place] = known._replace(name=item.name) if known else item
    return items


# ------------------------------------------------------------------------------------------------ embedding


def unit_rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The ensemble's embedding, `(N, sum d) float32` with rows of length 1, from the members' outputs `(N, d)`.

    Each member has the same share, so the dot product of two rows is the mean of the members' cosines.
    """
    rows = torch.empty((len(parts[0]), sum(part.shape[1] for part in parts)), device=parts[0].device)
    for target, part in zip(rows.split([part.shape[1] for part in parts], dim=1), parts, strict=True):
        target.copy_(embed(part)).div_(math.sqrt(len(parts)))
    return rows


@torch.inference_mode()
def embedded_files(option: str, items: list[Item], ensemble: Ensemble, batch_size: int) -> torch.Tensor:
    """The ensemble's embedding of image files, as `unit_rows`. Refuses bad images, all of them at once.

    After the first bad one, it only looks for others.
    """
    size, files, problems, batches = ensemble.image_size, [item.file for item in items], [], []

    def fill(start: int, stop: int, out: np.ndarray) -> None:
        images = threads.map(lambda file: read_test_image(file, size, ensemble.resize), files[start:stop])
        for place, image in zip(out, images, strict=True):
            if isinstance(image, str):
                problems.append(image)
            else:
                place[:] = image

    with ThreadPoolExecutor(num_cores()) as threads:
        pieces = spans(0, len(files), batch_size)
        loaded = image_batches(fill, pieces, size, ensemble.mean.device)
        for batch in tqdm(loaded, option, len(pieces), unit=" batches", delay=1, leave=False, disable=None):
            if not problems:
                batches.append(ensemble(batch) / math.sqrt(len(ensemble.members)))
    refuse(option, problems)
    rows = torch.cat(batches)
    if not torch.isfinite(rows).all():
        raise RunError(f"{option}: the embedding of some images is not finite in {ensemble.precision}")
    return rows


# ------------------------------------------------------------------------------------------------ search


@torch.inference_mode()
def nearest(
    queries: torch.Tensor, gallery: torch.Tensor, top: int, left_out: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The `top` rows of the gallery `(N, d)` that are most similar to each of the queries `(Q, d)`.

    Returns their similarities `(Q, top) float32`, rounded to 1e-6, so that the order in which products were summed up
    hardly ever breaks a tie, and their numbers `(Q, top) int64`; of equally similar ones the first come first.
    `left_out` `(Q,)` is the gallery's number of each query itself, -1 where it is not in there.
    """
    similarities, numbers, left_out = [], [], torch.as_tensor(left_out, device=queries.device)
    for start, stop in spans(0, len(queries), max(1, MAX_BLOCK // len(gallery))):
        stop_here()
        block = (queries[start:stop] @ gallery.T).mul_(1e6).round_().div_(1e6)
        itself = left_out[start:stop]
        inside = torch.nonzero(itself >= 0)[:, 0]
        block[inside, itself[inside]] = -torch.inf
        # All that reach the last place, then in order of row, similarity and number, of which each row's first.
        reaching = block >= block.topk(top).values[:, -1:]
        rows, columns = (indices.cpu().numpy() for indices in torch.nonzero(reaching, as_tuple=True))
        values = block[reaching].cpu().numpy()
        order = np.lexsort((columns, -values, rows))
        places = np.searchsorted(rows[order], np.arange(stop - start))[:, None] + np.arange(top)
        similarities.append(values[order[places]])
        numbers.append(columns[order[places]])
    return np.concatenate(similarities), np.concatenate(numbers)


@dataclass
class Found:
    """A query and its neighbours, the most similar first."""

    query: Item
    neighbours: list[Item]
    similarities: list[float]

    @property
    def right(self) -> list[bool | None]:
        """Whether each neighbour is of the query's class, by its name; None where one of the classes is not known."""
        mine, theirs = self.query.class_name, [item.class_name for item in self.neighbours]
        return [None if None in (mine, other) else mine == other for other in theirs]


def places_of(queries: list[Item], gallery: list[Item], top: int) -> list[int]:
    """Where each query itself is in the gallery, -1 if it is not: the same row of test.csv; in a folder the same file.

    Refuses a `top` for which there are too few others.
    """

    def key(item: Item) -> int | str:
        return os.path.realpath(item.file) if item.row is None or gallery[0].row is None else item.row

    places = {key(item): place for place, item in enumerate(gallery)}
    found = [places.get(key(item), -1) for item in queries]
    available = len(gallery) - (max(found) >= 0)
    if top > available:
        raise InputError(f"--top {top} is over the number of images that can be found, {available}")
    return found


def confident_errors(
    run: Run, rows: torch.Tensor, gallery_rows: torch.Tensor, gallery: list[int], number: int
) -> tuple[list[int], int, int]:
    """The test queries whose first neighbour is wrong, by its similarity, the most similar first, at most `number`.

    Returns rows of test.csv, and how many such queries there are, and of how many. Queries whose class has no other
    image in the gallery can find nothing right and do not count.
    """
    labels, gallery = run.test.label.to_numpy(), np.array(gallery)
    queries = np.flatnonzero(run.test.is_query.to_numpy() & ~run.truth.lone_queries().numpy())
    place = np.full(len(labels), -1)
    place[gallery] = np.arange(len(gallery))
    similarities, numbers = nearest(rows[torch.from_numpy(queries)], gallery_rows, 1, place[queries])
    wrong = np.flatnonzero(labels[gallery[numbers[:, 0]]] != labels[queries])
    order = np.argsort(-similarities[wrong, 0], kind="stable")[:number]
    return queries[wrong[order]].tolist(), len(wrong), len(queries)


# ------------------------------------------------------------------------------------------------ what is written

MARKS = {True: "✓", False: "✗", None: "–"}


def print_found(found: list[Found]) -> None:
    for each in found:
        of_class = f" ({each.query.class_name})" if each.query.class_name else ""
        show(f"\n{each.query.name}{of_class}")
        rows = zip(each.neighbours, each.similarities, each.right, strict=True)
        for rank, (item, similarity, right) in enumerate(rows, 1):
            word = {True: "right", False: "wrong", None: "-"}[right]
            show(f"{rank:4d}  {similarity:7.4f}  {word:<5}  {item.class_name or '-'}  {item.path}")


def found_table(found: list[Found]) -> pd.DataFrame:
    """One row for each neighbour; `right` and unknown classes are empty."""
    rows = []
    for each in found:
        neighbours = zip(each.neighbours, each.similarities, each.right, strict=True)
        for rank, (item, similarity, right) in enumerate(neighbours, 1):
            rows.append((each.query.name, rank, item.path, item.class_name, f"{similarity:.6f}", right))
    return pd.DataFrame(rows, columns=["query", "rank", "path", "class", "similarity", "right"], dtype=object)


def export(path: Path, rows: torch.Tensor, table: pd.DataFrame) -> None:
    """The matrix as NAME.npy, `(N, sum d) float32`, and NAME.csv with a line for each of its rows."""
    with writable(path.parent, "--export"):
        with atomic_open(path, "wb") as file:
            np.save(file, rows.cpu().numpy(), allow_pickle=False)
        write_csv(path.with_suffix(".csv"), table)
    show(f"{path}: {rows.shape[0]:,} x {rows.shape[1]:,} float32, rows of length 1; {path.with_suffix('.csv').name}")


# ------------------------------------------------------------------------------------------------ the picture

DPI = 150
TILE, QUERY_GAP = 1.0, 0.2  # inches: side of an image; more space after the query
PITCH = (TILE + 0.2, TILE + 0.42)  # from one image to the next, right and down
MARGIN, FONT_SIZE = 0.12, 6.5  # inches, points
PICTURE_STYLE = {"font.size": FONT_SIZE, "figure.dpi": DPI, "savefig.dpi": DPI}
FRAMES = {  # edge colour and line of a neighbour
    True: {"edgecolor": "#1a9641", "linewidth": 2.6},
    False: {"edgecolor": "#d7191c", "linewidth": 2.6, "linestyle": (0, (2.2, 1.1))},
    None: {"edgecolor": "#999999", "linewidth": 1.2},
}


@dataclass
class Thumbnails:
    """Small pictures as the network sees them; from the run's cache where a test image's file is gone."""

    run: Run
    data_path: Path

    @functools.cached_property
    def cache(self) -> Cache:
        settings = self.run.settings
        cache = read_cache(self.data_path, settings["data_name"], settings["image_size"], settings["resize"])
        if cache.fingerprint != self.run.record["data"]["fingerprint"]:
            raise InputError(f"{cache.folder} is not the cache of this run")
        return cache

    def of(self, item: Item) -> np.ndarray:
        """`(S, S, 3) uint8`, S pixels for a tile. Raises InputError if there is nothing to show."""
        side = round(TILE * DPI)
        if item.file.exists() or item.row is None:
            pixels = read_test_image(item.file, side, self.run.settings["resize"])
        else:
            try:
                image = Image.fromarray(self.cache.array("test_images")[item.row])
            except InputError as error:
                raise InputError(f"no picture: {item.file} is missing (see --data_path), and {error}") from None
            pixels = resize_test(image, side)
        if isinstance(pixels, str):
            raise InputError(f"no picture: {pixels}")
        return pixels


def tile_corner(row: int, column: int) -> tuple[float, float]:
    """(left, top) of an image in inches; column 0 is the query."""
    return MARGIN + column * PITCH[0] + (column > 0) * QUERY_GAP, MARGIN + row * PITCH[1]


def draw(found: list[Found], thumbnails: Thumbnails, title: str, folder: Path, name: str) -> None:
    """Writes NAME.png: each row a query and its neighbours."""
    texts = [MARKS[True], MARKS[False]]
    for each in found:
        texts += [each.query.caption, each.query.class_name or ""]
        texts += [item.class_name or item.file.name for item in each.neighbours]
    with drawing(texts, PICTURE_STYLE) as boxes:
        save_figure(found_figure(found, thumbnails, title, boxes), folder, name, ["png"])


def found_figure(found: list[Found], thumbnails: Thumbnails, title: str, boxes: dict[int, str]) -> "Figure":
    """Rows of images with frames and captions, and a line that says what the frames mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Rectangle

    last_left, last_top = tile_corner(len(found) - 1, len(found[0].neighbours))
    width = last_left + TILE + MARGIN
    legend = textwrap.fill(f"{legend_text(found)}; {title}", round(19 * width))
    height = last_top + PITCH[1] + 0.13 * (legend.count("\n") + 1) + MARGIN
    figure = Figure((width, height))
    axes = figure.add_axes((0, 0, 1, 1))  # its coordinates are inches from the top left corner
    axes.set_axis_off()
    renderer, font = FigureCanvasAgg(figure).get_renderer(), FontProperties(size=FONT_SIZE)

    def fits(text: str) -> bool:
        return renderer.get_text_width_height_descent(text, font, False)[0] <= (PITCH[0] - 0.08) * figure.dpi

    def put(row: int, column: int, item: Item, frame: dict, captions: list[str]) -> None:
        left, top = tile_corner(row, column)
        axes.imshow(thumbnails.of(item), extent=(left, left + TILE, top + TILE, top))
        edge = frame["linewidth"] / 72 / 2  # the frame lies around the image: gaps in a dashed one are white
        axes.add_patch(Rectangle((left - edge, top - edge), TILE + 2 * edge, TILE + 2 * edge, fill=False, **frame))
        for line, caption in enumerate(captions):
            text = shortened(caption.translate(boxes), fits)
            axes.text(left + TILE / 2, top + TILE + 0.15 + 0.13 * line, text, ha="center", va="baseline")

    for row, each in enumerate(found):
        plain = {"edgecolor": "black", "linewidth": 0.8}
        put(row, 0, each.query, plain, [each.query.caption, each.query.class_name or ""])
        rows = zip(each.neighbours, each.similarities, each.right, strict=True)
        for rank, (item, similarity, right) in enumerate(rows, 1):
            second = item.class_name or item.file.name
            put(row, rank, item, FRAMES[right], [f"{rank}   {MARKS[right]}   {similarity:.3f}", second])
    axes.text(MARGIN, height - MARGIN, legend, va="bottom", color="#555555")
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


def legend_text(found: list[Found]) -> str:
    """What the frames that occur mean."""
    meanings = {True: "green ✓: the query's class", False: "dashed red ✗: another class", None: "grey: class not known"}
    occurring = {right for each in found for right in each.right}
    return ", ".join(meaning for right, meaning in meanings.items() if right in occurring)


def shortened(text: str, fits: Callable[[str], bool]) -> str:
    """The text, or as much of its beginning and end as fits with "…" between them."""
    if fits(text):
        return text
    shorter = (f"{text[: -(-kept // 2)]}…{text[len(text) - kept // 2 :]}" for kept in range(min(len(text), 99), 0, -1))
    return next(filter(fits, shorter), "…")


# ------------------------------------------------------------------------------------------------ the retrieval


def run(args: argparse.Namespace) -> None:
    # 1. Whatever can be wrong is found before anything is computed
    device = pick_device(args.device)
    trained = read_run(args.folder, args.num_members)
    data_path = args.data_path or Path(trained.record["options"]["data_path"])
    test = test_items(trained, data_path / trained.settings["data_name"])
    in_gallery = np.flatnonzero(trained.test.is_gallery).tolist()
    gallery = folder_items("--gallery", args.gallery) if args.gallery else [test[row] for row in in_gallery]
    queries = query_items(args.query, test) if args.query else []
    if queries or args.worst:
        check_matplotlib()
        places_of(queries or [test[row] for row in np.flatnonzero(trained.test.is_query)], gallery, args.top)
    output = args.output or trained.folder / "retrieval"
    suffix = "" if args.embedding == "logits" else f"_{args.embedding}"
    of = f"_gallery{suffix}" if args.gallery else suffix
    exported = None if args.export is None else export_file(Path(args.export or output), of)
    if not args.gallery or any(item.row is not None for item in queries):
        trained.check(args.embedding)
    for folder in [output] * bool(queries or args.worst) + ([exported.parent] if exported else []):
        make_folder(folder)

    # 2. The embeddings: the saved ones of the test split, new ones of image files
    photos = [item for item in queries if item.row is None]
    if photos or args.gallery:
        ensemble = load_ensemble(trained.folder, device, args.embedding, trained.num_members)
    if not args.gallery or len(photos) < len(queries):
        test_rows = unit_rows(trained.parts(args.embedding, device))

    def embedded(option: str, items: list[Item]) -> torch.Tensor:
        return with_less_memory(lambda size: embedded_files(option, items, ensemble, size), BATCH_SIZE)

    photo_rows = iter(embedded("--query", photos)) if photos else None
    query_rows = [next(photo_rows) if item.row is None else test_rows[item.row] for item in queries]
    if args.gallery:
        gallery_rows = embedded("--gallery", gallery)
    else:
        gallery_rows = test_rows[in_gallery] if len(in_gallery) < len(test) else test_rows

    # 3. The matrix
    if exported and args.gallery:
        table = pd.DataFrame({"path": [item.path for item in gallery], "class": [item.class_name for item in gallery]})
        export(exported, gallery_rows, table)
    elif exported:
        export(exported, test_rows, trained.test.rename(columns={"class_name": "class"}))

    # 4. The neighbours
    title = (
        f"similarity: mean cosine of {trained.num_members} members" if trained.num_members > 1 else "similarity: cosine"
    )
    if args.worst:
        rows, num_wrong, num_queries = confident_errors(trained, test_rows, gallery_rows, in_gallery, args.worst)
        print(
            f"{num_wrong:,} of {num_queries:,} test queries have a wrong first neighbour; {len(rows)} of them follow, "
            "the most confident first (confidence: the similarity of that neighbour)"
        )
        queries, query_rows = [test[row]._replace(name=f"test:{row}") for row in rows], list(test_rows[rows])
        title += "; wrong first neighbours, the most similar first"
    if not queries:
        return
    places = places_of(queries, gallery, args.top)
    similarities, numbers = nearest(torch.stack(query_rows), gallery_rows, args.top, places)
    found = []
    for query, place, row, values in zip(queries, places, numbers.tolist(), similarities.tolist(), strict=True):
        if query.class_name is None and place >= 0:  # a photo that lies in the gallery has its class
            query = query._replace(class_name=gallery[place].class_name)
        found.append(Found(query, [gallery[number] for number in row], values))
    name = f"{'worst' if args.worst else 'neighbours'}{suffix}"
    with writable(output):
        write_csv(output / f"{name}.csv", found_table(found))
    print_found(found)
    show(f"\n{output / name}.csv")
    with writable(output):
        draw(found[:MAX_ROWS], Thumbnails(trained, data_path), title, output, name)
    rest = f", the first {MAX_ROWS} of {len(found)} queries" if len(found) > MAX_ROWS else ""
    show(f"{output / name}.png{rest}")


def export_file(path: Path, suffix: str) -> Path:
    """The .npy file that --export names, or embedding.npy in the folder that it names."""
    return path if path.suffix == ".npy" else path / f"embedding{suffix}.npy"


def main(argv: list[str] | None = None) -> int:
    return run_main("retrieve.py", lambda: run(parse_args(argv)), "fewer --num_members, or --device cpu", goes_on=False)


if __name__ == "__main__":
    sys.exit(main())
