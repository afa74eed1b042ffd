"""dreml/runs.py: records, finished and damaged members, reading a run."""

import csv
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from builders import (
    CLASS_NAMES,
    LABELS,
    copy_run,
    digests,
    edit_record,
    random_embeddings,
    train_tiny,
    write_run,
)

import evaluate
import train
from dreml import files
from dreml.cli import InputError
from dreml.files import json_sha256, read_record, take_lock, write_record
from dreml.runs import (
    TEST_COLUMNS,
    WEIGHTS,
    MemberRecord,
    Members,
    read_run,
    read_run_record,
    read_test,
    run_lock,
)
from dreml.settings import Settings
from model import load_ensemble

CPU = torch.device("cpu")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def members_of(folder: Path, settings_hash: str | None = None) -> Members:
    return Members(folder, settings_hash or read_run_record(folder).settings_hash)


# ------------------------------------------------------------------------------------------------ records


def test_what_is_no_run_is_not_opened(tiny_run, tmp_path):
    def refused(message: str, folder: Path = tmp_path) -> None:
        with pytest.raises(InputError, match=message) as error:
            read_run(folder)
        assert "\n" not in str(error.value)

    refused("is not a run folder: it has no args.json$")
    refused("is not a run folder", tmp_path / ("long" * 100))
    path = tmp_path / "args.json"
    for content in ("{}", "[]", "", (tiny_run / "args.json").read_text()[:-9]):
        path.write_text(content)
        refused(r"args.json is damaged \(.*\): remove it, and train.py makes it again$")
    shutil.copy(tiny_run / "args.json", path)
    refused("has no finished member: train it on")


def test_a_run_of_another_format_is_refused(tiny_run, tiny_data, tmp_path, capsys, no_training):
    """Members of two formats never share a folder. Nothing is written; nothing reads it."""
    folder = copy_run(tiny_run, tmp_path / tiny_run.name)
    record = read_record(folder / "args.json") | {"format": 2}
    del record["settings"]["optimizer"]  # and whatever else an older one lacks
    write_record(folder / "args.json", record)
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    assert train_tiny(tiny_data, tmp_path, "--ensemble_size", "3") == 2
    message = capsys.readouterr().err
    assert "is of format 2, and this version of the program reads format 3: train it again under" in message
    for read in (read_run, load_ensemble):
        with pytest.raises(InputError) as error:
            read(folder)
        assert message == f"train.py: {error.value}\n"
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]} == before


def test_runs_from_before_a_setting_go_on(small_run, tiny_data, tmp_path, capsys, no_training):
    """Their args.json lacks it and so has its default, and their members belong to it; another value is another run."""
    folder = copy_run(small_run, tmp_path / small_run.name)
    record, settings = read_run_record(folder), read_record(folder / "args.json")["settings"]
    later = {name: settings.pop(name) for name in ("optimizer", "resize", "backbone", "seed", "flip", "scale_min")}
    assert later == {name: getattr(Settings(), name) for name in later}
    edit_record(folder / "args.json", "settings", value=settings)
    assert read_run_record(folder) == record and load_ensemble(folder).image_spec.resize == "crop"
    assert train_tiny(tiny_data, tmp_path) == 0
    assert capsys.readouterr().err == "" and digests(folder, "recall.csv") == digests(small_run, "recall.csv")
    assert read_record(folder / "member_001.json", MemberRecord).settings_hash == record.settings_hash
    given = {"data_name": "tiny", "meta_class_size": 3, "num_epochs": 2, "image_size": 32, "batch_size": 16}
    given |= {"lr": 1e-3, "weights": "none", "precision": "fp32"}  # all that was not at its default when it was begun
    assert json_sha256({"settings": given, "fingerprint": record.data.fingerprint}) == record.settings_hash
    other = replace(record, settings=replace(record.settings, optimizer="sgd"))
    assert other.settings_hash != record.settings_hash


# ------------------------------------------------------------------------------------------------ members


