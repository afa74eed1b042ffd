"""The scripts as people run them, and the README's own commands and code."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import save_image, write_cub, write_sop
from test_utils import slow_recall

import data_utils
import evaluate
import retrieve
import train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"data_utils": data_utils, "train": train, "evaluate": evaluate, "retrieve": retrieve}


def call(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == code, done.stderr
    return done


def test_from_raw_folders_to_the_recall_log(tmp_path):
    """Raw cub and sop in data/, both cached; two members on cub; the log agrees with the files it comes from."""
    write_cub(tmp_path / "data" / "cub" / "CUB_200_2011")
    write_sop(tmp_path / "data" / "sop")
    done = call(tmp_path, "data_utils.py", "--image_size", "32")
    assert re.search(r"\ncub +2 classes 4 images +2 classes 4 images .*\nsop +2 classes 4 images", done.stdout)

    options = "--image_size 32 --weights none --meta_class_size 2 --num_epochs 2 --ensemble_size 2 --recalls 1,2"
    done = call(tmp_path, "train.py", "--data_name", "cub", "--device", "cpu", *options.split())
    (folder,) = (path for path in (tmp_path / "results").iterdir() if path.is_dir())
    assert folder.name == "cub_resnet18_D2_e2_s0_i32_wnone"
    assert re.fullmatch(
        r"2 members: R@1 [\d.]+, R@2 [\d.]+ in results/cub_\w+/recall\.csv", done.stdout.splitlines()[-1]
    )
    parts = [np.load(folder / f"member_00{member}.npy") for member in (1, 2)]
    assert [part.shape for part in parts] == [(4, 2)] * 2
    log = pd.read_csv(folder / "recall.csv")
    expected = 100 * slow_recall(parts, pd.read_csv(folder / "test.csv").label.to_numpy(), [1, 2])
    assert list(log.columns) == ["ensemble_size", "R@1", "R@2"] and log.ensemble_size.tolist() == [1, 2]
    np.testing.assert_allclose(log.iloc[:, 1:], expected, atol=5e-5)
    assert len(pd.read_csv(folder / "train.csv")) == 4

    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("member_*")}
    done = call(tmp_path, "train.py", "--data_name", "cub", "--device", "cpu", *options.split())
    assert "2 of 2 members are finished" in done.stdout
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("member_*")} == before


def test_refusals_are_one_line_and_exit_code_2(tmp_path):
    for arguments, message in (
        (
            ["train.py"],
            "then: python data_utils.py --data_name car; to try it without one: python data_utils.py --data_name demo",
        ),
        (["data_utils.py", "--image_size", "big"], "'big' is not a positive integer"),
    ):
        done = call(tmp_path, *arguments, code=2)
        assert message in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.fixture
def help_texts(tmp_path, monkeypatch, capsys) -> dict[str, str]:
    """What `python SCRIPT.py --help` prints on a terminal of 80 columns, without any data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    texts = {}
    for name, script in SCRIPTS.items():
        with pytest.raises(SystemExit, match="0"):
            script.main(["--help"])
        texts[name] = capsys.readouterr().out
    return texts


def test_help_fits_a_screen(help_texts):
    for text in help_texts.values():
        assert 10 < text.count("\n") <= 50 and max(map(len, text.splitlines())) <= 120


# ------------------------------------------------------------------------------------------------ README


def test_every_command_of_the_readme_is_accepted():
    """Option names and values; the demo and the benchmark commands are too long to run here."""
    commands = re.findall(r"python (data_utils|train|evaluate|retrieve)\.py( [^\n&|`#]*)?", README)
    assert "@@" not in README
    assert SCRIPTS.keys() == {script for script, _ in commands} and len(commands) >= 7
    for script, options in commands:
        SCRIPTS[script].parse_args(shlex.split(options))


def test_every_option_stands_in_the_readme(help_texts):
    for text in help_texts.values():
        options = set(re.findall(r"^  (--\w+)", text, re.MULTILINE))
        assert len(options) >= 6
        assert not [option for option in options if f"`{option}" not in README]


def test_the_python_of_the_readme(tiny_run, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    save_image(tmp_path / "photo.jpg")
    code = re.sub(r'"results/\w+[^"]*"', repr(str(tiny_run)), code).replace(
        '"photo.jpg"', repr(str(tmp_path / "photo.jpg"))
    )
    names = {}
    exec(code, names)
    assert names["embedding"].shape == (1, 6)
    np.testing.assert_allclose((names["embedding"] ** 2).sum().item(), 2, rtol=1e-5)
