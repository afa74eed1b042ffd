"""dreml/runs/student.py: settings and tags, finding and reading a student, what it keeps. test_distill.py makes one."""

import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from builders import STUDENT_TAG, edit_record, flip_a_bit

from dreml.console import InputError, Parser
from dreml.files import read_record
from dreml.index import model_checksum
from dreml.runs.folder import read_run, read_run_record
from dreml.runs.settings import Settings, add_settings, settings_of
from dreml.runs.student import (
    StudentRecord,
    StudentSettings,
    complete_settings,
    find_student,
    kept_text,
    read_student,
    read_student_run,
)

OF_RUN = Settings(precision="bf16")
SETTINGS = StudentSettings("resnet18", 8, weights="member1", precision="bf16")
OTHERS = {
    **{"backbone": "timm:vit_tiny", "num_members": 4, "num_epochs": 7, "seed": 3, "dim": 64, "batch_size": 16},
    **{"lr": 0.01, "weights": "imagenet:x", "precision": "fp32", "photos": "abcdef0123"},
}


def parse(*options: str) -> StudentSettings:
    parser = Parser(prog="test")
    add_settings(parser.add_argument_group("the student"), StudentSettings)
    return settings_of(parser.parse_args(options), StudentSettings)


# ------------------------------------------------------------------------------------------------ settings


def test_every_setting_makes_another_student():
    """Another folder, and another owner of its progress."""
    assert OTHERS.keys() == {field.name for field in fields(StudentSettings)}
    every = [SETTINGS, *(replace(SETTINGS, **{name: value}) for name, value in OTHERS.items())]
    assert len({each.tag(OF_RUN) for each in every}) == len(every)
    assert len({StudentRecord("run", [], each, {}, [], {}, {}).owner for each in every}) == len(every)
    owners = {StudentRecord(run, teachers, SETTINGS, {}, [], {}, {}).owner for run in "ab" for teachers in ([], ["x"])}
    assert len(owners) == 4
    assert SETTINGS.tag(OF_RUN) == "resnet18_L8_e36_s0"
    tag = replace(SETTINGS, **OTHERS).tag(OF_RUN)
    assert tag == "timm-vit_tiny_L4_e7_s3_d64_b16_lr0.01_wimagenet_fp32_photosabcdef01"


def test_the_options_are_the_settings():
    assert parse() == StudentSettings() == StudentSettings(num_epochs=36, batch_size=32, lr=1e-3)
    options = "--backbone b --num_members 4 --num_epochs 7 --seed 3 --dim 64 --batch_size 16 --lr 0.01 --weights none"
    given = StudentSettings("b", 4, 7, 3, 64, 16, 0.01, "none", "fp32")
    assert parse(*options.split(), "--precision", "fp32") == given
    assert parse("--dim", "0").dim == 0
    with pytest.raises(InputError):
        parse("--photos", "x")
    with pytest.raises(ValueError, match="dim is '3', not a int"):
        StudentSettings(dim="3")


def test_the_output_has_a_block_for_each_member_or_the_width_asked_for():
    of_run = Settings(meta_class_size=34)
    assert (SETTINGS.width(of_run), SETTINGS.num_blocks) == (8 * 34, 8)
    other = replace(SETTINGS, dim=100)
    assert (other.width(of_run), other.num_blocks) == (100, 1)


def test_what_is_not_said_is_as_in_the_run(small_run, tmp_path):
    run = read_run(small_run)
    found = complete_settings(StudentSettings(), run)
    assert found == StudentSettings("resnet18", 2, weights="member1", precision="fp32")
    assert complete_settings(StudentSettings("resnet34"), run).weights.startswith("imagenet:resnet34-")
    assert complete_settings(StudentSettings(weights="none", precision="bf16"), run).weights == "none"
    torch.save({}, tmp_path / "w.pth")
    tagged = complete_settings(StudentSettings(weights=str(tmp_path / "w.pth")), run)
    assert tagged.weights.startswith("sha256:") and f"_w{tagged.weights[7:15]}" in tagged.tag(run.settings)


# ------------------------------------------------------------------------------------------------ finding and reading


