"""How fast is the search of a photo folder by retrieve.py, with its index?

    python -m benchmarks.search RUN_FOLDER    10,000 drawn photos: first search, second, after changes

The seconds are those of whole processes, and those above importing the libraries.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.plain import hardware
from dreml.cli import MANY, Parser, check_ranges, progress_bar, run_main

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = "import torch, torchvision, lancedb"


def draw_photo(path: Path, generator: np.random.Generator) -> None:
    """Write a smooth random picture of 200 x 160 pixels as JPEG."""
    pixels = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((200, 160), Image.Resampling.BICUBIC).save(path, quality=85)


def timed(*command: object) -> tuple[float, str]:
    """Run a command in the folder of the scripts. Returns its seconds and what it printed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}: {done.stderr}")
    return seconds, done.stdout


def measure(run: Path, work: Path, number: int, repeats: int) -> None:
    """Time a first search, a second one, and one after photos were added, changed and removed."""
    generator = np.random.default_rng(0)
    photos = work / "photos"
    shutil.rmtree(work, ignore_errors=True)
    for index in progress_bar(range(number), "drawing", number):
        draw_photo(photos / f"{index % 100:02d}" / f"{index}.jpg", generator)
    draw_photo(work / "query.jpg", generator)
    imports = float(np.median([timed("-c", IMPORTS)[0] for _ in range(repeats)]))
    print(f"imports ({IMPORTS}): {imports:.2f} s\n\n| search | seconds | above imports | |\n|---|---|---|---|")

    def row(what: str, *options: object) -> None:
        command = ["retrieve.py", run, "--query", work / "query.jpg", "--gallery", photos, "--no_picture"]
        seconds, output = timed(*command, "--index", work / "index", "--output", work / "out", *options)
        line = next(iter(re.findall(r": (\d.* removed)$", output, re.MULTILINE)), "not refreshed")
        print(f"| {what} | {seconds:.2f} | {seconds - imports:.2f} | {line} |", flush=True)

    row("first")
    for _ in range(repeats):
        row("second")
    changed = number // 200
    files = sorted(photos.rglob("*.jpg"))
    for index in range(2 * changed):
        draw_photo(photos / "new" / f"{index}.jpg", generator)
    for index in range(changed):
        draw_photo(files[index], generator)
        files[changed + index].unlink()
    row(f"after {2 * changed} new, {changed} changed, {changed} removed")
    row("and again")
    row("--refresh never", "--refresh", "never")
    row("--ann", "--ann")
    row("--ann again", "--ann")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="-m benchmarks.search", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="a run folder of train.py")
    work = Path("results/benchmark_search")
    parser.add_argument("--work", type=Path, default=work, metavar="DIR", help=f"where it works (default: {work})")
    parser.add_argument("--number", type=int, default=10_000, metavar="N", help="photos (default: 10,000)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="second searches (default: 3)")
    args = parser.parse_args(argv)
    check_ranges(args, number=(1, MANY), repeats=(1, MANY))
    return args


def run(args: argparse.Namespace) -> None:
    print(hardware(torch.device("cpu")))
    measure(args.run.resolve(), args.work.resolve(), args.number, args.repeats)


def main(argv: list[str] | None = None) -> int:
    return run_main("benchmarks.search", lambda: run(parse_args(argv)), "a smaller --number")


if __name__ == "__main__":
    sys.exit(main())
