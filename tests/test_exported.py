"""The folder of an exported model: its pixels, its graph, and when an earlier one is replaced."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import odd_images, random_image
from processes import ROOT
from torch import nn

from dreml.cli import InputError, RunError
from dreml.exported import (
    DESCRIPTION,
    GRAPH,
    WEIGHTS,
    Description,
    check_packages,
    difference,
    new_export,
    open_graph,
    preprocess_code,
    write_graph,
)
from dreml.files import take_lock, write_record
from dreml.images import ImageSpec, read_test_image
from model import Ensemble, build_model, head_of

# ------------------------------------------------------------------------------------------------ pixels


@pytest.mark.parametrize("spec", [ImageSpec(32), ImageSpec(45), ImageSpec(45, "squash")], ids=str)
def test_the_code_that_goes_with_a_model_reads_images_as_this_program(tmp_path, spec):
    """Every kind of file, bit for bit, but for the one that docs/EXPORT.md leaves out; from an open file, too."""
    names = [*odd_images(tmp_path / "odd"), "photo.jpg"]
    random_image(4, 301, 200).save(tmp_path / "odd" / "photo.jpg", quality=90)
    given = {}
    exec(preprocess_code(spec), given)
    for name in set(names) - {"deep_holes.png"}:
        path = tmp_path / "odd" / name
        pixels = given["preprocess"](path)
        assert pixels.dtype == np.uint8, name
        np.testing.assert_array_equal(pixels, read_test_image(path, spec), err_msg=name)
    with open(path, "rb") as file:
        np.testing.assert_array_equal(given["preprocess"](file), pixels)


# ------------------------------------------------------------------------------------------------ the graph


def random_images(number: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (number, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("backbone", "size"),
    [("timm:test_efficientnet", 32), pytest.param("timm:test_maxvit", 160, marks=pytest.mark.slow)],
)
def test_a_graph_gives_the_embedding_of_its_network(tmp_path, backbone, size):
    """For any number of images, with the weights beside the graph, and without a path of this machine.

    Of networks that are no ResNets: depthwise convolutions with squeeze and excitation; attention.
    """
    pytest.importorskip("timm"), pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    member = build_model(backbone, 6, None)
    for layer in member.modules():
        if isinstance(layer, nn.BatchNorm2d):  # as after training
            layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    ensemble = Ensemble([member], ImageSpec(size), [0.2, 0.5, 0.7], [0.1, 0.25, 0.3], "pooled").eval()
    write_graph([ensemble], size, tmp_path)
    embed = open_graph(tmp_path, threads=1)
    for number in (1, 2, 7):
        images = random_images(number, size)
        expected, found = ensemble(torch.from_numpy(images)).numpy(), embed(images)
        assert found.dtype == np.float32 and found.shape == (number, head_of(member).in_features)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert difference(ensemble, embed, random_images(8, size)) < 1e-6
    num_bytes = sum(4 * weight.numel() for weight in member.parameters())
    assert (tmp_path / WEIGHTS).stat().st_size > 0.8 * num_bytes
    text = (tmp_path / GRAPH).read_bytes().decode("latin-1")
    assert not re.search(rf"{re.escape(str(ROOT))}|site-packages|stack_trace|File \"", text)


class Rows(nn.Module):
    """In the place of an ensemble: every image has this embedding."""

    def __init__(self, *row: float):
        super().__init__()
        self.row = torch.tensor(row)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.row.expand(len(images), -1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((0.9998, 0.02), r"^the graph's embedding is not PyTorch's: 1 - cosine is 0\.0002 for an image, and its rows"),
        ((1.0003, 0.0), r"rows have lengths of 1\.000000 to 1\.000300, not 1; nothing is exported$"),
        ((np.nan, 0.0), "1 - cosine is nan for an image"),
    ],
)
def test_a_graph_that_computes_something_else_is_refused(row, message):
    """Also if only one image of a larger batch is wrong."""

    def embed(images: np.ndarray) -> np.ndarray:
        rows = np.tile(np.float32([1, 0]), (len(images), 1))
        rows[5:6] = row
        return rows

    assert difference(Rows(1.0, 0.0), embed, random_images(11, 2)) == 0  # one, five, and another five
    with pytest.raises(RunError, match=message):
        difference(Rows(1.0, 0.0), embed, random_images(12, 2))


@pytest.mark.parametrize("number", [1, 3, 6, 7])
def test_no_batch_of_a_comparison_is_empty(number):
    def embed(images: np.ndarray) -> np.ndarray:
        assert len(images)
        return np.tile(np.float32([1, 0]), (len(images), 1))

    assert difference(Rows(1.0, 0.0), embed, random_images(number, 2)) == 0


class Undecided(nn.Module):
    """What it computes hangs on the pixels, which a graph cannot say."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((1, 2)) if images.sum() > 7 else images.float().amax((1, 2))


