"""export.py: the whole command, and its comparison with the run."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import build_small_model, edit_record, only_folder, refused, save_image, train_tiny
from processes import ROOT

import data_utils
import export
import model
from dreml.cache import read_cache
from dreml.cli import RunError
from dreml.exported import open_graph, preprocess_code
from dreml.files import sha256
from dreml.images import ImageSpec
from dreml.index import model_checksum
from dreml.runs import TestSplit, read_run
from dreml.search import embed_images, folder_items
from model import load_ensemble

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def call(*arguments: object) -> None:
    assert export.main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def exported(_small_runs, tiny_data, tmp_path_factory) -> Path:
    """The exported model of `small_run`, compared with its R@1. Not to be changed."""
    target = tmp_path_factory.mktemp("exported") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "build_model", build_small_model)
        call(_small_runs[0], "--output", target, "--data_path", tiny_data, "--check_recall")
    return target


# ------------------------------------------------------------------------------------------------ what is written


def test_an_export_embeds_the_test_images_as_the_run_did(exported, small_run, tiny_data):
    saved = [np.load(small_run / f"member_00{member}.npy") for member in (1, 2)]
    expected = np.hstack([rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in saved]) / 2**0.5
    images = read_cache(tiny_data, "tiny", ImageSpec(32)).array("test_images")
    np.testing.assert_allclose(open_graph(exported, 1)(images), expected, atol=1e-5)
    assert sorted(path.name for path in exported.iterdir()) == ["model.json", "model.onnx", "model.onnx.data"]


def test_test_images_of_the_whole_split_are_compared(tiny_cache, monkeypatch):
    """From the first to the last, none twice, also where there are few."""
    test = tiny_cache.array("test_images")
    for wanted, number in ((32, 32), (50, 36)):
        monkeypatch.setattr(export, "NUM_CHECKED", wanted)
        images = export.images_to_check(tiny_cache, 32)
        places = [np.flatnonzero((test == image).all((1, 2, 3)))[0] for image in images]
        assert places == sorted(set(places)) and len(places) == number and places[0] == 0 and places[-1] == 35


def test_its_description(exported, small_run, tiny_data):
    found, cache = json.loads((exported / "model.json").read_text()), read_cache(tiny_data, "tiny", ImageSpec(32))
    assert found["model"] == model_checksum(read_run(small_run), "logits")
    assert found["source"] == f"{small_run.name}, 2 members, logits"
    assert (found["image_size"], found["resize"], found["d"]) == (32, "crop", 6)
    assert (found["mean"], found["std"]) == (cache.meta.mean, cache.meta.std)
    assert found["input"] == {"name": "images", "shape": ["N", 32, 32, 3], "dtype": "uint8"}
    assert found["output"] == {"name": "embedding", "shape": ["N", 6], "dtype": "float32"}
    assert found["preprocess"] == preprocess_code(ImageSpec(32))
    assert found["sha256"] == {name: sha256(exported / name) for name in ("model.onnx", "model.onnx.data")}
    recall = float((small_run / "recall.csv").read_text().splitlines()[2].split(",")[1])
    checked = found["checked"]
    assert checked["images"] == "32 test images" and 0 <= checked["1 - cosine"] < 1e-6 and checked["queries"] == 36
    assert checked["R@1"] == checked["R@1 of the run"] == recall


def test_the_python_of_the_page(exported, small_run, tmp_path):
    """An export, Pillow, NumPy and onnxruntime: what a program does that has nothing of ours."""
    text = (ROOT / "docs" / "EXPORT.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.startswith(preprocess_code(ImageSpec(32)))
    save_image(tmp_path / "photos" / "photo.jpg", 5, width=90, height=61)
    code, number = re.subn(r'"results/\w+/export_L4/', f'"{exported}/', code)
    names = {}
    exec(code.replace("photo.jpg", str(tmp_path / "photos" / "photo.jpg")), names)
    expected = embed_images("", folder_items("", tmp_path / "photos"), load_ensemble(small_run), 1)
    np.testing.assert_allclose(names["embedding"], expected.numpy(), atol=1e-5)
    assert number == 1


@pytest.fixture
def networks(monkeypatch) -> list:
    """PyTorch in the place of the graph, whose networks these are; the first one embeds."""
    networks = []

    def write_graph(parts, image_size, folder):
        networks.extend(parts)
        for name in ("model.onnx", "model.onnx.data"):
            (folder / name).write_text(str(image_size))

    monkeypatch.setattr(export, "write_graph", write_graph)
    monkeypatch.setattr(export, "open_graph", lambda *_: lambda images: networks[0](torch.from_numpy(images)).numpy())
    return networks


def test_fewer_members_pooled_and_without_the_data(networks, small_pooled_run, tmp_path, capsys):
    """Drawn images are compared then, and the screen says so."""
    target = tmp_path / "a" / "model"
    options = ["--num_members", "1", "--embedding", "pooled", "--data_path", tmp_path]
    call(small_pooled_run, *options, "--output", target)
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    expected = load_ensemble(small_pooled_run, embedding="pooled", num_members=1)(images)
    assert torch.equal(networks[0](images), expected) and (target / "model.onnx").read_text() == "32"
    found, output = json.loads((target / "model.json").read_text()), capsys.readouterr().out
    assert found["d"] == 16 and found["source"].endswith(", 1 members, pooled")
    assert found["checked"] == {"images": "32 drawn images", "1 - cosine": pytest.approx(0, abs=1e-9)}
    assert re.search("^note: compared on drawn images, not on test images: .*tiny: no such folder", output)
    assert f"{target}/: model.onnx, model.onnx.data (0.0 MB), model.json; 16 numbers an image\n" in output


def test_a_run_without_a_test_split_is_compared_on_drawn_images(networks, small_run, tiny_data, tmp_path, capsys):
    shutil.copytree(tiny_data / "tiny" / "train", tmp_path / "tiny" / "train")
    assert data_utils.main(["--data_path", str(tmp_path), "--data_name", "tiny", "--image_size", "32"]) == 0
    assert train_tiny(tmp_path, tmp_path / "results", "--ensemble_size", "1") == 0
    run = only_folder(tmp_path / "results")
    line = refused(capsys, export, run, "--check_recall")
    assert line == f"export.py: {run}: its data set has no test images\n" and not (run / "export_L1").exists()
    call(run)
    note = f"note: compared on drawn images, not on test images: {run}: its data set has no test images\n"
    assert capsys.readouterr().out.startswith(note)
    found = json.loads((run / "export_L1" / "model.json").read_text())
    assert found["checked"] == {"images": "32 drawn images", "1 - cosine": pytest.approx(0, abs=1e-9)}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "export_L2"),
        (["--embedding", "pooled"], "export_L2_pooled"),
    ],
)
def test_where_an_export_goes(small_pooled_run, tiny_data, monkeypatch, options, name):
    targets = []

    def stop(target: Path, checksum: str):
        targets.append(target)
        raise RunError("here")

    monkeypatch.setattr(export, "new_export", stop)
    assert export.main([str(small_pooled_run), "--data_path", str(tiny_data), *options]) == 1
    assert targets == [small_pooled_run.resolve() / name]


# ------------------------------------------------------------------------------------------------ what is refused


def test_what_onnxruntime_refuses_is_one_line(exported, tmp_path):
    """Images of another size; weights that are not there."""
    with pytest.raises(RunError, match=r"^onnxruntime cannot run the graph \(InvalidArgument: .*Got: 16 Expected: 32"):
        open_graph(exported, 1)(np.zeros((1, 16, 16, 3), np.uint8))
    shutil.copy(exported / "model.onnx", tmp_path)
    with pytest.raises(RunError, match=r"^onnxruntime cannot run the graph \(Fail: .*External data"):
        open_graph(tmp_path, 1)


def test_another_model_is_not_replaced(exported, small_run, tiny_data, capsys):
    """And nothing is computed for it."""
    before = sha256(exported / "model.json")
    arguments = [small_run, "--num_members", "1", "--output", exported, "--data_path", tiny_data]
    message = f"{exported} has the export of another model ({small_run.name}, 2 members, logits): delete it"
    assert message in refused(capsys, export, *arguments)
    assert sha256(exported / "model.json") == before


def test_bad_input_is_refused_in_one_line(small_run, tiny_data, tmp_path, capsys):
    """--check_recall needs the cache of the training, and the saved embedding."""
    recall = ["--check_recall", "--output", tmp_path / "model", "--data_path"]
    assert "is not a run folder" in refused(capsys, export, tmp_path)
    assert "member 3 is missing" in refused(capsys, export, small_run, "--num_members", "3")
    assert "no such folder" in refused(capsys, export, small_run, *recall, tmp_path)
    line = refused(capsys, export, small_run, *recall, tiny_data, "--embedding", "pooled")
    assert "the pooled embedding of member 1 is missing" in line
    shutil.copytree(tiny_data, tmp_path / "data", copy_function=os.link)  # records are replaced, not written over
    edit_record(tmp_path / "data" / "tiny" / "cache_32" / "meta.json", "mean", value=[0.5, 0.5, 0.5])
    line = refused(capsys, export, small_run, *recall, tmp_path / "data")
    assert "cache_32 is not the cache of this run" in line
    assert not (tmp_path / "model").exists()


def test_without_the_packages_one_line_says_so(small_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert refused(capsys, export, small_run) == "export.py: an export needs: pip install onnxscript\n"


def test_a_model_that_finds_other_neighbours_is_refused(capsys):
    """R@1 by hand: two queries may be apart; only queries count. Images are numbers; one-hot rows find each other."""
    labels, every = torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.ones(7, dtype=torch.bool)
    right, images = torch.eye(3)[labels], np.arange(7)[:, None, None, None]

    def compared(changes: dict[int, list[float]], is_query: torch.Tensor) -> dict[str, float]:
        rows = right.clone()
        for image, row in changes.items():
            rows[image] = torch.tensor(row)
        split = TestSplit(labels, is_query, every)
        return export.compare_recall(lambda batch: rows[batch.ravel()].numpy(), images, right, split)

    assert compared({}, every) == {"R@1": 100, "R@1 of the run": 100, "queries": 7}
    wrong = {0: [0.0, 0.6, 0.8], 3: [0.6, 0.0, 0.8]}  # nearer to the other class, whose images still find their own
    assert compared(wrong, every)["R@1"] == 71.4286
    assert "R@1 71.43, of the run 100.00: 2 of 7 queries apart" in capsys.readouterr().out
    assert compared(wrong, torch.arange(7) != 3) == {"R@1": 83.3333, "R@1 of the run": 100, "queries": 6}
    with pytest.raises(RunError, match=r"^--check_recall: R@1 57.14, of the run 100.00: 3 of 7 queries apart, and 2"):
        compared(wrong | {4: [0.6, 0.0, -0.8]}, every)
