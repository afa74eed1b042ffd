"""How fast is the search of a photo folder by retrieve.py, with its index?

    python -m benchmarks.search refresh RUN_FOLDER             10,000 drawn photos: first search, second, after changes
    python -m benchmarks.search start RUN_FOLDER               one query, whole process, against importing the libraries
    python -m benchmarks.search exact                          one exact query in 100,000 x 272 on disk, and its memory
    python -m benchmarks.search ann RUN_FOLDER --photos DIR    approximate search among crops and flips of real photos

`refresh` draws its photos under --work, where `start` finds them again.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from benchmarks.plain import hardware
from dreml.approximate import ApproximateSearch
from dreml.cli import MANY, Parser, check_ranges, progress_bar, run_main
from dreml.images import load_rgb, resize_test
from dreml.index import PhotoIndex, model_checksum
from dreml.photos import Photo
from dreml.runs import read_run
from dreml.search import Item, embed_batch, find_neighbours, folder_items, nearest
from model import load_ensemble

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = "import torch, torchvision, lancedb"
TOP = 8


def draw_photo(path: Path, generator: np.random.Generator) -> None:
    """A smooth random picture of 200 x 160 pixels, as JPEG."""
    pixels = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((200, 160), Image.Resampling.BICUBIC).save(path, quality=85)


def timed(*command: object) -> tuple[float, str]:
    """Runs a command in the folder of the scripts. Returns its seconds and what it printed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}: {done.stderr}")
    return seconds, done.stdout


def search(run: Path, work: Path, *options: object) -> tuple[float, str]:
    """One query by retrieve.py among the drawn photos. Returns the seconds of the process and its line on the index."""
    command = ["retrieve.py", run, "--query", work / "query.jpg", "--gallery", work / "photos", "--no_picture"]
    seconds, output = timed(*command, "--index", work / "index", "--output", work / "out", *options)
    return seconds, next(iter(re.findall(r": (\d.* embedded)$", output, re.MULTILINE)), "not refreshed")


def alternating(commands: dict[str, list], repeats: int) -> dict[str, list[float]]:
    """The seconds of each command, in turns."""
    seconds = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            seconds[name].append(timed(*command)[0])
    return seconds


# ------------------------------------------------------------------------------------------------ what is measured


def refresh(run: Path, work: Path, number: int, repeats: int) -> None:
    """First search, second search, and one after photos were added, changed, moved and removed."""
    generator, photos = np.random.default_rng(0), work / "photos"
    shutil.rmtree(work, ignore_errors=True)
    for index in progress_bar(range(number), "drawing", number):
        draw_photo(photos / f"{index % 100:02d}" / f"{index}.jpg", generator)
    draw_photo(work / "query.jpg", generator)
    start = float(np.median(alternating({"imports": ["-c", IMPORTS]}, repeats)["imports"]))
    print(f"start-up ({IMPORTS}): {start:.2f} s\n\n| search | seconds | above start-up | |\n|---|---|---|---|")

    def row(what: str, *options: object) -> None:
        seconds, line = search(run, work, *options)
        print(f"| {what} | {seconds:.2f} | {seconds - start:.2f} | {line} |", flush=True)

    row("first")
    for _ in range(repeats):
        row("second")
    changed = number // 200
    files = sorted(photos.rglob("*.jpg"))
    for index in range(2 * changed):
        draw_photo(photos / "new" / f"{index}.jpg", generator)
    for index in range(changed):
        draw_photo(files[index], generator)
        os.rename(files[changed + index], photos / "new" / f"moved{index}.jpg")
        files[2 * changed + index].unlink()
    row(f"after {2 * changed} new, {changed} changed, {changed} moved, {changed} removed")
    row("and again")
    row("--refresh never", "--refresh", "never")