def test_the_next_missing_member_is_locked(small_pooled_run, tmp_path):
    """One that another process makes, or has made in the meantime, is passed over; its lock is free again."""
    folder = copy_run(small_pooled_run, tmp_path / "run")
    (folder / "member_002.json").rename(tmp_path / "member_002.json")
    members = members_of(folder)
    members.refresh()
    with take_lock(folder / ".member_003.lock"):
        member, lock = members.lock_next_missing([1, 3, 2], "logits")
        with lock:
            assert member == 2 and take_lock(folder / ".member_002.lock", timeout=0) is None
            assert members.lock_next_missing([2, 3], "logits") is None
    (tmp_path / "member_002.json").rename(folder / "member_002.json")
    member, lock = members.lock_next_missing([1, 2, 3], "logits")
    with lock:
        assert member == 3 and sorted(members.records) == [1, 2]
    for path in folder.glob(".member_*.lock"):
        with take_lock(path, timeout=0):
            pass
    assert members.lock_next_missing([1, 2], "logits") is members.lock_next_missing([1, 2], "pooled") is None
    assert members.pooled == {1, 2}


@pytest.mark.parametrize("change", [{"member": 1}, {"settings_hash": "another run"}])
def test_a_member_of_another_run_or_number_is_not_taken(small_run, tmp_path, capsys, change):
    folder = copy_run(small_run, tmp_path / "run")
    record = read_record(folder / "member_002.json", MemberRecord)
    write_record(folder / "member_002.json", replace(record, **change))
    members = members_of(folder)
    members.refresh()
    assert list(members.records) == [1] and "from another run or member" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [WEIGHTS, "json", "npy"])
def test_a_damaged_member_is_named_once_and_trained_again(tiny_data, small_run, tmp_path, capsys, suffix):
    folder = copy_run(small_run, tmp_path / small_run.name)
    path = folder / f"member_001.{suffix}"
    truncate(path)
    assert train_tiny(tiny_data, tmp_path) == 0
    output = capsys.readouterr()
    assert output.err.count(f"warning: member 1 is damaged ({path.name}") == 1
    assert "1 of 2 members finished" in output.out
    for pattern in ("member_*.npy", "recall.csv"):
        assert digests(folder, pattern) == digests(small_run, pattern)


# ------------------------------------------------------------------------------------------------ pooled features


def change_record(**entries):
    return lambda path: write_record(path, read_record(path) | entries)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pooled_001.npy", Path.unlink, "No such file"),
        ("pooled_001.json", truncate, "JSONDecodeError"),
        ("pooled_001.json", change_record(weights="0" * 64), "another run, member, weights or .npy"),
        ("pooled_001.json", Path.unlink, None),
    ],
)
def test_bad_pooled_files_are_named_and_made_again(
    small_pooled_run, tiny_data, tmp_path, capsys, no_training, name, change, message
):
    """Whoever scores logits does not look at them."""
    folder = copy_run(small_pooled_run, tmp_path / small_pooled_run.name)
    change(folder / name)
    assert train_tiny(tiny_data, tmp_path) == 0 and capsys.readouterr().err == ""
    assert train_tiny(tiny_data, tmp_path, "--embedding", "pooled") == 0
    output = capsys.readouterr()
    if message:
        assert "warning: pooled_001.json is damaged (" in output.err and message in output.err
        assert output.err.count("\n") == 1
    else:
        assert output.err == ""
    assert re.search(r"^member 1/2: pooled features, [\d.]+ s$", output.out, re.MULTILINE)
    for pattern in ("member_*", "pooled_*", "*.csv"):
        assert digests(folder, pattern) == digests(small_pooled_run, pattern)


# ------------------------------------------------------------------------------------------------ embeddings


def test_embeddings_that_do_not_fit_on_the_device_are_scored_on_the_cpu(small_pooled_run, capsys, monkeypatch):
    def full(array, device):
        raise RuntimeError("MPS backend out of memory")

    monkeypatch.setattr(torch.Tensor, "to", full)
    arrays = read_run(small_pooled_run).embeddings("logits", torch.device("mps"))
    assert capsys.readouterr().err == "warning: the embeddings do not fit on mps: they are scored on the CPU\n"
    assert np.array_equal(arrays[1], np.load(small_pooled_run / "member_002.npy"))


# ------------------------------------------------------------------------------------------------ a run


