"""Raw image folders -> cached splits.

    python data_utils.py                                      every data set found under data/
    python data_utils.py --data_name cub --image_size 128     one of them, smaller
    python data_utils.py --data_name demo --image_size 32     draws a data set first; needs no download
    python data_utils.py --data_name cub --holdout 0.2        cub_holdout: a fifth of the training classes as test split

The cache data/NAME/cache_256/ holds pixels after the last deterministic step of the input pipeline, as uint8: training
images with their shorter side at int(1.1 * 256), test images resized and centre-cropped to 256 x 256. They equal
torchvision's Resize and CenterCrop bit for bit. Random crops, flips and normalisation are left to training.
With --resize squash, cache_256_squash/ has both sides at int(1.1 * 256), or 256: nothing is cut off a wide image.
"""

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

from dreml.cache import Cache, cache_folder, cache_options, default_recalls, read_cache, verify_cache
from dreml.cache_writer import build_cache
from dreml.cli import MANY, InputError, Parser, RunError, check_ranges, counted, data_set_name, num_cores, run_main
from dreml.datasets import OTHER_LAYOUT, PUBLISHED, hold_out
from dreml.demo import draw_demo
from dreml.files import writable
from dreml.images import RESIZES, ImageSpec, load_rgb, resize_test
from dreml.lists import UnknownLayout, subfolders
from dreml.settings import Settings

__all__ = ["ImageSpec", "load_rgb", "main", "resize_test"]  # the images: for embedding one of your own (README)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="data_utils.py", description=__doc__)
    names_help = "data sets to cache (default: all that are found)"
    parser.add_argument("--data_name", nargs="+", type=data_set_name, metavar="NAME", help=names_help)
    data_help = "folder of the data sets (default: data)"
    parser.add_argument("--data_path", type=Path, default=Path("data"), metavar="DIR", help=data_help)
    size_help = "side of the square crops in pixels (default: 256)"
    parser.add_argument("--image_size", type=int, default=256, metavar="S", help=size_help)
    resize_help = "crop (default): the shorter side to S, then a crop; squash: all of the image to S x S"
    parser.add_argument("--resize", choices=RESIZES, default="crop", metavar="R", help=resize_help)
    workers_help = "worker processes (default: all cores)"
    parser.add_argument("--num_workers", type=int, default=num_cores(), metavar="N", help=workers_help)
    parser.add_argument("--force", action="store_true", help="make a cache again that is there already")
    skip_help = "go on without bad images; their list is written into the cache"
    parser.add_argument("--skip_bad", action="store_true", help=skip_help)
    holdout_help = "cache NAME_holdout: a random share of the training classes as test split, such as 0.2"
    parser.add_argument("--holdout", type=float, metavar="SHARE", help=holdout_help)
    parser.add_argument("--holdout_seed", type=int, metavar="N", help="other classes, for NAME_holdoutN (default: 0)")
    parser.add_argument("--verify", action="store_true", help="only compare the caches with their checksums")
    args = parser.parse_args(argv)
    check_ranges(args, image_size=(1, 2048), num_workers=(1, MANY), holdout=(1e-9, 1), holdout_seed=(0, 2**32 - 1))
    if args.verify and (args.force or args.skip_bad or args.holdout):
        raise InputError("--verify only reads: it does not go with --force, --skip_bad or --holdout")
    if args.holdout and not args.data_name:
        raise InputError("--holdout needs --data_name: the data sets whose classes it divides")
    if args.holdout_seed is not None and not args.holdout:
        raise InputError("--holdout_seed goes with --holdout")
    return args


def run(args: argparse.Namespace) -> None:
    # 1. The data sets: those that are named, or all folders that may be some
    data_path = args.data_path
    spec = ImageSpec(args.image_size, args.resize)
    names = args.data_name
    if not names:
        names = [folder.name for folder in subfolders(data_path)] if data_path.is_dir() else []
        if args.verify:
            names = [name for name in names if cache_folder(data_path, name, spec).exists()]

    # 2. One after the other. A bad one does not stop the others
    rows = []
    errors = []
    for name in dict.fromkeys(names):
        start = time.perf_counter()
        try:
            if args.verify:
                cache = read_cache(data_path, name, spec)
                verify_cache(cache)
            else:
                if name == "demo" and not (data_path / name).exists():
                    with writable(data_path, "--data_path"):
                        draw_demo(data_path / name)
                if args.holdout:
                    name = hold_out(data_path, name, args.holdout, args.holdout_seed or 0)
                cache = build_cache(data_path, name, spec, args.num_workers, args.force, args.skip_bad)
            rows.append((cache, time.perf_counter() - start))
        except InputError as error:
            if isinstance(error, UnknownLayout) and not args.data_name:
                print(f"passed over: {error}")
            else:
                errors.append(error)
        except (RunError, OSError) as error:
            errors.append(RunError(f"{name}: {error}"))

    # 3. The summary, and what to run next
    if rows:
        print_summary(rows)
        if not args.verify:
            print(f"\n{training_text(data_path, rows[0][0])}")
    elif not errors and args.verify:
        raise InputError(f"no {cache_folder(data_path, 'NAME', spec)} found; see --image_size and --resize")
    elif not errors:
        layouts = [f"  data/{name}/  {published.layout}" for name, published in PUBLISHED.items()]
        layouts.append(f"  data/NAME/  {OTHER_LAYOUT}")
        layouts.append("The README says where to get them. Without any: python data_utils.py --data_name demo")
        raise InputError("\n".join([f"no data set found in {data_path}/; expected is one of", *layouts]))
    if errors:
        kind = InputError if all(isinstance(error, InputError) for error in errors) else RunError
        raise kind("\n".join(map(str, errors)))


def print_summary(rows: list[tuple[Cache, float]]) -> None:
    """Print a table of caches and the seconds that each took."""
    print(f"\n{'data set':<12}{'train':>30}{'test':>30}{'on disk':>10}{'seconds':>9}")
    for cache, seconds in rows:
        train, test = (f"{counted(c, 'class')} {counted(n, 'image')}" for c, n in cache.counts.values())
        on_disk = tqdm.format_sizeof(sum(path.stat().st_size for path in cache.folder.iterdir()), "B")
        print(f"{cache.name:<12}{train:>30}{test:>30}{on_disk:>10}{seconds:>9.1f}")


def training_text(data_path: Path, cache: Cache) -> str:
    """The command that trains on a data set, with options that fit few classes or images; or why none can."""
    name = cache.name
    num_classes = cache.counts["train"][0]
    num_gallery = int(cache.array("test_is_gallery").sum())
    recalls = [k for k in default_recalls(name) if k < num_gallery]
    if num_classes < 2 or (num_gallery and not recalls):
        return f"{name} cannot be trained on: that takes two training classes, and two test images or none"
    command = f"python train.py {cache_options(data_path, name, cache.spec)}"
    advice = ""
    if num_classes < Settings().meta_class_size:
        command += f" --meta_class_size {num_classes // 2 if num_classes >= 4 else 'all'}"
        if num_classes >= 4:
            advice = "\n(for one network in place of an ensemble: --meta_class_size all --ensemble_size 1)"
    if num_gallery and recalls != default_recalls(name):
        command += f" --recalls {','.join(map(str, recalls))}"
    if name.split("_holdout")[0] == "demo":  # on a CPU
        command += " --weights none --no_flip --lr 1e-3"
    return f"train on it with: {command}{advice}"


def main(argv: list[str] | None = None) -> int:
    return run_main("data_utils.py", lambda: run(parse_args(argv)), "fewer --num_workers or a smaller --image_size")


if __name__ == "__main__":
    sys.exit(main())