def start(run: Path, work: Path, repeats: int) -> None:
    """One query, the whole process, against importing the libraries, in turns."""
    query = ["retrieve.py", run, "--query", work / "query.jpg", "--gallery", work / "photos", "--no_picture"]
    query += ["--index", work / "index", "--output", work / "out"]
    commands = {
        "imports": ["-c", IMPORTS],
        "query": query,
        "query, 1 member": [*query[:2], "--num_members", 1, *query[2:]],
    }
    commands["query, 1 member"][-3] = work / "index1"
    commands |= {"query, --refresh never": [*query, "--refresh", "never"]}
    commands |= {
        "query of a test image, no gallery": [
            "retrieve.py",
            run,
            "--query",
            "test:0",
            "--no_picture",
            "--output",
            work / "out",
        ]
    }
    timed(*commands["query, 1 member"])
    seconds = alternating(commands, repeats)
    for name, values in seconds.items():
        above = np.median(np.subtract(values, seconds["imports"]))
        print(
            f"| {name} | {np.median(values):.2f} s | {above:+.2f} s |  {' '.join(f'{value:.2f}' for value in values)}"
        )
    importing = subprocess.run(
        [sys.executable, "-X", "importtime", *map(str, query)], cwd=ROOT, capture_output=True, text=True
    ).stderr
    print("\nimports, seconds with what they import themselves:")
    for name in ("torch", "torchvision", "lancedb", "pandas", "retrieve", "PIL.Image", "dreml.search", "model"):
        found = re.findall(rf"\| +(\d+) \| +{re.escape(name)}$", importing, re.MULTILINE)
        print(f"  {name}: {int(found[0]) / 1e6:.2f}" if found else f"  {name}: not imported")


EXACT = """
import json, resource, sys, time
import torch, torchvision, lancedb
from pathlib import Path
from dreml.index import PhotoIndex
from dreml.search import Item, find_neighbours
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
before, query = peak(), torch.nn.functional.normalize(torch.randn(1, int(sys.argv[2])))
start = time.perf_counter()
photos = PhotoIndex(Path("photos"), Path(sys.argv[1]), "m" * 64).photos()
read = time.perf_counter() - start
found = find_neighbours([Item("q", "q", None, Path("."))], query, photos, photos.vectors, 8)
seconds = time.perf_counter() - start
print(json.dumps({"read": read, "seconds": seconds, "GiB": peak() - before, "rows": len(photos)}))
"""


def exact(work: Path, number: int, width: int, repeats: int) -> None:
    """One exact query after start, and the peak of memory beside the libraries."""
    index, place = (
        PhotoIndex(Path("photos"), work / f"exact_{number}_{width}", "m" * 64),
        work / f"exact_{number}_{width}",
    )
    if not place.exists():
        place.mkdir(parents=True)
        write_rows(index, torch.nn.functional.normalize(torch.randn(number, width)))
    for _ in range(repeats):
        print(
            {name: round(value, 3) for name, value in json.loads(timed("-c", EXACT, place, width)[1]).items()},
            flush=True,
        )
    compare_with_lance(index)