def test_students_are_found_by_their_tags(small_student, tmp_path):
    run = Path(shutil.copytree(small_student, tmp_path / "a run"))
    folder = run / f"student_{STUDENT_TAG}"
    (run / "student_unfinished").mkdir()
    assert find_student(run) == find_student(run, STUDENT_TAG) == folder
    with pytest.raises(InputError, match=f"has no student 'x': give one of {STUDENT_TAG}$"):
        find_student(run, "x")
    shutil.copytree(folder, run / "student_b")
    assert find_student(run, "b") == run / "student_b"
    with pytest.raises(InputError, match=f"has several students: give one of b, {STUDENT_TAG}$"):
        find_student(run)
    for name in ("student_b", folder.name):
        shutil.rmtree(run / name)
    with pytest.raises(InputError, match=r"has no student; to make one: python distill.py '.*/a run'$"):
        find_student(run)


@pytest.mark.parametrize("name", ["student.json", "logits.npy", "weights.pth"])
def test_damaged_students_are_refused(small_student, tmp_path, name):
    run = Path(shutil.copytree(small_student, tmp_path / "run"))
    flip_a_bit(run / f"student_{STUDENT_TAG}" / name)
    message = r"student_\w+ is damaged \(ValueError: .*\); distill.py makes it again$"
    with pytest.raises(InputError, match=message):
        read_student(run, read_run_record(run), "", ["logits.npy", "weights.pth"])
    if name != "weights.pth":  # which the saved embeddings do without
        with pytest.raises(InputError, match=message):
            read_student_run(run)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["run"], "another"),
        (["settings", "dim"], "3"),
        (["settings", "precision"], "fp8"),
        (["settings", "colour"], 1),
        (["history"], [{"epoch": 0}]),
        (["sha256"], 3),
    ],
)
def test_records_of_others_are_refused(small_student, tmp_path, keys, value):
    run = Path(shutil.copytree(small_student, tmp_path / "run"))
    edit_record(run / f"student_{STUDENT_TAG}" / "student.json", *keys, value=value)
    with pytest.raises(InputError, match="is damaged"):
        read_student_run(run)


def test_a_student_stands_in_for_its_members(small_student, tmp_path):
    """One network with the test split of the run; neither members nor weights are needed."""
    run = Path(shutil.copytree(small_student, tmp_path / "run"))
    for path in [*run.glob("member_*"), *run.glob("pooled_*"), *run.glob("*/weights.pth")]:
        path.unlink()
    student, folder = read_student_run(run), run / f"student_{STUDENT_TAG}"
    assert (student.folder, student.run_folder, student.tag, student.num_members) == (folder, run, STUDENT_TAG, 1)
    assert student.name == f"run_student_{STUDENT_TAG}" and len(student.test) == 36
    record = read_record(folder / "student.json", StudentRecord)
    assert student.weights == [record.sha256["weights.pth"]]
    checksums = {
        model_checksum(run, name) for run in (student, read_run(small_student)) for name in ("logits", "pooled")
    }
    assert len(checksums) == 4
    for name in student.saved_embeddings():
        student.require(name)
        (rows,) = student.embeddings(name, torch.device("cpu"))
        np.testing.assert_array_equal(rows, np.load(folder / f"{name}.npy"))
    pd.read_csv(run / "test.csv")[1:].to_csv(run / "test.csv", index=False)
    with pytest.raises(InputError, match=r"test.csv has 35 images, the embeddings 36$"):
        read_student_run(run).embeddings("logits", torch.device("cpu"))


def test_students_that_differ_in_the_seed_are_one_experiment(small_student):
    student = read_student_run(small_student)
    other = replace(student, student=replace(student.student, settings=replace(student.student.settings, seed=5)))
    assert other.without_seed() == student.without_seed()
    other = replace(student, student=replace(student.student, settings=replace(student.student.settings, lr=0.5)))
    assert other.without_seed() != student.without_seed()


# ------------------------------------------------------------------------------------------------ what it keeps


def test_the_share_kept_is_of_all_members():
    rows = [("student", "logits", 1, 4, 30.0), ("student", "pooled", 1, 9, 45.0)]
    rows += [("ensemble", "logits", 1, 2, 20.0), ("ensemble", "logits", 2, 4, 60.0), ("ensemble", "pooled", 1, 9, 1.0)]
    rows += [("ensemble", "pooled", 2, 18, 90.0)]
    table = pd.DataFrame(rows, columns=["model", "embedding", "ensemble_size", "dimensions", "R@1"])
    lines = [
        "of the R@1 of 2 members' logits, the student keeps 50.0 % (logits) and 75.0 % (pooled)",
        "of the R@1 of 2 members' pooled features, the student keeps 33.3 % (logits) and 50.0 % (pooled)",
    ]
    assert kept_text(table) == "\n".join(lines) and kept_text(table[:4]) == lines[0]
