"""A model that runs without this program: a folder with an ONNX graph, its weights, and a description of both."""

import contextlib
import glob
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dreml.cli import InputError, RunError, one_line, out_of_memory, progress_bar
from dreml.files import flush_to_disk, read_record, replace_folder, sha256, take_lock, temporary_name
from dreml.images import ImageSpec

if TYPE_CHECKING:
    import onnx

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
GRAPH, WEIGHTS, DESCRIPTION = "model.onnx", "model.onnx.data", "model.json"
INPUT, OUTPUT = "images", "embedding"  # what they are called in the graph
MAX_DIFFERENCE = 1e-4  # 1 - cosine between PyTorch's embedding of an image and onnxruntime's

# ------------------------------------------------------------------------------------------------ pixels

# The same as `load_rgb` and `resize_test` of dreml/data/images.py; docs/EXPORT.md says what is left out.
OPENING = """\
import numpy as np
from PIL import Image, ImageOps


def preprocess(photo):  # an image file -> (SIZE, SIZE, 3) uint8
    image = ImageOps.exif_transpose(Image.open(photo))
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray(((np.asarray(image, np.int64).clip(0, 65535) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image, white = image.convert("RGBA"), Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        image = white
"""
RESIZING = {
    "crop": """\
    width, height = image.size
    size = (SIZE, int(SIZE * height / width)) if width <= height else (int(SIZE * width / height), SIZE)
    image = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    left, top = (round((side - SIZE) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))
""",
    "squash": """\
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
""",
}


def preprocess_code(spec: ImageSpec) -> str:
    """Python code, for NumPy and Pillow alone, that defines `preprocess`: an image file -> `(S, S, 3) uint8`."""
    return (OPENING + RESIZING[spec.resize]).replace("SIZE", str(spec.size))


# ------------------------------------------------------------------------------------------------ the graph


def check_packages() -> None:
    """Raises InputError, which says what to install, where a package is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"an export needs: pip install {' '.join(missing)}")


def write_graph(networks: Sequence[nn.Module], image_size: int, folder: Path) -> None:
    """Writes networks, `(N, S, S, 3) uint8` -> `(N, d) float32` with rows of length 1, as model.onnx, model.onnx.data.

    The graph's embedding has theirs side by side, over the square root of their number, as an `Ensemble` has. N stays
    free. Raises RunError for a network that PyTorch's exporter cannot write.
    """
    import onnx

    parts, number = [], len(networks)
    for network in progress_bar(networks, "writing the graph", number, " networks"):
        parts.append(export_part(network, image_size, folder))
    onnx.save(join_parts(parts), folder / GRAPH)
    for name in (GRAPH, WEIGHTS):
        with open(folder / name, "r+b") as file:
            flush_to_disk(file)


def export_part(network: nn.Module, image_size: int, folder: Path) -> "onnx.ModelProto":
    """The graph of one network, whose weights are added to the end of model.onnx.data.

    One at a time: the exporter's memory grows with the square of the number of networks (docs/EXPORT.md).
    """
    import onnx

    images = torch.zeros((2, image_size, image_size, 3), dtype=torch.uint8)  # with one image, N could become fixed
    try:
        with sdpa_kernel(SDPBackend.MATH):  # with others, MaxViT of timm ended in "Cannot view a tensor"
            program = torch.onnx.export(
                network,
                (images,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("N")},),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = one_line(error.__cause__ or error)
        raise RunError(f"PyTorch's ONNX exporter cannot write this network ({reason}); nothing is exported") from None
    for node in program.model.graph:  # notes of the exporter, most of the file, with paths of this machine
        node.metadata_props.clear()
    files = [folder / "part.onnx", folder / "part.onnx.data"]
    program.save(files[0], external_data=True)
    part = onnx.load(files[0], load_external_data=False)
    with open(files[1], "rb") as own, open(folder / WEIGHTS, "ab") as weights:
        start = weights.tell()
        shutil.copyfileobj(own, weights)
    for tensor in part.graph.initializer:  # those of a few bytes lie in the graph
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = WEIGHTS
            elif entry.key == "offset":
                entry.value = str(start + int(entry.value))
    for file in files:
        file.unlink()
    return part


def join_parts(parts: "list[onnx.ModelProto]") -> "onnx.ModelProto":
    """One graph of the networks' graphs, which have the same input; see `write_graph`. Changes their names."""
    import onnx
    from onnx import helper

    graph, outputs = onnx.GraphProto(name="embedding", input=parts[0].graph.input), []
    for number, part in enumerate(parts, 1):
        onnx.compose.add_prefix(part, f"network{number}/", rename_inputs=False, inplace=True)
        for name in ("node", "initializer", "value_info"):
            getattr(graph, name).extend(getattr(part.graph, name))
        outputs.extend(part.graph.output)
    d = sum(each.type.tensor_type.shape.dim[1].dim_value for each in outputs)
    graph.output.append(helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, ["N", d]))
    graph.initializer.append(helper.make_tensor("length", onnx.TensorProto.FLOAT, [], [len(parts) ** 0.5]))
    graph.node.append(helper.make_node("Concat", [each.name for each in outputs], ["side_by_side"], axis=1))
    graph.node.append(helper.make_node("Div", ["side_by_side", "length"], [OUTPUT]))
    return helper.make_model(graph, opset_imports=parts[0].opset_import, ir_version=parts[0].ir_version)


