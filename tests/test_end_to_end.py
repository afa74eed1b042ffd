"""The scripts as people run them, one after the other. Most are forked, see processes.py; data_utils.py is not."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from builders import TINY, save_image, write_cub, write_sop
from processes import ROOT
from reference import slow_recall

import evaluate
import retrieve
import train
from dreml.files import read_record


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python in a folder."""
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)


def test_from_raw_folders_to_neighbours(processes, tmp_path):
    """Raw cub and sop are cached; two members are trained on cub, scored and searched. The files fit each other."""
    write_cub(tmp_path / "data" / "cub" / "CUB_200_2011")
    write_sop(tmp_path / "data" / "sop")
    done = python(tmp_path, "-X", "importtime", str(ROOT / "data_utils.py"), "--image_size", "32")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\ncub +2 classes 4 images +2 classes 4 images .*\nsop +2 classes 4 images", done.stdout)
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "PIL.Image" in imported and "torch" not in imported  # it takes seconds

    options = "--image_size 32 --weights none --meta_class_size 2 --num_epochs 2 --ensemble_size 2 --recalls 1,2"
    command = ["train.py", "--data_name", "cub", "--device", "cpu", *options.split()]
    trained = processes.run(*command, folder=tmp_path)
    (folder,) = (path for path in (tmp_path / "results").iterdir() if path.is_dir())
    assert folder.name == "cub_resnet18_D2_e2_s0_i32_wnone"
    line = r"2 members: R@1 [\d.]+, R@2 [\d.]+, mAP@R [\d.]+ \(4 numbers an image\) in results/cub_\w+/recall\.csv"
    assert re.fullmatch(line, trained.out.splitlines()[-1])
    members = [np.load(folder / f"member_00{member}.npy") for member in (1, 2)]
    assert [embedding.shape for embedding in members] == [(4, 2)] * 2
    log, test = pd.read_csv(folder / "recall.csv"), pd.read_csv(folder / "test.csv")
    expected = 100 * slow_recall(members, test.label.to_numpy(), [1, 2])
    assert list(log.columns) == ["ensemble_size", "R@1", "R@2"] and log.ensemble_size.tolist() == [1, 2]
    np.testing.assert_allclose(log.iloc[:, 1:], expected, atol=5e-5)
    assert len(pd.read_csv(folder / "train.csv")) == 4

    assert "2 of 2 members finished" in processes.run(*command, folder=tmp_path).out

    run = folder.relative_to(tmp_path)
    processes.run("evaluate.py", run, "--recalls", "1,2", folder=tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "evaluation.csv")[list(log.columns)], log)
    found = processes.run("retrieve.py", run, "--query", "test:0", "--top", "1", folder=tmp_path)
    unit = np.hstack([embedding / np.linalg.norm(embedding, axis=1, keepdims=True) for embedding in members])
    assert test.path[1 + np.argmax(unit[1:] @ unit[0])] in found.out
    assert (folder / "retrieval" / "neighbours.png").stat().st_size > 0


def test_a_run_taken_elsewhere(small_run, tiny_data, tmp_path, monkeypatch, capsys):
    """Under another name, without the data; then with them in data/. Pictures alone need them."""
    home, folder = tmp_path / "home", tmp_path / "elsewhere"
    shutil.copytree(small_run, home / "results" / small_run.name)
    shutil.copytree(tiny_data / "tiny" / "cache_32", home / "data" / "tiny" / "cache_32")
    monkeypatch.chdir(home)
    assert train.main([*TINY, "--embedding", "pooled"]) == 0  # writes down where the data are; nothing is trained
    options = read_record(home / "results" / small_run.name / "args.json")["options"]
    assert (options["data_path"], options["results_path"]) == (str(home / "data"), str(home / "results"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "tiny").mkdir(parents=True)  # another one
    search = ["--query", "test:3", "--top", "2"]
    assert retrieve.main([f"home/results/{small_run.name}", *search]) == 0  # from any folder
    (home / "results" / small_run.name / "retrieval" / "neighbours.png").unlink()

    folder.mkdir()
    (home / "results" / small_run.name).rename(folder / "my cars")
    shutil.rmtree(home)
    monkeypatch.chdir(folder)
    save_image(Path("photo.jpg"))
    assert evaluate.main(["my cars", "--recalls", "1,2", "--plot"]) == 0
    assert evaluate.main(["my cars", "--recalls", "1,2", "--embedding", "pooled", "--output", "pooled"]) == 0
    capsys.readouterr()
    for what in (search, ["--worst", "2", "--top", "2"], ["--query", "photo.jpg", "test:3", "--export", "--top", "2"]):
        assert retrieve.main(["my cars", *what]) == 0
        output = capsys.readouterr()
        assert output.out.splitlines()[-1] == "no picture: the images of tiny are not in data/ (see --data_path)"
        assert output.err == ""
    assert not list(Path("my cars", "retrieval").glob("*.png"))
    assert len(pd.read_csv("my cars/retrieval/neighbours.csv")) == 4
    assert np.load("my cars/retrieval/embedding.npy").shape == (36, 6)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    code, number = re.subn(r'"results/\w+[^"]*"', '"my cars"', code)
    names = {}
    exec(code, names)
    assert number == 2 and names["embedding"].shape == (1, 6)
    np.testing.assert_allclose((names["embedding"] ** 2).sum().item(), 1, rtol=1e-5)

    assert retrieve.main(["my cars", *search, "--data_path", "nowhere"]) == 2  # pictures from there were asked for
    shutil.copytree(tiny_data / "tiny" / "cache_32", folder / "data" / "tiny" / "cache_32")
    assert retrieve.main(["my cars", *search]) == 0
    assert Path("my cars/retrieval/neighbours.png").exists()


def test_refusals_are_one_line_and_exit_code_2(processes, tmp_path):
    refused = processes.run("evaluate.py", "nowhere", folder=tmp_path, code=2)
    assert refused.out == "" and "nowhere is not a run folder" in refused.err and refused.err.count("\n") == 1
    refused = python(tmp_path, str(ROOT / "data_utils.py"), "--image_size", "big")
    assert refused.returncode == 2 and refused.stdout == ""
    assert "invalid int value: 'big'" in refused.stderr and refused.stderr.count("\n") == 1
