"""Writes a trained ensemble as ONNX graphs, one a member, which run without this program.

    python export.py RUN                       all finished members
    python export.py RUN --num_members 4       the first four
    python export.py RUN --check_recall        and compare R@1 with the run's

A graph maps images, (N, S, S, 3) uint8, to the rows of one member, (N, d) float32.
model.json has the Python code that reads a photo and joins the rows: then the dot
product of two is the mean of the members' cosines. All of it is compared with
PyTorch before it is written. docs/SEARCH.md: how to use it. Needs:
pip install onnx onnxscript onnxruntime
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dreml.cache import Cache
from dreml.cli import MANY, InputError, Parser, RunError, check_ranges, one_line, progress_bar, run_main
from dreml.files import read_record, replace_folder, sha256, take_lock, writable, write_record
from dreml.images import ImageSpec
from dreml.index import model_checksum
from dreml.runs import SUFFIXES, Run, read_run
from dreml.settings import EMBEDDINGS
from model import Ensemble, load_ensemble
from utils import recall_at_k

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
DESCRIPTION = "model.json"
NUM_CHECKED = 32  # images whose embeddings are compared
MAX_DIFFERENCE = 1e-4  # 1 - cosine between PyTorch's embedding of an image and onnxruntime's
MAX_QUERIES_APART = 2  # of which rounding may change the nearest neighbour

# ------------------------------------------------------------------------------------------------ code in model.json

# A test holds it equal to `load_rgb` and `resize_test` of dreml/images.py; docs/SEARCH.md says what is left out.
CODE = """\
import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def preprocess(photo):  # an image file -> (SIZE, SIZE, 3) uint8
    image = ImageOps.exif_transpose(Image.open(photo))
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray(((np.asarray(image, np.int64).clip(0, 65535) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        image = white
RESIZING

def load(folder):  # the members' graphs
    files = [f"{folder}/member_{number:03d}.onnx" for number in range(1, MEMBERS + 1)]
    return [onnxruntime.InferenceSession(file) for file in files]


def embed(members, images):  # (N, SIZE, SIZE, 3) uint8 -> (N, d) float32, rows of length 1
    rows = [member.run(None, {"images": images})[0] for member in members]
    return np.hstack(rows) / np.float32(len(rows) ** 0.5)
"""
RESIZING = {
    "crop": """\
    width, height = image.size
    size = (SIZE, int(SIZE * height / width)) if width <= height else (int(SIZE * width / height), SIZE)
    image = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    left = round((image.width - SIZE) / 2)
    top = round((image.height - SIZE) / 2)
    return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))
""",
    "squash": """\
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
""",
}


def python_code(spec: ImageSpec, num_members: int) -> str:
    """Python code that needs NumPy, Pillow and onnxruntime, and defines `preprocess`, `load` and `embed`."""
    code = CODE.replace("RESIZING", RESIZING[spec.resize])
    return code.replace("SIZE", str(spec.size)).replace("MEMBERS", str(num_members))


# ------------------------------------------------------------------------------------------------ options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="export.py", description=__doc__, epilog="It computes on the CPU.")
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="a run folder of train.py")
    group = parser.add_argument_group("options")
    group.add_argument("--num_members", type=int, metavar="L", help="members 1 to L (default: all that are finished)")
    embedding_help = "logits (default), or pooled: the features before the last layer"
    group.add_argument("--embedding", choices=EMBEDDINGS, default="logits", metavar="E", help=embedding_help)
    output_help = "folder to make (default: RUN_FOLDER/export_L<members>)"
    group.add_argument("--output", type=Path, metavar="DIR", help=output_help)
    recall_help = "embed all test images, too, and compare R@1 with that of the saved embeddings"
    group.add_argument("--check_recall", action="store_true", help=recall_help)
    data_help = "folder of data sets, for the test images of the check (default: as in training)"
    group.add_argument("--data_path", type=Path, metavar="DIR", help=data_help)
    args = parser.parse_args(argv)
    check_ranges(args, num_members=(1, MANY))
    return args


# ------------------------------------------------------------------------------------------------ the graphs


def check_packages() -> None:
    """Raise InputError, which says what to install, where a package is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"an export needs: pip install {' '.join(missing)}")