def compare_with_lance(index: PhotoIndex) -> None:
    """Whether Lance's own flat search gives the same rows in the same order, among rows of which some are equal."""
    photos, table, same, equal = index.photos(), index.table(), 0, 0
    times = [0.0, 0.0]
    for row in range(0, len(photos), max(1, len(photos) // 50)):
        begin = time.perf_counter()
        ours = [photos.paths[n] for n in nearest(photos.vectors[row][None], photos.vectors, TOP, [-1])[1][0]]
        times[0] += time.perf_counter() - begin
        begin = time.perf_counter()
        query = table.search(photos.vectors[row].numpy()).distance_type("cosine").bypass_vector_index().limit(TOP)
        theirs = query.select(["path", "_distance"]).to_arrow()["path"].to_pylist()
        times[1] += time.perf_counter() - begin
        equal, same = equal + 1, same + (ours == theirs)
    print(f"rows and order equal to Lance's flat search: {same} of {equal} queries")
    ours, theirs = (seconds / equal for seconds in times)
    print(f"a query: {ours:.4f} s with the vectors in memory, {theirs:.4f} s by Lance's flat search")


def write_rows(index: PhotoIndex, vectors: torch.Tensor) -> None:
    """Fills an index with vectors `(N, d)`, photos of which there are no files, in pieces of 10,000."""
    for start in range(0, len(vectors), 10_000):
        names = [f"{number % 100:02d}/{number:07d}.jpg" for number in range(start, min(start + 10_000, len(vectors)))]
        ready = [(Photo(name, 1, 1), f"{name:0>64}") for name in names]
        rows = vectors[start : start + 10_000].numpy()
        index.write(ready, {digest: row for (_, digest), row in zip(ready, rows, strict=True)})


def crops(path: Path, count: int, generator: np.random.Generator) -> list[Image.Image]:
    """Random crops of a photo, a half of them mirrored: each keeps 50 to 100 % of either side."""
    image, found = load_rgb(path), []
    for number in range(count):
        width, height = (round(side * generator.uniform(0.5, 1)) for side in image.size)
        left, top = generator.integers(0, image.width - width + 1), generator.integers(0, image.height - height + 1)
        crop = image.crop((left, top, left + width, top + height))
        found.append(ImageOps.mirror(crop) if number % 2 else crop)
    return found


def ann(run: Path, work: Path, photos: list[Path], number: int, repeats: int) -> None:
    """Recall and time of the approximate search against the exact one."""
    trained = read_run(run)
    index = PhotoIndex(Path("photos"), work / f"ann_{number}", model_checksum(trained, "logits"))
    if index.table() is None:
        index.place.mkdir(parents=True, exist_ok=True)
        ensemble, generator = load_ensemble(run), np.random.default_rng(0)
        files = [item.file for folder in photos for item in folder_items("--photos", folder)]
        count, rows, pixels = -(-number // len(files)), [], []
        for file in progress_bar(files, "embedding", len(files)):
            pixels += [resize_test(image, ensemble.image_spec) for image in crops(file, count, generator)]
            if len(pixels) >= 256 or file == files[-1]:
                rows.append(embed_batch("--photos", torch.from_numpy(np.stack(pixels)), ensemble))
                pixels = []
        write_rows(index, torch.cat(rows)[:number])
    begin = time.perf_counter()
    approximate = ApproximateSearch(index, may_build=True)
    print(f"opened, and made if it was not there: {time.perf_counter() - begin:.1f} s")
    for top in (1, TOP, 100):
        approximate.print_recall(top)
    everything = index.photos()
    print(f"{len(everything):,} x {everything.vectors.shape[1]}")
    queries = everything.vectors[torch.randperm(number)[:repeats]]
    item = [Item("query", "query", None, Path(__file__))]
    times = {name: [] for name in ("exact, first", "ann, first", "exact, in memory", "ann, open")}
    for row in queries:
        for name in times:
            begin = time.perf_counter()
            if name == "exact, first":
                gallery = index.photos()
                find_neighbours(item, row[None], gallery, gallery.vectors, TOP)
            elif name == "ann, first":
                ApproximateSearch(index, may_build=False).find(item, row[None], TOP)
            elif name == "exact, in memory":
                find_neighbours(item, row[None], everything, everything.vectors, TOP)
            else:
                approximate.find(item, row[None], TOP)
            times[name].append(time.perf_counter() - begin)
    for name, values in times.items():
        print(f"| {name} | {1000 * np.median(values):.1f} ms |")


# ------------------------------------------------------------------------------------------------ options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="-m benchmarks.search", description=__doc__)
    add = parser.add_argument
    add("what", choices=("refresh", "start", "exact", "ann"), help="what is measured")
    add("run", type=Path, nargs="?", metavar="RUN_FOLDER", help="a run folder of train.py (not for exact)")
    add("--work", type=Path, default=Path("results/benchmark_search"), metavar="DIR", help="where it works")
    add("--photos", type=Path, nargs="+", default=[], metavar="DIR", help="folders of real photos (ann)")
    add("--number", type=int, metavar="N", help="photos (default: 10,000; exact and ann: 100,000)")
    add("--width", type=int, default=272, metavar="D", help="dimensions (exact; default: 272)")
    add("--repeats", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    args = parser.parse_args(argv)
    check_ranges(args, number=(1, MANY), width=(1, MANY), repeats=(1, MANY))
    if args.what != "exact" and args.run is None:
        parser.error(f"{args.what} needs a RUN_FOLDER")
    if args.what == "ann" and not args.photos:
        parser.error("ann needs --photos")
    return args


def run(args: argparse.Namespace) -> None:
    print(f"{hardware(torch.device('cpu'))}, {args.repeats} runs of each")
    work, folder = args.work.resolve(), args.run and args.run.resolve()
    if args.what == "refresh":
        refresh(folder, work, args.number or 10_000, args.repeats)
    elif args.what == "start":
        start(folder, work, args.repeats)
    elif args.what == "exact":
        exact(work, args.number or 100_000, args.width, args.repeats)
    else:
        ann(folder, work, args.photos, args.number or 100_000, args.repeats)


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.search", lambda: run(parse_args(argv)), "a smaller --number")


if __name__ == "__main__":
    sys.exit(main())
