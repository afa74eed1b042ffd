"""export.py: its code for pixels, its graphs, its comparison with the run, and the folder that it makes."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import build_small_model, edit_record, odd_images, random_image, refused, table_of
from processes import ROOT
from torch import nn

import export
import model
from dreml.cli import RunError
from dreml.images import ImageSpec, read_pixels
from dreml.runs import read_test
from model import Ensemble, build_model, head_of, load_ensemble

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def call(*arguments: object) -> None:
    assert export.main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def exported(_small_run, tiny_data, tmp_path_factory) -> Path:
    """The exported model of `small_run`, compared with its R@1. Not to be changed."""
    target = tmp_path_factory.mktemp("exported") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "build_model", build_small_model)
        call(_small_run, "--output", target, "--data_path", tiny_data, "--check_recall")
    return target


@pytest.mark.parametrize("spec", [ImageSpec(32), ImageSpec(45, "squash")], ids=str)
def test_the_code_that_goes_with_a_model_reads_images_as_this_program(tmp_path, spec):
    """Every kind of file, bit for bit, and the same refusals. It imports nothing of ours."""
    names = [*odd_images(tmp_path / "odd"), "photo.jpg"]
    random_image(4, 301, 200).save(tmp_path / "odd" / "photo.jpg", quality=90)
    code, given = export.python_code(spec, 1), {}
    assert not re.search("import .*(dreml|utils|model)|from (dreml|utils|model)", code)
    exec(code, given)
    for name in names:
        path = tmp_path / "odd" / name
        pixels = given["preprocess"](path)
        assert pixels.dtype == np.uint8, name
        np.testing.assert_array_equal(pixels, read_pixels(path, spec), err_msg=name)
    with open(path, "rb") as file:
        np.testing.assert_array_equal(given["preprocess"](file), pixels)
    (tmp_path / "words.png").write_text("no image")
    with pytest.raises(given["BadImage"], match=r"words\.png: unreadable"):
        given["preprocess"](tmp_path / "words.png")


def random_images(number: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (number, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("backbone", "size"),
    [("timm:test_efficientnet", 32), pytest.param("timm:test_maxvit", 160, marks=pytest.mark.slow)],
)
def test_a_graph_gives_the_embedding_of_its_network(tmp_path, backbone, size):
    """For any number of images, with the weights inside, and without a path of this machine.

    Of networks that are no ResNets: depthwise convolutions with squeeze and excitation; attention.
    """
    pytest.importorskip("timm")
    torch.manual_seed(0)
    member = build_model(backbone, 6, None)
    for layer in member.modules():
        if isinstance(layer, nn.BatchNorm2d):  # as after training
            layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    ensemble = Ensemble([member], ImageSpec(size), [0.2, 0.5, 0.7], [0.1, 0.25, 0.3], "pooled").eval()
    file = tmp_path / "member_001.onnx"
    export.write_graph(ensemble, size, file)
    embed = export.open_graphs(tmp_path, export.python_code(ImageSpec(size), 1))
    for number in (1, 2, 7):
        images = random_images(number, size)
        expected, found = ensemble(torch.from_numpy(images)).numpy(), embed(images)
        assert found.dtype == np.float32 and found.shape == (number, head_of(member).in_features)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    num_bytes = sum(4 * weight.numel() for weight in member.parameters())
    assert list(tmp_path.iterdir()) == [file] and file.stat().st_size > 0.8 * num_bytes
    text = file.read_bytes().decode("latin-1")
    assert not re.search(rf"{re.escape(str(ROOT))}|site-packages|stack_trace|File \"", text)


class Rows(nn.Module):
    """In the place of an ensemble. The first value of an image is the number of its embedding among some rows."""

    image_spec = ImageSpec(2)
    embedding = "logits"

    def __init__(self, rows: torch.Tensor):
        super().__init__()
        self.rows = rows

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.rows[images[:, 0, 0, 0].long() % len(self.rows)]


@pytest.mark.parametrize(
    ("row", "cosine"), [((0.9998, 0.02, 0), "0.0002"), ((1.02, 0, 0), "0.0002"), ((np.nan, 0, 0), "nan")]
)
def test_a_graph_that_computes_something_else_is_refused(row, cosine):
    """Also if only one image of a larger batch is wrong."""
    ensemble = Rows(torch.tensor([[1.0, 0.0, 0.0]]))

    def embed(images: np.ndarray) -> np.ndarray:
        rows = ensemble(torch.from_numpy(images)).numpy()
        rows[5:6] = row
        return rows

    with pytest.raises(RunError, match=f"^the graphs' embedding is not PyTorch's: 1 - cosine is {cosine}; nothing"):
        export.check(None, ensemble, embed)


def test_a_model_that_finds_other_neighbours_is_refused(capsys):
    """R@1 by hand: two queries may be apart; only queries count. One-hot rows find their class."""
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    right = torch.eye(3)[labels]
    images = np.zeros((7, 2, 2, 3), np.uint8)
    images[:, 0, 0, 0] = range(7)

    def compared(changes: dict[int, list[float]], is_query: torch.Tensor) -> float:
        rows = right.clone()
        for image, row in changes.items():
            rows[image] = torch.tensor(row)
        ensemble = Rows(rows)
        run = SimpleNamespace(test=table_of(labels.numpy(), is_query.numpy()), embeddings=lambda *_: [right])
        found = export.check(run, ensemble, lambda batch: ensemble(torch.from_numpy(batch)).numpy(), images)
        assert found["R@1 of the run"] == 100
        return found["R@1"]

    every = torch.ones(7, dtype=torch.bool)
    assert compared({}, every) == 100
    wrong = {0: [0.0, 0.6, 0.8], 3: [0.6, 0.0, 0.8]}  # nearer to the other class, whose images still find their own
    assert compared(wrong, every) == 71.4286
    assert "R@1 71.4286, R@1 of the run 100.0\n" in capsys.readouterr().out
    assert compared(wrong, torch.arange(7) != 3) == 83.3333
    with pytest.raises(RunError, match=r"^R@1 is 57.1429, that of the run 100.0; nothing is exported"):
        compared(wrong | {4: [0.6, 0.0, -0.8]}, every)


class Undecided(nn.Module):
    """What it computes hangs on the pixels, which a graph cannot say."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((1, 2)) if images.sum() > 7 else images.float().amax((1, 2))