def test_a_run_is_read_up_to_the_first_member_that_is_missing(tiny_run, tmp_path):
    """Its members, the images that they embedded, and by what they are scored. Nothing is written."""
    is_query, is_gallery = np.arange(len(LABELS)) % 3 > 0, np.arange(len(LABELS)) % 4 > 0
    saved = random_embeddings(0, 4)
    folder = write_run(tmp_path / "run", tiny_run, saved, LABELS, is_query, is_gallery, lr=0.5)
    (folder / "member_003.json").unlink()
    run = read_run(folder)
    assert (run.folder, run.num_members, run.settings.lr) == (folder, 2, 0.5)
    assert run.settings == run.record.settings and sorted(run.members.records) == [1, 2, 4]
    assert run.test.class_name.tolist() == CLASS_NAMES[LABELS].tolist() and run.test.path[11] == "11.png"
    for found, expected in zip(run.split, (LABELS, is_query, is_gallery), strict=True):
        assert found.tolist() == expected.tolist()
    assert [tensor.dtype for tensor in run.split] == [torch.int64, torch.bool, torch.bool]
    for number, size in ((None, 2), (2, 2), (1, 1)):
        found = read_run(folder, number).embeddings("logits", CPU)
        assert len(found) == size
        assert all(np.array_equal(*pair) for pair in zip(found, saved[:size], strict=True))
    with pytest.raises(InputError, match=r"member 3 of 4 is missing; train\.py makes it$"):
        read_run(folder, 4)
    (folder / "member_001.json").unlink()
    with pytest.raises(InputError, match=r"member 1 of 1 is missing; train\.py makes it$"):
        read_run(folder)


def test_a_missing_embedding_names_the_command_that_makes_it(tiny_data, small_run, tmp_path):
    """The one that trained the run, as a whole: it works."""
    results = tmp_path / "my results"
    folder = copy_run(small_run, results / small_run.name)
    assert train_tiny(tiny_data, results, "--members", "2") == 0
    read_run(folder).require("logits")
    with pytest.raises(InputError, match=r"the pooled embedding of member 1 is missing; make it from the") as error:
        read_run(folder).require("pooled")
    script, *command = shlex.split(str(error.value).partition("saved member with: python ")[2])
    assert script == "train.py" and "--batch_size" in command and train.main(command) == 0
    read_run(folder).require("pooled")
    assert evaluate.main([str(folder), "--embedding", "pooled", "--recalls", "1"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table[:-1], r"test.csv has 11 images, the embeddings 12$"),
        (lambda table: table.drop(columns="class_name"), r"test.csv is missing or damaged \(.*\); train.py writes it"),
        (lambda table: table.assign(label="x"), r"test.csv is missing or damaged \(.*\); train.py writes it again$"),
    ],
)
def test_the_list_of_test_images_has_to_fit(tiny_run, tmp_path, change, message):
    folder = write_run(tmp_path / "run", tiny_run, random_embeddings(0))
    change(pd.read_csv(folder / "test.csv")).to_csv(folder / "test.csv", index=False)
    with pytest.raises(InputError, match=message):
        read_run(folder).embeddings("logits", CPU)


def test_a_process_that_waits_for_another_says_so(tmp_path, capsys, monkeypatch):
    timeouts, locks = [], iter([None, "held"])
    monkeypatch.setattr(files, "take_lock", lambda path, timeout=-1: timeouts.append(timeout) or next(locks))
    assert run_lock(tmp_path / "run") == "held" and timeouts == [2, -1]
    assert capsys.readouterr().out == f"{tmp_path / 'run'}: waiting for another process\n"


def test_every_name_comes_back_from_test_csv(tiny_run, tmp_path):
    """Also one with a carriage return, which pandas takes for the end of a line unless told otherwise."""
    names = ["a\rb", "a\r\nb", 'a"b', "a,b", "NA", "", "ä 猫", "\ufeffa"]
    with open(tmp_path / "test.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(TEST_COLUMNS)
        table.writerows([f"{number}.png", number, True, True, name] for number, name in enumerate(names))
    assert read_test(tmp_path).class_name.tolist() == names
