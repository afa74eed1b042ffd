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
import importlib.metadata
import importlib.util
import inspect
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dreml import images as images_module
from dreml.batches import spans
from dreml.cache import Cache
from dreml.cli import MANY, InputError, Parser, RunError, check_ranges, one_line, progress_bar, run_main
from dreml.files import replace_folder, sha256, writable, write_record
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
CODE = """
import onnxruntime

SPEC = ImageSpec({size}, "{resize}")


def preprocess(photo):  # an image file -> (S, S, 3) uint8
    return read_pixels(photo, SPEC)


def load(folder):  # the members' graphs
    files = [f"{{folder}}/member_{{number:03d}}.onnx" for number in range(1, {members} + 1)]
    return [onnxruntime.InferenceSession(file) for file in files]


def embed(members, images):  # (N, S, S, 3) uint8 -> (N, d) float32, rows of length 1
    rows = [member.run(None, {{"images": images}})[0] for member in members]
    return np.hstack(rows) / np.float32(len(rows) ** 0.5)
"""


def python_code(spec: ImageSpec, num_members: int) -> str:
    """Python code that needs NumPy, Pillow and onnxruntime, and defines `preprocess`, `load` and `embed`.

    Photos are read by dreml/images.py itself, whose one import of ours is put in.
    """
    reading = inspect.getsource(images_module)
    reading = reading.replace("from dreml.cli import one_line\n", f"\n{inspect.getsource(one_line)}")
    return reading + CODE.format(size=spec.size, resize=spec.resize, members=num_members)


# ------------------------------------------------------------------------------------------------ options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="export.py", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="a run folder of train.py")
    parser.add_argument("--num_members", type=int, metavar="L", help="members 1 to L (default: all that are finished)")
    embedding_help = "logits (default), or pooled: the features before the last layer"
    parser.add_argument("--embedding", choices=EMBEDDINGS, default="logits", metavar="E", help=embedding_help)
    output_help = "folder to make (default: RUN_FOLDER/export_L<members>)"
    parser.add_argument("--output", type=Path, metavar="DIR", help=output_help)
    recall_help = "embed all test images, too, and compare R@1 with that of the saved embeddings"
    parser.add_argument("--check_recall", action="store_true", help=recall_help)
    data_help = "folder of data sets, for the test images of the check (default: as in training)"
    parser.add_argument("--data_path", type=Path, metavar="DIR", help=data_help)
    args = parser.parse_args(argv)
    check_ranges(args, num_members=(1, MANY))
    return args


# ------------------------------------------------------------------------------------------------ the graphs


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
    return np.array(test[:: -(-len(test) // NUM_CHECKED)])


def difference(network: torch.nn.Module, embed: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> float:
    """The largest 1 - cosine between PyTorch's and onnxruntime's embeddings of images `(N, S, S, 3) uint8`.

    PyTorch embeds all of them at once, onnxruntime the first by itself. Raises RunError where it is too large.
    """
    found = np.concatenate([embed(images[:1]), embed(images)[1:]])
    apart = found - network(torch.from_numpy(images)).numpy()
    largest = float(
        (apart**2).sum(1).max() / 2
    )  # 1 - cosine of rows of length 1, and more where one has another length
    if not largest <= MAX_DIFFERENCE:  # so that NaN fails, too
        raise RunError(
            f"the graphs' embedding is not PyTorch's: 1 - cosine is {largest:.2g} for an image; nothing is exported"
        )
    return largest


def compare_recall(trained: Run, embedding: str, rows: torch.Tensor) -> dict[str, float]:
    """R@1 in percent, by the exported model's rows `(M, d) float32` of the test images and by the saved embedding.

    Raises RunError where the two are more than `MAX_QUERIES_APART` queries apart.
    """
    labels, is_query, is_gallery = trained.split
    recalls = {}
    for name, embeddings in (("R@1", rows), ("R@1 of the run", trained.embeddings(embedding, torch.device("cpu")))):
        found = recall_at_k(embeddings, labels, [1], is_query=is_query, is_gallery=is_gallery)
        recalls[name] = round(100 * found[-1].item(), 4)
    apart = round(abs(recalls["R@1"] - recalls["R@1 of the run"]) / 100 * int(is_query.sum()))
    text = ", ".join(f"{name} {value:.2f}" for name, value in recalls.items()) + f"; queries apart: {apart}"
    if apart > MAX_QUERIES_APART:
        raise RunError(f"--check_recall: {text}, and {MAX_QUERIES_APART} may be; nothing is exported")
    print(text)
    return recalls


# ------------------------------------------------------------------------------------------------ the export


def check_replaceable(target: Path) -> None:
    """Raise InputError where `target` is there and is anything but an earlier export or an empty folder."""
    if not target.exists():
        return
    names = os.listdir(target) if target.is_dir() else [target.name]
    others = [name for name in names if name != DESCRIPTION and not name.startswith("member_")]
    if others:
        raise InputError(
            f"{target} is no export, or has other files, such as {others[0]}: --output names another folder"
        )


def run(args: argparse.Namespace) -> None:
    # 1. Whatever can be wrong is found before anything is computed
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"an export needs: pip install {' '.join(missing)}")
    trained = read_run(args.folder, args.num_members)
    number = trained.num_members
    if args.check_recall:
        trained.require(args.embedding)
    try:
        if not len(trained.test):
            raise InputError(f"{args.folder}: its data set has no test images")
        cache = trained.read_cache(args.data_path)
    except InputError as error:
        if args.check_recall:
            raise
        cache = None
        print(f"note: compared on drawn images, not on test images: {error}")
    output = args.output or trained.folder / f"export_L{number}{SUFFIXES[args.embedding]}"
    check_replaceable(output)

    # 2. The graphs, which appear when all checks have passed
    with writable(output.parent, "--output"), tempfile.TemporaryDirectory(dir=output.parent, prefix=".export") as made:
        folder = Path(made) / "new"
        folder.mkdir()
        ensemble = load_ensemble(trained.folder, "cpu", args.embedding, number)
        spec = ensemble.image_spec
        mean = trained.record.data.mean
        std = trained.record.data.std
        print(f"{trained.name}: writing the graphs, {args.embedding}, ensemble size {number}")
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
            pieces = spans(0, len(test_images), NUM_CHECKED)
            bar = progress_bar(pieces, "embedding the test images", len(pieces), f" x {NUM_CHECKED} images")
            rows = [embed(np.array(test_images[start:stop])) for start, stop in bar]
            checked |= compare_recall(trained, args.embedding, torch.from_numpy(np.concatenate(rows)))
        width = embed(images[:1]).shape[1]
        checksums = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        description = {
            "model": model_checksum(trained, args.embedding),  # of the settings and data, the members, the embedding
            "source": f"{trained.name}, {number} members, {args.embedding}",
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
        replace_folder(folder, output)

    # 3. What there is now
    print(f"1 - cosine with PyTorch's embedding: at most {checked['1 - cosine']:.1g}, on {checked['images']}")
    megabytes = sum((output / name).stat().st_size for name in checksums) / 1e6
    print(f"{output}/: member_001.onnx … ({megabytes:,.1f} MB), {DESCRIPTION}; {width:,} numbers an image")


def main(argv: list[str] | None = None) -> int:
    return run_main("export.py", lambda: run(parse_args(argv)), "fewer --num_members", resumable=False)


if __name__ == "__main__":
    sys.exit(main())