def test_a_network_that_cannot_be_written_is_named_in_one_line(tmp_path):
    with pytest.raises(RunError, match=r"^PyTorch's ONNX exporter cannot write this network \(\w+: .*data-dep"):
        export.write_graph(Undecided().eval(), 4, tmp_path / "member_001.onnx")
    assert not list(tmp_path.iterdir())


def test_an_export_embeds_photos_as_the_run_did(exported, small_run, tiny_data):
    """Executed from model.json, as a program does that has nothing of ours."""
    saved = [np.load(small_run / f"member_00{member}.npy") for member in (1, 2)]
    expected = np.hstack([rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in saved]) / 2**0.5
    found = json.loads((exported / "model.json").read_text())
    names = {}
    exec(found["code"], names)
    files = [tiny_data / "tiny" / path for path in read_test(small_run).path]
    images = np.stack([names["preprocess"](file) for file in files])
    np.testing.assert_allclose(names["embed"](names["load"](exported), images), expected, atol=1e-5)
    assert sorted(path.name for path in exported.iterdir()) == ["member_001.onnx", "member_002.onnx", "model.json"]
    assert found["source"] == f"{small_run.name}, 2 members, logits"
    assert (found["image_size"], found["resize"], found["members"], found["d"]) == (32, "crop", 2, 6)
    recall = float((small_run / "recall.csv").read_text().splitlines()[2].split(",")[1])
    checked = found["checked"]
    assert 0 <= checked["1 - cosine"] < 1e-6 and checked["R@1"] == checked["R@1 of the run"] == recall


def test_where_an_export_goes_and_what_it_replaces(small_run, tmp_path, capsys, monkeypatch):
    """A folder of its own for each embedding and size; it appears when all is done, and replaces an export only.

    The graphs are drawn by PyTorch here. No data is needed.
    """
    networks = []

    def write_graph(network, image_size, path):
        networks.append(network)
        path.write_text(str(image_size))

    def embed(images):
        return np.hstack([network(torch.from_numpy(images)).numpy() for network in networks]) / len(networks) ** 0.5

    monkeypatch.setattr(export, "write_graph", write_graph)
    monkeypatch.setattr(export, "open_graphs", lambda *_: embed)
    run = shutil.copytree(small_run, tmp_path / "run")
    for options in ([], [], ["--embedding", "pooled", "--num_members", "1"]):
        networks.clear()
        call(run, *options)
    images = torch.from_numpy(random_images(2))
    assert torch.equal(networks[0](images), load_ensemble(run, embedding="pooled", num_members=1)(images))
    found = json.loads((run / "export_L1_pooled" / "model.json").read_text())
    assert found["d"] == 16 and found["source"] == "run, 1 members, pooled"
    assert found["checked"] == {"1 - cosine": pytest.approx(0, abs=1e-9)}
    before = (run / "export_L2" / "model.json").read_bytes()
    monkeypatch.setattr(export, "check", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(run)
    assert sorted(path.name for path in run.glob("*export*")) == ["export_L1_pooled", "export_L2"]
    assert (run / "export_L2" / "model.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "notes.txt"
    file.write_text("mine")
    assert "; --output names another folder" in refused(capsys, export, run, "--output", file / "new")
    (run / "export_L2" / "model.json.bak").write_text("of its user")
    for other in (tmp_path / "mine", file, run / "export_L2"):
        line = refused(capsys, export, run, "--output", other)
        assert f"{other} is no export, or holds other files: --output names another folder" in line
    assert file.read_text() == "mine"
    (run / "member_001.pooled.npy").unlink()
    assert export.main([str(run), "--embedding", "pooled"]) == 2


def test_bad_input_is_refused_in_one_line(small_run, tiny_data, tmp_path, capsys):
    """--check_recall needs the cache of the training."""
    recall = ["--check_recall", "--output", tmp_path / "model", "--data_path"]
    assert "is not a run folder" in refused(capsys, export, tmp_path)
    assert "member 3 of 3 is missing" in refused(capsys, export, small_run, "--num_members", "3")
    assert "no such folder" in refused(capsys, export, small_run, *recall, tmp_path)
    shutil.copytree(tiny_data, tmp_path / "data", copy_function=os.link)  # records are replaced, not written over
    edit_record(tmp_path / "data" / "tiny" / "cache_32" / "meta.json", "mean", value=[0.5, 0.5, 0.5])
    line = refused(capsys, export, small_run, *recall, tmp_path / "data")
    assert "cache_32 is not the cache of this run" in line
    assert not (tmp_path / "model").exists()


def test_without_the_packages_one_line_says_so(small_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert refused(capsys, export, small_run) == "export.py: an export needs: pip install onnxscript\n"
