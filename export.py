"""Writes a trained ensemble as ONNX graphs, one a member, which run without this program.

    python export.py RUN                       all finished members
    python export.py RUN --num_members 4       the first four
    python export.py RUN --check_recall        and compare R@1 with the run's

A graph maps images, (N, S, S, 3) uint8, to the rows of one member, (N, d) float32.
model.json has the Python code that reads a photo and joins the rows. Both are
compared with PyTorch first. docs/SEARCH.md: how to use them. Needs:
pip install onnx onnxscript onnxruntime
"""

import argparse
import inspect
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dreml import images as images_module
from dreml.batches import spans
from dreml.cli import InputError, Parser, RunError, one_line, progress_bar, require, run_main
from dreml.files import replace_folder, writable, write_record
from dreml.images import ImageSpec
from dreml.runs import SUFFIXES, Run, add_run_options, read_run, recall_percent
from model import Ensemble, load_ensemble

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


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="export.py", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="a run folder of train.py")
    add_run_options(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN_FOLDER/export_L<members>")
    parser.add_argument("--check_recall", action="store_true", help="embed all test images, too, and compare R@1")
    parser.add_argument("--data_path", type=Path, metavar="DIR", help="data sets (default: as in training)")
    return parser.parse_args(argv)


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


def check(run: Run, ensemble: Ensemble, embed: Callable, test_images: np.ndarray | None = None) -> dict[str, float]:
    """Compare what the graphs embed, `embed(images)`, with PyTorch's rows of the same drawn images.

    With `test_images`, all of the run's, compare their R@1 with that of the saved embedding, too. Returns what
    model.json says of it. Raises RunError where they are too far apart.
    """
    size = ensemble.image_spec.size
    images = np.random.default_rng(0).integers(0, 256, (NUM_CHECKED, size, size, 3), dtype=np.uint8)
    apart = embed(images) - ensemble(torch.from_numpy(images)).numpy()
    largest = float((apart**2).sum(1).max() / 2)  # 1 - cosine of rows of length 1; more where one has another length
    if not largest <= MAX_DIFFERENCE:  # so that NaN fails, too
        raise RunError(f"the graphs' embedding is not PyTorch's: 1 - cosine is {largest:.2g}; nothing is exported")
    found = {"1 - cosine": float(f"{largest:.1g}")}
    if test_images is not None:
        pieces = spans(0, len(test_images), NUM_CHECKED)
        bar = progress_bar(pieces, "embedding the test images", len(pieces), f" x {NUM_CHECKED} images")
        rows = torch.from_numpy(np.concatenate([embed(np.array(test_images[start:stop])) for start, stop in bar]))
        for name, members in (("R@1", [rows]), ("R@1 of the run", run.embeddings(ensemble.embedding, rows.device))):
            found[name] = round(recall_percent(members, run.test, [1])[-1].item(), 4)
        num_apart = abs(found["R@1"] - found["R@1 of the run"]) / 100 * run.test.is_query.sum()
        if round(num_apart) > MAX_QUERIES_APART:
            raise RunError(f"R@1 is {found['R@1']}, that of the run {found['R@1 of the run']}; nothing is exported")
    print(f"compared with PyTorch: {', '.join(f'{name} {value}' for name, value in found.items())}")
    return found


def run(args: argparse.Namespace) -> None:
    # 1. Whatever can be wrong is found before anything is computed
    require("an export", "onnx", "onnxscript", "onnxruntime")
    trained = read_run(args.folder, args.num_members, args.embedding)
    number = trained.num_members
    test_images = None
    if args.check_recall:
        test_images = trained.read_cache(args.data_path).array("test_images")
        if not len(test_images):
            raise InputError(f"{args.folder}: its data set has no test images")
    output = args.output or trained.folder / f"export_L{number}{SUFFIXES[args.embedding]}"
    others = [path.name for path in output.glob("*") if not re.fullmatch(r"member_.*|model\.json", path.name)]
    if others or output.is_file():
        raise InputError(f"{output} is no export, or holds other files: --output names another folder")

    # 2. The graphs, which appear when all checks have passed
    with writable(output.parent, "--output"), tempfile.TemporaryDirectory(dir=output.parent, prefix=".export") as made:
        folder = Path(made) / "new"
        folder.mkdir()
        ensemble = load_ensemble(trained.folder, "cpu", args.embedding, number)
        spec = ensemble.image_spec
        data = trained.record.data
        print(f"{trained.name}: writing the graphs, {args.embedding}, ensemble size {number}")
        for place, member in enumerate(progress_bar(ensemble.members, "writing the graphs", number, " members"), 1):
            network = Ensemble([member], spec, data.mean, data.std, args.embedding).eval()
            write_graph(network, spec.size, folder / f"member_{place:03d}.onnx")
        code = python_code(spec, number)
        embed = open_graphs(folder, code)
        description = {
            "source": f"{trained.name}, {number} members, {args.embedding}",
            "members": number,
            "image_size": spec.size,
            "resize": spec.resize,
            "d": embed(np.zeros((1, spec.size, spec.size, 3), np.uint8)).shape[1],
            "code": code,
            "checked": check(trained, ensemble, embed, test_images),
        }
        write_record(folder / "model.json", description)
        replace_folder(folder, output)
    print(f"{output}/: member_001.onnx … model.json; {description['d']:,} numbers an image")


def main(argv: list[str] | None = None) -> int:
    return run_main("export.py", lambda: run(parse_args(argv)), "fewer --num_members", resumable=False)


if __name__ == "__main__":
    sys.exit(main())