def write_graph(network: torch.nn.Module, image_size: int, path: Path) -> None:
    """Write a network, `(N, S, S, 3) uint8` -> `(N, d) float32` with any N, as an ONNX file with its weights.

    Raises RunError for a network that PyTorch's exporter cannot write.
    """
    images = torch.zeros((2, image_size, image_size, 3), dtype=torch.uint8)  # with one image, N could become fixed
    try:
        with sdpa_kernel(SDPBackend.MATH):  # with others, MaxViT of timm ended in "Cannot view a tensor"
            program = torch.onnx.export(
                network,
                (images,),
                input_names=["images"],
                output_names=["embedding"],
                dynamic_shapes=({0: torch.export.Dim("N")},),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = one_line(error.__cause__ or error)
        raise RunError(f"PyTorch's ONNX exporter cannot write this network ({reason}); nothing is exported") from None
    for node in program.model.graph:  # notes of the exporter, most of the graph, with paths of this machine
        node.metadata_props.clear()
    program.save(path, external_data=False)  # weights of more than 1.5 GB get a file of their own all the same


def open_graphs(folder: Path, code: str) -> Callable[[np.ndarray], np.ndarray]:
    """The exported model as its user runs it: `(N, S, S, 3) uint8` -> `(N, d) float32`."""
    names = {}
    exec(code, names)  # so that the code of model.json is what is checked
    members = names["load"](folder)
    return lambda images: names["embed"](members, images)


# ------------------------------------------------------------------------------------------------ the checks


def images_to_check(cache: Cache | None, image_size: int) -> np.ndarray:
    """Images for the comparison, `(N, S, S, 3) uint8`: of the whole test split or, without a cache, drawn."""
    if cache is None:
        shape = (NUM_CHECKED, image_size, image_size, 3)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    test = cache.array("test_images")
    rows = np.linspace(0, len(test) - 1, NUM_CHECKED).astype(int)
    return np.array(test[np.unique(rows)])


def difference(network: torch.nn.Module, embed: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> float:
    """The largest 1 - cosine between PyTorch's and onnxruntime's embeddings of images `(N, S, S, 3) uint8`.

    PyTorch embeds all of them at once, onnxruntime the first by itself. Raises RunError where the difference is above
    `MAX_DIFFERENCE` or a row has not length 1.
    """
    expected = network(torch.from_numpy(images)).numpy().astype(np.float64)
    found = np.concatenate([embed(images[:1]), embed(images)[1:]]).astype(np.float64)
    lengths = np.linalg.norm(found, axis=1)
    cosines = (found * expected).sum(1) / lengths / np.linalg.norm(expected, axis=1)
    largest = float(np.abs(1 - cosines).max())
    if not (largest <= MAX_DIFFERENCE and np.allclose(lengths, 1, rtol=0, atol=1e-4)):  # so that NaN fails, too
        raise RunError(
            f"the graphs' embedding is not PyTorch's: 1 - cosine is {largest:.2g} for an image, and its rows have "
            f"lengths of {lengths.min():.6f} to {lengths.max():.6f}, not 1; nothing is exported"
        )
    return largest


def compare_recall(trained: Run, embedding: str, rows: torch.Tensor) -> dict[str, float]:
    """R@1 in percent, by the exported model's rows `(M, d) float32` of the test images and by the saved embedding.

    Raises RunError where the two are more than `MAX_QUERIES_APART` queries apart.
    """
    split = trained.split
    recalls = {}
    for name, embeddings in (("R@1", rows), ("R@1 of the run", trained.embeddings(embedding, torch.device("cpu")))):
        found = recall_at_k(embeddings, split.labels, [1], is_query=split.is_query, is_gallery=split.is_gallery)
        recalls[name] = round(100 * found[-1].item(), 4)
    apart = round(abs(recalls["R@1"] - recalls["R@1 of the run"]) / 100 * int(split.is_query.sum()))
    text = ", ".join(f"{name} {value:.2f}" for name, value in recalls.items()) + f": {apart} queries apart"
    if apart > MAX_QUERIES_APART:
        raise RunError(f"--check_recall: {text}, and {MAX_QUERIES_APART} may be; nothing is exported")
    print(text)
    return recalls


# ------------------------------------------------------------------------------------------------ the folder


@contextlib.contextmanager
def new_export(target: Path, model: str) -> Iterator[Path]:
    """Yield a temporary folder, which takes the place of `target` when the block ends without an error.

    Raises InputError where `target` is not an earlier export of this `model`, or where another process writes it.
    """
    lock = take_lock(target.with_name(f".{target.name}.lock"), timeout=0)
    if lock is None:
        raise InputError(f"{target} is being written by another process")
    with lock:
        check_replaceable(target, model)
        new = target.with_name(f".{target.name}.new")
        shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
        try:
            new.mkdir()
            yield new
            replace_folder(new, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def check_replaceable(target: Path, model: str) -> None:
    """Raise InputError where `target` is anything but an earlier export of this model, or an empty folder."""
    if not target.exists() or (target.is_dir() and not os.listdir(target)):
        return
    remedy = "--output names another folder"
    try:
        earlier = read_record(target / DESCRIPTION)
        if not {"sha256", "model", "source"} <= earlier.keys():
            raise ValueError("its entries are those of another version")
    except (ValueError, OSError) as error:
        raise InputError(f"{target} is not an export ({one_line(error)}); {remedy}") from None
    others = set(os.listdir(target)) - set(earlier["sha256"]) - {DESCRIPTION}
    if others:
        raise InputError(f"{target} has other files than those of an export, such as {min(others)}; {remedy}")
    if earlier["model"] != model:
        raise InputError(f"{target} has the export of another model ({earlier['source']}): delete it, or {remedy}")


# ------------------------------------------------------------------------------------------------ the export


def run(args: argparse.Namespace) -> None:
    # 1. Whatever can be wrong is found before anything is computed
    check_packages()
    trained = read_run(args.folder, args.num_members)
    number = trained.num_members
    model = model_checksum(trained, args.embedding)
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
        print(f"note: compared on drawn images, not on test images: {error}")

    # 2. The graphs, which appear when all checks have passed
    output = args.output or trained.folder / f"export_L{number}{SUFFIXES[args.embedding]}"
    source = f"{trained.name}, {number} members, {args.embedding}"
    with writable(output.parent, "--output"), new_export(output.resolve(), model) as folder:
        print(f"{source}: writing the graphs")
        ensemble = load_ensemble(trained.folder, "cpu", args.embedding, number)
        spec = ensemble.image_spec
        mean = trained.record.data.mean
        std = trained.record.data.std
        for place, member in enumerate(progress_bar(ensemble.members, "writing the graphs", number, " members"), 1):
            network = Ensemble([member], spec, mean, std, args.embedding).eval()
            write_graph(network, spec.size, folder / f"member_{place:03d}.onnx")
        code = python_code(spec, number)
        embed = open_graphs(folder, code)
        images = images_to_check(cache, spec.size)
        kind = "drawn images" if cache is None else "test images"
        checked = {"images": f"{len(images)} {kind}", "1 - cosine": difference(ensemble, embed, images)}
        if args.check_recall:
            test_images = cache.array("test_images")
            starts = range(0, len(test_images), NUM_CHECKED)
            bar = progress_bar(starts, "embedding the test images", len(starts), f" x {NUM_CHECKED} images")
            rows = [embed(np.array(test_images[start : start + NUM_CHECKED])) for start in bar]
            checked |= compare_recall(trained, args.embedding, torch.from_numpy(np.concatenate(rows)))
        width = embed(images[:1]).shape[1]
        checksums = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        description = {
            "model": model,  # checksum of the run's settings and data, the members and the embedding
            "source": source,
            "members": number,
            "image_size": spec.size,
            "resize": spec.resize,
            "mean": mean,  # of the channels, in 0..1; this one and the next are inside the graphs
            "std": std,
            "d": width,
            "code": code,
            "checked": checked,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", *PACKAGES)},
            "sha256": checksums,
        }
        write_record(folder / DESCRIPTION, description)

    # 3. What there is now
    print(f"1 - cosine with PyTorch's embedding: at most {checked['1 - cosine']:.1g}, on {checked['images']}")
    megabytes = sum((output / name).stat().st_size for name in checksums) / 1e6
    contents = f"{number} member_*.onnx ({megabytes:,.1f} MB), {DESCRIPTION}"
    print(f"{output}/: {contents}; {width:,} numbers an image")


def main(argv: list[str] | None = None) -> int:
    return run_main("export.py", lambda: run(parse_args(argv)), "fewer --num_members", resumable=False)


if __name__ == "__main__":
    sys.exit(main())