def test_a_network_that_cannot_be_written_is_named_in_one_line(tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(
        RunError, match=r"^PyTorch's ONNX exporter cannot write this network \(\w+: .*data-dep.*\); not"
    ):
        write_graph([Undecided().eval()], 4, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", [["onnx"], ["onnxscript", "onnxruntime"]])
def test_what_has_to_be_installed(monkeypatch, missing):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name in missing else pytest)
    with pytest.raises(InputError, match=f"^an export needs: pip install {' '.join(missing)}$"):
        check_packages()


# ------------------------------------------------------------------------------------------------ the folder


def write_export(target: Path, content: str, model: str = "a" * 64) -> None:
    """An export of which only the description is sound."""
    with new_export(target, model) as folder:
        fields = {
            "model": model,
            "source": f"run {model[0]}",
            "image_size": 32,
            "resize": "crop",
            "mean": [],
            "std": [],
        }
        fields |= {"d": 3, "input": {}, "output": {}, "preprocess": "", "checked": {}, "versions": {}, "sha256": {}}
        write_record(folder / DESCRIPTION, Description(**fields))
        for name in (GRAPH, WEIGHTS):
            (folder / name).write_text(content)


def contents(folder: Path) -> dict[str, str]:
    """Name -> content of the graph and its weights; and what else lies in the folder above, but the lock."""
    rest = {path.name: "" for path in folder.parent.iterdir()}
    assert rest.pop(f".{folder.name}.lock") == rest.pop(folder.name) == ""
    return rest | {name: (folder / name).read_text() for name in (GRAPH, WEIGHTS)}


def test_an_export_appears_when_it_is_whole_and_replaces_one_of_the_same_model(tmp_path):
    """What a killed process left goes, and of another name's stays."""
    target = tmp_path / "mo[d]el"
    write_export(target, "first")
    assert contents(target) == {GRAPH: "first", WEIGHTS: "first"}
    for name in (".mo[d]el.new-1", ".mo[d]el.old-1", ".model.new-1"):
        (tmp_path / name).mkdir()
    with pytest.raises(KeyError), new_export(target, "a" * 64) as folder:
        (folder / GRAPH).write_text("half")
        raise KeyError
    assert contents(target) == {GRAPH: "first", WEIGHTS: "first", ".model.new-1": ""}
    write_export(target, "second")
    assert contents(target) == {GRAPH: "second", WEIGHTS: "second", ".model.new-1": ""}


def test_an_empty_folder_may_become_an_export(tmp_path):
    (tmp_path / "model").mkdir()
    write_export(tmp_path / "model", "first")
    assert contents(tmp_path / "model") == {GRAPH: "first", WEIGHTS: "first"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda target: (target / "notes.txt").write_text(""), "has other files than those of an export, such as not"),
        (lambda target: (target / DESCRIPTION).unlink(), r"is not whole \(FileNotFoundError: .*: delete it, or --out"),
        (lambda target: (target / DESCRIPTION).write_text("{}"), r"is not whole \(ValueError: its checksum does not"),
        (lambda target: None, r"has the export of another model \(run a\): delete it, or --output names another fol"),
    ],
)
def test_nothing_else_is_replaced(tmp_path, damage, message):
    write_export(tmp_path / "model", "first")
    damage(tmp_path / "model")
    with pytest.raises(InputError, match=message):
        write_export(tmp_path / "model", "second", model="b" * 64)
    assert contents(tmp_path / "model") == {GRAPH: "first", WEIGHTS: "first"}


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(InputError, match="model is not a folder; --output names another folder"):
        write_export(tmp_path / "model", "first")
    assert (tmp_path / "model").read_text() == "mine"


def test_one_process_at_a_time_writes_an_export(tmp_path):
    with take_lock(tmp_path / ".model.lock"), pytest.raises(InputError, match="model is being written by another pro"):
        write_export(tmp_path / "model", "first")
    assert not (tmp_path / "model").exists()