def open_graph(folder: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """The exported model, run by onnxruntime on the CPU: `(N, S, S, 3) uint8` -> `(N, d) float32`.

    Both this function and the one that it returns raise RunError where onnxruntime fails.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with onnxruntime_errors():
        session = onnxruntime.InferenceSession(folder / GRAPH, options, providers=["CPUExecutionProvider"])

    def embed(images: np.ndarray) -> np.ndarray:
        with onnxruntime_errors():
            return session.run([OUTPUT], {INPUT: np.ascontiguousarray(images)})[0]

    return embed


@contextlib.contextmanager
def onnxruntime_errors() -> Iterator[None]:
    """Makes one line of what onnxruntime raises, which is of a dozen kinds."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        raise RunError(f"onnxruntime cannot run the graph ({one_line(error)})") from None


def difference(network: nn.Module, embed: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> float:
    """The largest 1 - cosine between PyTorch's and onnxruntime's embeddings of images `(N, S, S, 3) uint8`.

    PyTorch embeds all of them at once, onnxruntime one, then five, then the rest. Raises RunError where the difference
    is above `MAX_DIFFERENCE` or a row has not length 1.
    """
    expected = network(torch.from_numpy(images)).numpy().astype(np.float64)
    found = np.concatenate([embed(batch) for batch in np.split(images, [1, 6]) if len(batch)]).astype(np.float64)
    lengths = np.linalg.norm(found, axis=1)
    cosines = (found * expected).sum(1) / lengths / np.linalg.norm(expected, axis=1)
    largest = float(np.abs(1 - cosines).max())
    if not (largest <= MAX_DIFFERENCE and np.allclose(lengths, 1, rtol=0, atol=1e-4)):  # so that NaN fails, too
        raise RunError(
            f"the graph's embedding is not PyTorch's: 1 - cosine is {largest:.2g} for an image, and its rows have "
            f"lengths of {lengths.min():.6f} to {lengths.max():.6f}, not 1; nothing is exported"
        )
    return largest


# ------------------------------------------------------------------------------------------------ the folder


@dataclass
class Description:
    """`model.json`: what a program that runs the graph has to know, and where it comes from."""

    model: str  # checksum of the run's settings and data, the members and the embedding
    source: str  # the same, in words
    image_size: int
    resize: str
    mean: list[float]  # of the channels, in 0..1; this one and the next are inside the graph
    std: list[float]
    d: int  # numbers of an embedding
    input: dict[str, object]  # name, shape, dtype
    output: dict[str, object]
    preprocess: str  # see `preprocess_code`
    checked: dict[str, object]
    versions: dict[str, str]
    sha256: dict[str, str]  # file name -> checksum


def file_checksums(folder: Path) -> dict[str, str]:
    """The checksums of the graph and its weights."""
    return {name: sha256(folder / name) for name in (GRAPH, WEIGHTS)}


@contextlib.contextmanager
def new_export(target: Path, model: str) -> Iterator[Path]:
    """Yields a temporary folder, which takes the place of `target` when the block ends without an error.

    Raises InputError where `target` is anything but an earlier export of this `model`, or another process writes it.
    """
    lock = take_lock(target.with_name(f".{target.name}.lock"), timeout=0)
    if lock is None:
        raise InputError(f"{target} is being written by another process")
    with lock:
        check_replaceable(target, model)
        for leftover in target.parent.glob(f".{glob.escape(target.name)}.*-*"):  # of a run that was killed
            shutil.rmtree(leftover)
        new = temporary_name(target, "new")
        try:
            new.mkdir()
            yield new
            replace_folder(new, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def check_replaceable(target: Path, model: str) -> None:
    """Raises InputError where `target` is anything but an earlier export of this model, or an empty folder."""
    if not os.path.exists(target):
        return
    remedy = "--output names another folder"
    if not os.path.isdir(target):
        raise InputError(f"{target} is not a folder; {remedy}")
    others = sorted(set(os.listdir(target)) - {GRAPH, WEIGHTS, DESCRIPTION})
    if others:
        raise InputError(f"{target} has other files than those of an export, such as {others[0]}; {remedy}")
    if not os.listdir(target):
        return
    try:
        earlier = read_record(target / DESCRIPTION, Description)
    except (ValueError, OSError) as error:
        raise InputError(
            f"{target} has an export that is not whole ({one_line(error)}): delete it, or {remedy}"
        ) from None
    if earlier.model != model:
        raise InputError(f"{target} has the export of another model ({earlier.source}): delete it, or {remedy}")
